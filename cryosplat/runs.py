"""The run directory: which files make a run, and whether a run may begin, go on, or is complete."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryosplat import checkpoint
from cryosplat.config import Config, config_differences, load_config, save_config
from cryosplat.errors import InputError

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    "data.cache",
    "train.micro_batch",
    "train.cuda_graph",
    "train.device",
    "train.threads",
    "train.log_every",
    "maps.every",
    "checkpoint",
    "distributed",
    "resume",
    "run_dir",
)
"""Settings that do not change what a run computes, so that it may be resumed with others."""

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
    if not folder.exists() or (folder.is_dir() and all(path.name == JOBS for path in folder.iterdir())):
        _require_writable(folder)
        return None
    if not saved.is_file():
        raise InputError(f"run_dir: {folder} exists and is no run of cryosplat (it has no config.yaml); choose another")
    if config.resume == "never":
        raise InputError(f"run_dir: {folder} holds a run; choose another, or let it go on with resume=auto")
    _refuse_changes(load_config(saved), config, folder)
    return folder


def open_run(config: Config) -> RunState:
    """Find what is in the run directory, and write nothing yet; on one rank only.

    Raises:
        InputError: as ``find_run``.
    """
    folder = find_run(config)
    if folder is None:
        return RunState(Path(config.run_dir).expanduser())
    if (folder / "summary.json").is_file():
        return RunState(folder, resumed=True, summary=json.loads((folder / "summary.json").read_text()))
    run = RunState(folder, resumed=True)
    if checkpoint.latest(run.checkpoints) is None:
        logger.info("%s: a run that had no checkpoint yet; it starts anew", folder)
        return run
    return RunState(folder, resumed=True, state=checkpoint.load(run.checkpoints))


def begin_run(config: Config, run: RunState) -> None:
    """Make the directory of a new run and put its settings there; on one rank only.

    Called when the input is known to be good: settings that have to be mended must not stand in the way of the mended
    ones.

    Raises:
        InputError: the directory cannot be made or written to.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir: cannot make {run.folder}: {error.strerror}") from error
    save_config(config, run.folder / "config.yaml")


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
