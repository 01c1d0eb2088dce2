"""Submit a training run: to Slurm where there is one, else to this machine.

  python launch/submit.py --config demo.yaml
  python launch/submit.py --config 10049.yaml data_root=/data/cryodrgn_empiar train.batch=64 --nodes 2 --gpus-per-node 4

The configuration and its files are checked before anything is submitted. On Slurm this returns at once; a local job is
followed to its end, and the exit status is 0 if it succeeded. A job that Slurm interrupts (time limit, preemption) is
queued again and goes on from its last checkpoint.
"""

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import submitit
from job import TrainingJob
from submitit.core.utils import FailedJobError

from cryosplat.config import Config, check_files, load_config
from cryosplat.errors import InputError

INTERRUPTIONS = 50
"""Time limits that a job may outlive by being queued again."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        config = load_config(options.config, options.overrides)
        check_files(config)
        cluster = options.cluster
        if cluster == "auto":
            cluster = "slurm" if shutil.which("sbatch") else "local"
        resources = parameters(options, config, cluster)
        print(f"cluster: {cluster}; " + ", ".join(f"{name} {value}" for name, value in resources.items()))
        if options.dry_run:
            print("dry run: nothing was submitted")
            return 0
        job = submit(config, cluster, resources)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"job {job.job_id} submitted\n  run directory: {Path(config.run_dir).absolute()}\n  log: {log_path(job)}")
    print(f"  TensorBoard: tensorboard --logdir {Path(config.run_dir) / 'tensorboard'}", flush=True)
    return follow(job) if cluster == "local" else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as train.epochs=3")
    parser.add_argument("--config", required=True, help="YAML file; a bare name is looked up in configs/ too")
    parser.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tasks-per-node", type=int, help="ranks a node (default: one a GPU, else 1)")
    parser.add_argument("--gpus-per-node", type=int, help="default: none on Slurm, those visible on this machine")
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--mem", type=float, metavar="GIB", help="memory a node in GiB")
    parser.add_argument("--time", help="[days-]hours:minutes:seconds or minutes (default: a day on Slurm)")
    parser.add_argument("--partition")
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="any other option of sbatch, such as --slurm account=lab --slurm constraint=h100",
    )
    parser.add_argument("--dry-run", action="store_true", help="check all, say what would be asked for, and stop")
    return parser.parse_intermixed_args(arguments)


def parameters(options: argparse.Namespace, config: Config, cluster: str) -> dict[str, Any]:
    """What is asked of submitit. What is not set is left out: an empty request is not the same as none to Slurm."""
    asked = for_slurm(options, config) if cluster == "slurm" else for_this_machine(options, config)
    return {name: value for name, value in asked.items() if value is not None}


def for_slurm(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    if shutil.which("sbatch") is None:
        raise InputError("--cluster slurm: there is no sbatch on PATH; run this on a login node of the cluster")
    return {
        "name": f"cryosplat-{Path(config.run_dir).name}",
        "nodes": options.nodes,
        "tasks_per_node": options.tasks_per_node or options.gpus_per_node or 1,
        "gpus_per_node": options.gpus_per_node or None,
        "cpus_per_task": options.cpus_per_task,
        "mem_gb": options.mem,
        "timeout_min": minutes(options.time or "1-00"),
        "slurm_partition": options.partition,
        "slurm_additional_parameters": dict(option.partition("=")[::2] for option in options.slurm) or None,
        # Slurm's own default leaves the other ranks waiting for one that has died.
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
    }


def for_this_machine(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    if options.nodes != 1:
        raise InputError(f"--nodes {options.nodes}: a local job has one node, this machine")
    gpus = options.gpus_per_node
    if gpus is None:
        gpus = gpus_to_use(config)
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {
        "tasks_per_node": options.tasks_per_node or gpus or 1,
        "gpus_per_node": gpus or 0,
        # submitit would otherwise take the first GPUs of the machine, which may be somebody else's.
        "visible_gpus": [int(number) for number in listed.split(",")] if re.fullmatch(r"\d+(,\d+)*", listed) else None,
        "timeout_min": minutes(options.time or "365-00"),
    }


def gpus_to_use(config: Config) -> int:
    if config.train.device == "cpu":
        return 0
    import torch  # a second or two, and only here does it matter

    from cryosplat.distributed import choose_device

    return torch.cuda.device_count() if choose_device(config.train.device, 0).type == "cuda" else 0


def minutes(text: str) -> int:
    """Slurm's time formats, as whole minutes.

    >>> minutes("90"), minutes("1:30:00"), minutes("2-12"), minutes("10:30")
    (90, 90, 3600, 11)
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise InputError(f"--time {text}: expected minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, dash, clock = text.rpartition("-")
    numbers = [int(part) for part in clock.split(":")]
    if dash or len(numbers) == 3:
        hours, mins, seconds = (numbers + [0, 0])[:3]
    else:
        hours, (mins, seconds) = 0, (numbers + [0])[:2]
    return int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)


def submit(config: Config, cluster: str, resources: dict[str, Any]) -> submitit.Job:
    # By value: the nodes need not be able to import this folder, only the installed package.
    cloudpickle.register_pickle_by_value(sys.modules[TrainingJob.__module__])
    # Beside the run directory, not in it: a folder that is in use already is no place for a new run.
    run = Path(config.run_dir).absolute()
    folder = run.with_name(f"{run.name}-jobs") / "%j"
    if cluster == "slurm":
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=INTERRUPTIONS)
    else:
        executor = submitit.LocalExecutor(folder, max_num_timeout=INTERRUPTIONS)
    executor.update_parameters(stderr_to_stdout=True, **resources)
    try:
        return executor.submit(TrainingJob(config))
    except FailedJobError as error:
        raise InputError(f"the job was not accepted: {error}") from error


def log_path(job: submitit.Job) -> Path:
    return job.task(0).paths.stdout


def follow(job: submitit.Job) -> int:
    """Copy the log of rank 0 to the screen until the job ends; 0 if all ranks succeeded."""
    seen = 0
    try:
        while True:
            ended = job.done()  # asked before the last read, so that nothing written before the end is missed
            if log_path(job).exists():
                with open(log_path(job), "rb") as log:
                    log.seek(seen)
                    seen += sys.stdout.buffer.write(log.read())
                sys.stdout.flush()
            if ended:
                break
            time.sleep(0.5)
    except KeyboardInterrupt:
        job.cancel()
        return 130
    # A rank without a result was killed or has left with an error message; asking submitit for it would wait.
    tasks = [job.task(rank) for rank in range(job.num_tasks)]
    failed = [task.task_id for task in tasks if not task.paths.result_pickle.exists() or task.exception() is not None]
    if failed:
        ranks = ", ".join(str(rank) for rank in failed)
        print(f"job {job.job_id} failed on rank {ranks}; the logs are in {log_path(job).parent}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
