"""The compiled core in plain PyTorch: any floating dtype, derivatives by autograd, slow and meant to be read.

Written from the contract (csrc/splat.h) and sharing no code with csrc, so that a wrong formula cannot agree with
itself. Tests import it, nothing else does. Where the contract factors a volume's plane into a density along z and a
conditional one, `voxelise` here takes the three-dimensional density itself, and the conditional only for the cut.

Units are pixels of the output grid, vectors are (x, y, z), images [y, x], volumes [z, y, x], and the origin is index
box // 2 on every axis.
"""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SAMPLES_AT_ONCE = 2**17
"""Gaussians x pixels held at a time: 1 MiB a temporary in float64, which stays in a core's cache."""


def symmetric_matrices(covariances: Tensor) -> Tensor:
    """Six stored entries (..., 6) in the order xx, xy, xz, yy, yz, zz as symmetric matrices (..., 3, 3).

    Autograd through the repeated entries gives an off-diagonal number the derivative of both its places.

    >>> symmetric_matrices(torch.arange(1.0, 7.0)).tolist()
    [[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]]
    """
    return covariances[..., [0, 1, 2, 1, 3, 4, 2, 4, 5]].unflatten(-1, (3, 3))


def project(means: Tensor, covariances: Tensor, rotation: Tensor, shift: Tensor, box: int) -> tuple[Tensor, Tensor]:
    """Gaussians (G, 3), (G, 6) seen under one pose: centres m (G, 2) in pixels and covariances C (G, 2, 2) in px^2.

        m = (R mu)_xy + box // 2 - t          C = W S W^T, W the first two rows of R

    Only W enters, so the gradient of the third row of ``rotation`` (3, 3) is zero. ``shift`` (2,) is in pixels.
    """
    rows = rotation[:2]
    centres = means @ rows.T + box // 2 - shift
    return centres, rows @ symmetric_matrices(covariances) @ rows.T


def splat(
    means: Tensor,
    covariances: Tensor,
    amplitudes: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    model: Tensor,
    box: int,
    cutoff: float | None,
) -> Tensor:
    """Orthographic projections of Gaussian mixtures, images (V, box, box).

        image[v, y, x] = sum_g A_g exp(-d^T C^-1 d / 2) / (2 pi sqrt(det C)),   d = (x, y) - m
        over the pixels with |d_x| <= cutoff sqrt(C_xx) and |d_y| <= cutoff sqrt(C_yy)

    with g over mixture model[v], and m, C as `project` gives them. means (M, G, 3) px, covariances (M, G, 6) px^2,
    amplitudes (M, G), rotations (V, 3, 3), shifts (V, 2) px, model (V,) int64. ``cutoff`` is in standard deviations,
    None for no cut; its edge is not differentiated. A Gaussian that is not finite, or whose C is not positive definite,
    makes its whole view NaN, and NaN the gradients of all that the view was made of.
    """
    images = [
        _splat_view(means[m], covariances[m], amplitudes[m], rotation, shift, box, cutoff)
        for m, rotation, shift in zip(model.tolist(), rotations, shifts, strict=True)
    ]
    inputs = (means, covariances, amplitudes, rotations, shifts)
    return torch.stack(images) if images else _everywhere(0.0, inputs, (0, box, box))


def voxelise(means: Tensor, covariances: Tensor, amplitudes: Tensor, box: int, cutoff: float | None) -> Tensor:
    """Gaussian mixtures on the voxel grid, volumes (M, box, box, box).

        volume[m, z, y, x] = sum_g A_g exp(-d^T S^-1 d / 2) / sqrt((2 pi)^3 det S),   d = (x, y, z) - mu - box // 2
        over the voxels with |d_z| <= cutoff sqrt(S_zz) and, with a = (x, y) and the conditional Gaussian of a given z,
        |d_a - S_az d_z / S_zz| <= cutoff sqrt(S_aa - S_az^2 / S_zz) for a = x and for a = y

    means (M, G, 3) px, covariances (M, G, 6) px^2, amplitudes (M, G). ``cutoff`` and degenerate Gaussians as in
    `splat`, with a mixture in the place of a view.
    """
    volumes = [_voxelise_mixture(*mixture, box, cutoff) for mixture in zip(means, covariances, amplitudes, strict=True)]
    return torch.stack(volumes) if volumes else _everywhere(0.0, (means, covariances, amplitudes), (0, box, box, box))


def _splat_view(means, covariances, amplitudes, rotation, shift, box, cutoff) -> Tensor:
    """One image (box, box) of one mixture (G, 3), (G, 6), (G,)."""
    centres, projected = project(means, covariances, rotation, shift, box)
    if _degenerate(centres, projected, amplitudes):
        return _everywhere(math.nan, (means, covariances, amplitudes, rotation, shift), (box, box))
    return _sum_in_chunks(_sum_projections, (centres, projected, amplitudes), box, cutoff)


def _sum_projections(centres, covariances, amplitudes, box, cutoff) -> Tensor:
    """Sum over Gaussians of two-dimensional densities, (box, box)."""
    dx, dy = _offsets(centres, box)
    precision = torch.linalg.inv(covariances)
    p = {name: precision[:, i, j, None, None] for name, i, j in _ENTRIES if "z" not in name}
    exponent = p["xx"] * dx**2 + 2 * p["xy"] * dx * dy + p["yy"] * dy**2
    peaks = amplitudes / (2 * math.pi * torch.sqrt(torch.linalg.det(covariances)))
    inside = _within(dx, covariances[:, 0, 0], cutoff) & _within(dy, covariances[:, 1, 1], cutoff)
    return _sum_exponentials(peaks, exponent, inside)


