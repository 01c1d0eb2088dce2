"""Whether a particle has the point group that it is said to have: how much of what the images agree on has it.

Linear half maps at low resolution are made with the symmetry (S_a, S_b) and without it (U_a, U_b). Symmetrising is a
projection: of the truth T it leaves the part T_s that has the symmetry. Noise of the two halves is independent, so over
a shell <U_a, U_b> estimates <T, T>, and <U_a, S_b>, <S_a, U_b> and <S_a, S_b> all estimate <T_s, T_s>. So

    <U_a, S_b> <S_a, U_b> / ( <U_a, U_b> <S_a, S_b> )

estimates the share of the truth's power that has the symmetry, whatever the scales of the maps: 1 if the particle has
it, and about 1 / K if it has nothing of it.
"""

import logging
from dataclasses import dataclass

import numpy as np
import scipy.fft

from cryosplat import distributed
from cryosplat.backprojection import LinearHalf, back_project, linear_half
from cryosplat.conventions import shell_to_angstrom
from cryosplat.dataset import ParticleDataset
from cryosplat.linearmaps import without_ball
from cryosplat.masks import spherical_mask
from cryosplat.sectors import SectorSums, jackknife

logger = logging.getLogger(__name__)

SIDE = 64
"""px to which images are cropped in Fourier space to make the maps without symmetry: a quarter of the time that one
insertion of 128 px takes, and almost no memory."""

AGREED, CERTAINTY, LEAST_SHELLS = 0.3, 4.0, 2
"""A shell is looked at where the FSC of the halves without symmetry is above this, and above so many standard errors of
noise. There must be so many. They need not be the first ones: an icosahedral particle less a ball begins at a few."""

SEEN = 0.5
"""Share of a shell's voxels that images of both halves must have told of: a mask mixes what few have told."""

LEAST_SHARE = 0.85
"""A share that is below this by twice its error contradicts the symmetry."""


@dataclass(frozen=True)
class Agreement:
    """What the images say of a symmetry.

    Attributes:
        share: of the power that has it; 1 is all.
        error: its standard error.
        chance: 1 / K.
        finest_a: resolution of the last shell that was looked at, A.
    """

    share: float
    error: float
    chance: float
    finest_a: float

    @property
    def contradicts(self) -> bool:
        return self.share + 2 * self.error < LEAST_SHARE

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.0f} % (+- {100 * self.error:.0f}) of the density down to {self.finest_a:.1f} A, less "
            "its mean over directions, has the symmetry"
        )

    def warning(self, name: str) -> str | None:
        """What a user should know of it, of a symmetry that was called ``name``; None: nothing."""
        if not self.contradicts:
            return None
        return (
            f"the images contradict symmetry {name}: only {self} (100 % of a particle that has it, about "
            f"{100 * self.chance:.0f} % of one that has nothing of it). Everything else is averaged away. Check the "
            "group and that its axes lie in RELION's places (docs/physics.md#symmetry); C1 asks for none"
        )


def agreement(
    dataset: ParticleDataset,
    ids: np.ndarray,
    radial: np.ndarray,
    world: distributed.World,
    symmetric: tuple[LinearHalf, ...] | None,
) -> Agreement | None:
    """Look at the images once more, without symmetry; a collective.

    Args:
        dataset, ids, radial, world: as of ``back_project``, which made ``symmetric``.
        symmetric: linear half maps a and b with the symmetry, on rank 0; None on the others.

    Returns:
        None on other ranks, and where the halves agree on too little to tell.
    """
    side = min(SIDE, dataset.box)
    sums = back_project(dataset, ids, radial, world, crop=side)
    if sums is None:
        return None
    free = tuple(linear_half(one, side) for one in sums)
    return compare(free, symmetric, dataset.pixel_size_a * dataset.box / side)


def compare(
    free: tuple[LinearHalf, LinearHalf], symmetric: tuple[LinearHalf, LinearHalf], pixel_size_a: float
) -> Agreement | None:
    """The share from half maps without symmetry (d, d, d), of A/px ``pixel_size_a``, and with it, of box d or more."""
    side = len(free[0].map)
    sums, mask = SectorSums(side), spherical_mask(side)
    seen = np.isfinite(free[0].variance) & np.isfinite(free[1].variance) & sums.inside

    def spectrum(volume: np.ndarray) -> np.ndarray:
        known = scipy.fft.irfftn(_middle(scipy.fft.rfftn(volume), side) * seen, (side,) * 3)
        return scipy.fft.rfftn(without_ball(known.astype(np.float32)) * mask)

    u, s = ([spectrum(half.map) for half in pair] for pair in (free, symmetric))
    uu, us, su, ss = (sums.cross(one, other) for one, other in ((u[0], u[1]), (u[0], s[1]), (s[0], u[1]), (s[0], s[1])))
    power = np.sqrt(sums.cross(u[0], u[0]).sum(1) * sums.cross(u[1], u[1]).sum(1))
    curve = np.divide(uu.sum(1), power, out=np.zeros(sums.shells), where=power > 0)
    there, all_there = sums(seen.astype(np.float32)).sum(1), sums.voxels.sum(1)
    voxels = np.maximum(there * float(np.mean(mask**2)), 1)  # independent ones
    clear = (curve > np.maximum(AGREED, CERTAINTY / np.sqrt(voxels))) & (there > SEEN * all_there)
    shells = np.flatnonzero(clear[1:]) + 1
    if len(shells) < LEAST_SHELLS:
        return None
    weight = (voxels * curve**2)[shells]

    def share(uu: np.ndarray, us: np.ndarray, su: np.ndarray, ss: np.ndarray) -> np.ndarray:
        found = (us * su)[shells] / np.maximum(uu * ss, 1e-30)[shells]
        return np.array([(weight * np.clip(found, 0, 2)).sum() / weight.sum()])

    # Over the power of the shell, so that no rounding matters.
    scale, other = np.maximum(np.abs(uu.sum(1)), 1e-30)[:, None], np.maximum(np.abs(ss.sum(1)), 1e-30)[:, None]
    both = np.sqrt(scale * other)
    (value,), (error,) = jackknife(share, uu / scale, us / both, su / both, ss / other)
    finest_a = shell_to_angstrom(int(shells[-1]), side, pixel_size_a)
    return Agreement(float(value), float(error), 1 / symmetric[0].copies, finest_a)


def _middle(spectrum: np.ndarray, side: int) -> np.ndarray:
    """A half-spectrum (D, D, D//2+1) as a map of ``side`` voxels has it, an even number."""
    rows = np.r_[0 : side // 2, len(spectrum) - side // 2 : len(spectrum)]
    return spectrum[rows][:, rows][:, :, : side // 2 + 1]
