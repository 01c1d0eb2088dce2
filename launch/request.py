"""What a job asks of Slurm, put together from site, command line and configuration, and checked."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from sites import Site, check_site, minutes
from submitit.slurm.slurm import SlurmExecutor

from cryosplat.errors import InputError
from cryosplat.settings import Config

MOST_RANKS = 64
"""Particles are dealt to as many shards, so further ranks would have nothing to do (cryosplat.sampling.SHARDS)."""

INTERRUPTIONS = 50
"""Time limits that a job may outlive by being queued again."""

GRACE_S = 90
"""Seconds before its time limit at which a job is told to save, go, and be queued again."""


@dataclasses.dataclass(frozen=True)
class Request:
    """``site`` with what the command line has changed; ``tasks``: ranks a node."""

    site: Site
    nodes: int
    tasks: int
    gpus: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks


def make_request(options: argparse.Namespace, site: Site, config: Config) -> Request:
    """The command line over the site.

    Raises:
        InputError: a request that makes no sense by itself or for this configuration.
    """
    given = {item.name: getattr(options, item.name, None) for item in dataclasses.fields(Site)}
    site = dataclasses.replace(site, **{name: value for name, value in given.items() if value is not None})
    site = dataclasses.replace(site, sbatch=site.sbatch | dict(_option(word) for word in options.slurm))
    check_site(site, "the request")
    gpus = site.gpus_per_node or 0
    # A site's number of tasks is for its nodes without GPUs; on the command line it is for this job.
    tasks = options.tasks_per_node or gpus or site.tasks_per_node or 1
    request = Request(site, options.nodes, tasks, gpus)
    _check(request, config)
    return request


def _option(word: str) -> tuple[str, str]:
    name, _, value = word.removeprefix("--").partition("=")
    return name, value


def _check(request: Request, config: Config) -> None:
    gpus, tasks, device = request.gpus, request.tasks, config.train.device
    if request.nodes < 1:
        raise InputError(f"--nodes {request.nodes}: expected 1 or more")
    if device == "cuda" and not gpus:
        raise InputError("train.device=cuda, but no GPU is asked for: --gpus-per-node, or gpus_per_node of the site")
    if device == "cpu" and gpus:
        raise InputError(
            f"{gpus} GPUs a node are asked for, but train.device=cpu: use --gpus-per-node 0, or device auto"
        )
    if gpus and tasks < gpus:
        raise InputError(
            f"--tasks-per-node {tasks} with {gpus} GPUs a node leaves GPUs idle: a rank uses one; leave it out"
        )
    if gpus and tasks > gpus and not config.distributed.share_gpus:
        raise InputError(
            f"--tasks-per-node {tasks} with {gpus} GPUs a node puts several ranks on a GPU: leave it out, or allow it "
            "with distributed.share_gpus=true"
        )
    if request.ranks > MOST_RANKS:
        raise InputError(
            f"{request.nodes} nodes of {tasks} ranks: expected {MOST_RANKS} ranks at most; more have nothing to do"
        )


class Executor(SlurmExecutor):
    """submitit's, which writes scripts where there is no Slurm too, for a dry run."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """The batch script, as it would be submitted."""
        return self._make_submission_file_text(self._submitit_command_str, "")


def make_executor(request: Request, name: str, folder: Path, code: Path) -> Executor:
    """An executor that asks for all that ``request`` says.

    Args:
        name: of the job.
        folder: takes the script, the pickled job and the logs.
        code: the snapshot that the job runs.
    """
    site = request.site
    python = site.python or shlex.quote(sys.executable)
    executor = Executor(
        folder, max_num_timeout=INTERRUPTIONS, python=f"{site.container} {python}" if site.container else python
    )
    values: dict[str, Any] = {
        "job_name": name,
        "time": minutes(site.time or "1-00"),
        "nodes": request.nodes,
        "ntasks_per_node": request.tasks,
        "cpus_per_task": site.cpus_per_task,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "mem": None if site.memory_gb is None else f"{round(site.memory_gb * 1024)}M",
        "additional_parameters": _further_options(request),
        "setup": _setup(site, code),
        "srun_args": _srun(site),
        "stderr_to_stdout": True,
        "signal_delay_s": GRACE_S,
    }
    executor.update_parameters(**{key: value for key, value in values.items() if value is not None}, wckey=None)
    return executor


def _further_options(request: Request) -> dict[str, Any]:
    site = request.site
    found: dict[str, Any] = {"requeue": True}
    if request.gpus:
        amount = f"{site.gpu_type}:{request.gpus}" if site.gpu_type else request.gpus
        found[site.gpu_option] = f"gpu:{amount}" if site.gpu_option == "gres" else amount
    return found | {key: value if value != "" else True for key, value in site.sbatch.items()}


def _setup(site: Site, code: Path) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    # Python looks for the package in the folder it is started in before all others, an installed one included.
    return [*site.setup, *exports, f"cd {shlex.quote(str(code))} || exit 1"]


def _srun(site: Site) -> list[str]:
    # By itself srun lets ranks wait for one that has died, and (since Slurm 22.05) gives a task one core.
    cores = [f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else []
    return ["--kill-on-bad-exit=1", *cores, *site.srun]
