"""The Gaussian mixtures that are trained: parameters, activations, random start, export."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from cryosplat import ops

# Columns of a mixture's one parameter tensor. One tensor means one learning rate and one optimiser state.
MEAN, SCALE, QUATERNION, AMPLITUDE = slice(0, 3), slice(3, 6), slice(6, 10), 10
NUMBERS = 11

VOXEL_CUTOFF = 4.8
"""Standard deviations drawn in final maps: relative L2 error 1e-5, and maps are rare, so nothing is gained by less."""

SIGNED_START = 0.1
"""Raw amplitude that signed Gaussians start from. The smaller it is, the faster amplitudes move against positions and
scales at the one learning rate; at 1 signed amplitudes hardly moved in five epochs (benchmarks/quality.md)."""


class GaussianMixture(nn.Module):
    """M mixtures (full, half a, half b) of anisotropic Gaussians, sharing nothing, not even how many they are.

    Each mixture is one parameter tensor (G, 11) with, per Gaussian: position x, y, z as a fraction of the box from its
    centre; three scales s through softplus, fractions of the box; a quaternion w, x, y, z, normalised
    where used; an amplitude. The covariance is R(q) diag(s^2) R(q)^T. Amplitudes are ``unit[m]`` times
    the raw number ("signed") or its softplus ("positive", as in the paper), so that the learning rate
    means the same whatever the grey levels of the images are.

    Where the mixtures are seen together, as (M, G, ...), G is the size of the largest. The others are filled up with
    Gaussians of amplitude zero, which are no parameters.

    With a symmetry of K operators S the parameters are those of one asymmetric unit. What is drawn has K G Gaussians,
    of means S m, covariances S C S^T and equal amplitudes, the copies by S one after the other and the unit itself
    first; so the gradient of a parameter is the sum over its copies. Amplitudes are such that ``unit`` is the whole's.

    Args:
        models: M.
        gaussians: parameters in each mixture (with a symmetry: of one asymmetric unit), one number for all or M.
        amplitudes: "signed" or "positive".
        scale_range: least and greatest scale, fractions of the box.
        symmetry: (K, 3, 3) operators of a point group, the identity first; None: no symmetry.
    """

    def __init__(
        self,
        models: int,
        gaussians: int | Sequence[int],
        amplitudes: str,
        scale_range: tuple[float, float],
        symmetry: np.ndarray | None = None,
    ):
        super().__init__()
        self.counts = (gaussians,) * models if isinstance(gaussians, int) else tuple(gaussians)
        assert len(self.counts) == models, "a number of Gaussians for every model"
        self.positive = amplitudes == "positive"
        self.raw_scale_range = tuple(inverse_softplus(s) for s in scale_range)
        # One tensor a mixture, so that the optimiser can leave one alone whose half has no image in a batch.
        self.mixtures = nn.ParameterList(nn.Parameter(torch.zeros(count, NUMBERS)) for count in self.counts)
        self.register_buffer("unit", torch.ones(models))
        filler = torch.zeros(NUMBERS)
        filler[SCALE], filler[QUATERNION] = self.raw_scale_range[0], torch.tensor([1.0, 0.0, 0.0, 0.0])
        self.register_buffer("_filler", filler, persistent=False)
        self.copies = 1 if symmetry is None else len(symmetry)
        operators = torch.eye(3, dtype=torch.float64)[None] if symmetry is None else torch.from_numpy(symmetry)
        self.register_buffer("_operators", operators.float(), persistent=False)
        self.register_buffer("_on_covariances", _on_covariances(operators).float(), persistent=False)
        counts = torch.tensor(self.counts)[:, None] * self.copies
        self.register_buffer("_equal", SIGNED_START * counts, persistent=False)
        there = torch.arange(self.gaussians) < torch.tensor(self.counts)[:, None]
        self.register_buffer("_there", there, persistent=False)

    @property
    def models(self) -> int:
        return len(self.mixtures)

    @property
    def gaussians(self) -> int:
        """G, of the largest mixture, without copies."""
        return max(self.counts)

    @property
    def drawn(self) -> tuple[int, ...]:
        """Gaussians of each mixture with their copies."""
        return tuple(self.copies * count for count in self.counts)

    @property
    def theta(self) -> Tensor:
        """All parameters (M, G, 11), and fillers."""
        most = self.gaussians
        return torch.stack([torch.cat([m, self._filler.expand(most - len(m), -1)]) for m in self.mixtures])

    @torch.no_grad()
    def start_randomly(self, spread: float, scale: float, seed: int) -> None:
        """Normal positions round the centre, equal round Gaussians (the paper's start).

        Every mixture draws from a generator of its own: halves share no initialisation, and the
        presence of one does not change another.

        Args:
            spread: standard deviation of the positions, fraction of the box.
            scale: standard deviation of each Gaussian, fraction of the box.
            seed: of the run.
        """
        for m, mixture in enumerate(self.mixtures):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + m)
            positions = spread * torch.randn(len(mixture), 3, generator=generator)
            mixture[:, MEAN] = positions.clamp(-0.45, 0.45)
            mixture[:, SCALE] = inverse_softplus(scale)
            mixture[:, QUATERNION] = torch.tensor([1.0, 0.0, 0.0, 0.0])
            mixture[:, AMPLITUDE] = self.raw_amplitude_of_equals(len(mixture))

    def raw_amplitude_of_equals(self, count: int) -> float:
        """The raw amplitude of each of ``count`` equal Gaussians that, with their copies, add up to ``unit``."""
        return inverse_softplus(1.0 / (self.copies * count)) if self.positive else SIGNED_START

    def shares(self) -> Tensor:
        """Amplitudes (M, G) over ``unit``, those of equal copies left out; 0 for fillers."""
        raw = self.theta[..., AMPLITUDE]
        shares = nn.functional.softplus(raw) if self.positive else raw / self._equal
        return shares * self._there

    def amplitudes(self) -> Tensor:
        """Integrals (M, G) of the Gaussians, image units times the box's area; with copies ``unit`` at the start."""
        return self.unit[:, None] * self.shares()

    def scales(self) -> Tensor:
        """Standard deviations (M, G, 3), fractions of the box."""
        return nn.functional.softplus(self.theta[..., SCALE])

    def in_pixels(self, box: int) -> tuple[Tensor, Tensor, Tensor]:
        """Means (M, K G, 3), covariances (M, K G, 6) and amplitudes (M, K G) for a grid of ``box`` pixels."""
        theta = self.theta
        covariances = ops.covariances(theta[..., QUATERNION], nn.functional.softplus(theta[..., SCALE]) * box)
        means, amplitudes = theta[..., MEAN] * box, self.amplitudes() * box**2
        if self.copies == 1:
            return means, covariances, amplitudes
        turned = torch.einsum("kij,mgj->mkgi", self._operators, means)
        covariances = torch.einsum("kij,mgj->mkgi", self._on_covariances, covariances)
        return turned.flatten(1, 2), covariances.flatten(1, 2), amplitudes.repeat(1, self.copies)

    def project(self, rotations: Tensor, shifts: Tensor, model: Tensor, box: int, cutoff: float) -> Tensor:
        """Images (V, D, D) without CTF of mixtures ``model`` (V,) at poses (V, 3, 3) and shifts (V, 2) in pixels."""
        means, covariances, amplitudes = self.in_pixels(box)
        return ops.splat(means, covariances, amplitudes, rotations, shifts, model, box, cutoff)

    def draw(self, box: int, side: int, cutoff: float) -> Tensor:
        """Maps (M, side, side, side) of the middle of a grid of ``box`` voxels, differentiable."""
        return ops.voxelise(*self.in_pixels(box), side, cutoff)

    @torch.no_grad()
    def voxelise(self, box: int) -> Tensor:
        """Maps (M, D, D, D), image units per pixel of depth: summed along a view they give its projection."""
        return ops.voxelise(*self.in_pixels(box), box, VOXEL_CUTOFF)

    @torch.no_grad()
    def stay_in_bounds(self) -> None:
        """After a step: scales inside their range, positions inside the box.

        The bounds are on the parameters themselves; a bound inside the activation would have no
        gradient beyond it, and Gaussians that reached it could never come back.
        """
        for mixture in self.mixtures:
            mixture[:, SCALE].clamp_(*self.raw_scale_range)
            mixture[:, MEAN].clamp_(-0.5, 0.5)

    @torch.no_grad()
    def export(self, model: int, box: int, pixel_size_a: float) -> dict[str, Tensor]:
        """One mixture in physical units, copies included: its first G / K Gaussians are the asymmetric unit.

        Returns:
            ``means`` (G, 3) in A from the box centre (x, y, z), ``scales`` (G, 3) in A, ``quaternions``
            (G, 4) normalised w, x, y, z, ``amplitudes`` (G,) in image units times A^2.
        """
        side_a, mixture, copies = box * pixel_size_a, self.mixtures[model], self.copies
        quaternions = nn.functional.normalize(mixture[:, QUATERNION], dim=-1)
        return {
            "means": (mixture[:, MEAN] @ self._operators.mT).flatten(0, 1) * side_a,
            "scales": nn.functional.softplus(mixture[:, SCALE]).repeat(copies, 1) * side_a,
            "quaternions": _turned(quaternions, self._operators),
            "amplitudes": self.amplitudes()[model, : len(mixture)].repeat(copies) * side_a**2,
        }


def _on_covariances(operators: Tensor) -> Tensor:
    """(K, 6, 6): what S C S^T is of the entries xx, xy, xz, yy, yz, zz of a symmetric matrix C, S (K, 3, 3)."""
    rows, columns = torch.triu_indices(3, 3)
    units = torch.zeros(6, 3, 3, dtype=operators.dtype)
    units[torch.arange(6), rows, columns] = units[torch.arange(6), columns, rows] = 1
    turned = torch.einsum("kij,ejl,knl->kein", operators, units, operators)
    return turned[:, :, rows, columns].mT.contiguous()


def _turned(quaternions: Tensor, operators: Tensor) -> Tensor:
    """Quaternions (K G, 4) of S R from those of R (G, 4), w x y z, and S (K, 3, 3)."""
    if len(operators) == 1:
        return quaternions
    xyzw = Rotation.from_matrix(operators.double().cpu().numpy()).as_quat()
    w, x, y, z = torch.from_numpy(xyzw).to(quaternions)[:, [3, 0, 1, 2]].T
    product = torch.stack([w, -x, -y, -z, x, w, -z, y, y, z, w, -x, z, -y, x, w], 1).reshape(-1, 4, 4)
    return (quaternions @ product.mT).flatten(0, 1)


def mixture_to_map(mixture: dict[str, Tensor], box: int, pixel_size_a: float) -> Tensor:
    """Map (D, D, D) of an exported mixture (see :meth:`GaussianMixture.export`) on any grid.

    The map is in image units per pixel of depth of that grid.
    """
    covariances = ops.covariances(mixture["quaternions"], mixture["scales"] / pixel_size_a)
    return ops.voxelise(
        (mixture["means"] / pixel_size_a)[None],
        covariances[None],
        (mixture["amplitudes"] / pixel_size_a**2)[None],
        box,
        VOXEL_CUTOFF,
    )[0]


def inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
