"""A training step: in micro-batches, when memory runs out, recorded; and that it never waits for the device."""

import contextlib
import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch
import training_set
from backends import needs_gpu
from test_dataset import some_images, stack_of
from torch.utils._python_dispatch import TorchDispatchMode
from views import WORLD

from cryosplat import gaussians
from cryosplat.dataset import ParticleDataset
from cryosplat.errors import InputError
from cryosplat.gaussians import GaussianMixture
from cryosplat.reconstruction import Reconstruction
from cryosplat.sampling import BatchPlan
from cryosplat.settings import TrainConfig
from cryosplat.stepgraph import WARM_UP, StepGraphs
from cryosplat.trainer import Trainer

COUNT, BATCH = 208, 13


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    return training_set.reference_run(tmp_path_factory)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return stack_of(tmp_path_factory.mktemp("particles"), some_images(count=COUNT))


def make_trainer(table, models=3, cache="device", world=WORLD, **settings) -> Trainer:
    dataset = ParticleDataset(table, np.arange(COUNT), device=world.device, cache=cache)
    dataset.normalise(dataset.statistics.deviation)
    mixture = GaussianMixture(models, 20, "signed", (0.02, 0.1))
    mixture.start_randomly(0.1, 0.05, 0)
    weights = torch.rand(2, dataset.box, dataset.box // 2 + 1, generator=torch.Generator().manual_seed(0)) + 0.5
    seen = Reconstruction(mixture, dataset.box, dataset.pixel_size_a, weights).to(world.device)
    config = TrainConfig(epochs=2, batch=BATCH, lr=1e-2, log_every=1000, **settings)
    return Trainer(world, table, dataset, BatchPlan(dataset.half, BATCH, 0), seen, config)


def first_step(trainer) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Gradients of all models, of the ledger, and the losses of one step."""
    ids = trainer.plan.epoch(0)[:1]
    trainer._step(next(trainer.dataset.choose(ids)), trainer._counts(ids)[0], 1e-2)
    mixtures = [mixture.grad.clone() for mixture in trainer.reconstruction.mixture.mixtures]
    return mixtures, trainer.reconstruction.ledger.grad.clone(), trainer._recent[-1][2]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def mixtures(run_dir):
    return torch.stack(training_set.last_checkpoint(run_dir)["trainer"]["mixtures"])


def check_same_step(found, expected) -> None:
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert theirs.norm() > 0 and relative(ours, theirs) < 1e-5
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=0)


# Micro-batches


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 12, 13, 100])
def test_micro_batches_add_up_to_the_gradient_of_the_batch(table, size, models):
    check_same_step(first_step(make_trainer(table, models, micro_batch=size)), first_step(make_trainer(table, models)))


def test_a_run_in_micro_batches_ends_as_one_without(stack, reference_run, tmp_path):
    run_dir = training_set.trained(stack, tmp_path / "run", "train.micro_batch=5")
    assert relative(mixtures(run_dir), mixtures(reference_run)) < 1e-4
    progress = [training_set.last_checkpoint(each)["trainer"]["progress"] for each in (run_dir, reference_run)]
    assert progress[0] == progress[1]


# Out of memory


def memory_for(images: int, monkeypatch, where: str) -> list[int]:
    """GPU memory that more images than these do not fit in; returns the sizes that were tried."""
    tried, view_losses = [], Reconstruction.view_losses

    def refuse():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, losses):
            return losses.clone()

        @staticmethod
        def backward(ctx, grad):
            refuse()

    def losses(self, batch):
        tried.append(len(batch))
        if len(batch) <= images:
            return view_losses(self, batch)
        return Refuses.apply(view_losses(self, batch)) if where == "backward" else refuse()

    monkeypatch.setattr(Reconstruction, "view_losses", losses)
    return tried


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(table, where, monkeypatch, caplog):
    expected = first_step(make_trainer(table))
    tried, trainer = memory_for(5, monkeypatch, where), make_trainer(table)
    with caplog.at_level(logging.WARNING):
        check_same_step(first_step(trainer), expected)
        assert tried == [13, 7, 4, 4, 4, 1]
        del tried[:]
        first_step(trainer)
    assert tried == [4, 4, 4, 1]
    (record,) = caplog.records  # said once
    assert "out of GPU memory with 13 images at a time. From now on 4" in record.getMessage()
    assert "train.micro_batch=4" in record.getMessage()


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_runs_out_in_the_middle_of_a_batch_leaves_nothing_behind(table, where, monkeypatch):
    """The last micro-batch of 1 fits, that of 6 before it did, and the second did not: what 6 had given is dropped."""
    expected, trainer = first_step(make_trainer(table)), make_trainer(table, micro_batch=6)
    tried = memory_for(COUNT, monkeypatch, where)
    whole = Reconstruction.view_losses

    def once(self, batch):
        found = whole(self, batch)
        if len(tried) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(Reconstruction, "view_losses", once)
    check_same_step(first_step(trainer), expected)
    assert tried == [6, 6, 3, 3, 3, 3, 1]


def test_a_run_that_memory_runs_out_in_ends_as_one_with_enough(stack, reference_run, tmp_path, monkeypatch, caplog):
    tried = memory_for(5, monkeypatch, "backward")
    run_dir = training_set.trained(stack, tmp_path / "run")
    assert relative(mixtures(run_dir), mixtures(reference_run)) < 1e-4
    assert sum("out of GPU memory" in record.getMessage() for record in caplog.records) == 1
    assert tried[:3] == [15, 8, 4] and max(tried[3:]) == 4


def test_memory_for_no_image_at_all_stops_the_run_with_words(stack, tmp_path, monkeypatch):
    memory_for(0, monkeypatch, "forward")
    with pytest.raises(
        InputError, match=r"with one image at a time, out of GPU memory\. .*data\.cache=host.*data\.box"
    ):
        training_set.trained(stack, tmp_path / "run")


def test_memory_that_runs_out_elsewhere_stops_the_run_with_words_too(stack, tmp_path, monkeypatch):
    def refuse(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more.")

    monkeypatch.setattr("cryosplat.preparation.linear_half", refuse)
    with pytest.raises(
        InputError, match=r"rank 0: out of GPU memory\. .*\(CUDA out of memory\. Tried.* 2\.00 GiB\.\)$"
    ):
        training_set.trained(stack, tmp_path / "run")


# Images from the host


def test_a_run_whose_images_are_sent_from_the_host_is_bitwise_the_same(stack, reference_run, tmp_path):
    run_dir = training_set.trained(stack, tmp_path / "run", "data.cache=host")
    assert torch.equal(mixtures(run_dir), mixtures(reference_run))


# Nothing waits for the device


class NoWaiting(TorchDispatchMode):
    """Fails at what a GPU would have to be waited for: a value read by the host, a tensor made from its numbers."""

    def __torch_dispatch__(self, function, types, arguments=(), words=None):
        name = function.name()
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "equal")
        masks = name.startswith("aten::index") and any(
            part is not None and part.dtype in (torch.bool, torch.uint8)
            for part in arguments[1:2]
            for part in (part if isinstance(part, list | tuple) else [])
        )
        assert not any(f"aten::{word}" in name for word in waits) and not masks, f"{name} waits for the device"
        return function(*arguments, **(words or {}))


@pytest.fixture
def unchecked_splat(monkeypatch):
    """Without the range check of model indices, which the CPU's tensors alone are put to."""
    monkeypatch.setattr(gaussians.ops, "splat", torch.ops.cryosplat.splat)


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 4}])
@pytest.mark.parametrize("cache", ["device", "host"])
def test_no_step_waits_for_the_device(table, unchecked_splat, cache, settings):
    trainer = make_trainer(table, cache=cache, **settings)
    batches = trainer.plan.epoch(0)
    counts, chosen = trainer._counts(batches), trainer.dataset.choose(batches)
    trainer._step(next(chosen), counts[0], 1e-2)  # the optimiser makes its moments
    with NoWaiting():
        for of_batch in counts[1:]:
            trainer._step(next(chosen), of_batch, 1e-2)
    assert len(trainer._recent) == len(batches) == 16


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t[t > 0], lambda t: torch.tensor([1.0]),
        lambda t: t.nonzero(),
    ],
)  # fmt: skip
def test_what_waits_is_noticed(wait):
    some = torch.ones(3)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        wait(some)


