"""Images on their way before they are needed: read by several threads in order, or gathered a few batches ahead."""

import collections
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cryosplat.batches import Courier
from cryosplat.cache import ChunkSet
from cryosplat.imageprep import Prepared, Preparer

logger = logging.getLogger(__name__)

Item, Result = TypeVar("Item"), TypeVar("Result")

MOST_READERS = 16
"""Threads that read at a time, at the most."""

GATHERED_AHEAD = 3
"""Batches that are being gathered from the disk while one is at work."""


def readers() -> int:
    """Threads that read and prepare images: one more than compute, because one mostly waits for the disk."""
    return min(torch.get_num_threads() + 1, MOST_READERS)


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """(item, ``work(item)``) in the order of the items, worked on by ``readers`` threads, a few items ahead.

    Each thread computes by itself: an image then has the same numbers whatever is done beside it.
    """
    threads, several = readers(), torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "reader", torch.set_num_threads, (1,))
    begun: collections.deque[tuple[Item, Future]] = collections.deque()
    try:
        for item in items:
            begun.append((item, pool.submit(work, item)))
            if len(begun) > threads:
                first, future = begun.popleft()
                yield first, future.result()
        while begun:
            first, future = begun.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(several)  # which each thread has set for those to come


def prepared_in_order(preparer: Preparer, parts: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, Prepared]]:
    """Particles' ids, and their images, read and prepared: on a CPU by several threads, on a GPU as they arrive."""
    if preparer.on_cpu:
        yield from in_order(preparer.read_and_prepare, parts)
        return
    for ids, raw in in_order(preparer.read, parts):
        yield ids, preparer.prepare(raw, ids)


@dataclass(frozen=True)
class CachedImages:
    """Images of a chunk set; those of chunks that are not there are read from their stacks again.

    Attributes:
        chunks: the set.
        ids: (n,) its particles, by their place in the set.
        preparer: of these images.
    """

    chunks: ChunkSet
    ids: np.ndarray
    preparer: Preparer

    def statistics(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, Prepared]]:
        """Ids of the images at ``places`` (n,), ascending, and all that is known of them but their spectra."""
        per_chunk = self.chunks.layout.per_chunk

        def of_chunk(part: np.ndarray) -> Prepared:
            chunk = int(part[0]) // per_chunk
            found = self.chunks.statistics(chunk, part - chunk * per_chunk)
            return found or self.preparer.read_and_prepare(self.ids[part])

        for part, found in in_order(of_chunk, _by_chunk(places, per_chunk)):
            yield self.ids[part], found

    def gather(self, places: np.ndarray, out: Tensor) -> None:
        """Put half-spectra of the images at ``places`` (n,) into ``out`` (n, D, D//2+1, 2), in the host's memory."""
        order, per_chunk = np.argsort(places, kind="stable"), self.chunks.layout.per_chunk
        for part in _by_chunk(places[order], per_chunk):
            mine, order = order[: len(part)], order[len(part) :]
            chunk = int(part[0]) // per_chunk
            if not self.chunks.gather(chunk, part - chunk * per_chunk, out, mine):
                out[torch.from_numpy(mine)] = self.preparer.read_and_prepare(self.ids[part]).spectra.cpu()


def _by_chunk(places: np.ndarray, per_chunk: int) -> list[np.ndarray]:
    """Ascending places (n,) cut where a new chunk begins."""
    return np.split(places, np.flatnonzero(np.diff(places // per_chunk)) + 1) if len(places) else []


class DiskCourier(Courier):
    """Takes images from the disk to the device, gathered by a thread of its own some batches ahead.

    Args:
        gather: puts the images of rows (n,) into an array (n, D, D//2+1, 2) in the host's memory.
        shape, dtype: of an image.
        device: where they go.
    """

    ahead = GATHERED_AHEAD

    def __init__(
        self,
        gather: Callable[[np.ndarray, Tensor], None],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__(torch.empty(0, *shape, dtype=dtype), device)
        self._gather = gather
        self._pool = ThreadPoolExecutor(1, "gatherer", torch.set_num_threads, (1,))

    def send(self, rows: Tensor) -> Future:
        """Begin to gather ``rows`` (B,)."""
        self._follow()
        return self._pool.submit(self._bring, rows.numpy())

    def _bring(self, rows: np.ndarray) -> tuple[Tensor, "torch.cuda.Event | None"]:
        staged = self._staging(len(rows))
        self._gather(rows, staged)
        return self._ship(staged)

    def take(self, sent: Future) -> Tensor:
        """The same rows, for use in the current stream; the host waits until they are read."""
        began = time.perf_counter()
        shipped = sent.result()
        self.waited_s += time.perf_counter() - began
        return super().take(shipped)
