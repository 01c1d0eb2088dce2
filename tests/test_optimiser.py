"""The gate that a non-finite value closes for good, and the schedules."""

import copy
import math

import pytest
import torch
from torch import nn

from cryosplat.optimiser import EPSILON, ColumnAdam, GatedAdam, learning_rate
from cryosplat.settings import TrainConfig


def parameters(count=3):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(4, 11, generator=generator)) for _ in range(count)]


def step(optimiser, mixtures, gradient=1.0, loss=1.0, counts=(2, 1, 1), where=0):
    """One step with gradients of 1, but for one element of model ``where``, and losses of 1 but for that model."""
    optimiser.zero_grad()
    for mixture in mixtures:
        mixture.grad = torch.ones_like(mixture)
    mixtures[where].grad[1, 5] = gradient
    losses = torch.ones(len(mixtures))
    losses[where] = loss
    optimiser.set_rate(0.1)
    optimiser.step(losses, counts)


def copies(mixtures):
    return [mixture.detach().clone() for mixture in mixtures]


BAD = ({"gradient": math.nan}, {"gradient": math.inf}, {"loss": math.nan}, {"loss": -math.inf})


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", [0, 2])
def test_a_non_finite_value_stops_all_updates_from_that_step_on(bad, where):
    mixtures = parameters()
    optimiser = GatedAdam(mixtures, 0.1)
    step(optimiser, mixtures)
    assert not optimiser.blocked()
    before, state = copies(mixtures), optimiser.state_dict()["state"]
    moments = {key: {name: value.clone() for name, value in of_one.items()} for key, of_one in state.items()}
    step(optimiser, mixtures, **bad, where=where)
    assert optimiser.blocked()
    step(optimiser, mixtures)  # finite again, but what came before is not made good
    assert optimiser.blocked()
    assert all(torch.equal(a, b) for a, b in zip(mixtures, before, strict=True))
    for key, of_one in optimiser.state_dict()["state"].items():
        assert all(torch.equal(value, moments[key][name]) for name, value in of_one.items())


def test_a_model_without_a_particle_in_the_batch_stays_where_it_is():
    mixtures = parameters()
    optimiser = GatedAdam(mixtures, 0.1)
    step(optimiser, mixtures)
    before = copies(mixtures)
    step(optimiser, mixtures, counts=(2, 2, 0))
    assert not torch.equal(mixtures[1], before[1])
    assert torch.equal(mixtures[2], before[2])


def test_a_non_finite_gradient_of_a_model_without_a_particle_counts_too():
    mixtures = parameters()
    optimiser = GatedAdam(mixtures, 0.1)
    step(optimiser, mixtures, gradient=math.nan, counts=(2, 2, 0), where=2)
    assert optimiser.blocked()


def test_updates_are_those_of_adam_for_gradients_of_any_size():
    """The first step of Adam is the rate, whatever the gradient: the guard against zero is far below all of them."""
    mixtures = parameters(1)
    optimiser = GatedAdam(mixtures, 0.1)
    before = copies(mixtures)[0]
    mixtures[0].grad = torch.logspace(-10, 10, 44).reshape(4, 11)
    optimiser.step(torch.ones(1), (1,))
    torch.testing.assert_close(before - mixtures[0].detach(), torch.full((4, 11), 0.1), rtol=1e-3, atol=0)


def test_the_state_goes_on_where_it_was():
    mixtures = parameters()
    optimiser = GatedAdam(mixtures, 0.1)
    for gradient in (1.0, 2.0):
        step(optimiser, mixtures, gradient)
    others = [nn.Parameter(mixture.detach().clone()) for mixture in mixtures]
    resumed = GatedAdam(others, 0.3)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for each, of_each in ((optimiser, mixtures), (resumed, others)):
        step(each, of_each, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(mixtures, others, strict=True))


# A rate for each column


def gradients(steps):
    """Of every size, and in one column none at all."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(steps, 4, 11, generator=generator) * torch.logspace(-6, 6, 11)
    drawn[..., 3] = 0
    return drawn


def test_with_equal_rates_columns_move_as_adam_moves_them():
    (ours,), (theirs,) = parameters(1), parameters(1)
    mine = ColumnAdam(ours, torch.full((11,), 0.05), (0.9, 0.99))
    adam = torch.optim.Adam([theirs], lr=1.0, betas=(0.9, 0.99), eps=EPSILON)
    for number, gradient in enumerate(gradients(30)):
        factor = 1 - number / 40
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step(factor)
        adam.param_groups[0]["lr"] = 0.05 * factor
        adam.step()
        assert ours.grad is None
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[:, 3], parameters(1)[0][:, 3])  # no gradient, no step, and no division by zero


def test_every_column_has_its_own_rate():
    rates = torch.linspace(0, 0.5, 11)
    (together,) = parameters(1)
    mine = ColumnAdam(together, rates, (0.9, 0.99))
    alone = [nn.Parameter(together.detach()[:, [column]].clone()) for column in range(11)]
    others = [ColumnAdam(one, rates[[column]], (0.9, 0.99)) for column, one in enumerate(alone)]
    start = together.detach().clone()
    for gradient in gradients(10):
        together.grad = gradient.clone()
        mine.step(0.7)
        for column, (one, other) in enumerate(zip(alone, others, strict=True)):
            one.grad = gradient[:, [column]].clone()
            other.step(0.7)
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-6, atol=1e-7)
    assert torch.equal(together[:, 0], start[:, 0]) and not torch.equal(together[:, 1], start[:, 1])


def test_the_first_step_is_the_rate_times_the_factor_whatever_the_gradient():
    (moved,) = parameters(1)
    start, rates = moved.detach().clone(), torch.linspace(0.1, 0.2, 11)
    moved.grad = torch.logspace(-10, 10, 44).reshape(4, 11)
    ColumnAdam(moved, rates, (0.9, 0.99)).step(0.5)
    torch.testing.assert_close(start - moved.detach(), 0.5 * rates.expand(4, 11), rtol=1e-3, atol=0)


# Schedules


def test_the_cosine_schedule_falls_smoothly_from_the_rate_to_its_last_fraction():
    config = TrainConfig(lr=2.0, schedule="cosine", lr_final=0.1)
    rates = [learning_rate(config, progress / 100, 0) for progress in range(101)]
    assert rates[0] == 2.0 and rates[50] == pytest.approx(1.1) and rates[100] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in zip(rates, rates[1:], strict=False))


def test_the_exponential_schedule_falls_by_its_factor_an_epoch_and_the_constant_one_not_at_all():
    exponential, constant = (TrainConfig(lr=1e-3, schedule=name, lr_gamma=0.1) for name in ("exponential", "constant"))
    assert [learning_rate(exponential, 0.3, epoch) for epoch in range(3)] == pytest.approx([1e-3, 1e-4, 1e-5])
    assert learning_rate(constant, 0.9, 7) == 1e-3
