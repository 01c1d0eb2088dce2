"""The ``status`` command: what run directories are doing, from their files alone; nothing is written there.

status.json says what a run is at, and is there from the first image read until the run is complete. Without it, as in
runs of earlier versions, the other files tell as much as they can.
"""

import argparse
import csv
import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryosplat.errors import InputError
from cryosplat.runlock import NAME as LOCK
from cryosplat.runlock import Holder, read_holder, why_dead

NAME = "status.json"

SIGN_S = 15.0
"""Between two signs of life: status.json is written anew or touched at least so often."""


@dataclass(frozen=True)
class RunStatus:
    """What a run directory is doing.

    Attributes:
        folder: the run directory.
        state: "running", "complete", "interrupted", "failed", "dead" (its process is gone and said nothing), "stopped"
            (nobody is at it, and nothing says why) or "not begun".
        stage: what it is at, or was at last, in words.
        done, total, unit: how far that is; total 0 where nobody can tell.
        left_s: seconds that the stage will take yet; None if not known.
        facts: "images_per_second", "resolution" and others, as words.
        holder: process, host and Slurm job that are at it, or were last; empty if nobody knows.
        sign_s: seconds since its last sign of life.
        checkpoint: its last one, and its age in seconds.
        message: why it stopped, its own last words.
    """

    folder: Path
    state: str
    stage: str = ""
    done: int = 0
    total: int = 0
    unit: str = ""
    left_s: float | None = None
    facts: dict[str, str] = field(default_factory=dict)
    holder: str = ""
    sign_s: float | None = None
    checkpoint: tuple[str, float] | None = None
    message: str = ""

    @property
    def progress(self) -> str:
        """How far, "12,000 of 400,000 images"; empty without a total."""
        return f"{self.done:,} of {self.total:,} {self.unit}" if self.total else ""

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of everything known, in the order to be read."""
        rows = [("state", self.state), ("stage", self.stage), ("progress", self.progress)]
        rows.append(("to go", "" if self.left_s is None else f"{duration(self.left_s)} in this stage"))
        rows += [(name.replace("images_per_second", "images/s"), value) for name, value in self.facts.items()]
        if self.checkpoint:
            rows.append(("last checkpoint", f"{self.checkpoint[0]}, {duration(self.checkpoint[1])} ago"))
        elif self.state != "complete":
            rows.append(("last checkpoint", "none yet"))
        sign = "" if self.sign_s is None else f", last sign of life {duration(self.sign_s)} ago"
        rows.append(("held by" if self.state == "running" else "was held by", self.holder and self.holder + sign))
        rows.append(("because", self.message))
        return [(name, value) for name, value in rows if value]


def read_status(folder: Path) -> RunStatus:
    """What a run directory is doing.

    Raises:
        InputError: no run is there, or one of its files is not as a run writes it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    told, summary = _read_json(folder / NAME), _read_json(folder / "summary.json")
    begun = (folder / "config.yaml").is_file()
    if not (begun or summary or told or (folder / "jobs").is_dir()):
        raise InputError(f"{folder}: no run of cryosplat (it has no config.yaml)")
    saved = [*folder.glob("checkpoints/step_*.pt"), *folder.glob("checkpoints/fit_*.pt")]
    newest = max(saved, key=_changed, default=None)
    common = {"folder": folder, "checkpoint": None if newest is None else (newest.name, _age(newest))}
    if summary:
        seconds = summary.get("wall_seconds")
        took = {"took": duration(seconds)} if seconds else {}
        return RunStatus(**common, state="complete", facts={**_of_summary(summary), **took})
    state, holder, sign_s = _life(folder, told, begun)
    common |= {"state": state, "holder": str(holder or ""), "sign_s": sign_s}
    if not told:
        return RunStatus(**common, stage=_stage_by_files(folder, begun), facts=_facts_by_files(folder))
    done, total, first = (int(told.get(key, 0)) for key in ("done", "total", "first"))
    left_s = None
    if state == "running" and total and done > first:
        pace = (told["updated"] - told["stage_began"]) / (done - first)
        left_s = max(0.0, pace * (total - done) - (time.time() - told["updated"]))
    return RunStatus(
        **common,
        stage=told.get("stage", ""),
        done=done,
        total=total,
        unit=told.get("unit", ""),
        left_s=left_s,
        facts={**_facts_by_files(folder), **told.get("facts", {})},
        message=told.get("message", ""),
    )


