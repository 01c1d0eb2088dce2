"""All FSC curves of a pair of half maps: without mask, under masks, corrected for the mask; and what is odd in them."""

import dataclasses
import logging
from typing import Literal

import numpy as np
import scipy.fft

from cryosplat import fscchecks, masks
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, RESOLUTION_THRESHOLD_TRUTH, shell_to_angstrom
from cryosplat.directional import ANISOTROPIC_BELOW, DirectionalFsc, directional_fsc
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, Resolution, check_maps, correlation, masked_spectrum, resolution, shell_sums
from cryosplat.uncertainty import independent_voxels, standard_error

logger = logging.getLogger(__name__)

THRESHOLDS = (RESOLUTION_THRESHOLD_TRUTH, RESOLUTION_THRESHOLD_HALF_MAPS)

RANDOMISE_BELOW = 0.8
"""Phases are randomised from the first shell on whose unmasked FSC is below this, as relion_postprocess does."""

HAND_OVER_SHELLS = 2
"""Shells beyond that one from which the curve is corrected; before, it is the masked one: at the edge of the
randomised region the mask mixes phases that are random with phases that are not."""


@dataclasses.dataclass(frozen=True, eq=False)
class FscSuite:
    """What ``fsc_suite`` finds.

    Attributes:
        curves: by name, all with errors. "unmasked", "sphere" (a soft ball inscribed in the box) always; with a mask
            "masked", or "loose" and "tight" if the masks were made here; "phase_randomised" (if a shell was found to
            begin at) and "corrected".
        mask: (D, D, D) that the corrected and the directional curves are under; None if there is none.
        randomisation_shell: the first shell with randomised phases.
        directional: the conical FSC, if asked for.
        warnings: sentences.
    """

    curves: dict[str, FscCurve]
    mask: np.ndarray | None
    randomisation_shell: int | None
    directional: DirectionalFsc | None
    warnings: list[str]

    @property
    def final(self) -> str:
        """Name of the curve to quote: "corrected", or "unmasked" where there is no mask."""
        return "corrected" if "corrected" in self.curves else "unmasked"

    @property
    def resolutions(self) -> dict[str, dict[float, Resolution]]:
        """Resolution of every curve at 0.5 and 0.143, with errors."""
        return {name: {level: resolution(curve, level) for level in THRESHOLDS} for name, curve in self.curves.items()}

    @property
    def anisotropy(self) -> float | None:
        """``DirectionalFsc.anisotropy``: worst over best direction, 0 to 1."""
        return None if self.directional is None else self.directional.anisotropy

    @property
    def randomised_beyond_a(self) -> float | None:
        """Resolution of the first shell with randomised phases, A."""
        curve = self.curves["unmasked"]
        shell = self.randomisation_shell
        return None if shell is None else shell_to_angstrom(shell, curve.box, curve.pixel_size_a)


def fsc_suite(
    half_a: np.ndarray,
    half_b: np.ndarray,
    pixel_size_a: float,
    mask: np.ndarray | Literal["none"] | None = None,
    seed: int = 0,
    directions: bool = True,
    copies: int = 1,
) -> FscSuite:
    """Every curve of a pair of half maps.

    Args:
        half_a, half_b: (D, D, D), unmasked and unfiltered.
        pixel_size_a: A/px of both.
        mask: (D, D, D), 0 to 1; None: made from the sum of the maps ("tight" of ``masks``, "loose" for comparison);
            "none": no mask and no correction.
        seed: of the random phases.
        directions: conical FSC, too.
        copies: operators of the symmetry that both maps were made with; 1: none.

    Raises:
        InputError: maps of different boxes, not finite, or a mask that ``masks.check_mask`` refuses.
    """
    given = mask if isinstance(mask, np.ndarray) else None
    check_maps({"half map a": half_a, "half map b": half_b} | ({} if given is None else {"the mask": given}))
    half_a, half_b = np.asarray(half_a, dtype=np.float32), np.asarray(half_b, dtype=np.float32)
    used, warnings = _masks(half_a + half_b, pixel_size_a, mask)
    pair = _Pair(half_a, half_b, float(pixel_size_a), copies)
    curves = {"unmasked": pair.curve(), "sphere": pair.curve(masks.spherical_mask(len(half_a)))}
    curves |= {name: pair.curve(volume) for name, volume in used.items()}
    name, volume = next(reversed(used.items())) if used else (None, None)
    shell = None if name is None else randomisation_shell(curves["unmasked"])
    if shell is not None:
        curves["phase_randomised"] = pair.randomised(shell, volume, seed)
        curves["corrected"] = corrected(curves[name], curves["phase_randomised"], shell)
    elif name is not None:
        curves["corrected"] = curves[name]
        warnings.append("the unmasked FSC never falls below 0.8: nothing is corrected for the mask")
    directional = pair.directional(volume) if directions else None
    warnings += fscchecks.warnings(curves, np.array_equal(half_a, half_b), shell) + _anisotropic(directional)
    return FscSuite(curves, volume, shell, directional, warnings)


