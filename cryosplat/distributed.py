"""Several processes as one run: the only module that says ``torch.distributed``.

The same program runs alone, under torchrun, under submitit and under a bare
srun; ``placement`` reads from the environment who started it. Host-side traffic (numbers,
objects, barriers) always goes over gloo, so it never waits for a GPU; only
CUDA tensors go over NCCL.
"""

import contextlib
import dataclasses
import datetime
import gc
import logging
import os
import re
import socket
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cryosplat._extension import core
from cryosplat.devices import find_facts, obstacles
from cryosplat.errors import InputError, PeerError, PeerGone
from cryosplat.placement import Placement, find_placement, tasks_left_out
from cryosplat.settings import Config

_LOG = logging.getLogger("cryosplat")

Result = TypeVar("Result")
LAST_TENSORS_S = 0.05
PATIENCE = datetime.timedelta(days=365)

PIECE = 1 << 24
"""Numbers summed at a time over ranks, 64 MiB in float."""

PEER_GONE = re.compile("Connection (closed|reset) by peer|Broken pipe")
"""How gloo says that the process at the other end is not there any more."""

TIMED_OUT = re.compile("Timed out waiting|[Tt]imed? ?out after|wait timeout")
"""How gloo and the store say that another rank has not come."""

_doing: str = "the start"


@dataclass(frozen=True)
class World:
    """Where this process stands among all ranks.

    Attributes:
        rank, size: this process and how many there are.
        local_rank, local_size: the same, counted on this host alone.
        device: what this rank computes on.
        backend: "gloo" or "nccl" for the tensors of ``device``; "none" for one process.
        launcher: "single", "torchrun", "submitit" or "srun".
        threads: CPU threads of this rank, as given to PyTorch.
        patient: the process group of ``wait_for_main``.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    launcher: str
    threads: int
    patient: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and talks."""
        return self.rank == 0


@contextlib.contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the other ranks, set device and threads, and leave at the end.

    Uses ``train.device``, ``train.threads`` and ``distributed``.

    Raises:
        InputError: half an environment, no such device, or the other ranks do not answer.
        PeerGone: another rank has ended before its time, or hangs.
    """
    placement = find_placement(os.environ)
    device = choose_device(config.train.device, placement.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = _connect(placement, config, device)
    leave = backend == "gloo"
    try:
        yield _survey(placement, device, backend, config)
        leave = True
    except BaseException as error:
        gone = _missed_peer(error, placement, config.distributed.timeout_minutes)
        if gone is not None:
            leave = False  # it may wait for ever
            raise gone from error
        if placement.size > 1:
            _forget_locals(error)
        raise
    finally:
        # After an error gloo's peers see the closed connections and stop too. NCCL would wait here for collectives
        # that never come; there the launcher ends the other ranks when this one dies.
        if dist.is_initialized() and leave:
            # First what may keep the group and its threads in a cycle until the interpreter ends: a thread that gives
            # up its last tensor then aborts the process. In the pause they do so, which takes Python's lock.
            gc.collect()
            time.sleep(LAST_TENSORS_S)
            dist.destroy_process_group()


def _missed_peer(error: BaseException, placement: Placement, timeout_minutes: float) -> PeerGone | None:
    """What to raise, once it is logged, if another rank has ended or does not come; None if it is something else."""
    if placement.size == 1 or not isinstance(error, RuntimeError):
        return None
    if PEER_GONE.search(str(error)):
        # What went wrong is for that rank to say; where in this one's code it was missed helps nobody.
        _LOG.warning("rank %d stops, because another rank has ended", placement.rank)
        return PeerGone("another rank has ended")
    if not TIMED_OUT.search(str(error)):
        return None
    said = (
        f"rank {placement.rank} of {placement.size} on {socket.gethostname()} has waited {timeout_minutes:g} minutes "
        f"in vain for another rank ({_doing}): one hangs or has lost its network. Started again, the run goes on from "
        "its last checkpoint; if a rank was only slow, raise distributed.timeout_minutes"
    )
    _LOG.error(said)
    return PeerGone(said)


def doing(what: str) -> None:
    """Say what this rank is at: what it then waits for in vain is named so."""
    global _doing
    _doing = what


def _forget_locals(error: BaseException | None) -> None:
    """Free what the functions that ``error`` went through have left, DistributedDataParallel above all.

    If that outlives the process group, its destructor waits for the group's threads with Python's lock held, which
    these may need: one run in a hundred then hung, instead of ending with its error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank: by local rank among the visible GPUs, round and round.

    "auto" is the CPU wherever GPUs cannot be used, and the log says why. Modulo, because some Slurm settings show every
    rank all GPUs of the node and some only its own.

    Raises:
        InputError: "cuda", and the build, the driver, PyTorch or a GPU does not allow it.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    reasons = obstacles(find_facts(core))
    if not reasons:
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if wanted == "cuda":
        raise InputError(
            f"train.device=cuda, but {'; and '.join(reasons)}. 'cryosplat doctor' says what there is; train.device=cpu "
            "(or auto) computes on the CPU"
        )
    _LOG.info("train.device=auto is the CPU: %s", reasons[0])
    return torch.device("cpu")


