"""What every image says of the model that it had no part in: residual, scale, correlation, gain in likelihood."""

import numpy as np
import torch
from torch import Tensor

from cryosplat import distributed
from cryosplat.backprojection import noise_variance
from cryosplat.batches import Batch
from cryosplat.dataset import ParticleDataset, half_plane_weights, shells_of_half_plane
from cryosplat.particles import ParticleTable
from cryosplat.preparation import Preparation
from cryosplat.reconstruction import FULL, Reconstruction
from cryosplat.scores import NUMBERS, Scores
from cryosplat.settings import Config

IMAGES_AT_ONCE = 64


def score_particles(
    config: Config, reconstruction: Reconstruction, table: ParticleTable, images: Preparation, world: distributed.World
) -> Scores | None:
    """The scores of all particles of a run, on every rank; each measures its own.

    Returns:
        None if they are not asked for (``maps.particles``), or there are no particles in the images any more.
    """
    if not config.maps.particles or config.data.null != "none":
        return None
    distributed.doing("measuring particles")
    return ParticleScores(images.dataset, images.noise, world).measure(reconstruction, table)


class ParticleScores:
    """Measures every particle against its projection, CTF and noise included.

    With X the CTF-modulated projection, Y the image, sigma^2 the noise power of the image's half, and sums over all
    Fourier coefficients k of the shells 1 .. D//2 - 1 in which the images have noise, f real numbers in all,

        <X, Y>      = sum_k Re(X conj(Y)) / sigma^2
        residual    = <Y - X, Y - X> / f, 1 of pure noise
        scale       = <X, Y> / <X, X>, by which X would have to be multiplied to fit best: the image's contrast
        correlation = <X, Y> / sqrt(<X, X> <Y, Y>)
        gain        = 1/2 (<Y, Y> - <Y - X, Y - X>), log likelihood over that of an empty map, nats

    X is of the mixture of the other half, which nothing of the image went into, so that none of these is flattered by
    what a model learnt of the image's own noise. Without halves (``maps.halves=false``) it is the only model there is,
    and they are flattered, but for images held out.

    Args:
        dataset: this rank's images.
        noise: (2, S) radial noise power of either half, see ``dataset.radial_noise``.
        world: the ranks.
    """

    def __init__(self, dataset: ParticleDataset, noise: np.ndarray, world: distributed.World):
        self.dataset, self.world = dataset, world
        shells = torch.from_numpy(shells_of_half_plane(dataset.box))
        inside = (shells >= 1) & (shells < dataset.box // 2)
        # Shells that the images were low-passed out of have no weight.
        weight = half_plane_weights(dataset.box) * inside / noise_variance(noise, dataset.box)
        self.weight = weight.float().to(world.device)
        counted = half_plane_weights(dataset.box) * (weight > 0)
        self.freedom = counted.sum((1, 2)).to(world.device)

    def measure(self, reconstruction: Reconstruction, table: ParticleTable) -> Scores:
        """The scores of all particles; every rank calls this."""
        values = np.zeros((len(table), len(NUMBERS)))
        values[self.dataset.owned] = distributed.together(lambda: self._of_owned(reconstruction), self.world)
        # Every particle's numbers come from its one owner, so the sums are exact.
        (values,) = distributed.sum_arrays((values,), self.world)
        return Scores(table.rows, table.half.astype(np.int64), table.held_out, values)

    @torch.no_grad()
    def _of_owned(self, reconstruction: Reconstruction) -> np.ndarray:
        """(n, 4) of this rank's particles."""
        owned = self.dataset.owned
        parts = np.split(owned, range(IMAGES_AT_ONCE, len(owned), IMAGES_AT_ONCE))
        found = [self._of_batch(reconstruction, batch) for batch in self.dataset.batches(parts) if len(batch)]
        return torch.cat(found).double().cpu().numpy() if found else np.zeros((0, len(NUMBERS)))

    def _of_batch(self, reconstruction: Reconstruction, batch: Batch) -> Tensor:
        """(B, 4) on the device."""
        shown_by = 2 - batch.half if reconstruction.mixture.models > 1 else torch.full_like(batch.half, FULL)
        weight = self.weight[batch.half]
        predicted = reconstruction.predict_by(batch, shown_by)

        def product(one: Tensor, two: Tensor) -> Tensor:
            return ((one * two.conj()).real * weight).sum((1, 2)).double()

        xy, xx, yy = (
            product(predicted, batch.images),
            product(predicted, predicted),
            product(batch.images, batch.images),
        )
        rest = yy - 2 * xy + xx
        tiny = torch.finfo(torch.float32).tiny  # of a model that is empty, or an image with nothing in it
        scale, correlation = xy / xx.clamp(min=tiny), xy / (xx * yy).clamp(min=tiny).sqrt()
        return torch.stack([rest / self.freedom[batch.half], scale, correlation, xy - xx / 2], dim=1)
