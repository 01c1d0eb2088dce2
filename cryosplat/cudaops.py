"""Starts the kernels on GPUs: allocates what they write and work in, passes addresses, device and stream.

The same operators as in ``ops``, which has checked the arguments, and registers these functions for CUDA tensors. They
wait for nothing: what goes wrong on the device shows at the next synchronisation, as everywhere in PyTorch.
"""

import torch
from torch import Tensor

from cryosplat._extension import HAS_CUDA, core
from cryosplat.errors import InputError

LARGEST_BOX = 4096
"""Of csrc/cuda/footprint.h: pixels are counted in 16 bits."""


def kernels_of(dtype: torch.dtype):
    """The compiled kernels of a precision.

    Raises:
        InputError: the core was built without CUDA.
    """
    if not HAS_CUDA:
        raise InputError(
            "the compiled core has no CUDA half, and this tensor is on a GPU: build it again where there is nvcc "
            "('cryosplat doctor' says more), or use train.device=cpu"
        )
    return core.cuda.float32 if dtype == torch.float32 else core.cuda.float64


def queue_of(tensor: Tensor) -> tuple[int, int]:
    """Index of a tensor's device, and its current stream.

    The core has a CUDA runtime of its own, which must be told both.
    """
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


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
    """Images (V, D, D), see :func:`cryosplat.ops.splat`."""
    _require_box(box)
    kernels = kernels_of(means.dtype)
    inputs = [t.contiguous() for t in (means, covariances, amplitudes, rotations, shifts, model)]
    shape = (means.shape[0], means.shape[1], model.shape[0], box)
    images = means.new_empty(model.shape[0], box, box)
    work = _workspace(kernels.splat_forward_bytes(*shape), means)
    kernels.splat_forward(*shape, *addresses(*inputs), cutoff, images.data_ptr(), work.data_ptr(), *queue_of(means))
    return images