def find_backends() -> list[str]:
    """What can carry tensors between ranks with this PyTorch: "gloo", "nccl" and its version."""
    found = ["gloo"] if dist.is_available() and dist.is_gloo_available() else []
    if dist.is_available() and dist.is_nccl_available():
        found.append(f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))}")
    return found


def _choose_backend(config: Config, device: torch.device) -> str:
    wanted = config.distributed.backend
    if wanted == "nccl" and device.type == "cpu":
        raise InputError("distributed.backend=nccl needs GPUs, and this rank computes on the CPU; use gloo or auto")
    if wanted == "auto":
        # NCCL refuses two ranks on one GPU.
        return "nccl" if device.type == "cuda" and not config.distributed.share_gpus else "gloo"
    return wanted


def _connect(placement: Placement, config: Config, device: torch.device) -> str:
    """Make the process group, if there are others; returns the backend of ``device``'s tensors."""
    if placement.size == 1:
        if tasks := tasks_left_out(placement, os.environ):
            _LOG.warning(
                "this job of Slurm has %d tasks, but this is one process alone, because srun has not started it", tasks
            )
        return "none"
    backend = _choose_backend(config, device)
    address = f"[{placement.address}]" if ":" in placement.address else placement.address
    try:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo",
            init_method=f"tcp://{address}:{placement.port}",
            rank=placement.rank,
            world_size=placement.size,
            timeout=datetime.timedelta(minutes=config.distributed.timeout_minutes),
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise InputError(
            f"rank {placement.rank} of {placement.size} ({placement.launcher}, host {socket.gethostname()}) cannot "
            f"join the others at {placement.address}:{placement.port}: {str(error).splitlines()[0]} "
            f"(if hosts cannot reach each other by name, set GLOO_SOCKET_IFNAME to their network interface)"
        ) from error
    return backend


@dataclass(frozen=True)
class _Place:
    """What a rank says of itself to the others; ``gpu`` is the UUID of its GPU, empty on the CPU."""

    host: str
    pid: int
    device: str
    gpu: str
    cores: frozenset[int]

    @classmethod
    def of(cls, device: torch.device) -> "_Place":
        name, gpu = str(device), ""
        if device.type == "cuda":
            facts = torch.cuda.get_device_properties(device)
            name, gpu = f"{device} ({facts.name})", str(facts.uuid)
        return cls(socket.gethostname(), os.getpid(), name, gpu, frozenset(os.sched_getaffinity(0)))


def _survey(placement: Placement, device: torch.device, backend: str, config: Config) -> World:
    """Who is where: ranks on this host, cores of each, no GPU used twice; rank 0 logs a line a rank."""
    world = World(
        rank=placement.rank,
        size=placement.size,
        local_rank=placement.local_rank,
        local_size=1,
        device=device,
        backend=backend,
        launcher=placement.launcher,
        threads=1,
        patient=dist.new_group(backend="gloo", timeout=PATIENCE) if placement.size > 1 else None,
    )
    mine = _Place.of(device)
    places = gather_objects(mine, world)
    if not config.distributed.share_gpus:
        _refuse_shared_gpus([(place.host, place.gpu) for place in places], world)
    neighbours = [place for place in places if place.host == mine.host]
    threads = config.train.threads or _share_of_cores(mine, neighbours, placement.launcher)
    torch.set_num_threads(threads)
    world = dataclasses.replace(world, local_size=len(neighbours), threads=threads)
    every = gather_objects(threads, world)
    if world.is_main:
        for rank, place in enumerate(places):
            _LOG.info(
                f"rank {rank} of {world.size} ({world.launcher}): host {place.host}, pid {place.pid}, "
                f"device {place.device}{place.gpu and f' {place.gpu}'}, {every[rank]} threads on "
                f"{len(place.cores)} visible cores, backend {backend}"
            )
    return world


def _share_of_cores(mine: _Place, neighbours: list[_Place], launcher: str) -> int:
    # Cores that Slurm has bound to this rank alone are all its own; cores that ranks see in common are divided.
    share = len(mine.cores) // sum(1 for place in neighbours if mine.cores & place.cores)
    if launcher in ("srun", "submitit") and os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        share = min(share, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, share)


