"""The linear half maps of a run, the mask that everything is measured under, and what the two say of the truth."""

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cryosplat.backprojection import LinearHalf
from cryosplat.calibration import Calibration
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, fsc
from cryosplat.masks import mask_from_map, radii, spherical_mask

logger = logging.getLogger(__name__)

LEAST_SHELLS, SIGNAL_CERTAINTY = 3, 4.0
"""Shells that half maps must agree in, and standard errors of the FSC of pure noise that count as agreement."""

EMPTY_SHARE = 0.01
"""Share of the Fourier voxels within Nyquist that may be empty before that is said."""


@dataclass(frozen=True, eq=False)
class LinearMaps:
    """Both linear half maps, on rank 0.

    Attributes:
        halves: of half a and half b.
        mask: (D, D, D) float32, 0 to 1.
        mask_origin: where it comes from, in words.
        pixel_size_a: A/px.
    """

    halves: tuple[LinearHalf, LinearHalf]
    mask: np.ndarray
    mask_origin: str
    pixel_size_a: float

    @cached_property
    def calibration(self) -> Calibration:
        """What the half maps say of the truth, under the mask."""
        return Calibration(self.halves, self.mask, self.pixel_size_a)

    @cached_property
    def curve(self) -> FscCurve:
        """FSC of the two half maps under the mask."""
        return fsc(self.halves[0].map, self.halves[1].map, self.pixel_size_a, self.mask)

    @property
    def empty_share(self) -> float:
        """Share of the Fourier voxels within Nyquist that no image of a half has told of; the larger of the halves'."""
        inside = self.calibration.sums.inside
        return max(float(np.isinf(half.variance[inside]).mean()) for half in self.halves)

    @cached_property
    def agreed_shells(self) -> int:
        """Shells in which the half maps agree, with an FSC clear of its noise, on more than a round ball of density.

        Images with wrong poses still make such a ball, averaged over all directions, the same from either half. So each
        half map's mean over directions is taken off first.
        """
        left = (without_ball(half.map) for half in self.halves)
        curve = fsc(*left, self.pixel_size_a, self.mask).fsc
        # Independent ones under the mask.
        voxels = self.calibration.sums.voxels.sum(1) * float(np.mean(self.mask**2)) / self.halves[0].copies
        clear = np.maximum(RESOLUTION_THRESHOLD_HALF_MAPS, SIGNAL_CERTAINTY / np.sqrt(np.maximum(voxels, 1)))
        return int((curve > clear)[1:].sum())


def linear_maps(
    halves: tuple[LinearHalf, LinearHalf], pixel_size_a: float, mask: np.ndarray | None, mask_name: str
) -> LinearMaps:
    """Both half maps under a mask, found round the molecule where none is given.

    Args:
        halves: of half a and half b.
        pixel_size_a: A/px.
        mask: (D, D, D) or None.
        mask_name: what to call the given mask.
    """
    origin = mask_name
    if mask is None:
        mask, origin = _made(halves[0].map + halves[1].map, pixel_size_a)
    maps = LinearMaps(halves, np.asarray(mask, dtype=np.float32), origin, pixel_size_a)
    if maps.empty_share > EMPTY_SHARE:
        logger.warning(
            "%.0f %% of the Fourier voxels of a half map are empty: views are missing, and no resolution holds there",
            100 * maps.empty_share,
        )
    return maps


def require_signal(maps: LinearMaps) -> None:
    """Check that the linear half maps agree on more than a ball of density in the middle.

    Raises:
        InputError: they agree in fewer than ``LEAST_SHELLS`` shells; with what to check.
    """
    agreed, shells = maps.agreed_shells, len(maps.curve.fsc) - 1
    if agreed < LEAST_SHELLS:
        raise InputError(
            f"beyond a round ball of density the linear half maps agree in {agreed} shells of {shells} (FSC "
            f"{RESOLUTION_THRESHOLD_HALF_MAPS}, clear of its noise): there is nothing that a mixture could be fitted "
            "to. Check that poses and CTF (data.poses, data.ctf, or the columns of data.particles) belong to this "
            "stack, row by row; that the rotations are not transposed; that A/px and box are those of these images; "
            "that there is a CTF if the images have one; and how many particles there are. cryosplat backproject shows "
            "the maps in seconds. data.check_signal=false trains all the same"
        )


def without_ball(volume: np.ndarray) -> np.ndarray:
    """A map (D, D, D) less its mean over directions."""
    shell = np.rint(radii(len(volume))).astype(np.int64).ravel()
    mean = np.bincount(shell, volume.ravel()) / np.maximum(np.bincount(shell), 1)
    return volume - mean[shell].reshape(volume.shape).astype(np.float32)


def _made(total: np.ndarray, pixel_size_a: float) -> tuple[np.ndarray, str]:
    try:
        return mask_from_map(total, pixel_size_a), "made from the linear map of both halves"
    except InputError as error:
        logger.warning("%s; everything is measured under a sphere instead", error)
        return spherical_mask(len(total)), "a sphere, because no molecule stands out in the linear map"
