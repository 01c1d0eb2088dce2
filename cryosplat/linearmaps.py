"""The linear half maps of a run, the mask that everything is measured under, and what the two say of the truth."""

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cryosplat.backprojection import LinearHalf
from cryosplat.calibration import Calibration
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, shell_to_angstrom
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, fsc
from cryosplat.masks import mask_from_map, spherical_mask
from cryosplat.quadratic import sign_certainty

logger = logging.getLogger(__name__)

LEAST_SHELLS = 4
"""Shells that half maps must agree on. A ball of density makes the first two or three whatever the poses are."""

SIGN_CERTAINTY = 6.0
"""Standard errors at which the data are held to be of the other sign."""

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
    """Check that the linear half maps agree on more than that there is a blob in the middle.

    Images with wrong poses still do: averaged over all directions, they make the same ball of either half.

    Raises:
        InputError: they agree on fewer than ``LEAST_SHELLS`` shells; with what to check.
    """
    curve = maps.curve.fsc
    below = np.flatnonzero(curve[1:] < RESOLUTION_THRESHOLD_HALF_MAPS)
    agreed = int(below[0]) if len(below) else len(curve) - 1
    if agreed >= LEAST_SHELLS:
        return
    reach = f"to {shell_to_angstrom(agreed, maps.curve.box, maps.pixel_size_a):.0f} A" if agreed else "on nothing"
    raise InputError(
        f"the linear half maps agree {reach} (FSC {RESOLUTION_THRESHOLD_HALF_MAPS}): there is nothing that a mixture "
        "could be fitted to. Check that data.poses and data.ctf belong to this stack, row by row; that their A/px and "
        "box are those of these images; that data.ctf is given if the images have a CTF; and how many particles there "
        "are. cryosplat backproject shows the maps in seconds. data.check_signal=false trains all the same"
    )


def require_sign(halves: tuple[LinearHalf, ...], spread: float) -> None:
    """Check that the images' density is positive: their correlation with a round Gaussian at the centre.

    Args:
        halves: of both halves, or one of all images.
        spread: standard deviation of that Gaussian, fraction of the box.

    Raises:
        InputError: the images are clearly of the other sign.
    """
    equations = [half.equations for half in halves]
    certainty = sign_certainty(equations[0] + equations[1] if len(equations) == 2 else equations[0], spread)
    logger.info("sign of the data: %+.1f standard errors", certainty)
    if certainty < -SIGN_CERTAINTY:
        raise InputError(
            f"the images look inverted: their correlation with density at the centre is {certainty:.1f} standard "
            "errors. Set data.invert to its opposite (true for particles white on dark), or data.check_sign=false if "
            "you know better"
        )


def _made(total: np.ndarray, pixel_size_a: float) -> tuple[np.ndarray, str]:
    try:
        return mask_from_map(total, pixel_size_a), "made from the linear map of both halves"
    except InputError as error:
        logger.warning("%s; everything is measured under a sphere instead", error)
        return spherical_mask(len(total)), "a sphere, because no molecule stands out in the linear map"
