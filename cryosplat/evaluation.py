"""What the mixtures are worth: maps, FSC curves, resolutions, an example particle."""

from dataclasses import dataclass

import numpy as np
import scipy.fft
import torch

from cryosplat.calibration import Calibrated
from cryosplat.config import resolve_path
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, RESOLUTION_THRESHOLD_TRUTH
from cryosplat.dataset import Batch
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, Resolution, fsc, mean_fsc, resolution, shell_index
from cryosplat.linearmaps import LinearMaps
from cryosplat.masks import check_mask
from cryosplat.posterior import deliver
from cryosplat.reconstruction import FULL, Reconstruction
from cryosplat.settings import Config
from cryosplat.volumes import read_map

PIXEL_SIZE_TOLERANCE = 1e-3
"""Relative difference of A/px up to which two maps are on the same grid: MRC headers are single precision."""


@dataclass(frozen=True)
class Comparison:
    """Maps to compare with: a known truth (simulations) and a soft mask; both optional, (D, D, D)."""

    truth: np.ndarray | None
    mask: np.ndarray | None
    mask_name: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the mixtures have come to.

    Attributes:
        maps: (D, D, D) by file: "map", the delivered one; and of a run with halves "mixture", "linear", "half_a",
            "half_b" (linear, unregularised), "mixture_half_a", "mixture_half_b" and "mask".
        curves: FSC curves by column of fsc.csv.
        calibrated: of the delivered map; None without halves.
        mask_origin: where the mask comes from.
    """

    maps: dict[str, np.ndarray]
    curves: dict[str, FscCurve]
    calibrated: Calibrated | None = None
    mask_origin: str | None = None

    @property
    def naive(self) -> Resolution | None:
        """Half-map FSC of the mixtures at 0.143. It says too much: both halves share the model's bias."""
        curve = self.curves.get("half_maps")
        return None if curve is None else resolution(curve, RESOLUTION_THRESHOLD_HALF_MAPS)

    @property
    def linear(self) -> Resolution | None:
        """FSC of the linear half maps at 0.143, under the mask and not corrected for it."""
        curve = self.curves.get("linear_half_maps")
        return None if curve is None else resolution(curve, RESOLUTION_THRESHOLD_HALF_MAPS)

    @property
    def truth(self) -> Resolution | None:
        """FSC of the delivered map to the truth at 0.5."""
        curve = self.curves.get("truth")
        return None if curve is None else resolution(curve, RESOLUTION_THRESHOLD_TRUTH)

    def summary(self) -> dict[str, float | bool | str | None]:
        """The entries of summary.json that an evaluation knows."""
        found = self.calibrated.resolution if self.calibrated else None
        means = {f"fsc_{name}_mean": self.curves.get(name) for name in ("truth", "mixture_truth", "linear_truth")}
        return {
            "resolution_a": found.angstrom if found else None,
            "resolution_error_a": found.error_a if found else None,
            "resolution_at_nyquist": found.limited_by_nyquist if found else None,
            "resolution_at_limit_of_data": found.limited_by_data if found else None,
            "calibrated_to_a": self.calibrated.end_a if self.calibrated else None,
            "resolution_naive_a": self.naive.angstrom if self.naive else None,
            "resolution_naive_at_nyquist": self.naive.limited_by_nyquist if self.naive else None,
            "resolution_linear_a": self.linear.angstrom if self.linear else None,
            **{name: mean_fsc(curve) if curve else None for name, curve in means.items()},
            "resolution_truth_a": self.truth.angstrom if self.truth else None,
            "resolution_truth_at_nyquist": self.truth.limited_by_nyquist if self.truth else None,
            "mask": "mask.mrc" if "mask" in self.maps else None,
            "mask_origin": self.mask_origin,
        }

    def for_the_eye(self) -> np.ndarray:
        """The delivered map with every shell weighted by its calibrated FSC, for figures: noise left out."""
        if self.calibrated is None:
            return self.maps["map"]
        weights = np.clip(np.nan_to_num(self.calibrated.curve.fsc), 0, 1)
        weights[0] = 1
        spectrum = scipy.fft.rfftn(self.maps["map"])
        index = shell_index(len(self.maps["map"]))
        spectrum *= np.where(index < len(weights), weights[np.minimum(index, len(weights) - 1)], 0)
        return scipy.fft.irfftn(spectrum, self.maps["map"].shape)


