"""Where a rank's images are while it works: in memory, or on the disk of its node, put there by its ranks together."""

import logging
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from cryosplat import distributed
from cryosplat.cache import ChunkSet, Layout, cache_folder, images_per_chunk
from cryosplat.dataset import ParticleDataset
from cryosplat.errors import InputError
from cryosplat.imageprep import Prepared, Preparer, training_box
from cryosplat.particles import ParticleTable
from cryosplat.prefetch import MOST_READERS, CachedImages, in_order
from cryosplat.sampling import BatchPlan
from cryosplat.settings import Config

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 4096
"""Read at the beginning, in the middle and at the end of a stack, to tell it from one of its name, size and time."""


def read_images(
    config: Config,
    world: distributed.World,
    table: ParticleTable,
    plan: BatchPlan,
    cache: str,
    progress: Callable[[int], None] = lambda done: None,
) -> ParticleDataset:
    """This rank's images, read and prepared; a collective.

    Args:
        config: of the run.
        world: the ranks.
        table: all particles.
        plan: which rank owns which of them.
        cache: where this rank holds them: "device", "host" or "disk".
        progress: called with the number of this rank's images that are there so far.

    Raises:
        InputError: an image that cannot be used, or a cache folder that cannot be written to.
    """
    owner = plan.owner(world.size)
    owned, kept = np.flatnonzero(owner == world.rank), None
    mine = (socket.gethostname(), cache)
    said = distributed.gather_objects(mine, world)
    if any(place == "disk" for _, place in said):
        sharing = [rank for rank, place in enumerate(said) if place == mine]
        ids = np.flatnonzero(np.isin(owner, sharing))
        on_disk = cache == "disk"
        kept = distributed.together(lambda: open_cache(config, world, table, ids) if on_disk else None, world)
        share = sharing.index(world.rank), len(sharing)
        distributed.together(lambda: fill(kept, *share) if on_disk else None, world)
    where = {"device": world.device, "cache": cache, "kept": kept, "progress": progress}
    return distributed.together(
        lambda: ParticleDataset(table, owned, config.data.box, table.invert, config.data.precision, **where), world
    )


def open_cache(config: Config, world: distributed.World, table: ParticleTable, ids: np.ndarray) -> CachedImages:
    """The set of the images of particles ``ids`` (n,) in this node's cache, whatever of it is there.

    Raises:
        InputError: the cache's folder cannot be written to, or a stack cannot be read.
    """
    preparer = Preparer(table, training_box(config.data.box, table), config.data.precision, world.device)
    ids = table.images.in_file_order(ids)
    layout = Layout(len(ids), images_per_chunk(table.box), preparer.shape, preparer.dtype, preparer.shells)
    root = cache_folder(config.cache.dir, os.environ)
    chunks = ChunkSet(root, describe(table, ids, preparer, layout), layout, config.cache.max_gb)
    missing = layout.images - chunks.kept * layout.per_chunk
    if missing > 0:
        logger.warning(
            "%s has no room for %d of %d images (all of them take %.3g GiB): these are read from their stacks and "
            "prepared again whenever they are needed, which is slow. A larger cache.max_gb, a cache.dir on a larger "
            "disk of this node or a smaller data.box would mend that",
            *(root, missing, layout.images, layout.total_bytes / 2**30),
        )
    return CachedImages(chunks, ids, preparer)


def describe(table: ParticleTable, ids: np.ndarray, preparer: Preparer, layout: Layout) -> dict:
    """All that the prepared images of particles ``ids`` (n,) depend on, to be a cache's key.

    Of each stack its path, size, time of change and a sample of its content, so that one that was written again is
    another; the stacks are not read.
    """
    images = table.images
    used, stack = np.unique(images.stack[ids], return_inverse=True)
    with ThreadPoolExecutor(MOST_READERS) as pool:
        stacks = list(pool.map(_describe_stack, [images.paths[index] for index in used]))
    which = np.stack([stack, images.slices[ids]]).astype("<i8")
    return {
        **preparer.key,
        "stored_box": table.box,
        "per_chunk": layout.per_chunk,
        "stacks": stacks,
        "which": zlib.crc32(which.tobytes()),
        "count": len(ids),
    }


def _describe_stack(path: Path) -> list:
    try:
        with open(path, "rb", buffering=0) as handle:
            facts, sample = os.fstat(handle.fileno()), 0
            for start in (0, facts.st_size // 2, facts.st_size - SAMPLE_BYTES):
                sample = zlib.crc32(os.pread(handle.fileno(), SAMPLE_BYTES, max(0, start)), sample)
    except OSError as error:
        raise InputError(f"{path}: the image stack cannot be read ({error.strerror or error})") from error
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns, sample]


def fill(kept: CachedImages, place: int, sharers: int) -> int:
    """Make those chunks that are not there, or are damaged: every ``sharers``-th from the ``place``-th on.

    Chunks at which another job's process is, are left to it, and looked at again when it has done with them.

    Returns:
        How many images were read.

    Raises:
        InputError: an image that cannot be used.
    """
    chunks, read = kept.chunks, 0

    def make(chunk: int) -> int | np.ndarray:
        """All of it, and how many images that were; for a GPU, which prepares what arrives, their pixels."""
        ids = kept.ids[chunks.layout.places(chunk)]
        if not chunks.kept or chunks.is_good(chunk):
            return 0
        if not kept.preparer.on_cpu:
            return kept.preparer.read(ids)
        return _write(chunks, chunk, kept.preparer.read_and_prepare(ids))

    left = [chunk for chunk in range(place, chunks.layout.chunks, sharers) if chunk < chunks.kept]
    while left:
        busy: list[int] = []
        for chunk, made in in_order(make, _claimed(chunks, left, busy)):
            if not isinstance(made, int):
                made = _write(chunks, chunk, kept.preparer.prepare(made, kept.ids[chunks.layout.places(chunk)]))
            read += made
            chunks.release(chunk)
        if busy == left:
            # Nothing else is claimed here, so no two processes can wait for each other.
            chunks.claim(busy[0], wait=True)
            chunks.release(busy[0])
        left = [chunk for chunk in busy if chunk < chunks.kept]
    return read


def _claimed(chunks: ChunkSet, wanted: list[int], busy: list[int]) -> Iterator[int]:
    """Those of the ``wanted`` chunks that could be claimed; others, at which another process is, go into ``busy``."""
    for chunk in wanted:
        if chunks.claim(chunk, wait=False):
            yield chunk
        else:
            busy.append(chunk)


def _write(chunks: ChunkSet, chunk: int, made: Prepared) -> int:
    """How many images were made; if the disk is full, say so once and keep no more."""
    try:
        if chunks.kept:
            chunks.write(chunk, made)
    except OSError as error:
        if not chunks.kept:  # another thread has said it
            return len(made.deviation)
        chunks.kept = 0
        logger.warning(
            "%s: %s: the cache keeps what it has; other images are read from their stacks and prepared again whenever "
            "they are needed, which is slow. Make room there, or name another folder with cache.dir",
            *(chunks.folder, error.strerror or error),
        )
    return len(made.deviation)