def test_a_step_can_be_made_where_nothing_can_be_read(table):
    """On PyTorch's meta device, which has shapes and no values: to copy any to the host is an error there."""
    trainer = make_trainer(table)
    batch = next(trainer.dataset.batches(trainer.plan.epoch(0)))
    batch = type(batch)(
        *(value.to("meta") if isinstance(value, torch.Tensor) else value for value in vars(batch).values())
    )
    seen = trainer.reconstruction.to("meta")
    objective, losses = seen(batch, torch.ones(3, dtype=torch.int64, device="meta"))
    objective.backward()
    seen.mixture.stay_in_bounds()
    assert losses.shape == (2, len(batch)) and all(mixture.grad.is_meta for mixture in seen.mixture.mixtures)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        losses.cpu()


# Recorded steps


class Graphs:
    """Stands in for CUDA graphs: recording computes, and replaying computes again, from the same places to the same."""

    def __init__(self, monkeypatch, fails=False):
        self.recorded, self.replayed, self.fails = [], 0, fails
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.recording)
        self.calls = []

    @contextlib.contextmanager
    def recording(self, graph, pool):
        assert graph is self and pool == "pool"
        before = len(self.calls)
        yield
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        (self.last,) = self.calls[before:]
        self.recorded.append(self.last)

    def replay(self):
        self.replayed += 1
        at, counts, losses = self.recorded[-1]
        losses.copy_(self.formula(at, counts))

    @staticmethod
    def formula(at, counts):
        return (at * 10 + counts.sum())[None].float()

    def work(self, at, counts):
        losses = self.formula(at, counts)
        self.calls.append((at, counts, losses))
        return losses


