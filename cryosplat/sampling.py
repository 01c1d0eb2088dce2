"""Which particles make up which batch: a pure function of seed, epoch and step.

Particles are dealt to 64 virtual shards, each with its share of either half.
An epoch is one permutation of every shard, interleaved; a batch is a stretch
of that order. Ranks own whole shards, so the ids of every batch are the same
for any number of ranks, and a rank only ever needs its own shards' images.
"""

import numpy as np

VIRTUAL_SHARDS = 64


class BatchPlan:
    """The batches of every epoch.

    Args:
        half: (N,) half set of every particle, 0 or 1.
        batch: particles a batch, over all ranks; the batches of an epoch differ by one at most.
        seed: of the run.
        held_out: (N,) bool, particles that are in no batch; ranks own and hold their share of them all the same.

    Attributes:
        particles: how many are in the batches of an epoch.

    >>> plan = BatchPlan(np.arange(100) % 2, batch=32, seed=0)
    >>> [len(ids) for ids in plan.epoch(0)]
    [25, 25, 25, 25]
    """

    def __init__(self, half: np.ndarray, batch: int, seed: int, held_out: np.ndarray | None = None):
        self.half = np.asarray(half)
        self.held_out = np.zeros(len(self.half), dtype=bool) if held_out is None else np.asarray(held_out)
        self.batch, self.seed = batch, seed
        self.particles = int((~self.held_out).sum())
        self.batches = max(1, -(-self.particles // batch))
        self.shard = np.empty(len(self.half), dtype=np.int64)
        for part in (~self.held_out, self.held_out):  # each dealt evenly
            self.shard[part] = _deal(self.half[part], seed)
        # Members of every shard by half; their order within an epoch is drawn from these.
        trained = [~self.held_out & (self.half == h) for h in (0, 1)]
        self._members = [
            [np.flatnonzero((self.shard == s) & trained[h]) for h in (0, 1)] for s in range(VIRTUAL_SHARDS)
        ]

    def owner(self, ranks: int) -> np.ndarray:
        """(N,) the rank that holds each particle."""
        return self.shard % ranks

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """Particle ids of each batch of an epoch; every particle that is not held out comes once."""
        ids, place, shard = [], [], []
        for s, members in enumerate(self._members):
            rng = np.random.default_rng([self.seed, epoch, s])
            merged = _merge(*(rng.permutation(m) for m in members), shard=s)
            ids.append(merged)
            place.append((np.arange(len(merged)) + 0.5) / max(len(merged), 1))
            shard.append(np.full(len(merged), s))
        order = np.lexsort((np.concatenate(shard), np.concatenate(place)))
        bounds = np.arange(self.batches + 1) * self.particles // self.batches
        return np.split(np.concatenate(ids)[order], bounds[1:-1])


def _deal(half: np.ndarray, seed: int) -> np.ndarray:
    """Shard (N,) of every particle: each half in random order, dealt round and round, the second half backwards."""
    shard = np.empty(len(half), dtype=np.int64)
    for h in (0, 1):
        members = np.random.default_rng([seed, h]).permutation(np.flatnonzero(half == h))
        dealt = np.arange(len(members)) % VIRTUAL_SHARDS
        # Backwards, so that the two halves' remainders fall on different shards.
        shard[members] = dealt if h == 0 else VIRTUAL_SHARDS - 1 - dealt
    return shard


def _merge(first: np.ndarray, second: np.ndarray, shard: int) -> np.ndarray:
    """Both halves spread evenly over one list, so that every stretch of it has its share of each.

    A batch takes about the same stretch of many shards, often a single place of each. So where the
    halves come in the list is staggered from shard to shard, by the shard's bits in reverse: any run of
    neighbouring shards then has, at the same place, both halves in the right proportion.
    """
    count = len(first) + len(second)
    reversed_bits = int(f"{shard:0{VIRTUAL_SHARDS.bit_length() - 1}b}"[::-1], 2)
    # How many of the second half come before each place, in integers so that the total is exact.
    scaled = np.arange(count + 1) * len(second) * VIRTUAL_SHARDS + reversed_bits * count
    before = scaled // max(count * VIRTUAL_SHARDS, 1)
    is_second = np.diff(before) == 1
    merged = np.empty(count, dtype=np.int64)
    merged[is_second], merged[~is_second] = second, first
    return merged
