"""The forward model and its loss, as the one module that DDP wraps."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cryosplat.batches import Batch
from cryosplat.ctf import ctf_image
from cryosplat.gaussians import GaussianMixture
from cryosplat.spectral import half_spectra, spectral_losses

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
        weights: (2, D, D//2+1) noise weights w of either half (inverse noise power), or None for 1.
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
        self.register_buffer("whitening", None if weights is None else weights.sqrt())

    def forward(self, batch: Batch, counts: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Objective of this rank and losses of its views.

        Args:
            batch: this rank's B particles, possibly none.
            counts: (M,) particles of each model in the whole batch, over all ranks; a tensor on the device, or numbers,
                which a GPU would have to be waited for to take over.

        Returns:
            A scalar to differentiate, and the losses (views, B) without gradient: row 0 under the
            full model, row 1 (with halves) under the particle's own half.
        """
        losses = self.view_losses(batch)
        per_model = self._sum_by_model(losses, batch.half)
        share = per_model / torch.as_tensor(counts, device=per_model.device).clamp(min=1)
        objective = self.ranks * (share.sum() + (self.ledger * share.detach()).sum())
        return objective, losses.detach()

    def view_losses(self, batch: Batch) -> Tensor:
        """Loss (views, B) of every particle under the models that show it."""
        return spectral_losses(self.project(batch), batch, self.whitening, self.pixel_size_a)

    def predict(self, batch: Batch) -> Tensor:
        """CTF-modulated half-spectra (views, B, D, D//2+1) of the batch's views."""
        spectra = half_spectra(self.project(batch))
        filters = self._filters(batch)
        return spectra if filters is None else spectra * filters

    def predict_by(self, batch: Batch, model: int | Tensor) -> Tensor:
        """CTF-modulated half-spectra (B, D, D//2+1) of the batch's particles under one model, whatever their half, or
        each under its own, (B,) int64."""
        shown_by = torch.full_like(batch.half, model) if isinstance(model, int) else model
        images = self.mixture.project(batch.rotations, batch.shifts, shown_by, self.box, self.cutoff)
        spectra, filters = half_spectra(images), self._filters(batch)
        return spectra if filters is None else spectra * filters

    def project(self, batch: Batch) -> Tensor:
        """Projections (views, B, D, D) without CTF: row 0 of the full model, row 1 of each particle's own half."""
        shown_by = [torch.zeros_like(batch.half)] + ([1 + batch.half] if self.mixture.models > 1 else [])
        views = len(shown_by)
        images = self.mixture.project(
            batch.rotations.repeat(views, 1, 1),
            batch.shifts.repeat(views, 1),
            torch.cat(shown_by),
            self.box,
            self.cutoff,
        )
        return images.reshape(views, len(batch.half), self.box, self.box)

    def _filters(self, batch: Batch) -> Tensor | None:
        return None if batch.ctf is None else ctf_image(batch.ctf, self.box, self.pixel_size_a, batch.phases)

    def _sum_by_model(self, losses: Tensor, half: Tensor) -> Tensor:
        full = losses[0].sum()
        if self.mixture.models == 1:
            return full[None]
        zero = torch.zeros_like(losses[1])
        return torch.stack([full, *(torch.where(half == h, losses[1], zero).sum() for h in (0, 1))])

    @torch.no_grad()
    def fit_unit(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums over a batch for the least-squares scale of each model: <X, Y> and <X, X>, each (M,).

        X is the prediction with ``unit`` 1 and Y the image, so the scale is sum <X, Y> / sum <X, X>.
        """
        predicted, images = self.predict(batch), batch.images
        if self.whitening is not None:
            predicted, images = predicted * self.whitening[batch.half], images * self.whitening[batch.half]
        both_mates = torch.full((self.box // 2 + 1,), 2.0, device=images.device)
        both_mates[:: self.box // 2] = 1.0
        xy = ((predicted * images.conj()).real * both_mates).sum((-2, -1))
        xx = (predicted.abs().square() * both_mates).sum((-2, -1))
        return tuple(self._sum_by_model(term, batch.half) for term in (xy, xx))
