"""Linear reconstruction: images inserted into Fourier space, and the half maps that come out, with no prior in them.

Of every half set the sums n and d of csrc/insert.h are collected on a grid of twice the box, n = d F + noise, F the
map's transform. n / d voxel by voxel would be the map, if a voxel with d near zero did not ruin it. So both are
averaged over a Gaussian neighbourhood G of a voxel first, which in real space is a window g:

    S n = (G * n) / (G * d),   in real space cropped to the box and divided by g times sinc^2 (the trilinear kernel's)

S is exact where d is even; where it is not, d F averaged is not d averaged times F averaged. The error is taken out by
one step of iterative refinement with the same S:

    L = S n + S (n - d F[S n])

L is linear in the images, unbiased to the second order, and has no Wiener term, no floor and no mask: what calibration
and deposition need. Its noise per voxel has the variance below, up to a factor near 1 (tests/test_backprojection.py).

With a point group of K operators S a view R counts as the K views R S. For L the K copies of an image are as good as K
images: noise falls on K different places (but for a few voxels next to an axis, where it adds up and is more than is
said). For the likelihood they are one image: of a map with the symmetry every copy says the same. So the normal
equations are those of the symmetrised sums over K: of such a map the Q of the images, in their own nats, and its
gradient the mean over the copies of the gradient.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosplat import distributed, ops, progress
from cryosplat.ctf import ctf_image
from cryosplat.dataset import ParticleDataset, shells_of_half_plane
from cryosplat.imageprep import fourier_crop
from cryosplat.quadratic import NormalEquations
from cryosplat.symmetry import split

PADDING = 2
"""Side of the Fourier grid over that of the box: trilinear interpolation needs a volume with room round it."""

KERNEL_VOXELS = 1.0
"""Standard deviation of G in voxels of the padded grid, half a Fourier pixel of the box. Of 0.6 to 1.6, 0.8 to 1.0 gave
the best maps of noisy images, evenly and unevenly spread (benchmarks/quality.md); wider ones leave a bias."""

TRILINEAR_VARIANCE = 1 / 6
"""Variance of the trilinear kernel along an axis, voxels squared."""

EMPTY_COVERAGE = (2 * math.pi * KERNEL_VOXELS**2) ** -1.5 * math.exp(-2.0 / KERNEL_VOXELS**2)
"""Coverage averaged over G of a voxel whose only coefficient is two voxels away, a Fourier pixel of the box. With less
it counts as empty."""

EMPTY_WEIGHT = 1e-4
"""A voxel with less than this fraction of the usual d for its coverage has only seen zeros of the CTF: empty too."""

ROUNDING = 1e-5
"""What transforms in single precision leave where there is nothing, as a fraction of a grid's root mean square, with
room: 1.4e-7 of it is usual, 4e-6 the largest seen (boxes of 16 to 64 px). It matters from a million images on."""

NARROW_VARIANCE = (KERNEL_VOXELS**2 - TRILINEAR_VARIANCE) / 2
"""Every coefficient is spread by the trilinear kernel and then by G, about a Gaussian of both variances. Noise adds up
with its square, a Gaussian of half of them; d, which has had the trilinear kernel already, lacks this."""

LEAST_NOISE = (KERNEL_VOXELS**2 / NARROW_VARIANCE) ** 1.5 * math.exp(2 / KERNEL_VOXELS**2 - 2 / NARROW_VARIANCE)
"""Noise variance over d, both averaged, of the voxel of EMPTY_COVERAGE. Further out it would be rounding errors."""

BAND_LIMIT = 1e-3
"""Noise power over the median of all lower shells with which the images end: they were low-passed. The weight of so
little noise would outweigh the data of all other shells (seen: FSC of -0.5 in shell 1) with what is not there."""

VIEWS_PER_INSERT = 256


@dataclass(frozen=True, eq=False)
class LinearHalf:
    """The linear reconstruction of one half set.

    Attributes:
        map: (D, D, D) float32, [z, y, x], in the units of a mixture's map; its transform is zero where empty.
        variance: (D, D, D//2+1) float32, of the noise of the map's transform (``rfftn``) by voxel, up to a factor near
            1; infinite where empty.
        equations: the likelihood of its images, which mixtures are fitted to; on the CPU, to be sent to whoever fits.
        symmetry: (K, 3, 3) operators of the point group that its sums were symmetrised over; None: none.
    """

    map: np.ndarray
    variance: np.ndarray
    equations: NormalEquations | None = None
    symmetry: np.ndarray | None = None

    @property
    def copies(self) -> int:
        """K, how many of its values are the same by symmetry."""
        return 1 if self.symmetry is None else len(self.symmetry)


def noise_variance(radial: np.ndarray, box: int) -> Tensor:
    """Noise variance (2, D, D//2+1) of coefficients, from radial noise power (2, S) of either half.

    Infinite from the first shell on that has been filtered out of the images.
    """
    level = np.stack([np.median(radial[:, : shell + 1], axis=1) for shell in range(radial.shape[1])], axis=1)
    ended = np.maximum.accumulate(radial < BAND_LIMIT * level, axis=1)
    shells = np.minimum(shells_of_half_plane(box), radial.shape[1] - 1)
    return torch.from_numpy(np.where(ended, np.inf, radial)[:, shells]).float()


def back_project(
    dataset: ParticleDataset,
    ids: np.ndarray,
    radial: np.ndarray,
    world: distributed.World,
    symmetry: np.ndarray | None = None,
    halves: bool = True,
    crop: int | None = None,
) -> Tensor | None:
    """Insert this rank's images, and add up those of all ranks.

    Args:
        dataset: this rank's, normalised.
        ids: (n,) which of its particles, best in the order in which they lie on disk (``dataset.in_file_order``).
        radial: (2, S) radial noise power of either half, as ``dataset.radial_noise`` gives it.
        symmetry: (K, 3, 3) operators S of a group; a view R is entered as R S for each of them. None: identity alone.
        halves: a grid each for half a and half b; otherwise one for all.
        crop: side, even, of the images' middle in Fourier space, which alone is inserted; None: all of it.

    Returns:
        Sums (2 or 1, P, P, P//2+1, 4) on rank 0, None on the others; P is twice the box, or ``crop``.
    """
    box, device = dataset.box, world.device
    side = crop or box
    padded = PADDING * side
    sums = torch.zeros(2 if halves else 1, padded, padded, padded // 2 + 1, 4, device=device)
    weight = 1 / noise_variance(radial, box).to(device)
    operators, on_grid = split(np.eye(3)[None] if symmetry is None else symmetry)
    operators = torch.from_numpy(operators).float().to(device)
    done = 0
    for batch in dataset.batches(np.split(ids, range(VIEWS_PER_INSERT, len(ids), VIEWS_PER_INSERT))):
        ctf = 1.0 if batch.ctf is None else ctf_image(batch.ctf, box, dataset.pixel_size_a, batch.phases)
        filtered = ctf * weight[batch.half]
        values, weights = batch.images * filtered, ctf * filtered
        grid = batch.half if halves else torch.zeros_like(batch.half)
        for some, inserted in _by_reach(batch.rotations, side, dataset.reach):
            near = fourier_crop(values[some], inserted), fourier_crop(weights[some], inserted)
            for operator in operators:
                rotations = batch.rotations[some] @ operator * (inserted / side)
                ops.insert(*near, rotations, batch.shifts[some] * (inserted / box), grid[some], sums)
        done += len(batch)
        progress.at(done)
    total = distributed.sum_to_main(sums, world)
    if total is not None and len(on_grid) > 1:
        for one in total:
            one.copy_(_symmetrised(one, on_grid))
    return total


def box_within(box: int, reach: float) -> int:
    """The largest even box of the same field of view whose coefficients, ``reach`` times as far out, are all within the
    Nyquist frequency of ``box``.

    >>> box_within(128, 1.0), box_within(128, 1.01)
    (128, 126)
    """
    inserted = box
    while math.sqrt((inserted // 2) ** 2 - 1) * reach * 2 >= box:
        inserted -= 2
    return inserted


def _by_reach(rotations: Tensor, box: int, reach: float) -> list[tuple[slice | Tensor, int]]:
    """Which views (V,) to insert together, and in images cropped to how many pixels.

    Where a magnification takes the last coefficients of a view out of the grid, it is inserted without these: cropped,
    with its projection scaled to the smaller box.
    """
    inserted = box_within(box, reach)
    if inserted == box:
        return [(slice(None), box)]
    stretch = torch.linalg.matrix_norm(rotations[:, :2].double(), 2)
    near = math.sqrt((box // 2) ** 2 - 1) * stretch * 2 < box
    parts = [(near.nonzero()[:, 0], box), ((~near).nonzero()[:, 0], inserted)]
    return [(some, size) for some, size in parts if len(some)]


def _symmetrised(sums: Tensor, on_grid: np.ndarray) -> Tensor:
    """Sums (P, P, P//2+1, 4) added up over rotations (H, 3, 3) that take the grid to itself: n_H(q) = sum n(h q)."""
    padded, columns = sums.shape[0], sums.shape[2]
    _hermitian(torch.view_as_complex(sums[..., :2]))
    _hermitian(sums[..., 2]), _hermitian(sums[..., 3])
    rows = sums.view(-1, 4)
    along = torch.fft.fftfreq(padded, 1 / padded, device=sums.device).long()
    y, x = along[:, None], torch.arange(columns, device=sums.device)
    total = torch.zeros_like(sums)
    for rotation in np.rint(on_grid).astype(int).tolist():
        for plane, z in zip(total, along, strict=True):  # no index of the size of the grid
            qx, qy, qz = (row[0] * x + row[1] * y + row[2] * z for row in rotation)
            mate = 1 - 2 * (qx < 0).long()
            found = rows[((qz * mate) % padded * padded + (qy * mate) % padded) * columns + qx.abs()]
            found[..., 1] *= mate
            plane += found
    total[:, :, 0] /= 2  # where ``linear_half`` is going to add the mates
    return total


def linear_half(sums: Tensor, box: int, symmetry: np.ndarray | None = None) -> LinearHalf:
    """The map of one half from its sums (P, P, P//2+1, 4), and the operators (K, 3, 3) that these were made with.

    Arrays of the padded grid are the largest of a run: each is freed as soon as it is not needed.
    """
    grid = _Grid(box, sums.device)
    denominator = _hermitian(sums[..., 2].clone())
    in_space = grid.to_space(denominator)
    kernel = NormalEquations.cut_kernel(in_space, box)
    narrow, whole = grid.gaussian(math.sqrt(NARROW_VARIANCE)), grid.gaussian(KERNEL_VOXELS)
    noise = grid.average(in_space, narrow).real[grid.of_box]
    averaged = grid.average(in_space, whole / narrow).real.contiguous()  # which has been multiplied by narrow already
    noise = torch.maximum(noise, LEAST_NOISE * averaged[grid.of_box])
    in_space = grid.to_space(_hermitian(sums[..., 3].clone()))
    covered = grid.average(in_space, whole).real.contiguous()
    del in_space
    seen = grid.is_seen(averaged, covered)
    del covered
    inverse = averaged.masked_fill_(~seen, torch.inf).reciprocal_()
    # For an even d, L is n / d, and its noise that of D^3 of the P^3 voxels: D^2 / (d 2^3).
    noise *= box**2 / PADDING**3
    variance = torch.where(inverse[grid.of_box] > 0, noise * inverse[grid.of_box] ** 2, torch.inf)
    del averaged, seen, noise
    numerator = _hermitian(torch.complex(sums[..., 0], sums[..., 1]))
    in_space = grid.to_space(numerator)
    equations = NormalEquations(kernel, NormalEquations.cut_data(in_space, box)).to(torch.device("cpu"))
    if symmetry is not None:
        equations = NormalEquations(equations.kernel / len(symmetry), equations.data / len(symmetry))
    volume = grid.solve(in_space, inverse)
    del in_space
    residual = numerator.sub_(grid.from_map(volume).mul_(denominator))
    volume += grid.solve(grid.to_space(residual), inverse)
    del numerator, residual, inverse
    # Cropping has filled the empty voxels from their neighbours, with what is at the box's edges above all.
    known = torch.fft.rfftn(volume).masked_fill_(variance.isinf(), 0)
    return LinearHalf(
        torch.fft.irfftn(known, s=volume.shape).cpu().numpy(), variance.cpu().numpy(), equations, symmetry
    )


def _hermitian(grid: Tensor) -> Tensor:
    """Give the plane x = 0 of a grid (P, P, P//2+1), in place, what its voxels' mates have collected."""
    plane = grid[:, :, 0]
    mates = torch.roll(plane.flip(0, 1), (1, 1), (0, 1))
    plane += mates.conj() if grid.is_complex() else mates
    return grid


class _Grid:
    """Between a map (D, D, D) and its transform on the padded grid (P, P, P//2+1), phases referring to the centre."""

    def __init__(self, box: int, device: torch.device):
        self.box, self.padded = box, PADDING * box
        frequency = torch.fft.fftfreq(self.padded, device=device)  # a position in FFT order, in units of P voxels
        self._position = frequency
        self._rows = (torch.arange(box, device=device) - box // 2) % self.padded
        inside = frequency[self._rows]
        self._window = self.gaussian(KERNEL_VOXELS)[self._rows] * torch.sinc(inside) ** 2
        self._trilinear = torch.sinc(inside) ** 2

    @property
    def of_box(self) -> tuple[slice, ...]:
        """Voxels of the padded grid that are frequencies of the box's own grid."""
        return (slice(None, None, PADDING),) * 3

    def to_space(self, spectrum: Tensor) -> Tensor:
        """Real space (P, P, P), origin first, of a half-spectrum."""
        return torch.fft.irfftn(spectrum, s=(self.padded,) * 3)

    def average(self, in_space: Tensor, window: Tensor) -> Tensor:
        """A half-spectrum, given in real space (which is overwritten), convolved with what ``gaussian`` is of."""
        return torch.fft.rfftn(_times(in_space, window))

    def solve(self, in_space: Tensor, inverse: Tensor) -> Tensor:
        """S of the module's docstring: the map (D, D, D) of n in real space (overwritten), with 1 / (G * d) given."""
        spectrum = self.average(in_space, self.gaussian(KERNEL_VOXELS)).mul_(inverse)
        # Axis by axis, each cropped before the next is transformed. Orthonormal image transforms make the factor D.
        for axis in (0, 1):
            spectrum = torch.fft.ifft(spectrum, dim=axis).index_select(axis, self._rows)
        volume = torch.fft.irfft(spectrum, n=self.padded, dim=2).index_select(2, self._rows)
        return _times(volume, 1 / self._window).mul_(self.box)

    def from_map(self, volume: Tensor) -> Tensor:
        """What interpolation between the grid's voxels sees of a map: its transform, not averaged."""
        spectrum = torch.fft.rfft(self._padded(_times(volume.clone(), self._trilinear), 2), dim=2)
        for axis in (1, 0):
            spectrum = torch.fft.fft(self._padded(spectrum, axis), dim=axis)
        return spectrum.div_(self.box)

    def is_seen(self, averaged: Tensor, covered: Tensor) -> Tensor:
        """Voxels inside the sphere of Nyquist that are not empty, from d and coverage, both averaged."""
        squares = (self._position * self.padded) ** 2
        radius = squares[:, None, None] + squares[:, None] + squares[: self.padded // 2 + 1]
        typical = averaged.mean() / covered.mean()
        return (
            (radius < (self.padded // 2) ** 2)
            & (covered >= max(EMPTY_COVERAGE, _rounding(covered)))
            & (averaged > (EMPTY_WEIGHT * typical * covered).clamp_(min=_rounding(averaged)))
        )

    def _padded(self, values: Tensor, axis: int) -> Tensor:
        shape = list(values.shape)
        shape[axis] = self.padded
        return values.new_zeros(shape).index_copy_(axis, self._rows, values)

    def gaussian(self, kernel_voxels: float) -> Tensor:
        """(P,) along an axis of real space: the transform of a Gaussian of unit sum, sampled at the grid's voxels.

        Sampling repeats it. Cut off at the edge instead, it would ring along the axes of Fourier space, far out and
        below zero, and make empty voxels there look seen.
        """
        position = self._position + torch.arange(-1, 2, device=self._position.device)[:, None]
        return torch.exp(-2 * (math.pi * kernel_voxels * position) ** 2).sum(0)


def _rounding(grid: Tensor) -> float:
    return ROUNDING * float(torch.linalg.vector_norm(grid)) / math.sqrt(grid.numel())


def _times(volume: Tensor, along: Tensor) -> Tensor:
    """A volume times the same factors along every axis, in place."""
    return volume.mul_(along[:, None, None]).mul_(along[:, None]).mul_(along)
