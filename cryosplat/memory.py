"""What a run needs of a GPU's memory, estimated before it begins; where images go, and how many are taken at a time.

The bytes are counted from shapes, but for two factors seen on CPUs (SOLVING, FIT_MAPS); how near they are to what a GPU
takes awaits one (benchmarks/gpu.md). So a margin is kept, and what does not fit in the end is met by the training step,
which halves its micro-batch.
"""

import contextlib
import logging
import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from cryosplat import distributed
from cryosplat.backprojection import PADDING
from cryosplat.batches import Courier
from cryosplat.errors import InputError
from cryosplat.gaussians import NUMBERS
from cryosplat.imageprep import IMAGES_PER_READ, training_box
from cryosplat.particles import ParticleTable
from cryosplat.prefetch import DiskCourier
from cryosplat.quadratic import MARGIN as FIT_MARGIN
from cryosplat.quadratic import fast_size
from cryosplat.reconstruction import MODEL_NAMES
from cryosplat.sampling import BatchPlan
from cryosplat.settings import Config
from cryosplat.volumefit import MOST

logger = logging.getLogger(__name__)

MARGIN = 0.1
"""Fraction of the free memory that is not counted on: fragments, and what is not estimated."""

RESERVED = 2**29
"""Bytes left to libraries: plans of transforms, modules that are loaded when first used."""

SOLVING = 3.5
"""Most that solving for linear maps needs, over the Fourier grids themselves."""

FIT_MAPS = 12
"""Maps of the molecule's own box that a fit in the volume holds; the box is taken for as large as the images'."""

READ_BYTES = 40
"""A pixel of images that are being prepared: raw, normalised, two transforms, their squares in double."""

STEP_BYTES = 20
"""A pixel of a view in a step: projection or its gradient, spectrum, a transform's copy and its work space."""

COPIES = 10
"""Numbers of a mixture in a step: parameters, gradients, moments, activations and their gradients."""

FOOTPRINT, SOLID, REGION, SLAB = 32, 64, 32, 8
"""Bytes of a Gaussian in a view and in a volume, px of the regions and planes that have a bit for each Gaussian
(csrc/cuda)."""

ON_THEIR_WAY = 2
"""Batches that are on the GPU at a time beside those sent ahead, if images come from elsewhere: at work, and not yet
given back."""

AHEAD = {"host": Courier.ahead, "disk": DiskCourier.ahead}
"""Batches sent ahead, by where images are held."""

HOST_SHARE = 0.75
"""Fraction of the free memory of a node that images may have, if nothing else is asked for."""

SMALLEST_SHARE = 4
"""Images stay on the GPU if that leaves room for one part in this many of a batch at a time; else the host has them."""

OUT_OF_MEMORY = (
    "out of GPU memory. What takes less: data.cache=host, a smaller data.box, fewer model.gaussians, "
    "or a GPU that nothing else runs on"
)