def _masks(
    total: np.ndarray, pixel_size_a: float, mask: np.ndarray | str | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Masks by name, the one to correct for last; and sentences about them."""
    if isinstance(mask, str):
        if mask != "none":
            raise InputError(f"mask={mask!r}: expected an array, None for one made here, or 'none'")
        return {}, []
    if mask is not None:
        warnings = []
        masks.check_mask(mask, warn=warnings.append)
        return {"masked": np.asarray(mask, dtype=np.float32)}, warnings
    try:
        made = masks.masks_from_map(total, pixel_size_a)
    except InputError as error:
        return {"masked": masks.spherical_mask(len(total))}, [f"{error}; a sphere is used instead"]
    return {name: made[name] for name in ("loose", "tight")}, []


def _anisotropic(directional: DirectionalFsc | None) -> list[str]:
    if directional is None or directional.anisotropy >= ANISOTROPIC_BELOW or directional.areas.max() <= 0:
        return []
    resolutions = directional.resolutions
    return [
        f"anisotropy {directional.anisotropy:.2f}: the map is far worse in some directions "
        f"({resolutions[directional.worst].angstrom:.1f} A) than in others "
        f"({resolutions[directional.best].angstrom:.1f} A); look at the viewing directions"
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair:
    """Two half maps (D, D, D), their A/px and how often each of their values is there by symmetry."""

    half_a: np.ndarray
    half_b: np.ndarray
    pixel_size_a: float
    copies: int

    def curve(self, mask: np.ndarray | None = None) -> FscCurve:
        """FSC under a mask, with errors."""
        spectra = [masked_spectrum(half, mask) for half in (self.half_a, self.half_b)]
        return self._with_errors(correlation(shell_sums(*spectra)), mask)

    def directional(self, mask: np.ndarray | None) -> DirectionalFsc:
        """Conical FSC under a mask."""
        spectra = (masked_spectrum(half, mask, np.float32) for half in (self.half_a, self.half_b))
        return directional_fsc(*spectra, self.pixel_size_a)

    def randomised(self, shell: int, mask: np.ndarray, seed: int) -> FscCurve:
        """FSC under a mask that was applied after the phases of both maps had been randomised from ``shell`` on.

        Its mean over all phases, not one draw. Phases drawn apart for the two maps have no product in the mean, so the
        cross term is that of the untouched low frequencies alone, as the mask spreads them; what is drawn serves for
        the power, which hardly depends on the draw. One draw (RELION) has the noise of two unrelated maps, too.
        """
        generator = np.random.default_rng(seed)
        low, drawn = zip(
            *(_split(masked_spectrum(half, dtype=np.float32), shell, generator) for half in (self.half_a, self.half_b)),
            strict=True,
        )
        cross, *low_powers = shell_sums(*(masked_spectrum(volume, mask, np.float32) for volume in low))
        _, *drawn_powers = shell_sums(*(masked_spectrum(volume, mask, np.float32) for volume in drawn))
        values = correlation(np.stack([cross, *np.add(low_powers, drawn_powers)]))
        independent = independent_voxels(len(mask), mask, self.copies)
        return FscCurve(values, len(mask), self.pixel_size_a, np.abs(values) / np.sqrt(independent))

    def _with_errors(self, values: np.ndarray, mask: np.ndarray | None) -> FscCurve:
        box = len(self.half_a)
        independent = independent_voxels(box, mask, self.copies)
        return FscCurve(values, box, self.pixel_size_a, standard_error(values, independent))


def randomisation_shell(unmasked: FscCurve) -> int | None:
    """The first shell whose unmasked FSC is below 0.8; None if there is none."""
    below = np.flatnonzero(unmasked.fsc[1:] < RANDOMISE_BELOW)
    return int(below[0]) + 1 if len(below) else None


def _split(spectrum: np.ndarray, shell: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The map within radius ``shell``, and one with the amplitudes of the rest and phases drawn anew: (D, D, D) each.

    Phases are those of white noise, so that they have the symmetry of a real map's. Radii are not rounded here: as in
    RELION, a voxel of shell ``shell`` that lies nearer than its number keeps its phase.
    """
    box = len(spectrum)
    phases = scipy.fft.rfftn(generator.standard_normal((box, box, box), dtype=np.float32))
    phases /= np.maximum(np.abs(phases), np.finfo(np.float32).tiny)
    squares = np.fft.fftfreq(box, 1 / box).astype(np.float32) ** 2
    beyond = squares[:, None, None] + squares[:, None] + squares[: box // 2 + 1] >= shell**2
    phases *= np.where(beyond, np.abs(spectrum), 0)
    low = np.where(beyond, 0, spectrum)
    return scipy.fft.irfftn(low, (box, box, box)), scipy.fft.irfftn(phases, (box, box, box))


def corrected(masked: FscCurve, randomised: FscCurve, shell: int) -> FscCurve:
    """FSC freed of what the mask alone correlates (Chen et al., Ultramicroscopy 135 (2013) 24).

    (F_t - F_n) / (1 - F_n), of the masked curve F_t and the one with randomised phases F_n, from two shells beyond
    ``shell`` on; F_t before. The errors of both are carried through.
    """
    noise = np.minimum(randomised.fsc, 0.999999)
    values = (masked.fsc - noise) / (1 - noise)
    error = np.hypot(masked.error / (1 - noise), randomised.error * (1 - masked.fsc) / (1 - noise) ** 2)
    before = masked.shells < shell + HAND_OVER_SHELLS
    return dataclasses.replace(
        masked, fsc=np.where(before, masked.fsc, values), error=np.where(before, masked.error, error)
    )