def _voxelise_mixture(means, covariances, amplitudes, box, cutoff) -> Tensor:
    """One volume (box, box, box) of one mixture (G, 3), (G, 6), (G,), plane by plane."""
    matrices = symmetric_matrices(covariances)
    if _degenerate(means, matrices, amplitudes):
        return _everywhere(math.nan, (means, covariances, amplitudes), (box, box, box))
    planes = []
    for z in range(box):
        dz = z - means[:, 2] - box // 2
        here = _within(dz, matrices[:, 2, 2], cutoff)
        section = (means[here, :2] + box // 2, dz[here], matrices[here], amplitudes[here])
        planes.append(_sum_in_chunks(_sum_in_section, section, box, cutoff))
    return torch.stack(planes)


def _sum_in_section(centres, dz, covariances, amplitudes, box, cutoff) -> Tensor:
    """Sum over Gaussians of three-dimensional densities in a plane dz (G,) above their centres, (box, box)."""
    dx, dy = _offsets(centres, box)
    precision = torch.linalg.inv(covariances)
    p = {name: precision[:, i, j, None, None] for name, i, j in _ENTRIES}
    in_plane = p["xx"] * dx**2 + 2 * p["xy"] * dx * dy + p["yy"] * dy**2
    h = dz[:, None, None]
    exponent = in_plane + 2 * h * (p["xz"] * dx + p["yz"] * dy) + p["zz"] * h**2
    peaks = amplitudes / torch.sqrt((2 * math.pi) ** 3 * torch.linalg.det(covariances))

    slopes = covariances[:, :2, 2] / covariances[:, 2:, 2]  # of the conditional mean of (x, y), px per px of z
    variances = covariances.diagonal(dim1=1, dim2=2)[:, :2] - slopes * covariances[:, :2, 2]
    moved_x, moved_y = _offsets(centres + slopes * dz[:, None], box)
    inside = _within(moved_x, variances[:, 0], cutoff) & _within(moved_y, variances[:, 1], cutoff)
    return _sum_exponentials(peaks, exponent, inside)


_ENTRIES = (("xx", 0, 0), ("xy", 0, 1), ("xz", 0, 2), ("yy", 1, 1), ("yz", 1, 2), ("zz", 2, 2))


def _sum_in_chunks(sum_densities, gaussians: tuple[Tensor, ...], box, cutoff) -> Tensor:
    """``sum_densities`` over the Gaussians (tensors (G, ...)), SAMPLES_AT_ONCE at a time, (box, box).

    What a chunk needs for its gradient is computed again in the backward pass, so memory does not grow with G. An
    empty mixture is one empty chunk, so that its zeros are differentiable too.
    """
    step = max(1, SAMPLES_AT_ONCE // box**2)
    total = gaussians[0].new_zeros(box, box)
    for start in range(0, max(1, len(gaussians[0])), step):
        chunk = [values[start : start + step] for values in gaussians]
        total = total + checkpoint(sum_densities, *chunk, box, cutoff, use_reentrant=False)
    return total


def _offsets(centres: Tensor, box: int) -> tuple[Tensor, Tensor]:
    """Pixels minus centres (G, 2): dx (G, 1, box) and dy (G, box, 1)."""
    offsets = torch.arange(box, dtype=centres.dtype, device=centres.device) - centres[..., None]
    return offsets[:, 0, None, :], offsets[:, 1, :, None]


def _within(offsets: Tensor, variances: Tensor, cutoff: float | None) -> Tensor:
    """|offset| <= cutoff standard deviations, offsets (G, ...) and variances (G,); everywhere without a cutoff."""
    if cutoff is None:
        return torch.ones_like(offsets, dtype=torch.bool)
    return offsets.abs() <= cutoff * torch.sqrt(variances).reshape(-1, *[1] * (offsets.ndim - 1))


def _sum_exponentials(peaks: Tensor, exponent: Tensor, inside: Tensor) -> Tensor:
    """sum_g peak_g exp(-exponent / 2) where inside: peaks (G,), exponent and inside (G, Y, X).

    The exponent is replaced before the exponential too: far outside it may overflow, and its gradient be 0 x inf.
    """
    densities = torch.exp(-0.5 * torch.where(inside, exponent, 0.0))
    return torch.einsum("g,gyx->yx", peaks, torch.where(inside, densities, 0.0))


def _degenerate(centres: Tensor, covariances: Tensor, amplitudes: Tensor) -> bool:
    """Whether any Gaussian is not finite or not positive definite (a Cholesky factor does not exist)."""
    finite = all(bool(values.isfinite().all()) for values in (centres, covariances, amplitudes))
    return not finite or bool(torch.linalg.cholesky_ex(covariances.detach()).info.any())


def _everywhere(value: float, inputs: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
    """NaN (or zero for finite inputs) everywhere, and the same the derivative with respect to every input."""
    return sum((value * values).sum() for values in inputs).expand(shape)


def quaternion_to_rotation(quaternions: Tensor) -> Tensor:
    """Rotations (..., 3, 3) of quaternions (..., 4) w, x, y, z, which are normalised here.

    >>> quaternion_to_rotation(torch.tensor([0.0, 0.0, 0.0, 2.0])).diagonal()
    tensor([-1., -1.,  1.])
    """
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=-1).unbind(-1)
    entries = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(entries, -1).unflatten(-1, (3, 3))


def covariances(quaternions: Tensor, scales: Tensor) -> Tensor:
    """R(q) diag(s^2) R(q)^T as entries xx, xy, xz, yy, yz, zz (..., 6), of quaternions (..., 4) and scales (..., 3)."""
    rotations = quaternion_to_rotation(quaternions)
    matrices = rotations @ torch.diag_embed(scales.square()) @ rotations.mT
    rows, columns = torch.triu_indices(3, 3)
    return matrices[..., rows, columns]
