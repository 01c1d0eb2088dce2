"""Batches: a pure function of seed, epoch and step, whole, even, with both halves in each, and fair to the ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cryosplat.sampling import VIRTUAL_SHARDS, BatchPlan


def halves(count, share_of_b, seed=0):
    """Half of ``count`` particles in random order, (N,) 0 or 1."""
    return np.random.default_rng(seed).permutation(np.arange(count) < round(share_of_b * count)).astype(np.int8)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 400), share=st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0]), batch=st.integers(1, 500),
    seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5),
)  # fmt: skip
def test_every_particle_comes_once_an_epoch_in_batches_as_even_as_can_be(count, share, batch, seed, epoch):
    plan = BatchPlan(halves(count, share), batch, seed)
    batches = plan.epoch(epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    sizes = [len(ids) for ids in batches]
    assert len(batches) == plan.batches == -(-count // batch)
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch


def test_a_plan_is_a_function_of_halves_seed_and_epoch_alone():
    half = halves(1001, 0.5)

    def flat(seed, epoch, half=half):
        return np.concatenate(BatchPlan(half, 32, seed).epoch(epoch))

    np.testing.assert_array_equal(flat(3, 2), flat(3, 2))
    plan = BatchPlan(half, 32, 3)
    plan.epoch(0), plan.epoch(1)  # what was asked for before does not matter
    np.testing.assert_array_equal(np.concatenate(plan.epoch(2)), flat(3, 2))
    for other in (flat(4, 2), flat(3, 1), flat(3, 2, halves(1001, 0.5, seed=1))):
        assert not np.array_equal(other, flat(3, 2))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64, 100])
def test_owners_share_out_all_particles(ranks):
    plan = BatchPlan(halves(999, 0.3), 32, 0)
    owner = plan.owner(ranks)
    assert owner.shape == (999,) and owner.min() == 0 and owner.max() == min(ranks, VIRTUAL_SHARDS) - 1
    in_shard = np.bincount(plan.shard, minlength=VIRTUAL_SHARDS)
    assert in_shard.max() - in_shard.min() <= 2
    for half in (0, 1):
        of_half = np.bincount(plan.shard[plan.half == half], minlength=VIRTUAL_SHARDS)
        assert of_half.max() - of_half.min() <= 1


@pytest.mark.parametrize("count", [1001, 5000, 20000])
@pytest.mark.parametrize("batch", [32, 128])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_equal_shares_of_every_batch(count, batch, ranks):
    plan = BatchPlan(halves(count, 0.3), batch, 1)
    owner = plan.owner(ranks)
    for ids in plan.epoch(1):
        shares = np.bincount(owner[ids], minlength=ranks)
        assert np.abs(shares - len(ids) / ranks).max() <= 1.5


@pytest.mark.parametrize("share", [0.5, 0.496, 0.45, 0.3, 0.05])
@pytest.mark.parametrize("count", [640, 1001, 10000])
@pytest.mark.parametrize("batch", [32, 50, 128])
def test_each_half_has_its_share_of_every_batch(share, count, batch):
    """Slightly unequal halves are the hard case: all shards then have the same half at the same place."""
    plan = BatchPlan(halves(count, share), batch, 0)
    true_share = plan.half.mean()
    for ids in plan.epoch(0) + plan.epoch(1):
        assert abs(plan.half[ids].sum() - true_share * len(ids)) <= 4


def test_half_a_is_dealt_alike_whatever_half_b_holds():
    """Half a's order must not hang on half b, only on how large it is."""
    half = halves(500, 0.5)
    plan = BatchPlan(half, 32, 0)
    relabelled = np.concatenate([half[half == 0], half[half == 1]])
    other = BatchPlan(relabelled, 32, 0)
    np.testing.assert_array_equal(plan.shard[half == 0], other.shard[relabelled == 0])


def test_neighbours_in_the_stack_are_spread_over_the_epoch():
    plan = BatchPlan(halves(6400, 0.5), 64, 0)
    when = np.empty(6400)
    for step, ids in enumerate(plan.epoch(0)):
        when[ids] = step
    assert abs(np.corrcoef(when, np.arange(6400))[0, 1]) < 0.05


def test_fewer_particles_than_shards_or_than_a_batch():
    assert [ids.tolist() for ids in BatchPlan(np.array([0]), 32, 0).epoch(0)] == [[0]]
    assert sorted(len(ids) for ids in BatchPlan(halves(7, 0.5), 3, 0).epoch(0)) == [2, 2, 3]
    (ids,) = BatchPlan(halves(50, 0.5), 64, 0).epoch(0)
    assert sorted(ids.tolist()) == list(range(50))
