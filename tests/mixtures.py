"""Gaussian mixtures to try the kernels on: awkward kinds, footprint edges that no rounding moves over a pixel."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cryosplat import reference

KINDS = ("round", "needle", "disc", "huge", "sub-pixel", "off the image", "across the edge")

CLEARANCE_PX = 1e-3
"""The least distance of a footprint's edge from a pixel.

The cut is a comparison, |x - m_x| <= cutoff sqrt(C_xx). Where both sides agree to rounding, float32 and float64 may
rightly differ about the pixel, whose value at 3.5 standard deviations (0.2 % of the peak) is far above the tolerances.
Rounding moves an edge by some 1e-5 px in float32 (1e-4 px for the thinnest Gaussians), so these are drawn again.
"""


@dataclass(frozen=True)
class Case:
    """One call of an operator. The numbers are float64 but representable in float32: one expectation serves both."""

    means: Tensor  # (M, G, 3) px
    covariances: Tensor  # (M, G, 6) px^2
    amplitudes: Tensor  # (M, G)
    rotations: Tensor  # (V, 3, 3)
    shifts: Tensor  # (V, 2) px
    model: Tensor  # (V,)
    kinds: tuple[str, ...]  # of the G Gaussians, the same in every mixture
    box: int
    cutoff: float

    def mixture(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Means, covariances and amplitudes as fresh leaves."""
        return tuple(t.to(dtype, copy=True).requires_grad_() for t in (self.means, self.covariances, self.amplitudes))

    def poses(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Rotations and shifts as fresh leaves."""
        return tuple(t.to(dtype, copy=True).requires_grad_() for t in (self.rotations, self.shifts))


def draw(
    box: int,
    gaussians: int,
    models: int = 1,
    views: int = 1,
    seed: int = 0,
    cutoff: float = 3.5,
    kinds: tuple[str, ...] = KINDS,
    volume: bool = False,
) -> Case:
    """A case of Gaussians of all ``kinds`` in turn, clear of edges in its views or (``volume``) on the voxel grid."""
    generator = torch.Generator().manual_seed(seed)
    of_each = tuple(kinds[g % len(kinds)] for g in range(gaussians))
    rotations = representable(random_rotations(views, generator))
    shifts = representable(3 * torch.rand(views, 2, generator=generator, dtype=torch.float64) - 1.5)
    model = (torch.arange(views) * 2 + 1) % models if models else torch.zeros(views, dtype=torch.int64)

    def distance(mixture: tuple[Tensor, ...]) -> Tensor:
        if volume:
            return section_edge_distance(*mixture[:2], box, cutoff)
        return footprint_edge_distance(*mixture[:2], rotations, shifts, model, box, cutoff)

    mixture = redraw_until_clear(lambda: draw_mixtures(of_each, models, box, generator), distance)
    return Case(*mixture, rotations, shifts, model, of_each, box, cutoff)


def redraw_until_clear(draw_all: Callable, distance: Callable) -> tuple[Tensor, ...]:
    """Replaces the Gaussians nearer than CLEARANCE_PX to an edge by newly drawn ones until there are none."""
    mixture = draw_all()
    while (unclear := distance(mixture) < CLEARANCE_PX).any():
        fresh = draw_all()
        mixture = tuple(
            torch.where(unclear.reshape(*unclear.shape, *[1] * (old.ndim - 2)), new, old)
            for new, old in zip(fresh, mixture, strict=True)
        )
    return mixture


def draw_mixtures(kinds: tuple[str, ...], models: int, box: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Means (M, G, 3), covariances (M, G, 6), amplitudes (M, G); every Gaussian has about the same norm on the grid."""
    count = models * len(kinds)
    drawn = [draw_one(kind, box, generator) for kind in kinds * models]
    means = torch.tensor([mean for mean, _ in drawn], dtype=torch.float64).reshape(models, -1, 3)
    scales = torch.tensor([scale for _, scale in drawn], dtype=torch.float64).reshape(models, -1, 3)
    axes = random_rotations(count, generator).reshape(models, -1, 3, 3)
    covariances = six_entries(axes @ torch.diag_embed(scales**2) @ axes.mT)
    signs = torch.randint(0, 2, (models, len(kinds)), generator=generator) * 2 - 1
    amplitudes = signs * (0.5 + torch.rand(models, len(kinds), generator=generator, dtype=torch.float64))
    amplitudes = amplitudes * scales.prod(-1) ** (1 / 3)
    return representable(means), representable(covariances), representable(amplitudes)


def draw_one(kind: str, box: int, generator: torch.Generator) -> tuple[list[float], list[float]]:
    """Mean and principal standard deviations of one Gaussian, px."""

    def uniform(low: float, high: float, count: int = 3) -> list[float]:
        return (low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)).tolist()

    inside = uniform(-0.3 * box, 0.3 * box)
    (thin, aspect) = uniform(0.3, 0.5, 1) + uniform(10, 30, 1)
    match kind:
        case "round":
            return inside, uniform(1.0, 2.0, 1) * 3
        case "needle":
            return inside, [thin, thin, aspect * thin]
        case "disc":
            return inside, [thin, aspect * thin, aspect * thin]
        case "huge":
            return inside, uniform(0.4 * box, 0.6 * box)
        case "sub-pixel":
            return inside, [0.3, 0.3, 0.3]
        case "off the image":
            return [uniform(1.0, 3.0, 1)[0] * box, *inside[1:]], uniform(1.0, 2.0)
        case "across the edge":
            return [*inside[:1], -0.5 * box + uniform(-2.0, 2.0, 1)[0], 0.5 * box + inside[2] / box], uniform(1.0, 3.0)
    raise AssertionError(kind)