def test_a_recorded_step_is_given_new_particles_and_its_losses_are_kept(monkeypatch):
    graphs = Graphs(monkeypatch)
    steps = StepGraphs(graphs.work)
    given = [(torch.arange(4) + n, torch.tensor([4, n])) for n in range(8)]
    found = [steps.run(*each) for each in given]
    for each, losses in zip(given, found, strict=True):
        assert torch.equal(losses, graphs.formula(*each))
    assert len(graphs.calls) == WARM_UP + 1 and len(graphs.recorded) == 1 and graphs.replayed == 8 - WARM_UP


def test_every_size_is_recorded_by_itself(monkeypatch):
    graphs = Graphs(monkeypatch)
    steps = StepGraphs(graphs.work)
    counts = torch.tensor([5])
    for number in range(WARM_UP + 2):
        assert torch.equal(
            steps.run(torch.arange(4) + number, counts), graphs.formula(torch.arange(4) + number, counts)
        )
    for number in range(WARM_UP + 2):
        assert torch.equal(
            steps.run(torch.arange(5) + number, counts), graphs.formula(torch.arange(5) + number, counts)
        )
    assert [len(at) for at, _, _ in graphs.recorded] == [4, 5]


def test_a_step_that_cannot_be_recorded_runs_as_it_comes_and_that_is_said_once(monkeypatch, caplog):
    graphs = Graphs(monkeypatch, fails=True)
    steps = StepGraphs(graphs.work)
    for number in range(WARM_UP + 4):
        at = torch.arange(4 + number % 2) + number
        assert torch.equal(steps.run(at, torch.tensor([1])), graphs.formula(at, torch.tensor([1])))
    for number in range(3 * WARM_UP):
        steps.run(torch.arange(4 + number % 2), torch.tensor([1]))
    (record,) = caplog.records
    assert "not permitted when stream is capturing)" in record.getMessage()
    assert "train.cuda_graph=off" in record.getMessage() and not graphs.recorded


