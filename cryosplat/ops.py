"""The compiled kernels as PyTorch operators, differentiable but for insertion.

``csrc/splat.h`` and ``csrc/insert.h`` are the contract: symbols, units, formulas, the cut-off. Here
arguments are checked, outputs allocated and addresses passed; autograd and
``torch.compile`` see ordinary operators (``torch.ops.cryosplat``).
"""

import torch
from torch import Tensor

from cryosplat import cudaops
from cryosplat._extension import core
from cryosplat.cudaops import addresses
from cryosplat.errors import InputError


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
    """Project mixtures along z under given poses; differentiable in all five float arguments.

    Args:
        means: (M, G, 3) positions x, y, z in pixels from the centre.
        covariances: (M, G, 6) entries xx, xy, xz, yy, yz, zz in pixels squared, positive definite.
        amplitudes: (M, G) integrals of the Gaussians, of either sign.
        rotations: (V, 3, 3) with x_image = R x_volume.
        shifts: (V, 2) in pixels; the volume's origin is seen at ``box // 2 - shift``.
        model: (V,) int64, which of the M mixtures each view shows.
        box: D, the side of an image in pixels.
        cutoff: standard deviations drawn on either side, per axis of the image. Relative L2
            error of an image about 2e-3 at 3.5 and 1e-5 at 4.8.

    Returns:
        Images (V, D, D), axes [y, x], of the dtype of ``means`` (float32 or float64).

    Raises:
        InputError: a wrong shape, dtype or device, or a model index out of range.

    >>> one, three = torch.ones(1, 1), torch.zeros(1, 1, 3)
    >>> covariance = torch.tensor([[[4.0, 0.0, 0.0, 4.0, 0.0, 4.0]]])
    >>> pose = torch.eye(3)[None], torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    >>> image = splat(three, covariance, one, *pose, box=32, cutoff=5.0)
    >>> image.shape, round(float(image.sum()), 4), image[0].argmax().item() == 16 * 32 + 16
    (torch.Size([1, 32, 32]), 1.0, True)
    """
    models, gaussians = _check_mixtures(means, covariances, amplitudes, box, cutoff)
    views = model.shape[0] if model.dim() == 1 else -1
    _check("model", model, (views,), torch.int64, means.device)
    _check("rotations", rotations, (views, 3, 3), means.dtype, means.device)
    _check("shifts", shifts, (views, 2), means.dtype, means.device)
    if views and model.device.type == "cpu" and not (0 <= int(model.min()) and int(model.max()) < models):
        raise InputError(f"model: indices must lie in 0..{models - 1}, found {int(model.min())}..{int(model.max())}")
    return torch.ops.cryosplat.splat(means, covariances, amplitudes, rotations, shifts, model, box, cutoff)


def voxelise(means: Tensor, covariances: Tensor, amplitudes: Tensor, box: int, cutoff: float) -> Tensor:
    """Sample mixtures on the voxel grid; differentiable in all three tensors.

    Args:
        means, covariances, amplitudes, cutoff: as for :func:`splat`.
        box: D, the side of a volume in voxels.

    Returns:
        Volumes (M, D, D, D), axes [z, y, x].

    Raises:
        InputError: a wrong shape, dtype or device.
    """
    _check_mixtures(means, covariances, amplitudes, box, cutoff)
    return torch.ops.cryosplat.voxelise(means, covariances, amplitudes, box, cutoff)


def covariances(quaternions: Tensor, scales: Tensor) -> Tensor:
    """Covariances R(q) diag(s^2) R(q)^T; differentiable in both.

    Args:
        quaternions: (..., 4) w, x, y, z, not zero; they are normalised here.
        scales: (..., 3) standard deviations along the columns of R.

    Returns:
        Entries xx, xy, xz, yy, yz, zz (..., 6), in the square of the scales' unit.

    Raises:
        InputError: a wrong shape, dtype or device.

    >>> covariances(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[1., 0., 0., 4., 0., 9.]])
    """
    if quaternions.dtype not in (torch.float32, torch.float64):
        raise InputError(f"quaternions: expected float32 or float64, got {quaternions.dtype}")
    if quaternions.dim() < 1 or quaternions.shape[-1] != 4:
        raise InputError(f"quaternions: expected shape (..., 4), got {tuple(quaternions.shape)}")
    _check("scales", scales, (*quaternions.shape[:-1], 3), quaternions.dtype, quaternions.device)
    return torch.ops.cryosplat.covariances(quaternions, scales)