def _life(folder: Path, told: dict[str, Any], begun: bool) -> tuple[str, Holder | None, float | None]:
    """The state of a run that is not complete, who is at it or was, and seconds since their last sign of life."""
    signs = [path for path in (folder / LOCK, folder / NAME) if path.is_file()]
    sign_s = min((_age(path) for path in signs), default=None)
    holder = read_holder(folder / LOCK)
    if holder is None and told:
        holder = Holder.of(told.get("holder"))
    # A run that stopped in good order says so, unless another has the lock by now.
    if told.get("state", "running") != "running" and not (folder / LOCK).is_file():
        return told["state"], holder, sign_s
    if holder is None:
        return ("stopped" if begun else "not begun"), None, sign_s
    dead = why_dead(holder, Holder.this_process(), sign_s or 0.0)
    return ("running" if dead is None else "dead"), holder, sign_s


def _of_summary(summary: dict[str, Any]) -> dict[str, str]:
    found = {}
    rate = summary.get("images_per_second")
    if rate:
        found["images_per_second"] = f"{rate:.0f}"
    value = summary.get("resolution_a")
    found["resolution"] = "none" if value is None else f"{value:.2f} A"
    return found


def _stage_by_files(folder: Path, begun: bool) -> str:
    if not begun:
        return "not begun: waiting, or reading images and summing them up"
    if _last_row(folder / "metrics.csv"):
        return "training image by image"
    if list(folder.glob("checkpoints/step_*.pt")):
        return "evaluation, or the first steps of training"
    return "fits in the volume" if list(folder.glob("checkpoints/fit_*.pt")) else "begun; no checkpoint yet"


def _facts_by_files(folder: Path) -> dict[str, str]:
    """Step, speed and resolution, as metrics.csv and run.log have them."""
    facts, log = {}, folder / "run.log"
    last = _last_row(folder / "metrics.csv")
    if last:
        facts["step"] = f"{last['step']}, epoch {last['epoch']}, loss {last['loss_full']}"
        facts["images_per_second"] = f"{float(last['images_per_second'] or 0):.0f}"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    said = [line for line in lines if ": resolution " in line]
    facts["resolution"] = said[-1].partition(": resolution ")[2].partition(",")[0] if said else "none yet"
    if lines:
        facts["last words"] = f"{lines[-1]} ({duration(_age(log))} ago)"
    return facts


def table(statuses: Sequence[RunStatus]) -> str:
    """Several runs, one a line, under a line of names."""
    names = ("run", "state", "stage", "progress", "to go", "images/s", "resolution", "checkpoint", "held by")
    lines = [names, *(_line(status) for status in statuses)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _line(status: RunStatus) -> tuple[str, ...]:
    running = status.state == "running"
    return (
        str(status.folder),
        status.state,
        status.stage or "-",
        status.progress or "-",
        "-" if status.left_s is None else duration(status.left_s),
        status.facts.get("images_per_second", "-"),
        status.facts.get("resolution", "-"),
        duration(status.checkpoint[1]) if status.checkpoint and running else "-",
        status.holder if running and status.holder else "-",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Say what run directories are doing: stage, progress, resolution so far, last checkpoint, and who is at it. "
        "Several runs make a table. Nothing is written; 'watch cryosplat status RUN' keeps looking."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories; others among several are left out")


def run(args: argparse.Namespace) -> None:
    """Print one run in full, or a line for each of several.

    Raises:
        InputError: the only one named is no run, or none of several is.
    """
    folders = [Path(name) for name in args.runs]
    if len(folders) == 1:
        for name, value in read_status(folders[0]).rows():
            print(f"{name:>18}  {value}")
        return
    found = []
    for folder in folders:
        try:
            found.append(read_status(folder))
        except InputError:
            continue  # runs/* names files and other folders too
    if not found:
        raise InputError(f"no run of cryosplat among {', '.join(args.runs)}")
    print(table(found))


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(42.4), duration(600), duration(9000), duration(200_000)
    ('42 s', '10 min', '2 h 30 min', '2 d 7 h')
    """
    if seconds < 120:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    whole = datetime.timedelta(minutes=minutes)
    hours, rest = divmod(whole.seconds // 60, 60)
    return f"{whole.days} d {hours} h" if whole.days else f"{hours} h {rest} min"


def _read_json(path: Path) -> dict[str, Any]:
    """Empty if there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_row(path: Path) -> dict[str, str] | None:
    """The last whole row of a CSV file; a run may just be writing the next."""
    if not path.is_file():
        return None
    text = path.read_text(errors="replace")
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    return rows[-1] if rows else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a checkpoint that has just made room for another
        return 0.0


def _age(path: Path) -> float:
    return max(0.0, time.time() - _changed(path))