def random_rotations(count: int, generator: torch.Generator) -> Tensor:
    """(count, 3, 3) proper rotations, float64."""
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    return q * torch.linalg.det(q)[:, None, None]


def six_entries(matrices: Tensor) -> Tensor:
    """The stored entries xx, xy, xz, yy, yz, zz (..., 6) of symmetric matrices (..., 3, 3)."""
    return matrices[..., [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]


def representable(values: Tensor) -> Tensor:
    """The nearest float32 numbers, as float64."""
    return values.to(torch.float32).to(torch.float64)


def footprint_edge_distance(means, covariances, rotations, shifts, model, box, cutoff) -> Tensor:
    """How near the edges of each Gaussian's footprints come to a pixel in any view, px (M, G)."""
    nearest = torch.full(means.shape[:2], math.inf, dtype=torch.float64)
    for m, rotation, shift in zip(model.tolist(), rotations, shifts, strict=True):
        centres, projected = reference.project(means[m], covariances[m], rotation, shift, box)
        reach = cutoff * projected.diagonal(dim1=1, dim2=2).sqrt()
        nearest[m] = torch.minimum(nearest[m], pixel_distance(centres, reach, box).amin(-1))
    return nearest


def section_edge_distance(means, covariances, box, cutoff) -> Tensor:
    """How near the edges of each Gaussian's sections by the voxel planes come to a voxel, px (M, G)."""
    matrices = reference.symmetric_matrices(covariances)
    dz = torch.arange(box, dtype=torch.float64) - means[..., 2:] - box // 2  # (M, G, Z)
    reach_z = cutoff * matrices[..., 2, 2].sqrt()
    nearest = pixel_distance(means[..., 2] + box // 2, reach_z, box)
    in_reach = dz.abs() <= reach_z[..., None]
    for axis in (0, 1):
        slope = matrices[..., axis, 2] / matrices[..., 2, 2]
        reach = cutoff * (matrices[..., axis, axis] - slope * matrices[..., axis, 2]).sqrt()
        centres = means[..., axis, None] + box // 2 + slope[..., None] * dz
        distance = pixel_distance(centres, reach[..., None], box)
        nearest = torch.minimum(nearest, torch.where(in_reach, distance, math.inf).amin(-1))
    return nearest


def pixel_distance(centres: Tensor, reach: Tensor, box: int) -> Tensor:
    """Distance of centre - reach and centre + reach from a pixel of the grid, the lesser; infinite beyond the grid."""
    edges = torch.stack((centres - reach, centres + reach))
    on_grid = (edges > -0.5) & (edges < box - 0.5)
    return torch.where(on_grid, (edges - edges.round()).abs(), math.inf).amin(0)


def relative_l2(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; infinite for something where nothing is expected."""
    if not expected.any():
        return math.inf if ours.any() else 0.0
    return ((ours - expected).norm() / expected.norm()).item()


def noise(shape, seed=0) -> torch.Tensor:
    return representable(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def run_splat(module, case: Case, dtype=torch.float64, poses=True) -> tuple[torch.Tensor, ...]:
    """Images and gradients of <images, noise> for means, covariances, amplitudes (rotations, shifts), as float64."""
    leaves = (*case.mixture(dtype), *case.poses(dtype))
    images = module.splat(*leaves, case.model, case.box, case.cutoff)
    wanted = leaves if poses else leaves[:3]
    gradients = torch.autograd.grad(images, wanted, noise(images.shape).to(dtype))
    return tuple(t.detach().double() for t in (images, *gradients))


def run_voxelise(module, case: Case, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    leaves = case.mixture(dtype)
    volumes = module.voxelise(*leaves, case.box, case.cutoff)
    gradients = torch.autograd.grad(volumes, leaves, noise(volumes.shape).to(dtype))
    return tuple(t.detach().double() for t in (volumes, *gradients))