def splat_backward(
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
    kernels = kernels_of(means.dtype)
    inputs = [t.contiguous() for t in (means, covariances, amplitudes, rotations, shifts, model)]
    grad_images = grad_images.contiguous()
    gradients = [torch.empty_like(t) for t in inputs[:3]]
    of_poses = [torch.empty_like(t) if poses else t.new_empty(0) for t in inputs[3:5]]
    shape = (means.shape[0], means.shape[1], model.shape[0], box)
    work = _workspace(kernels.splat_backward_bytes(*shape, poses), means)
    kernels.splat_backward(
        *shape,
        *addresses(*inputs),
        cutoff,
        grad_images.data_ptr(),
        *addresses(*gradients),
        *(addresses(*of_poses) if poses else (0, 0)),
        work.data_ptr(),
        *queue_of(means),
    )
    return (*gradients, *of_poses)


def voxelise(means: Tensor, covariances: Tensor, amplitudes: Tensor, box: int, cutoff: float) -> Tensor:
    """Volumes (M, D, D, D), see :func:`cryosplat.ops.voxelise`."""
    _require_box(box)
    kernels = kernels_of(means.dtype)
    inputs = [t.contiguous() for t in (means, covariances, amplitudes)]
    shape = (means.shape[0], means.shape[1], box)
    volumes = means.new_empty(means.shape[0], box, box, box)
    work = _workspace(kernels.voxelise_forward_bytes(*shape), means)
    kernels.voxelise_forward(*shape, *addresses(*inputs), cutoff, volumes.data_ptr(), work.data_ptr(), *queue_of(means))
    return volumes


def voxelise_backward(
    grad_volumes: Tensor, means: Tensor, covariances: Tensor, amplitudes: Tensor, box: int, cutoff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of means, covariances and amplitudes."""
    kernels = kernels_of(means.dtype)
    inputs = [t.contiguous() for t in (means, covariances, amplitudes)]
    grad_volumes = grad_volumes.contiguous()
    gradients = [torch.empty_like(t) for t in inputs]
    shape = (means.shape[0], means.shape[1], box)
    work = _workspace(kernels.voxelise_backward_bytes(*shape), means)
    kernels.voxelise_backward(
        *shape,
        *addresses(*inputs),
        cutoff,
        grad_volumes.data_ptr(),
        *addresses(*gradients),
        work.data_ptr(),
        *queue_of(means),
    )
    return tuple(gradients)


def covariances(quaternions: Tensor, scales: Tensor) -> Tensor:
    """Entries (..., 6), see :func:`cryosplat.ops.covariances`."""
    inputs = [t.contiguous() for t in (quaternions, scales)]
    entries = scales.new_empty(*scales.shape[:-1], 6)
    kernels_of(scales.dtype).covariances_forward(
        scales.numel() // 3, *addresses(*inputs), entries.data_ptr(), *queue_of(scales)
    )
    return entries


def covariances_backward(grad_entries: Tensor, quaternions: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of quaternions and scales."""
    inputs = [t.contiguous() for t in (quaternions, scales, grad_entries)]
    gradients = [torch.empty_like(t) for t in inputs[:2]]
    kernels_of(scales.dtype).covariances_backward(
        scales.numel() // 3, *addresses(*inputs), *addresses(*gradients), *queue_of(scales)
    )
    return tuple(gradients)


def insert(values: Tensor, weights: Tensor, rotations: Tensor, shifts: Tensor, grid: Tensor, sums: Tensor) -> None:
    """See :func:`cryosplat.ops.insert`. With torch's deterministic algorithms on, the same bits on every run."""
    inputs = [t.contiguous() for t in (torch.view_as_real(values.resolve_conj()), weights, rotations, shifts, grid)]
    kernels_of(sums.dtype).insert(
        *(sums.shape[0], values.shape[0], values.shape[1], sums.shape[1]),
        *addresses(*inputs),
        sums.data_ptr(),
        torch.are_deterministic_algorithms_enabled(),
        *queue_of(sums),
    )


def spectral_residual(
    spectra: Tensor,
    stored: Tensor,
    rows: Tensor,
    gain: Tensor,
    ctf: Tensor | None,
    half: Tensor,
    whitening: Tensor | None,
    box: int,
    constants: tuple[float, float, float],
) -> Tensor:
    """Losses (views, B), see :mod:`cryosplat.spectral`; ``spectra`` (views, B, D, D//2+1) is overwritten.

    ``constants``: of the CTF, in the order of csrc/residual.h.

    Raises:
        InputError: double precision.
    """
    if spectra.dtype != torch.complex64 or stored.dtype not in (torch.float16, torch.float32):
        raise InputError(f"spectra: GPUs take single precision, got {spectra.dtype}, images of {stored.dtype}")
    kernels, shape = kernels_of(torch.float32), (*spectra.shape[:2], box)
    assert spectra.is_contiguous() and stored.is_contiguous()
    losses = gain.new_empty(spectra.shape[:2])
    work = _workspace(kernels.residual_bytes(*shape), spectra)
    given = [None if t is None else t.contiguous() for t in (rows, gain, ctf, half, whitening)]
    kernels.residual(
        *shape,
        stored.data_ptr(),
        stored.dtype == torch.float16,
        *(0 if t is None else t.data_ptr() for t in given),
        *constants,
        *addresses(spectra, losses, work),
        *queue_of(spectra),
    )
    return losses


def addresses(*tensors: Tensor) -> list[int]:
    """Of the first elements."""
    return [tensor.data_ptr() for tensor in tensors]


def _require_box(box: int) -> None:
    if box > LARGEST_BOX:
        raise InputError(f"box: GPUs draw up to {LARGEST_BOX} pixels a side, got {box}; use the CPU, or a smaller box")


def _workspace(size: int, like: Tensor) -> Tensor:
    """Bytes for kernels to work in; torch's allocator aligns them to 512."""
    return torch.empty(size, dtype=torch.uint8, device=like.device)