def _refuse_shared_gpus(places: list[tuple[str, str]], world: World) -> None:
    """``places``: (host, UUID of the GPU, empty on the CPU) of every rank. Said by rank 0."""
    for rank, place in enumerate(places):
        if place[1] and place in places[:rank]:
            raise common_error(
                f"ranks {places.index(place)} and {rank} share the GPU {place[1]} of host {place[0]}: start one rank a "
                "GPU, or allow it with distributed.share_gpus=true (slower, and over gloo)",
                world,
            )


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """The element-wise sum of every rank's ``values`` (any shape, on the CPU or ``world.device``), on every rank."""
    if world.size == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def sum_arrays(arrays: Sequence[np.ndarray], world: World) -> list[np.ndarray]:
    """``sum_over_ranks`` of NumPy arrays, each of one shape on all ranks."""
    return [sum_over_ranks(torch.from_numpy(array), world).numpy() for array in arrays]


def sum_to_main(values: Tensor, world: World) -> Tensor | None:
    """The element-wise sum of every rank's ``values``, in place, on rank 0; None on the others, which may free theirs.

    For what only rank 0 goes on with, and is large: Fourier grids. In pieces, so that no backend needs a buffer of the
    whole.
    """
    if world.size == 1:
        return values
    for piece in values.view(-1).split(PIECE):
        dist.reduce(piece, dst=0)
    return values if world.is_main else None


def gather_objects(item: Any, world: World) -> list[Any]:
    """Every rank's picklable ``item``, in the order of ranks, on every rank."""
    if world.size == 1:
        return [item]
    items: list[Any] = [None] * world.size
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item: Any, world: World, source: int = 0) -> Any:
    """The picklable ``item`` of rank ``source``, on every rank."""
    if world.size == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=source, device=torch.device("cpu"))
    return items[0]


def send_object(item: Any, rank: int, world: World) -> Any:
    """The picklable ``item`` of rank 0, on ``rank`` (and on rank 0 itself); None on the others."""
    if rank == 0 or world.size == 1:
        return item
    if world.rank not in (0, rank):
        return None
    items = [item]
    if world.is_main:
        dist.send_object_list(items, dst=rank, device=torch.device("cpu"))
    else:
        dist.recv_object_list(items, src=0, device=torch.device("cpu"))
    return items[0]


def together(work: Callable[[], Result], world: World) -> Result:
    """Do each rank's own ``work``, and stop all ranks if one of them finds something the user must mend.

    Returns:
        What this rank's work returned.

    Raises:
        InputError: from this rank's work.
        PeerError: with another rank's message; ranks in good order would otherwise wait for it in vain.
    """
    result, problem = None, None
    try:
        result = work()
    except InputError as error:
        problem = error
    messages = gather_objects(None if problem is None else str(problem), world)
    if problem is not None:
        first = next(message for message in messages if message is not None)
        # Said once: by the lowest of the ranks that have the same thing to say.
        if first == str(problem) and messages.index(first) < world.rank:
            raise PeerError(first) from problem
        raise problem
    others = [message for message in messages if message is not None]
    if others:
        raise PeerError(others[0])
    return result


def common_error(message: str, world: World) -> InputError:
    """The error for something all ranks have found alike, to be raised by each: rank 0 alone says it."""
    return InputError(message) if world.is_main else PeerError(message)


def tell_all(key: str, world: World) -> None:
    """Leave word for all ranks, wherever they are; waits for none of them."""
    if world.size > 1:
        _store().set(key, "1")


def is_told(key: str, world: World) -> bool:
    """Whether a rank has left this word; one question to rank 0's host."""
    return world.size > 1 and _store().check([key])


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()  # by which init_process_group has brought them together


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    sum_over_ranks(torch.zeros(1), world)


def wait_for_main(world: World) -> None:
    """Wait until every rank is here, however long rank 0 takes; all ranks call it.

    For after what rank 0 does alone (maps, FSC), which may take longer than ``distributed.timeout_minutes``, as long as
    other collectives wait for a rank that hangs. A rank 0 that ends meanwhile is noticed at once.
    """
    if world.size > 1:
        dist.all_reduce(torch.zeros(1), group=world.patient)


def apart(wrapped: nn.Module, world: World) -> contextlib.AbstractContextManager:
    """Inside, gradients of what ``wrap`` returned add up on each rank; the first backward pass outside shares them."""
    return contextlib.nullcontext() if world.size == 1 else wrapped.no_sync()


def wrap(module: nn.Module, world: World) -> nn.Module:
    """``module`` with gradients averaged over ranks, in one all-reduce a step; itself in a single process.

    Every rank starts from rank 0's parameters. One bucket, because a mixture's
    gradients are a few MB: a second collective would cost more than it hides.
    """
    if world.size == 1:
        return module
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers to something that 2.6 does not have yet.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            module, broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=size // 2**20 + 1
        )
