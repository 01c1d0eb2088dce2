"""The likelihood of images that nothing was trained on, beside that of images that were: an overfitting curve."""

import numpy as np
import torch

from cryosplat import distributed
from cryosplat.batches import Batch
from cryosplat.dataset import ParticleDataset, half_plane_weights, shells_of_half_plane
from cryosplat.metrics import HOLDOUT_BANDS
from cryosplat.reconstruction import MODEL_NAMES, Reconstruction
from cryosplat.sampling import BatchPlan

IMAGES_AT_ONCE = 64

HELD_OUT, TRAINED = 0, 1


class HoldOut:
    """Judges the models by two sets of images: those held out, and as many of either half that are trained on.

    The number is the gain in log likelihood an image over an empty map, in nats: with X a model's CTF-modulated
    projection, Y the image and sigma^2 the noise power of the image's half,

        gain = 1/2 sum_k ( |Y|^2 - |X - Y|^2 ) / sigma^2

    over all Fourier coefficients of the shells 1 .. D // 2. Images that were trained on favour the model by what it has
    learnt of their noise; the held-out ones do not, and fall when it learns more noise than signal. All models are
    shown all held-out images; of the trained ones, a half's model is shown its own.

    Args:
        plan: which are held out.
        dataset: this rank's images.
        noise: (2, S) radial noise power of either half, see ``dataset.radial_noise``.
        world: the ranks.
        seed: of the choice of trained images, which is the same at every evaluation.
    """

    def __init__(
        self, plan: BatchPlan, dataset: ParticleDataset, noise: np.ndarray, world: distributed.World, seed: int
    ):
        self.dataset, self.world = dataset, world
        rng = np.random.default_rng([seed, 0x401E])
        trained = []
        for h in (0, 1):
            count = int((plan.held_out & (plan.half == h)).sum())
            trained.append(rng.permutation(np.flatnonzero(~plan.held_out & (plan.half == h)))[:count])
        mine = plan.owner(world.size) == world.rank
        sets = np.flatnonzero(plan.held_out), np.sort(np.concatenate(trained))
        self.ids = [ids[mine[ids]] for ids in sets]
        self.shells = torch.from_numpy(shells_of_half_plane(dataset.box))
        weight = half_plane_weights(dataset.box) / 2 / torch.from_numpy(noise)[:, self.shells]
        self.weight = weight.float().to(world.device)

    @torch.no_grad()
    def measure(self, reconstruction: Reconstruction) -> dict[str, float]:
        """Gains in nats an image by column of holdout.csv (``metrics.HOLDOUT_COLUMNS``); every rank calls this."""
        models, shells = reconstruction.mixture.models, self.dataset.box // 2 + 1
        gains = torch.zeros(2, models, 2, shells, dtype=torch.float64)
        squares = torch.zeros(2, models, 2, dtype=torch.float64)
        counts = torch.zeros(2, 2, dtype=torch.float64)
        for kind, ids in enumerate(self.ids):
            for batch in self.dataset.batches(np.split(ids, range(IMAGES_AT_ONCE, len(ids), IMAGES_AT_ONCE))):
                members = [(batch.half == h).cpu() for h in (0, 1)]
                counts[kind] += torch.stack(members).sum(1)
                for m in range(models):
                    found = self._gains(reconstruction, batch, m)
                    for h, mine in enumerate(members):
                        gains[kind, m, h] += found[mine].sum(0)
                        squares[kind, m, h] += found[mine, 1:].sum(1).square().sum()
        packed = torch.cat([gains.flatten(), squares.flatten(), counts.flatten()])
        parts = distributed.sum_over_ranks(packed, self.world).split([gains.numel(), squares.numel(), counts.numel()])
        return _columns(parts[0].view_as(gains), parts[1].view_as(squares), parts[2].view_as(counts))

    def _gains(self, reconstruction: Reconstruction, batch: Batch, model: int) -> torch.Tensor:
        """Gains (B, D//2+1) of each image in each shell, float64 on the CPU; shells beyond D//2 are left out."""
        predicted = reconstruction.predict_by(batch, model)
        terms = 2 * (predicted * batch.images.conj()).real - predicted.abs().square()
        terms = (terms * self.weight[batch.half]).double().cpu().flatten(1)
        by_shell = torch.zeros(len(terms), int(self.shells.max()) + 1, dtype=torch.float64)
        return by_shell.index_add_(1, self.shells.flatten(), terms)[:, : self.dataset.box // 2 + 1]


def _columns(gains: torch.Tensor, squares: torch.Tensor, counts: torch.Tensor) -> dict[str, float]:
    """Means by column, from sums over the images of each set and half."""
    row = {"images": int(counts[HELD_OUT].sum())}
    for kind, name in ((HELD_OUT, "gain"), (TRAINED, "trained")):
        for m, model in enumerate(MODEL_NAMES[: gains.shape[1]]):
            shown = [m - 1] if kind == TRAINED and m else [0, 1]
            count = float(counts[kind, shown].sum())
            if count == 0:
                continue
            mean = gains[kind, m][shown].sum(0) / count
            total = float(mean[1:].sum())
            row[f"{name}_{model}"] = total
            if m == 0:
                variance = max(float(squares[kind, m].sum()) / count - total**2, 0.0)
                row[f"{name}_full_error"] = (variance / count) ** 0.5
                bands = zip(range(1, HOLDOUT_BANDS + 1), np.array_split(mean[1:].numpy(), HOLDOUT_BANDS), strict=True)
                row |= {f"{name}_band_{number}": float(band.sum()) for number, band in bands}
    return row