def test_a_step_that_is_recorded_does_what_one_that_is_not_does(table):
    """The function that is recorded, run as it is: particles and counts from the device alone."""
    plain, recorded = make_trainer(table), make_trainer(table)
    for trainer in (plain, recorded):
        batches = trainer.plan.epoch(0)
        for mine, counts in zip(trainer.dataset.choose(batches), trainer._counts(batches), strict=True):
            if trainer is plain:
                trainer._step(mine, counts, 1e-2)
            else:
                trainer.optimiser.set_rate(1e-2)
                trainer._recorded_step(mine.at, counts.on_device)
    for ours, theirs in zip(recorded.reconstruction.parameters(), plain.reconstruction.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(recorded._totals, plain._totals)


def test_steps_are_recorded_on_one_gpu_only_and_where_they_are_alike(table):
    trainer = make_trainer(table, micro_batch=13)
    ids = trainer.plan.epoch(0)[:1]
    mine, (counts,) = next(trainer.dataset.choose(ids)), trainer._counts(ids)
    assert not trainer._is_recordable(mine, counts)  # on a CPU
    trainer.world = dataclasses.replace(WORLD, device=torch.device("cuda", 0))
    assert trainer._is_recordable(mine, counts)
    assert not trainer._is_recordable(mine, dataclasses.replace(counts, numbers=[13, 13, 0]))
    assert not trainer._is_recordable(dataclasses.replace(mine, stored=torch.zeros(13)), counts)
    trainer._micro_batch = 12
    assert not trainer._is_recordable(mine, counts)
    trainer._micro_batch, trainer.config = 13, dataclasses.replace(trainer.config, cuda_graph="off")
    assert not trainer._is_recordable(mine, counts)
    trainer.config = dataclasses.replace(trainer.config, cuda_graph="auto")
    trainer.world = dataclasses.replace(trainer.world, size=2)
    assert not trainer._is_recordable(mine, counts)


# The same on a GPU, if there is one

ON_GPU = dataclasses.replace(WORLD, device=torch.device("cuda", 0))


def train_an_epoch(trainer, reports=None) -> torch.Tensor:
    """Parameters (M, G, 11) afterwards."""
    trainer.run_epoch(([] if reports is None else reports).append)
    return trainer.reconstruction.mixture.theta.detach().cpu()


@needs_gpu
@pytest.mark.parametrize("cache", ["device", "host"])
def test_a_gpu_prepares_images_as_the_cpu_does(table, cache):
    ours, theirs = make_trainer(table, world=ON_GPU, cache=cache).dataset, make_trainer(table).dataset
    np.testing.assert_allclose(ours.statistics.deviation, theirs.statistics.deviation, rtol=1e-5)
    np.testing.assert_allclose(ours.statistics.power, theirs.statistics.power, rtol=1e-5)
    np.testing.assert_allclose(ours.statistics.fingerprint, theirs.statistics.fingerprint, atol=1e-4)
    assert relative(ours.batch(ours.owned).images.cpu(), theirs.batch(theirs.owned).images) < 1e-3  # half precision


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 4}, {"cache": "host"}, {"models": 1}])
def test_a_step_on_a_gpu_is_that_on_the_cpu(table, settings):
    found, expected = (first_step(make_trainer(table, world=world, **settings)) for world in (ON_GPU, WORLD))
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert relative(ours.cpu(), theirs) < 1e-3
    torch.testing.assert_close(found[2].cpu(), expected[2], rtol=1e-3, atol=0)


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"micro_batch": 4}, {"cache": "host"}, {"cuda_graph": "off"}])
def test_no_step_waits_for_a_gpu(table, settings):
    trainer = make_trainer(table, world=ON_GPU, **settings)
    train_an_epoch(trainer)  # plans, moments and graphs are made
    batches = trainer.plan.epoch(1)
    counts, chosen = trainer._counts(batches), trainer.dataset.choose(batches)
    first = next(chosen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._step(first, counts[0], 1e-2)
        for mine, of_batch in zip(chosen, counts[1:], strict=True):
            trainer._step(mine, of_batch, 1e-2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not trainer.optimiser.blocked()


@needs_gpu
def test_recorded_steps_on_a_gpu_are_those_that_run_as_they_come(table, caplog):
    recorded, plain = (make_trainer(table, world=ON_GPU, cuda_graph=way) for way in ("auto", "off"))
    reports = []
    assert relative(train_an_epoch(recorded, reports), train_an_epoch(plain, reports)) < 1e-5
    assert recorded._graphs._recorded and plain._graphs is None and not caplog.records
    assert reports[0].losses == pytest.approx(reports[1].losses, rel=1e-5)


@needs_gpu
def test_a_state_of_a_gpu_goes_on_on_a_cpu_and_the_other_way_round(table):
    there, here = make_trainer(table, world=ON_GPU), make_trainer(table)
    train_an_epoch(there)
    here.load_state(copy.deepcopy(there.state()))
    again = make_trainer(table, world=ON_GPU)
    again.load_state(copy.deepcopy(here.state()))
    expected = train_an_epoch(there)
    for trainer in (here, again):
        assert relative(train_an_epoch(trainer), expected) < 1e-3
