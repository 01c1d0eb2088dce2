"""Several processes as one run: the only module that says ``torch.distributed``.

The same program runs alone, under torchrun, under submitit and under a bare
srun; who started it is read from the environment. Host-side traffic (numbers,
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
import shutil
import socket
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cryosplat._extension import core
from cryosplat.config import Config
from cryosplat.devices import find_facts, obstacles
from cryosplat.errors import InputError, PeerError, PeerGone

_LOG = logging.getLogger("cryosplat")

Result = TypeVar("Result")
LAST_TENSORS_S = 0.05
FIRST_PORT, PORTS = 12000, 8000
"""Ports drawn from the job's number: below 20000, where submitit's and Linux's own ranges begin."""


PIECE = 1 << 24
"""Numbers summed at a time over ranks, 64 MiB in float."""

PEER_GONE = re.compile("Connection (closed|reset) by peer|Broken pipe")
"""How gloo says that the process at the other end is not there any more."""


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
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    launcher: str
    threads: int

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and talks."""
        return self.rank == 0


@dataclass(frozen=True)
class Placement:
    """What the launcher's environment says; ``address`` is empty for one process."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0


@contextlib.contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the other ranks, set device and threads, and leave at the end.

    Uses ``train.device``, ``train.threads`` and ``distributed``.

    Raises:
        InputError: half an environment, no such device, or the other ranks do not answer.
        PeerGone: another rank has ended before its time.
    """
    placement = find_placement(os.environ)
    device = choose_device(config.train.device, placement.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = _choose_backend(config, device) if placement.size > 1 else "none"
    if placement.size > 1:
        _connect(placement, backend, config.distributed.timeout_minutes)
    leave = backend == "gloo"
    try:
        yield _survey(placement, device, backend, config.train.threads)
        leave = True
    except BaseException as error:
        if placement.size > 1 and isinstance(error, RuntimeError) and PEER_GONE.search(str(error)):
            # What went wrong is for that rank to say; where in this one's code it was missed helps nobody.
            _LOG.warning("rank %d stops, because another rank has ended", placement.rank)
            leave = False  # it may wait for ever
            raise PeerGone("another rank has ended") from error
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


def _forget_locals(error: BaseException | None) -> None:
    """Free what the functions that ``error`` went through have left, DistributedDataParallel above all.

    If that outlives the process group, its destructor waits for the group's threads with Python's lock held, which
    these may need: one run in a hundred then hung, instead of ending with its error.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def find_placement(environment: Mapping[str, str]) -> Placement:
    """Who started this process, and as which rank.

    torchrun comes first, because it may run inside an srun or a submitit job;
    submitit's local executor before Slurm, because it may run inside an
    allocation.

    Raises:
        InputError: some of a launcher's variables are missing or are not numbers.

    >>> find_placement({}).launcher
    'single'
    """
    if any(name in environment for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _torchrun(environment)
    if environment.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in environment:
        return _submitit_local(environment)
    # A batch script and an interactive shell (srun --pty) have SLURM_PROCID=0 too, and are one process.
    in_step = "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PTY_PORT" not in environment
    if "SLURM_PROCID" in environment and (in_step or environment["SLURM_PROCID"] != "0"):
        return _slurm(environment)
    return Placement("single")


def _torchrun(environment: Mapping[str, str]) -> Placement:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    _require(environment, names, "torchrun", "start the program with torchrun, or unset them for a single process")
    rank, size, local_rank = (_number(environment, name) for name in names[:3])
    return _placement("torchrun", rank, size, local_rank, environment["MASTER_ADDR"], _port(environment, 0))


def _submitit_local(environment: Mapping[str, str]) -> Placement:
    names = [f"SUBMITIT_LOCAL_{name}" for name in ("GLOBALID", "NTASKS", "LOCALID", "JOB_ID")]
    _require(environment, names, "submitit", "submit the job anew with launch/submit.py")
    rank, size, local_rank, job = (_number(environment, name) for name in names)
    return _placement("submitit", rank, size, local_rank, "127.0.0.1", _port(environment, job))


def _slurm(environment: Mapping[str, str]) -> Placement:
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")
    _require(environment, names, "srun", "start the program with srun inside the job")
    rank, size, local_rank, job = (_number(environment, name) for name in names[:4])
    nodes = environment["SLURM_STEP_NODELIST"]
    # One node needs no name service; "node[1-2]" and "a,b" are several.
    several = re.search(r"[,\[]", nodes) is not None
    address = environment.get("MASTER_ADDR") or (first_host(nodes) if several else "127.0.0.1")
    step = int(environment.get("SLURM_STEP_ID", "0"))
    launcher = "submitit" if environment.get("SUBMITIT_EXECUTOR") == "slurm" else "srun"
    return _placement(launcher, rank, size, local_rank, address, _port(environment, job + step))


def _placement(launcher: str, rank: int, size: int, local_rank: int, address: str, port: int) -> Placement:
    if not 0 <= rank < size or local_rank < 0:
        raise InputError(f"{launcher}: rank {rank} (local {local_rank}) of {size} ranks is not possible")
    return Placement(launcher, rank, size, local_rank, address, port)


def _require(environment: Mapping[str, str], names: tuple[str, ...] | list[str], launcher: str, fix: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        there = [name for name in names if name not in missing]
        raise InputError(
            f"the environment is half set for {launcher}: {', '.join(there)} set, {', '.join(missing)} missing; {fix}"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environment[name]):
        raise InputError(f"{name}={environment[name]!r} in the environment: expected a whole number")
    return int(environment[name])


def _port(environment: Mapping[str, str], job: int) -> int:
    return _number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else FIRST_PORT + job % PORTS


def first_host(nodes: str) -> str:
    """First name in a Slurm node list such as ``gpu[07-09,12],login1``, where Slurm puts rank 0.

    Asks ``scontrol``; where that is not installed (inside a container) the list is read here.

    >>> first_host("gpu[07-09,12],login1")
    'gpu07'
    """
    if shutil.which("scontrol"):
        answer = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    match = re.match(r"([^,\[\]]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise InputError(f"cannot read the Slurm node list {nodes!r}; set MASTER_ADDR to the first node's name")
    return "".join(part for part in match.groups() if part)


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
    return {"cpu": "gloo", "cuda": "nccl"}[device.type] if wanted == "auto" else wanted


def _connect(placement: Placement, backend: str, timeout_minutes: float) -> None:
    address = f"[{placement.address}]" if ":" in placement.address else placement.address
    try:
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo",
            init_method=f"tcp://{address}:{placement.port}",
            rank=placement.rank,
            world_size=placement.size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise InputError(
            f"rank {placement.rank} of {placement.size} ({placement.launcher}, host {socket.gethostname()}) cannot "
            f"join the others at {placement.address}:{placement.port}: {str(error).splitlines()[0]} "
            f"(if hosts cannot reach each other by name, set GLOO_SOCKET_IFNAME to their network interface)"
        ) from error


def _survey(placement: Placement, device: torch.device, backend: str, threads: int | None) -> World:
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
    )
    cores = os.sched_getaffinity(0)
    here = socket.gethostname()
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    ranks = gather_objects((here, os.getpid(), str(device), gpu, cores), world)
    if backend == "nccl":
        _refuse_shared_gpus([(other[0], other[3]) for other in ranks])
    neighbours = [other for other in ranks if other[0] == here]
    # Cores that Slurm has bound to this rank alone are all its own; cores that ranks see in common are divided.
    share = len(cores) // sum(1 for other in neighbours if cores & other[4])
    if placement.launcher in ("srun", "submitit") and os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        share = min(share, int(os.environ["SLURM_CPUS_PER_TASK"]))
    threads = threads or max(1, share)
    torch.set_num_threads(threads)
    world = dataclasses.replace(world, local_size=len(neighbours), threads=threads)
    every = gather_objects(threads, world)
    if world.is_main:
        for rank, (host, pid, name, _, visible) in enumerate(ranks):
            _LOG.info(
                f"rank {rank} of {world.size} ({world.launcher}): host {host}, pid {pid}, device {name}, "
                f"{every[rank]} threads on {len(visible)} visible cores, backend {backend}"
            )
    return world


def _refuse_shared_gpus(places: list[tuple[str, str | None]]) -> None:
    """``places``: (host, GPU) of every rank."""
    for rank, place in enumerate(places):
        if place in places[:rank]:
            raise InputError(
                f"ranks {places.index(place)} and {rank} share a GPU of host {place[0]}, which NCCL cannot do; "
                "start one rank a GPU, or set distributed.backend=gloo"
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


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    sum_over_ranks(torch.zeros(1), world)


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
