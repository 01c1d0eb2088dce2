"""The run directory: which files make a run, and whether a run may begin, go on, or is complete."""

import contextlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryosplat import checkpoint
from cryosplat.config import config_differences, load_config, save_config
from cryosplat.errors import InputError
from cryosplat.files import remove_unfinished
from cryosplat.runlock import NAME as LOCK
from cryosplat.runlock import RunLock
from cryosplat.sampling import BatchPlan
from cryosplat.settings import Config
from cryosplat.status import NAME as STATUS

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    "data.cache",
    "cache",
    "train.micro_batch",
    "train.cuda_graph",
    "train.device",
    "train.threads",
    "train.log_every",
    "maps.every",
    "maps.particles",
    "checkpoint",
    "distributed",
    "resume",
    "run_dir",
)
"""Settings that do not change what a run computes, so that it may be resumed with others."""

HALVES = "halves.npy"
"""The half of every particle, as ``data.halves`` takes it."""

JOBS = "jobs"
"""Folder of launch/submit.py in a run directory: its logs and the code that it runs. It alone makes no run."""


@dataclass(frozen=True)
class RunState:
    """What was found in a run directory.

    Attributes:
        folder: the run directory.
        resumed: a run that had begun goes on.
        state: its newest readable checkpoint; None if it has none yet.
        summary: of a run that is complete; None of others.
    """

    folder: Path
    resumed: bool = False
    state: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def find_run(config: Config) -> Path | None:
    """The run directory if it holds a run that may go on with these settings, or is complete; None if it is unused.

    Raises:
        InputError: the directory holds something else, a run with other settings, or any run with resume=never; or it
            cannot be made.
    """
    folder = Path(config.run_dir).expanduser()
    saved = folder / "config.yaml"
    if not folder.exists() or (folder.is_dir() and all(_is_no_run(path) for path in folder.iterdir())):
        _require_writable(folder)
        return None
    if not saved.is_file():
        raise InputError(f"run_dir: {folder} exists and is no run of cryosplat (it has no config.yaml); choose another")
    if config.resume == "never":
        raise InputError(f"run_dir: {folder} holds a run; choose another, or let it go on with resume=auto")
    _refuse_changes(load_config(saved), config, folder)
    return folder


def _is_no_run(path: Path) -> bool:
    """Whether it is what submitting has put there, or a process that was killed before the run began."""
    return path.name in (JOBS, LOCK, STATUS) or path.name.startswith(".")


def open_run(config: Config, lock: RunLock) -> RunState:
    """Find what is in the run directory, and lock it if a run goes on there; on one rank only.

    Of a run that is new, or complete, nothing is written.

    Raises:
        InputError: as ``find_run``; another job is at it.
    """
    folder = find_run(config)
    if folder is None:
        return RunState(Path(config.run_dir).expanduser())
    if not (folder / "summary.json").is_file():
        lock.acquire()
    if (folder / "summary.json").is_file():  # also if its last job has just completed it
        return RunState(folder, resumed=True, summary=json.loads((folder / "summary.json").read_text()))
    remove_unfinished(folder)
    run = RunState(folder, resumed=True)
    if checkpoint.latest(run.checkpoints) is None:
        logger.info("%s: a run that had no checkpoint yet; it starts anew", folder)
        return run
    return RunState(folder, resumed=True, state=checkpoint.load(run.checkpoints))


def begin_run(config: Config, run: RunState, lock: RunLock) -> None:
    """Make the directory of a new run, lock it and put its settings there; on one rank only.

    Called when the input is known to be good: settings that have to be mended must not stand in the way of the mended
    ones.

    Raises:
        InputError: the directory cannot be made or written to, or another job has begun a run there meanwhile.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir: cannot make {run.folder}: {error.strerror}") from error
    lock.acquire()
    if (run.folder / "config.yaml").exists():
        raise InputError(f"run_dir: another job has begun a run in {run.folder} meanwhile; choose another")
    remove_unfinished(run.folder)
    save_config(config, run.folder / "config.yaml")


def give_up_run(run: RunState, lock: RunLock) -> None:
    """Take away a run that was begun and is refused after all, with settings that are to be mended."""
    for path in [*run.checkpoints.glob("*.pt"), run.folder / HALVES, run.folder / "config.yaml"]:
        path.unlink(missing_ok=True)
    lock.release()
    for folder in (run.checkpoints, run.folder):
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()


def _require_writable(folder: Path) -> None:
    """Said now, and not after all images have been read."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "is not writable" if place.is_dir() else "is not a folder"
        raise InputError(f"run_dir: cannot make {folder}: {place} {what}; choose another run_dir")


def _refuse_changes(before: Config, now: Config, folder: Path) -> None:
    changes = [line for line in config_differences(before, now) if not line.startswith(MAY_CHANGE)]
    if changes:
        listed = "\n  ".join(changes)
        raise InputError(
            f"run_dir: {folder} holds a run with other settings; choose another run_dir, or go on with the old ones "
            f"({folder / 'config.yaml'}).\n  {listed}"
        )


def changed_particles(state: dict[str, Any], plan: BatchPlan) -> str | None:
    """In words, why a saved state cannot be trained on with the particles of a plan; None if it can."""
    if state["particles"] != plan.particles:
        return f"the run was trained on {state['particles']} particles, now there are {plan.particles}"
    if not np.array_equal(state["half"].numpy(), plan.half):
        return "particles have moved from one half to the other since the run began; its half maps would be void"
    if "held_out" in state and not np.array_equal(state["held_out"].numpy(), plan.held_out):
        return "other images are held out than when the run began"
    return None
