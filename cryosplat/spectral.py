"""From a projection's spectrum to its loss and the adjoint's: CTF, data, weights, Parseval's sum, as one operator.

``csrc/residual.h`` is the contract. On a GPU one kernel does it and makes the CTF on its way, so that no image of a CTF
or of a residual is ever stored; here on the CPU it is written in PyTorch.
"""

import torch
from torch import Tensor

from cryosplat import cudaops
from cryosplat.batches import Batch
from cryosplat.ctf import RELATIVISTIC_PER_VOLT, WAVELENGTH_NUMERATOR_A, ctf_image


def half_spectra(images: Tensor) -> Tensor:
    """Orthonormal ``rfft2`` of images (..., D, D). MKL, unlike others, refuses to transform no image at all."""
    if images.numel() == 0:
        return images.new_zeros(*images.shape[:-1], images.shape[-1] // 2 + 1, dtype=images.dtype.to_complex())
    return torch.fft.rfft2(images, norm="ortho")


def spectral_losses(images: Tensor, batch: Batch, whitening: Tensor | None, pixel_size_a: float) -> Tensor:
    """Losses (views, B) of projections (views, B, D, D) of a batch's particles; differentiable in the projections.

    With X = rfft2(projection, ortho), Y the stored half-spectrum times the gain, w the whitening of the particle's half
    and f = w CTF,

        loss_v = 1/D^2 sum_k p_k |f(k) X_v(k) - w(k) Y(k)|^2

    with p_k = 2, or 1 where kx is its own mate: by Parseval the mean over pixels.

    Args:
        images: float32, or float64 on the CPU.
        batch: its particles, of images of D pixels.
        whitening: (2, D, D//2+1) of either half, or None for 1.
        pixel_size_a: A/px.
    """
    data = (batch.stored, batch.rows, batch.gain, batch.ctf, batch.half)
    return _SpectralLoss.apply(images, *data, whitening, pixel_size_a, batch.phases)


class _SpectralLoss(torch.autograd.Function):
    """Its gradient is 2/D^2 irfft2(f (f X - w Y)): one inverse transform, where autograd's own way through rfft2 takes
    a full complex one of zero-padded spectra."""

    @staticmethod
    def forward(ctx, images, stored, rows, gain, ctf, half, whitening, pixel_size_a, phases):
        ctx.box = images.shape[-1]
        data = (stored, rows, gain, ctf, half, whitening, ctx.box, pixel_size_a)
        spectra = half_spectra(images)
        losses = torch.ops.cryosplat.spectral_residual(spectra, *data, ctx.needs_input_grad[0], phases)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(spectra)
        return losses

    @staticmethod
    def backward(ctx, grad_losses: Tensor):
        (residual,) = ctx.saved_tensors
        if residual.numel() == 0:
            gradient = residual.real.new_zeros(*residual.shape[:-1], ctx.box)
        else:
            gradient = torch.fft.irfft2(residual, s=(ctx.box, ctx.box), norm="ortho")
            gradient.mul_((2 / ctx.box**2) * grad_losses[..., None, None])
        return gradient, *(None,) * 8


@torch.library.custom_op("cryosplat::spectral_residual", mutates_args=("spectra",), device_types="cpu")
def _spectral_residual(
    spectra: Tensor,
    stored: Tensor,
    rows: Tensor,
    gain: Tensor,
    ctf: Tensor | None,
    half: Tensor,
    whitening: Tensor | None,
    box: int,
    pixel_size_a: float,
    adjoint: bool,
    phases: Tensor | None = None,
) -> Tensor:
    """Losses (views, B); ``spectra`` (views, B, D, D//2+1), X before, is f (f X - w Y) after, if ``adjoint``."""
    return _in_pytorch(spectra, stored, rows, gain, ctf, half, whitening, box, pixel_size_a, adjoint, phases)


def _in_pytorch(spectra, stored, rows, gain, ctf, half, whitening, box, pixel_size_a, adjoint, phases) -> Tensor:
    observed = torch.view_as_complex(stored[rows].to(gain.dtype)) * gain[:, None, None]
    filters = None if ctf is None else ctf_image(ctf, box, pixel_size_a, phases)
    if whitening is not None:
        weights = whitening[half]
        filters = weights if filters is None else filters * weights
        observed = observed * weights
    if filters is not None:
        spectra *= filters
    spectra -= observed
    losses = 2 * _power(spectra) - _power(spectra[..., :1])
    if box % 2 == 0:
        losses -= _power(spectra[..., -1:])
    if adjoint and filters is not None:
        spectra *= filters
    return losses / box**2


def _power(spectra: Tensor) -> Tensor:
    return torch.linalg.vector_norm(torch.view_as_real(spectra), dim=(-3, -2, -1)).square()


@_spectral_residual.register_kernel("cuda")
def on_gpu(spectra, stored, rows, gain, ctf, half, whitening, box, pixel_size_a, adjoint, phases=None):
    """The same by the kernel, which leaves f (f X - w Y) whether it is asked for or not.

    It knows no phases of aberrations: with these it is done in PyTorch as on the CPU, with images of CTFs in memory.
    """
    if phases is not None:
        return _in_pytorch(spectra, stored, rows, gain, ctf, half, whitening, box, pixel_size_a, adjoint, phases)
    constants = WAVELENGTH_NUMERATOR_A, RELATIVISTIC_PER_VOLT, pixel_size_a
    return cudaops.spectral_residual(spectra, stored, rows, gain, ctf, half, whitening, box, constants)


@_spectral_residual.register_fake
def _(spectra, stored, rows, gain, ctf, half, whitening, box, pixel_size_a, adjoint, phases=None):
    return spectra.new_empty(spectra.shape[:2], dtype=gain.dtype)
