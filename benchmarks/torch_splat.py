"""The splat in vectorised PyTorch, as one would write it without a compiled core: what the kernels are timed against.

The same formula, units and cut-off as csrc/splat.h; gradients by autograd. Every Gaussian of a view is evaluated on a
patch of pixels that covers its footprint, and the patches are added into the image at once. Gaussians are grouped by
the size of their patch, so that a wide one does not widen all, and taken so many at a time that the temporaries stay
in a core's cache, or fill a GPU. Degenerate Gaussians are not looked for.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PATCH_STEP_PX = 4
"""Patches are rounded up to multiples of this: few groups, little waste."""

SAMPLES_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}
"""Gaussians x pixels of a patch held at a time: 1 MiB a temporary in float32 on a CPU, 256 MiB on a GPU."""


def splat(
    means: Tensor,
    covariances: Tensor,
    amplitudes: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    model: Tensor,
    box: int,
    cutoff: float,
) -> Tensor:
    """Images (V, box, box) of mixtures (M, G, 3), (M, G, 6), (M, G); arguments as of `cryosplat.reference.splat`."""
    rows = rotations[:, :2]
    symmetric = covariances[..., [0, 1, 2, 1, 3, 4, 2, 4, 5]].unflatten(-1, (3, 3))
    centres = means[model] @ rows.mT + (box // 2 - shifts)[:, None]
    projected = (rows[:, None] @ symmetric[model] @ rows[:, None].mT).flatten(2)[..., [0, 1, 3]]  # xx, xy, yy
    gaussians = torch.cat((centres, projected, amplitudes[model][..., None]), -1).flatten(0, 1)  # (V G, 6)
    first_pixels = (torch.arange(len(model), device=means.device) * box**2).repeat_interleave(means.shape[1])
    images = means.new_zeros(len(model) * box**2)
    for chunk, width, height in _groups(gaussians.detach(), box, cutoff):
        _add_patches(images, first_pixels[chunk], gaussians[chunk], width, height, box, cutoff)
    return images.view(-1, box, box)


def _groups(gaussians: Tensor, box: int, cutoff: float) -> Iterator[tuple[Tensor, int, int]]:
    """Indices (n,) of Gaussians that share a patch of width x height pixels; those off the image are left out."""
    first, last = _footprint(gaussians[:, :2], gaussians[:, [2, 4]], box, cutoff)
    steps = torch.ceil((last - first + 1) / PATCH_STEP_PX).long()
    key = torch.where((last >= first).all(1), steps[:, 0] * (box + 1) + steps[:, 1], -1)
    order = torch.argsort(key)
    keys, counts = torch.unique_consecutive(key[order], return_counts=True)
    for value, members in zip(keys.tolist(), order.split(counts.tolist()), strict=True):
        if value >= 0:
            width, height = (PATCH_STEP_PX * n for n in divmod(value, box + 1))
            for chunk in members.split(max(1, SAMPLES_AT_ONCE[gaussians.device.type] // (width * height))):
                yield chunk, width, height


def _footprint(centres: Tensor, variances: Tensor, box: int, cutoff: float) -> tuple[Tensor, Tensor]:
    """The first and the last pixel within the cut-off, clipped to the image."""
    reach = cutoff * torch.sqrt(variances)
    return torch.ceil(centres - reach).clamp(min=0), torch.floor(centres + reach).clamp(max=box - 1)


def _add_patches(
    images: Tensor, first_pixels: Tensor, gaussians: Tensor, width: int, height: int, box: int, cutoff: float
) -> None:
    """Adds to ``images`` (V box^2,) the densities of Gaussians (n, 6) = centre x, y, C xx, xy, yy, amplitude."""
    x0, y0, xx, xy, yy, amplitudes = (values[:, None] for values in gaussians.unbind(1))
    x, dx, x_inside = _patch_axis(x0, xx, width, box, cutoff)  # (n, width)
    y, dy, y_inside = _patch_axis(y0, yy, height, box, cutoff)  # (n, height)
    determinant = xx * yy - xy * xy
    along_x = torch.where(x_inside, -0.5 * yy / determinant * dx**2, -math.inf)
    along_y = torch.where(y_inside, -0.5 * xx / determinant * dy**2, -math.inf)
    mixed = (xy / determinant * dy)[:, :, None] * dx[:, None, :]
    peaks = amplitudes / (2 * math.pi * torch.sqrt(determinant))
    densities = peaks[:, :, None] * torch.exp(mixed + along_x[:, None, :] + along_y[:, :, None])
    pixels = (y * box + first_pixels[:, None])[:, :, None] + x[:, None, :]
    images.index_add_(0, pixels.flatten(), densities.flatten())


def _patch_axis(centre: Tensor, variance: Tensor, size: int, box: int, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (n, size) of the patches along an axis, their offsets from the centres, and which are in the footprint."""
    first, last = _footprint(centre.detach(), variance.detach(), box, cutoff)
    pixels = first + torch.arange(size, dtype=centre.dtype, device=centre.device)
    return pixels.clamp(max=box - 1).long(), pixels - centre, pixels <= last
