"""The order of events in training, and nothing else."""

import collections
import contextlib
import dataclasses
import logging
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cryosplat import distributed
from cryosplat.batches import Batch, Chosen, to_device
from cryosplat.dataset import ParticleDataset
from cryosplat.errors import InputError
from cryosplat.memory import OUT_OF_MEMORY
from cryosplat.optimiser import GatedAdam, learning_rate
from cryosplat.particles import ParticleTable
from cryosplat.reconstruction import MODEL_NAMES, Reconstruction
from cryosplat.sampling import BatchPlan
from cryosplat.settings import TrainConfig
from cryosplat.stepgraph import StepGraphs

logger = logging.getLogger(__name__)

SCALE_PARTICLES = 1024
"""Particles whose correlation with the random start sets the grey scale."""

SCALE_BATCH = 64
"""Particles compared at a time."""


@dataclass
class Progress:
    """Where a run stands: ``step`` steps are done, of which ``step_in_epoch`` in ``epoch``."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


@dataclass
class Report:
    """What is known at every look at the losses (each ``log_every`` steps)."""

    step: int
    epoch: int
    losses: dict[str, float]
    learning_rate: float
    images: int
    seconds: float
    waited: float  # seconds of these in which this rank waited for images


@dataclass
class Counts:
    """Particles of each model in a batch, over all ranks: numbers, and (M,) int64 on the device."""

    numbers: list[int]
    on_device: Tensor


@dataclass
class Trainer:
    """Trains the mixtures of a reconstruction on a rank's particles.

    Args:
        world: the ranks and this one's device.
        table: all particles (for names in messages).
        dataset: this rank's.
        plan: the batches, the same on all ranks.
        reconstruction: on this rank's device, equal on all ranks.
        config: of training.
    """

    world: distributed.World
    table: ParticleTable
    dataset: ParticleDataset
    plan: BatchPlan
    reconstruction: Reconstruction
    config: TrainConfig
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self):
        mixture = self.reconstruction.mixture
        self.optimiser = GatedAdam(mixture.mixtures, self.config.lr)
        self.wrapped = distributed.wrap(self.reconstruction, self.world)
        self.mine = self.plan.owner(self.world.size) == self.world.rank
        # Losses since the last look, on the device; the host reads them only then.
        self._recent: collections.deque[tuple[int, np.ndarray, Tensor]] = collections.deque()
        self._totals = torch.zeros(mixture.models, device=self.world.device)
        self._steps_since_look = 0
        self._micro_batch = self.config.micro_batch or self.config.batch
        # Other ranks wait in the last micro-batch, so GPU memory must not run out in it: it is an empty one.
        self._shares_apart = self.world.size > 1 and self.world.device.type == "cuda"
        self._graphs: StepGraphs | None = None

    @property
    def total_steps(self) -> int:
        return self.config.epochs * self.plan.batches

    @property
    def at_epoch_end(self) -> bool:
        """Whether the epoch's last step is done."""
        return self.progress.step_in_epoch == self.plan.batches

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps

    def set_scale(self) -> None:
        """Fit each model's grey scale to its images, at the random start.

        Raises:
            InputError: a particle's loss is not finite.
        """
        mixture = self.reconstruction.mixture
        mine = distributed.together(self._unit_sums, self.world)
        xy, xx = distributed.sum_over_ranks(mine, self.world)
        # A scale near zero would freeze amplitudes; the sign of the data is known by now.
        scale = (xy / xx).abs().clamp(min=1e-3)
        mixture.unit.copy_(scale.float())

    def _unit_sums(self) -> Tensor:
        """Sums of ``fit_unit`` (2, M) over this rank's share of some particles of either half."""
        rng = np.random.default_rng([self.config.seed, 7])
        # Of either half, so that a small one is there too.
        halves = [np.flatnonzero((self.plan.half == h) & ~self.plan.held_out) for h in (0, 1)]
        chosen = np.sort(np.concatenate([rng.permutation(ids)[: SCALE_PARTICLES // 2] for ids in halves]))
        mine = chosen[self.mine[chosen]]
        sums = torch.zeros(2, self.reconstruction.mixture.models, dtype=torch.float64)
        for batch in self.dataset.batches(np.split(mine, range(SCALE_BATCH, len(mine), SCALE_BATCH))):
            terms = torch.stack(self.reconstruction.fit_unit(batch)).double().cpu()
            power = batch.images.abs().square().sum((1, 2))  # of a particle alone, it makes the loss overflow
            if not bool(torch.isfinite(terms).all() and torch.isfinite(power).all()):
                with torch.no_grad():
                    losses = self.reconstruction.view_losses(batch)
                worst = int(losses.nan_to_num(nan=torch.inf).amax(0).argmax())
                raise InputError(
                    f"{self.table.location(int(batch.ids[worst]))}: its loss is not finite at the random start; its "
                    f"image, pose or CTF is wrong: mend it, or leave the particle out with data.indices"
                )
            sums += terms
        return sums

    def state(self) -> dict:
        """Everything that training goes on from. Batches and the random start are functions of the seed, so no
        generator has a state to keep."""
        mixture = self.reconstruction.mixture
        return {
            "mixtures": [parameter.detach().cpu().clone() for parameter in mixture.mixtures],
            "unit": mixture.unit.cpu(),
            "optimiser": self.optimiser.state_dict(),
            "progress": dataclasses.asdict(self.progress),
            # Between two looks: so that the next one means the same steps as if nothing had happened.
            "since_look": {"steps": self._steps_since_look, "losses": self._totals.cpu().clone()},
        }

    def load_state(self, state: dict) -> None:
        """Go on from ``state()``, on any number of ranks."""
        mixture = self.reconstruction.mixture
        with torch.no_grad():
            for parameter, saved in zip(mixture.mixtures, state["mixtures"], strict=True):
                parameter.copy_(saved)
            mixture.unit.copy_(state["unit"])
        self.optimiser.load_state_dict(state["optimiser"])
        self._graphs = None  # they know the moments by their addresses
        self.progress = Progress(**state["progress"])
        if "since_look" in state:
            self._steps_since_look = state["since_look"]["steps"]
            self._totals.copy_(state["since_look"]["losses"])

    def run_epoch(self, on_report, on_step=lambda looked: None) -> None:
        """Train to the end of the current epoch, calling ``on_report(Report)`` every ``log_every`` steps.

        ``on_step(looked)`` is called after every step but the epoch's last, ``looked`` whether it was also reported.

        Raises:
            InputError: a value that is not finite, on all ranks together, before it reached a parameter.
        """
        batches = self.plan.epoch(self.progress.epoch)
        began, images, waited = time.perf_counter(), 0, self.dataset.waited_s
        left = batches[self.progress.step_in_epoch :]
        chosen = self.dataset.choose([ids[self.mine[ids]] for ids in left])
        for ids, mine, counts in zip(left, chosen, self._counts(left), strict=True):
            rate = learning_rate(self.config, self.progress.step / self.total_steps, self.progress.epoch)
            self._step(mine, counts, rate)
            images += len(ids)
            self.progress.step += 1
            self.progress.step_in_epoch += 1
            last = self.progress.step_in_epoch == len(batches)
            look = self.progress.step % self.config.log_every == 0 or last
            if look:
                losses = self._look()
                now, so_far = time.perf_counter(), self.dataset.waited_s
                progress = self.progress
                on_report(Report(progress.step, progress.epoch, losses, rate, images, now - began, so_far - waited))
                began, images, waited = now, 0, so_far
            if not last:
                on_step(look)
        self.progress.epoch += 1
        self.progress.step_in_epoch = 0

    def _step(self, mine: Chosen, counts: Counts, rate: float) -> None:
        """One batch: forward, backward (with DDP's all-reduce), update. Waits for nothing on the device."""
        self.optimiser.set_rate(rate)
        if self._is_recordable(mine, counts):
            # Whose address the graph keeps: it is made again when the state is loaded.
            self._graphs = self._graphs or StepGraphs(self._recorded_step)
            losses = self._graphs.run(mine.at, counts.on_device)
        else:
            losses = self._compute(mine, counts)
        self._recent.append((self.progress.step, mine.ids, losses))
        self._steps_since_look += 1

    def _compute(self, mine: Chosen, counts: Counts) -> Tensor:
        """What a step does on the device; losses (views, B) of this rank's particles."""
        losses = self._differentiate(self.dataset.select(mine), counts.on_device)
        # After DDP's average the ledger's gradient is each model's loss over all ranks, see Reconstruction.
        ledger = self.reconstruction.ledger.grad
        self.optimiser.step(ledger, counts.numbers)
        self.reconstruction.mixture.stay_in_bounds()
        self._totals += ledger
        return losses

    def _is_recordable(self, mine: Chosen, counts: Counts) -> bool:
        """Whether a step is like others of its size in all that a graph of it would hold."""
        alone_on_a_gpu = self.world.device.type == "cuda" and self.world.size == 1
        whole = len(mine.ids) <= self._micro_batch and mine.stored is None
        return self.config.cuda_graph == "auto" and alone_on_a_gpu and whole and min(counts.numbers) > 0

    def _recorded_step(self, at: Tensor, counts: Tensor) -> Tensor:
        """``_compute`` of particles that only the device knows. Of their numbers, none of which is 0, it needs none."""
        every = [1] * self.reconstruction.mixture.models
        return self._compute(Chosen(np.empty(0, np.int64), at), Counts(every, counts))

    def _differentiate(self, batch: Batch, counts: Tensor) -> Tensor:
        """Gradients of the batch's objective, and its losses; in micro-batches of half the size if memory runs out.

        Raises:
            InputError: it runs out with one image at a time.
        """
        began_with = self._micro_batch
        while (losses := self._try_to_differentiate(batch, counts)) is None:
            # Here and not where the error was caught, which held on to all that the step had allocated.
            self._micro_batch = (min(self._micro_batch, len(batch)) + 1) // 2
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()
        if self._micro_batch < began_with:
            logger.warning(
                "rank %d: out of GPU memory with %d images at a time. From now on %d, and gradients are added up: the "
                "batch stays what it is. train.micro_batch=%d begins there",
                *(self.world.rank, min(began_with, len(batch)), self._micro_batch, self._micro_batch),
            )
        return losses

    def _try_to_differentiate(self, batch: Batch, counts: Tensor) -> Tensor | None:
        """None if memory ran out."""
        try:
            return self._accumulate(batch, counts)
        except torch.cuda.OutOfMemoryError as error:
            if self.world.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise  # the graph is not recorded, and the step run as it comes
            if min(self._micro_batch, len(batch)) <= 1:
                raise InputError(f"rank {self.world.rank}: with one image at a time, {OUT_OF_MEMORY}") from error
            return None

    def _accumulate(self, batch: Batch, counts: Tensor) -> Tensor:
        """Gradients added up over micro-batches, and shared between ranks with the last."""
        self.optimiser.zero_grad()
        self.reconstruction.ledger.grad = None
        size, losses = self._micro_batch, []
        parts = [batch.part(slice(at, at + size)) for at in range(0, len(batch), size)] or [batch]
        if self._shares_apart:
            parts.append(batch.part(slice(0, 0)))
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else distributed.apart(self.wrapped, self.world):
                objective, of_part = self.wrapped(part, counts)
                objective.backward()
            losses.append(of_part)
        return torch.cat(losses, dim=1) if len(losses) > 1 else losses[0]

    def _look(self) -> dict[str, float]:
        """Read the device: mean losses since the last look, or the end of the run if something was not finite."""
        self.require_finite()
        mean = (self._totals / self._steps_since_look).tolist()
        self._totals.zero_()
        self._steps_since_look = 0
        self._recent.clear()
        return dict(zip(MODEL_NAMES, mean, strict=False))

    def require_finite(self) -> None:
        """Read the device: what is saved must not have passed over a step. All ranks call it at the same step.

        Raises:
            InputError: a value was not finite, on all ranks.
        """
        if self.optimiser.blocked():
            self._stop_for_non_finite()

    def _stop_for_non_finite(self) -> None:
        """Every rank comes here at the same look: name the first step and particle, from whichever rank has it."""
        found = None
        for step, ids, losses in self._recent:
            bad = ~torch.isfinite(losses).all(0)
            if bool(bad.any()):
                particle = int(ids[int(bad.nonzero()[0])])
                found = (step, self.table.location(particle))
                break
        first = min((f for f in distributed.gather_objects(found, self.world) if f), default=None)
        if first is None:
            step = self.progress.step - 1
            what = f"the gradient became non-finite by step {step}, though every particle's loss is finite"
        else:
            what = f"the loss became non-finite at step {first[0]}, particle {first[1]}"
        raise distributed.common_error(
            f"{what}. No parameter was changed by it. Remove the particle if its image, pose or CTF is wrong; "
            f"otherwise lower train.lr",
            self.world,
        )

    def _counts(self, batches: list[np.ndarray]) -> list[Counts]:
        """Of all batches of an epoch, which go to the device in one copy."""
        in_b = np.array([self.plan.half[ids].sum() for ids in batches], dtype=np.int64)
        whole = np.array([len(ids) for ids in batches], dtype=np.int64)
        numbers = np.stack([whole, whole - in_b, in_b], axis=1)[:, : self.reconstruction.mixture.models]
        on_device = to_device(np.ascontiguousarray(numbers), self.world.device)
        return [Counts(*of_batch) for of_batch in zip(numbers.tolist(), on_device, strict=True)]
