"""Submit a training run: to Slurm where there is one, else to this machine.

  python launch/submit.py --config demo.yaml
  python launch/submit.py --config 10049.yaml --site h100-infiniband data_root=/data/cryodrgn_empiar --nodes 2 --follow
  python launch/submit.py --config my.yaml --site cpu --array train.seed=0,1,2

Configuration, data and request are checked before anything is submitted. On Slurm this returns at once unless it is to
follow the job; a local job is followed to its end. A job that Slurm interrupts (time limit, preemption) is queued again
and goes on from its last checkpoint. It runs a copy of the code, in RUN_DIR/jobs.
"""

import argparse
import contextlib
import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import submitit
from follow import follow_local, follow_slurm
from job import TrainingJob
from jobs import JobRecord, now
from omegaconf import OmegaConf
from request import INTERRUPTIONS, Request, make_executor, make_request
from sites import load_site, minutes
from snapshot import take_snapshot
from submitit.core.utils import FailedJobError

from cryosplat.config import check_files, load_config
from cryosplat.errors import InputError
from cryosplat.settings import Config


@dataclass(frozen=True)
class Plan:
    """What is to be submitted: a run, or the runs of a sweep, all with the same resources.

    ``home`` holds ``jobs/``: the run directory, or the folder of a sweep's run directories.
    """

    configs: list[Config]
    home: Path
    request: Request
    local: bool

    @property
    def name(self) -> str:
        return f"cryosplat-{self.home.name}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        plan = make_plan(options)
        if options.dry_run:
            dry_run(plan)
            return 0
        folder = plan.home / "jobs" / time.strftime("%Y%m%d-%H%M%S")
        job, record = submit(plan, folder)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number, run in record.runs.items():
        print(f"job {number} submitted\n  run directory: {run}\n  log: {record.log(number)}")
    watched = plan.home if len(record.runs) > 1 else plan.home / "tensorboard"
    print(f"  status: python launch/status.py {shlex.quote(str(plan.home))}")
    print(f"  TensorBoard: tensorboard --logdir {shlex.quote(str(watched))}", flush=True)
    if plan.local:
        return follow_local(job, record)
    return follow_slurm(record) if options.follow else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as train.epochs=3")
    parser.add_argument("--config", required=True, help="YAML file; a bare name is looked up in configs/ too")
    parser.add_argument("--site", metavar="NAME", help="profile of the cluster: a file, or one of slurm/sites/")
    parser.add_argument("--local", action="store_true", help="run on this machine, also where there is Slurm")
    parser.add_argument("--array", metavar="KEY=V1,V2,...", help="a sweep: one run for each value of a setting")
    parser.add_argument("--follow", action="store_true", help="show the log until the job ends; its exit status")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all, print the batch script and the settings, stop"
    )
    asked = parser.add_argument_group("resources (what is not given is the site's)")
    asked.add_argument("--nodes", type=int, default=1)
    asked.add_argument("--gpus-per-node", type=int, help="one rank each; local: all that are visible")
    asked.add_argument("--tasks-per-node", type=int, help="ranks a node where there are no GPUs (default: 1)")
    asked.add_argument("--cpus-per-task", type=int)
    asked.add_argument("--mem", dest="memory_gb", type=float, metavar="GIB", help="memory a node in GiB")
    asked.add_argument("--time", help="[days-]hours:minutes:seconds or minutes (default: a day)")
    for name in ("partition", "account", "qos", "constraint"):
        asked.add_argument(f"--{name}")
    asked.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="OPTION[=VALUE]",
        help="any other option of sbatch, such as --slurm reservation=cryoem --slurm exclusive",
    )
    return parser.parse_intermixed_args(arguments)


def make_plan(options: argparse.Namespace) -> Plan:
    """Everything that can be found wrong is found here, with nothing written.

    Raises:
        InputError: configuration, data, site or request are wrong, or there is no Slurm where it is asked for.
    """
    config = load_config(options.config, options.overrides)
    configs = sweep(options, config)
    has_slurm = shutil.which("sbatch") is not None
    local = options.local or not (has_slurm or options.dry_run or options.site or options.array)
    if local and (options.site or options.array):
        raise InputError("--local goes with neither --site nor --array: it is one job on this machine")
    if not (local or has_slurm or options.dry_run):
        raise InputError("there is no sbatch on PATH; run this on a login node of the cluster, or with --local")
    if local and options.nodes != 1:
        why = "a local job" if has_slurm else "there is no sbatch on PATH, and a job on this machine"
        raise InputError(f"--nodes {options.nodes}: {why} has one node")
    if local:
        options = copy.copy(options)
        options.gpus_per_node = gpus_to_use(config) if options.gpus_per_node is None else options.gpus_per_node
    request = make_request(options, load_site(options.site), config)
    check_input(configs)
    return Plan(configs, Path(config.run_dir).expanduser().absolute(), request, local)