def read_comparison(config: Config, box: int, pixel_size_a: float) -> Comparison:
    """The truth and the mask that the configuration names.

    Raises:
        InputError: another box or A/px than the run's, or not a mask.
    """
    volumes = {}
    for name in ("truth", "mask"):
        path = getattr(config.data, name)
        if not path:
            volumes[name] = None
            continue
        volume, volume_pixel_size = read_map(resolve_path(config, path))
        if len(volume) != box or abs(volume_pixel_size / pixel_size_a - 1) > PIXEL_SIZE_TOLERANCE:
            raise InputError(
                f"data.{name}={path}: {len(volume)} voxels at {volume_pixel_size:.5g} A, but the run's maps have "
                f"{box} at {pixel_size_a:.5g} A; resample it, or leave it out"
            )
        volumes[name] = volume
    if volumes["mask"] is not None:
        check_mask(volumes["mask"], f"data.mask={config.data.mask}")
    return Comparison(**volumes, mask_name=config.data.mask)


def evaluate(reconstruction: Reconstruction, comparison: Comparison, linear: LinearMaps | None) -> Evaluation:
    """Voxelise all models, put the delivered map together, and say what it is worth, all under one mask.

    Args:
        linear: of the run's half sets; None without halves, and then the mixture's map is delivered.
    """
    mixture = reconstruction.mixture
    volumes = mixture.voxelise(reconstruction.box).cpu().numpy()
    pixel_size_a, truth = reconstruction.pixel_size_a, comparison.truth
    if linear is None:
        curves = {} if truth is None else {"truth": fsc(volumes[FULL], truth, pixel_size_a, comparison.mask)}
        return Evaluation({"map": volumes[FULL]}, curves, mask_origin=comparison.mask_name)
    mixtures = (volumes[1], volumes[2])
    delivered = deliver(linear.halves, mixtures, linear.mask, linear.calibration.sums, volumes[FULL])
    maps = {
        "map": delivered.map,
        "mixture": volumes[FULL],
        "linear": delivered.linear,
        "half_a": linear.halves[0].map,
        "half_b": linear.halves[1].map,
        "mixture_half_a": mixtures[0],
        "mixture_half_b": mixtures[1],
        "mask": linear.mask,
    }
    calibrated = linear.calibration.of_both(*delivered.parts)
    curves = {"calibrated_map": calibrated.curve}
    for name, volume, half in zip(("calibrated_half_a", "calibrated_half_b"), mixtures, (0, 1), strict=True):
        curves[name] = linear.calibration.of_half(volume, half).curve
    curves["linear_half_maps"] = linear.curve
    curves["half_maps"] = fsc(*mixtures, pixel_size_a, linear.mask)
    if truth is not None:
        for name, file in (("truth", "map"), ("mixture_truth", "mixture"), ("linear_truth", "linear")):
            curves[name] = fsc(maps[file], truth, pixel_size_a, linear.mask)
    return Evaluation(maps, curves, calibrated, linear.mask_origin)


@torch.no_grad()
def particle_example(reconstruction: Reconstruction, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first particle of a batch, the full model's CTF-modulated projection, and their difference, each (D, D)."""

    def image(spectrum):
        return torch.fft.irfft2(spectrum, s=(reconstruction.box, reconstruction.box), norm="ortho").cpu().numpy()

    particle = image(batch.images[0])
    projection = image(reconstruction.predict(batch)[FULL, 0])
    return particle, projection, particle - projection
