"""Which rank of how many this process is: read from what its launcher has put into the environment."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from cryosplat.errors import InputError

FIRST_PORT, PORTS = 12000, 8000
"""Ports drawn from the job's number: below 20000, where submitit's and Linux's own ranges begin."""


@dataclass(frozen=True)
class Placement:
    """What the launcher's environment says; ``address`` is empty for one process."""

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0


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


def tasks_left_out(placement: Placement, environment: Mapping[str, str]) -> int:
    """Tasks of the Slurm job in which a single process was started without srun; 0 if it is none or has but one."""
    tasks = environment.get("SLURM_NTASKS", "")
    return int(tasks) if placement.launcher == "single" and tasks.isdigit() and int(tasks) > 1 else 0


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
