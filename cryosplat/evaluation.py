"""What the mixtures are worth: maps, FSC curves, resolutions, an example particle."""

from dataclasses import dataclass

import numpy as np
import torch

from cryosplat.config import Config, resolve_path
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, RESOLUTION_THRESHOLD_TRUTH
from cryosplat.dataset import Batch
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, Resolution, check_mask, fsc, mean_fsc, resolution
from cryosplat.reconstruction import FULL, MODEL_NAMES, Reconstruction
from cryosplat.volumes import read_map

PIXEL_SIZE_TOLERANCE = 1e-3
"""Relative difference of A/px up to which two maps are on the same grid: MRC headers are single precision."""


@dataclass(frozen=True)
class Comparison:
    """Maps to compare with: a known truth (simulations) and a soft mask; both optional, (D, D, D)."""

    truth: np.ndarray | None
    mask: np.ndarray | None


@dataclass(frozen=True)
class Evaluation:
    """Maps by model, FSC curves ("half_maps", "truth") and their resolutions."""

    maps: dict[str, np.ndarray]
    curves: dict[str, FscCurve]

    @property
    def naive(self) -> Resolution | None:
        """Half-map FSC = 0.143. Of mixtures it says too much: both halves share the model's bias."""
        curve = self.curves.get("half_maps")
        return None if curve is None else resolution(curve, RESOLUTION_THRESHOLD_HALF_MAPS)

    @property
    def truth(self) -> Resolution | None:
        """FSC to the truth = 0.5."""
        curve = self.curves.get("truth")
        return None if curve is None else resolution(curve, RESOLUTION_THRESHOLD_TRUTH)

    def summary(self) -> dict[str, float | bool | None]:
        """The entries of summary.json that an evaluation knows."""
        truth = self.curves.get("truth")
        return {
            "resolution_a": None,  # awaits calibration: a mixture's half maps alone cannot tell it
            "resolution_naive_a": self.naive.angstrom if self.naive else None,
            "resolution_naive_at_nyquist": self.naive.limited_by_nyquist if self.naive else None,
            "fsc_truth_mean": mean_fsc(truth) if truth else None,
            "resolution_truth_a": self.truth.angstrom if self.truth else None,
            "resolution_truth_at_nyquist": self.truth.limited_by_nyquist if self.truth else None,
        }


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
    return Comparison(**volumes)


def evaluate(reconstruction: Reconstruction, comparison: Comparison) -> Evaluation:
    """Voxelise all models and compare them with each other and with the truth, under the run's mask."""
    mixture = reconstruction.mixture
    volumes = mixture.voxelise(reconstruction.box).cpu().numpy()
    maps = dict(zip(MODEL_NAMES, volumes, strict=False))
    pixel_size_a, mask = reconstruction.pixel_size_a, comparison.mask
    curves = {}
    if mixture.models > 1:
        curves["half_maps"] = fsc(maps["half_a"], maps["half_b"], pixel_size_a, mask)
    if comparison.truth is not None:
        curves["truth"] = fsc(maps["full"], comparison.truth, pixel_size_a, mask)
    return Evaluation(maps, curves)


@torch.no_grad()
def particle_example(reconstruction: Reconstruction, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first particle of a batch, the full model's CTF-modulated projection, and their difference, each (D, D)."""

    def image(spectrum):
        return torch.fft.irfft2(spectrum, s=(reconstruction.box, reconstruction.box), norm="ortho").cpu().numpy()

    particle = image(batch.images[0])
    projection = image(reconstruction.predict(batch)[FULL, 0])
    return particle, projection, particle - projection