def insert(values: Tensor, weights: Tensor, rotations: Tensor, shifts: Tensor, grid: Tensor, sums: Tensor) -> None:
    """Add the half-spectra of images to Fourier grids, each along its slice, in place (back-projection).

    Args:
        values: (V, D, D//2+1) complex64 or complex128, CTF times image transform over noise variance; D even.
        weights: (V, D, D//2+1), CTF squared over noise variance.
        rotations: (V, 3, 3) with x_image = R x_volume.
        shifts: (V, 2) in pixels; the volume's origin is seen at ``D // 2 - shift``.
        grid: (V,) int64, which of the K grids each view goes to.
        sums: (K, P, P, P//2+1, 4), contiguous, P even and at least D: real and imaginary part of the numerator, the
            denominator and the coverage, as csrc/insert.h says.

    Raises:
        InputError: a wrong shape, dtype or device, or a grid index out of range.

    >>> sums = torch.zeros(1, 8, 8, 5, 4)
    >>> image = torch.ones(1, 4, 3, dtype=torch.complex64), torch.ones(1, 4, 3)
    >>> insert(*image, torch.eye(3)[None], torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), sums)
    >>> sums[0, 0, 2, 2].abs().round(decimals=5).tolist()  # z, y, x = 0, 2, 2 is kx = ky = 1
    [1.0, 0.0, 1.0, 1.0]
    """
    if values.dtype not in (torch.complex64, torch.complex128) or values.dim() != 3 or values.shape[1] % 2:
        raise InputError(f"values: expected complex (V, D, D//2+1), D even, got {values.dtype} {tuple(values.shape)}")
    views, box = values.shape[:2]
    real = values.dtype.to_real()
    _check("values", values, (views, box, box // 2 + 1), values.dtype, values.device)
    _check("weights", weights, tuple(values.shape), real, values.device)
    _check("rotations", rotations, (views, 3, 3), real, values.device)
    _check("shifts", shifts, (views, 2), real, values.device)
    _check("grid", grid, (views,), torch.int64, values.device)
    padded = sums.shape[1] if sums.dim() == 5 else -1
    _check("sums", sums, (sums.shape[0], padded, padded, padded // 2 + 1, 4), real, values.device)
    if padded % 2 or padded < box or not sums.is_contiguous():
        raise InputError(f"sums: expected a contiguous grid of even side, at least {box}, got {tuple(sums.shape)}")
    if views and grid.device.type == "cpu" and not (0 <= int(grid.min()) and int(grid.max()) < len(sums)):
        raise InputError(f"grid: indices must lie in 0..{len(sums) - 1}, found {int(grid.min())}..{int(grid.max())}")
    torch.ops.cryosplat.insert(values, weights, rotations, shifts, grid, sums)


def _check_mixtures(means: Tensor, covariances: Tensor, amplitudes: Tensor, box: int, cutoff: float) -> tuple[int, int]:
    if means.dtype not in (torch.float32, torch.float64):
        raise InputError(f"means: expected float32 or float64, got {means.dtype}")
    if means.dim() != 3 or means.shape[-1] != 3:
        raise InputError(f"means: expected shape (models, Gaussians, 3), got {tuple(means.shape)}")
    models, gaussians = means.shape[:2]
    _check("covariances", covariances, (models, gaussians, 6), means.dtype, means.device)
    _check("amplitudes", amplitudes, (models, gaussians), means.dtype, means.device)
    if box < 1:
        raise InputError(f"box: expected at least 1 pixel, got {box}")
    if not cutoff > 0:
        raise InputError(f"cutoff: expected a positive number of standard deviations, got {cutoff}")
    return models, gaussians


def _check(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(value.shape) != shape:
        raise InputError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if value.dtype != dtype:
        raise InputError(f"{name}: expected {dtype}, got {value.dtype}")
    if value.device != device:
        raise InputError(f"{name}: expected device {device}, as of means, got {value.device}")


def _kernels(dtype: torch.dtype):
    return core.float32 if dtype == torch.float32 else core.float64


@torch.library.custom_op("cryosplat::splat", mutates_args=(), device_types="cpu")
def _splat(
    means: Tensor,
    covariances: Tensor,
    amplitudes: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    model: Tensor,
    box: int,
    cutoff: float,
) -> Tensor:
    inputs = [t.contiguous() for t in (means, covariances, amplitudes, rotations, shifts, model)]
    images = means.new_empty(model.shape[0], box, box)
    shape = (means.shape[0], means.shape[1], model.shape[0], box)
    _kernels(means.dtype).splat_forward(*shape, *addresses(*inputs), cutoff, images.data_ptr(), torch.get_num_threads())
    return images


@_splat.register_fake
def _(means, covariances, amplitudes, rotations, shifts, model, box, cutoff):
    return means.new_empty(model.shape[0], box, box)


@torch.library.custom_op("cryosplat::splat_backward", mutates_args=(), device_types="cpu")
def _splat_backward(
    grad_images: Tensor,
    means: Tensor,
    covariances: Tensor,
    amplitudes: Tensor,
    rotations: Tensor,
    shifts: Tensor,
    model: Tensor,
    box: int,
    cutoff: float,
    poses: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of means, covariances, amplitudes, rotations and shifts; the last two are empty unless ``poses``."""
    inputs = [t.contiguous() for t in (means, covariances, amplitudes, rotations, shifts, model)]
    grad_images = grad_images.contiguous()
    gradients = [torch.empty_like(t) for t in inputs[:3]]
    of_poses = [torch.empty_like(t) if poses else t.new_empty(0) for t in inputs[3:5]]
    shape = (means.shape[0], means.shape[1], model.shape[0], box)
    _kernels(means.dtype).splat_backward(
        *shape,
        *addresses(*inputs),
        cutoff,
        grad_images.data_ptr(),
        *addresses(*gradients),
        *(addresses(*of_poses) if poses else (0, 0)),
        torch.get_num_threads(),
    )
    return (*gradients, *of_poses)


@_splat_backward.register_fake
def _(grad_images, means, covariances, amplitudes, rotations, shifts, model, box, cutoff, poses):
    like = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (means, covariances, amplitudes)]
    of_poses = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if poses else t.new_empty(0)
        for t in (rotations, shifts)
    ]
    return (*like, *of_poses)


def _splat_setup(ctx, inputs, output):
    *tensors, ctx.box, ctx.cutoff = inputs
    ctx.save_for_backward(*tensors)


def _splat_autograd(ctx, grad_images):
    poses = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    gradients = torch.ops.cryosplat.splat_backward(grad_images, *ctx.saved_tensors, ctx.box, ctx.cutoff, poses)
    of_poses = gradients[3:] if poses else (None, None)
    return (*gradients[:3], *of_poses, None, None, None)


_splat.register_autograd(_splat_autograd, setup_context=_splat_setup)


@torch.library.custom_op("cryosplat::voxelise", mutates_args=(), device_types="cpu")
def _voxelise(means: Tensor, covariances: Tensor, amplitudes: Tensor, box: int, cutoff: float) -> Tensor:
    inputs = [t.contiguous() for t in (means, covariances, amplitudes)]
    volumes = means.new_empty(means.shape[0], box, box, box)
    _kernels(means.dtype).voxelise_forward(
        means.shape[0], means.shape[1], box, *addresses(*inputs), cutoff, volumes.data_ptr(), torch.get_num_threads()
    )
    return volumes


@_voxelise.register_fake
def _(means, covariances, amplitudes, box, cutoff):
    return means.new_empty(means.shape[0], box, box, box)


@torch.library.custom_op("cryosplat::voxelise_backward", mutates_args=(), device_types="cpu")
def _voxelise_backward(
    grad_volumes: Tensor, means: Tensor, covariances: Tensor, amplitudes: Tensor, box: int, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of means, covariances and amplitudes."""
    inputs = [t.contiguous() for t in (means, covariances, amplitudes)]
    grad_volumes = grad_volumes.contiguous()
    gradients = [torch.empty_like(t) for t in inputs]
    _kernels(means.dtype).voxelise_backward(
        means.shape[0],
        means.shape[1],
        box,
        *addresses(*inputs),
        cutoff,
        grad_volumes.data_ptr(),
        *addresses(*gradients),
        torch.get_num_threads(),
    )
    return tuple(gradients)


@_voxelise_backward.register_fake
def _(grad_volumes, means, covariances, amplitudes, box, cutoff):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (means, covariances, amplitudes))


def _voxelise_setup(ctx, inputs, output):
    *tensors, ctx.box, ctx.cutoff = inputs
    ctx.save_for_backward(*tensors)


def _voxelise_autograd(ctx, grad_volumes):
    return (
        *torch.ops.cryosplat.voxelise_backward(grad_volumes, *ctx.saved_tensors, ctx.box, ctx.cutoff),
        None,
        None,
    )


_voxelise.register_autograd(_voxelise_autograd, setup_context=_voxelise_setup)


@torch.library.custom_op("cryosplat::covariances", mutates_args=(), device_types="cpu")
def _covariances(quaternions: Tensor, scales: Tensor) -> Tensor:
    inputs = [t.contiguous() for t in (quaternions, scales)]
    entries = scales.new_empty(*scales.shape[:-1], 6)
    count = scales.numel() // 3
    _kernels(scales.dtype).covariances_forward(count, *addresses(*inputs), entries.data_ptr(), torch.get_num_threads())
    return entries


@_covariances.register_fake
def _(quaternions, scales):
    return scales.new_empty(*scales.shape[:-1], 6)


@torch.library.custom_op("cryosplat::covariances_backward", mutates_args=(), device_types="cpu")
def _covariances_backward(grad_entries: Tensor, quaternions: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of quaternions and scales."""
    inputs = [t.contiguous() for t in (quaternions, scales, grad_entries)]
    gradients = [torch.empty_like(t) for t in inputs[:2]]
    count = scales.numel() // 3
    _kernels(scales.dtype).covariances_backward(
        count, *addresses(*inputs), *addresses(*gradients), torch.get_num_threads()
    )
    return tuple(gradients)


@_covariances_backward.register_fake
def _(grad_entries, quaternions, scales):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (quaternions, scales))


def _covariances_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _covariances_autograd(ctx, grad_entries):
    return torch.ops.cryosplat.covariances_backward(grad_entries, *ctx.saved_tensors)


_covariances.register_autograd(_covariances_autograd, setup_context=_covariances_setup)


@torch.library.custom_op("cryosplat::insert", mutates_args=("sums",), device_types="cpu")
def _insert(values: Tensor, weights: Tensor, rotations: Tensor, shifts: Tensor, grid: Tensor, sums: Tensor) -> None:
    inputs = [t.contiguous() for t in (torch.view_as_real(values.resolve_conj()), weights, rotations, shifts, grid)]
    shape = (sums.shape[0], values.shape[0], values.shape[1], sums.shape[1])
    _kernels(sums.dtype).insert(*shape, *addresses(*inputs), sums.data_ptr(), torch.get_num_threads())


@_insert.register_fake
def _(values, weights, rotations, shifts, grid, sums):
    return None


for _operator, _on_gpu in (
    (_splat, cudaops.splat),
    (_splat_backward, cudaops.splat_backward),
    (_voxelise, cudaops.voxelise),
    (_voxelise_backward, cudaops.voxelise_backward),
    (_covariances, cudaops.covariances),
    (_covariances_backward, cudaops.covariances_backward),
    (_insert, cudaops.insert),
):
    _operator.register_kernel("cuda")(_on_gpu)