@dataclass(frozen=True)
class Task:
    """What a rank is to do, as far as memory depends on it.

    Attributes:
        images: how many it holds.
        stored_box: px, as they are read.
        box: px, D, as they are held.
        number_bytes: 2 or 4, data.precision.
        models: M.
        gaussians: of the largest model, or the most it may have.
        grids: Fourier grids of the linear maps; 0: none are made.
        solves: whether this rank solves for these maps.
        fits: whether it fits in the volume.
        batch: most images it has in a step; 0: none is trained image by image.
    """

    images: int
    stored_box: int
    box: int
    number_bytes: int
    models: int
    gaussians: int
    grids: int
    solves: bool
    fits: bool
    batch: int

    @property
    def image_bytes(self) -> int:
        """Of one half-spectrum."""
        return self.box * (self.box // 2 + 1) * 2 * self.number_bytes

    def parts(self, cache: str, micro_batch: int) -> dict[str, int]:
        """Bytes of the images, which stay, and of what comes one after the other."""
        box, gaussians = self.box, self.gaussians
        padded = PADDING * box
        bits = math.ceil(box / REGION) ** 2 / 8
        drawn = self.models * (4 * box**3 + gaussians * (SOLID + bits * math.ceil(box / SLAB)))
        grids = self.grids * padded**2 * (padded // 2 + 1) * 16
        fit = FIT_MAPS * 4 * (FIT_MARGIN * box) ** 3 + gaussians * (SOLID + 4 * NUMBERS * COPIES) if self.fits else 0
        views = min(self.models, 2) * min(micro_batch, self.batch)
        step = views * (STEP_BYTES * box**2 + gaussians * (FOOTPRINT + bits))
        step += 4 * NUMBERS * COPIES * self.models * gaussians
        if cache in AHEAD:
            step += (ON_THEIR_WAY + AHEAD[cache]) * self.batch * self.image_bytes
        return {
            "images": self.images * self.image_bytes if cache == "device" else 0,
            "reading": IMAGES_PER_READ * self.stored_box**2 * READ_BYTES,
            "linear maps": int(grids * (SOLVING if self.solves else 1)),
            "fit in the volume": int(fit),
            "training step": int(step) if self.batch else 0,
            "evaluation": int(drawn),
        }

    def need(self, cache: str, micro_batch: int) -> int:
        """Bytes at the most."""
        images, *others = self.parts(cache, micro_batch).values()
        return images + max(others)


@dataclass(frozen=True)
class Plan:
    """Where images are held ("device", "host", "disk"), and how many a rank takes at a time (None: all its share)."""

    cache: str = "device"
    micro_batch: int | None = None


def plan_memory(
    config: Config,
    table: ParticleTable,
    batches: BatchPlan,
    world: distributed.World,
    free: int | None,
    grids: int,
    trains: bool = True,
) -> Plan:
    """Where this rank's images go and how many it takes at a time, so that all it has to do fits.

    Args:
        config: of the run.
        table: all particles.
        batches: who owns them, and what is trained on at a time.
        world: the ranks.
        free: what ``free_bytes`` gives; None: on a CPU, where nothing is estimated.
        grids: Fourier grids of the linear maps.
        trains: whether more than linear maps is made.

    Raises:
        InputError: nothing fits; with what would.
    """
    data, train = config.data, config.train
    box, number_bytes = training_box(data.box, table), 2 if data.precision == "half" else 4
    of_node = len(table) * min(1, world.local_size / world.size) * box * (box // 2 + 1) * 2 * number_bytes
    if free is None:
        place = "device" if data.cache == "auto" else data.cache
        return Plan(_housed(place, data.cache, of_node), train.micro_batch)
    mine, models = batches.owner(world.size) == world.rank, len(MODEL_NAMES) if config.maps.halves else 1
    epoch = batches.epoch(0) if trains and train.epochs else []
    task = Task(
        images=int(mine.sum()),
        stored_box=table.box,
        box=box,
        number_bytes=number_bytes,
        models=models if trains else 0,
        gaussians=config.model.gaussians or MOST,
        grids=grids,
        solves=world.is_main,
        fits=trains and config.volume.steps > 0 and world.rank < models,
        batch=max((int(mine[ids].sum()) for ids in epoch), default=0),
    )
    chosen = choose(task, free, data.cache, train.micro_batch)
    if chosen.cache == "host":
        chosen = replace(chosen, cache=_housed("host", data.cache, of_node))
    need = task.need(chosen.cache, chosen.micro_batch or task.batch)
    logger.info(
        "rank %d: about %.2g of %.2g GiB of free GPU memory are needed, images on the %s",
        *(world.rank, need / 2**30, free / 2**30, chosen.cache),
    )
    return chosen


def choose(task: Task, free: int, cache: str, micro_batch: int | None) -> Plan:
    """What is best of what fits.

    Args:
        task: of this rank.
        free: bytes of its GPU's memory that it may use.
        cache: "auto", "device", "host" or "disk".
        micro_batch: None: as many as fit.

    Raises:
        InputError: nothing fits; with what would.
    """
    room = _room(free)
    wanted = micro_batch or max(task.batch, 1)
    for place, size in _choices(cache, wanted, micro_batch is None):
        if task.need(place, size) <= room:
            return Plan(place, size if size < max(task.batch, 1) else micro_batch)
    raise InputError(_refusal(task, free, cache, micro_batch))


def free_bytes(world: distributed.World) -> int | None:
    """A rank's part of what is free of its GPU now; None on a CPU. Every rank calls this."""
    on_gpu = world.device.type == "cuda"
    mine = (socket.gethostname(), str(torch.cuda.get_device_properties(world.device).uuid)) if on_gpu else None
    sharing = distributed.gather_objects(mine, world).count(mine)
    return torch.cuda.mem_get_info(world.device)[0] // sharing if on_gpu else None


def _housed(place: str, asked: str, need: float) -> str:
    """``place``, in a node's memory; or the disk, if nothing was asked for and that memory is too small."""
    if asked != "auto" or need <= HOST_SHARE * (has := free_host_bytes()):
        return place
    logger.info("images take %.3g GiB, and %.3g of memory are free: they go to the disk", need / 2**30, has / 2**30)
    return "disk"


def free_host_bytes() -> int:
    """Memory of this node that is free now, or of what the job was given of it if that is less."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition(":")[2].lstrip("/")
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if limit.exists() and (most := limit.read_text().strip()) != "max":
                free = min(free, int(most) - int((folder / "memory.current").read_text()))
    return free


def _room(free: int) -> float:
    return (1 - MARGIN) * (free - RESERVED)


def _choices(cache: str, micro_batch: int, may_shrink: bool) -> Iterator[tuple[str, int]]:
    """Places of images and micro-batches, the best first."""
    sizes = [micro_batch]
    while may_shrink and sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    large = [size for size in sizes if size * SMALLEST_SHARE >= micro_batch]
    if cache == "auto":
        yield from (("device", size) for size in large)
    yield from (("host" if cache == "auto" else cache, size) for size in sizes)


def _refusal(task: Task, free: int, cache: str, micro_batch: int | None) -> str:
    room, place = _room(free), "host" if cache == "auto" else cache
    size = micro_batch or 1
    parts = {name: count for name, count in task.parts(place, size).items() if count}
    listed = ", ".join(f"{name} {count / 2**30:.2g}" for name, count in parts.items())
    fitting = []
    if place == "device" and task.need("host", size) <= room:
        fitting.append("data.cache=host")
    if micro_batch is not None:
        smaller = [n for _, n in _choices(place, micro_batch, True) if task.need(place, n) <= room]
        fitting += [f"train.micro_batch={n}" for n in smaller[:1]]
    boxes = (box for box in range(task.box - 2, 7, -2) if box == fast_size(box))
    fitting += [f"data.box={box}" for box in boxes if replace(task, box=box).need(place, size) <= room][:1]
    return (
        f"the GPU has too little memory for this run: {free / 2**30:.2g} GiB are free, and it needs about "
        f"{task.need(place, size) / 2**30:.2g} and {(MARGIN * free + RESERVED) / 2**30:.2g} to spare (GiB of {listed}; "
        f"all but the images one after the other). What would fit: {' or '.join(fitting) or 'train.device=cpu'}"
    )