def sweep(options: argparse.Namespace, config: Config) -> list[Config]:
    """The configurations of ``--array``, each with a run directory of its own inside ``run_dir``; or the one."""
    if not options.array:
        return [config]
    key, equals, values = options.array.partition("=")
    chosen = values.split(",")
    if not equals or not all(chosen) or len(set(chosen)) < len(chosen):
        raise InputError(f"--array {options.array}: expected KEY=V1,V2,... with values that differ")
    if key in ("run_dir", "resume") or any(word.startswith(f"{key}=") for word in options.overrides):
        raise InputError(f"--array {options.array}: {key} cannot be swept over, or is given on the command line too")
    home = Path(config.run_dir).expanduser()
    if (home / "config.yaml").exists():
        raise InputError(f"run_dir: {home} holds a run, and cannot hold those of a sweep too; choose another run_dir")
    names = [re.sub(r"[^\w.=+-]", "_", f"{key}={value}") for value in chosen]
    if len(set(names)) < len(names):
        raise InputError(f"--array {options.array}: the values make the same names of run directories")
    words = [[f"{key}={value}", f"run_dir={home / name}"] for value, name in zip(chosen, names, strict=True)]
    return [load_config(options.config, [*options.overrides, *mine]) for mine in words]


def check_input(configs: list[Config]) -> None:
    """What the trainer would find wrong with files, particles and run directory before it reads any pixel.

    Raises:
        InputError: as the trainer would.
    """
    for config in configs:
        check_files(config)
    # Here and not above, because they take a second or two: mistakes that need no data are found at once.
    from cryosplat.conventions import rescaled_pixel_size
    from cryosplat.evaluation import read_comparison
    from cryosplat.particles import read_particles
    from cryosplat.runs import find_run

    seen = None
    for config in configs:
        if (find_run(config) or Path()).joinpath("summary.json").is_file():
            raise InputError(f"run_dir: {config.run_dir} holds a run that is complete; choose another")
        if (config.data, config.data_root) == seen:  # a sweep over something else reads the same files
            continue
        seen = config.data, config.data_root
        table = read_particles(config.data, config.data_root, config.train.seed, config.maps.halves)
        box = config.data.box or table.box
        if box > table.box:
            raise InputError(f"data.box={box}: larger than the images, which are {table.box} px; leave it out")
        read_comparison(config, box, rescaled_pixel_size(table.pixel_size_a, table.box, box))


def gpus_to_use(config: Config) -> int:
    if config.train.device == "cpu":
        return 0
    import torch  # a second or two, and only here does it matter

    from cryosplat.distributed import choose_device

    return torch.cuda.device_count() if choose_device(config.train.device, 0).type == "cuda" else 0


def dry_run(plan: Plan) -> None:
    """Print what would be submitted, and what Slurm would say to it if it is here."""
    folder = plan.home / "jobs" / "dry-run"
    if plan.local:
        print(f"# on this machine: {plan.request.tasks} ranks, {plan.request.gpus} GPUs")
    else:
        executor = make_executor(plan.request, plan.name, folder, folder / "code")
        if len(plan.configs) > 1:
            executor.parameters["map_count"] = len(plan.configs)
        script = executor.script()
        print(script)
        if shutil.which("sbatch"):
            tested = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
            print(tested.stderr.strip(), file=sys.stderr)
            if tested.returncode:
                raise InputError("Slurm would not accept this job, as it says above")
    for config in plan.configs:
        print(f"# the settings of {config.run_dir}\n{OmegaConf.to_yaml(OmegaConf.structured(config))}", end="")
    print("# dry run: nothing was submitted", flush=True)


def submit(plan: Plan, folder: Path) -> tuple[submitit.Job, JobRecord]:
    """Write the job's folder and hand it over; nothing stays behind if it is refused.

    Returns:
        The first job, and the record of all.
    """
    # By value: the nodes need not be able to import this folder, only the package.
    cloudpickle.register_pickle_by_value(sys.modules[TrainingJob.__module__])
    try:
        folder.mkdir(parents=True)
        take_snapshot(folder / "code")
        jobs = _hand_over(plan, folder)
        runs = {
            job.job_id: str(Path(config.run_dir).expanduser().absolute())
            for job, config in zip(jobs, plan.configs, strict=True)
        }
        record = JobRecord(str(folder), runs, plan.request.nodes, plan.request.ranks, now(), plan.local)
        record.write()
    except FileExistsError as error:
        raise InputError(f"{folder}: another job is being submitted for this run; try again") from error
    except (InputError, OSError, FailedJobError) as error:
        _remove(folder)
        if isinstance(error, InputError):
            raise
        if isinstance(error, OSError):
            raise InputError(f"run_dir: cannot write {folder}: {error.strerror}") from error
        raise InputError(f"the job was not accepted: {error}") from error
    return jobs[0], record


def _remove(folder: Path) -> None:
    """Take a job's folder away, and those above it as far as nothing else is in them."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for parent in folder.parents:
            parent.rmdir()


def _hand_over(plan: Plan, folder: Path) -> list[submitit.Job]:
    trainings = [TrainingJob(config, os.getcwd()) for config in plan.configs]
    if plan.local:
        return [_local_executor(plan.request, folder).submit(trainings[0])]
    executor = make_executor(plan.request, plan.name, folder, folder / "code")
    with executor.batch():
        return [executor.submit(training) for training in trainings]


def _local_executor(request: Request, folder: Path) -> submitit.LocalExecutor:
    executor = submitit.LocalExecutor(folder, max_num_timeout=INTERRUPTIONS)
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # submitit would otherwise take the first GPUs of the machine, which may be somebody else's.
    numbers = [int(number) for number in listed.split(",")] if re.fullmatch(r"\d+(,\d+)*", listed) else None
    executor.update_parameters(
        stderr_to_stdout=True,
        tasks_per_node=request.tasks,
        gpus_per_node=request.gpus,
        timeout_min=minutes(request.site.time or "365-00"),
        **({"visible_gpus": numbers} if numbers else {}),
    )
    return executor


if __name__ == "__main__":
    sys.exit(main())
