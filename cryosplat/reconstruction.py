"""The forward model and its loss, as the one module that DDP wraps."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cryosplat.ctf import ctf_image
from cryosplat.dataset import Batch
from cryosplat.gaussians import GaussianMixture

FULL = 0
MODEL_NAMES = ("full", "half_a", "half_b")


class Reconstruction(nn.Module):
    """Mixtures seen through poses and CTF, compared with images in Fourier space.

    A particle i of half h is shown by the full model and, if halves are trained, by model 1 + h. Its
    loss under a model is the mean over pixels of the squared, optionally whitened, difference, by
    Parseval from the orthonormal half-spectra:

        loss_i = 1/D^2 sum_k p_k w_k |CTF_i(k) P_i(k) - Y_i(k)|^2,    p_k = 2, or 1 where kx is its own mate

    so pure noise gives 1. The loss of model m is the mean over all its particles in the batch, over
    all ranks: sum over ranks of local sums / global count_m. Each rank's objective is its local sum
    over the global counts, times the number of ranks, which undoes the 1/W of DDP's average.

    Args:
        mixture: the M models, M = 1 (full) or 3 (full, half a, half b).
        box: D in pixels.
        pixel_size_a: A/px at that box.
        weights: (2, D, D//2+1) noise weights of either half, or None.
        cutoff: of the splatting, standard deviations.
        ranks: W.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        box: int,
        pixel_size_a: float,
        weights: Tensor | None = None,
        cutoff: float = 3.5,
        ranks: int = 1,
    ):
        super().__init__()
        self.mixture = mixture
        self.box, self.pixel_size_a, self.cutoff, self.ranks = box, pixel_size_a, cutoff, ranks
        # A parameter whose gradient is the loss of each model: it rides in the gradient's own
        # collective, so that every rank knows the global losses without another one.
        self.ledger = nn.Parameter(torch.zeros(mixture.models))
        parseval = torch.full((box // 2 + 1,), 2.0)
        parseval[0] = 1.0
        if box % 2 == 0:
            parseval[-1] = 1.0
        self.register_buffer("parseval", parseval / box**2)
        self.register_buffer("weights", weights)

    def forward(self, batch: Batch, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Objective of this rank and losses of its views.

        Args:
            batch: this rank's B particles, possibly none.
            counts: particles of each model in the whole batch, over all ranks.

        Returns:
            A scalar to differentiate, and the losses (views, B) without gradient: row 0 under the
            full model, row 1 (with halves) under the particle's own half.
        """
        losses = self.view_losses(batch)
        per_model = self._sum_by_model(losses, batch.half)
        share = per_model / torch.tensor([max(c, 1) for c in counts], dtype=per_model.dtype, device=per_model.device)
        objective = self.ranks * (share.sum() + (self.ledger * share.detach()).sum())
        return objective, losses.detach()

    def view_losses(self, batch: Batch) -> Tensor:
        """Loss (views, B) of every particle under the models that show it."""
        predicted = self.predict(batch)
        difference = torch.view_as_real(predicted - batch.images).square().sum(-1)
        weights = self.parseval if self.weights is None else self.parseval * self.weights[batch.half]
        return (difference * weights).sum((-2, -1))

    def predict(self, batch: Batch) -> Tensor:
        """CTF-modulated half-spectra (views, B, D, D//2+1) of the batch's views."""
        shown_by = [torch.zeros_like(batch.half)] + ([1 + batch.half] if self.mixture.models > 1 else [])
        views, model = len(shown_by), torch.cat(shown_by)
        images = self.mixture.project(
            batch.rotations.repeat(views, 1, 1), batch.shifts.repeat(views, 1), model, self.box, self.cutoff
        )
        spectra = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(-2, -1)), norm="ortho")
        spectra = spectra.reshape(views, len(batch.half), *spectra.shape[1:])
        if batch.ctf is None:
            return spectra
        return spectra * ctf_image(batch.ctf, self.box, self.pixel_size_a).to(spectra.real.dtype)

    def _sum_by_model(self, losses: Tensor, half: Tensor) -> Tensor:
        full = losses[0].sum()
        if self.mixture.models == 1:
            return full[None]
        zero = torch.zeros_like(losses[1])
        return torch.stack([full, *(torch.where(half == h, losses[1], zero).sum() for h in (0, 1))])

    @torch.no_grad()
    def fit_unit(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over a batch for the least-squares scale of each model: <X, Y>, <X, X> and <X, Y>^2, each (M,).

        X is the prediction with ``unit`` 1 and Y the image, so the scale is sum <X, Y> / sum <X, X>; the
        third sum gives the spread of <X, Y> between particles, hence how sure its sign is.
        """
        predicted = self.predict(batch)
        product = (predicted * batch.images.conj()).real
        weights = self.parseval if self.weights is None else self.parseval * self.weights[batch.half]
        xy = (product * weights).sum((-2, -1))
        xx = (torch.view_as_real(predicted).square().sum(-1) * weights).sum((-2, -1))
        return tuple(self._sum_by_model(term, batch.half) for term in (xy, xx, xy.square()))
