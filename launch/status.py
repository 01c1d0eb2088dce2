"""How the jobs of a run do: what Slurm says of them, and how far the run directory has come.

  python launch/status.py runs/10049
  python launch/status.py runs/*

Of a sweep's folder each run is shown.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jobs import JobRecord, JobState, ask_slurm, records

from cryosplat.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    options = parser.parse_args(arguments)
    try:
        for run in [member for name in options.runs for member in members(Path(name).expanduser())]:
            print(f"{run}")
            for name, value in [*jobs_of(run), *progress(run)]:
                print(f"{name:>18}  {value}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def members(path: Path) -> list[Path]:
    """The run, or the runs of the sweep, in a folder.

    Raises:
        InputError: neither is there.
    """
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder")
    if (path / "config.yaml").is_file():
        return [path]
    submitted = {Path(run) for record in records(path) for run in record.runs.values()}
    if not submitted:
        raise InputError(f"{path}: no run and no job of launch/submit.py (neither config.yaml nor jobs/ are there)")
    return sorted(submitted)


def jobs_of(run: Path) -> list[tuple[str, str]]:
    """A line a job, newest last."""
    lines = []
    for record in records(run):
        for job, its_run in record.runs.items():
            if Path(its_run).resolve() == run.resolve():
                lines += [(f"job {job}", _words(record, job)), ("log", str(record.log(job)))]
    return lines or [("job", "none was submitted by launch/submit.py")]


def _words(record: JobRecord, job: str) -> str:
    size = f"{record.nodes} node{'s' * (record.nodes > 1)}, {record.ranks} rank{'s' * (record.ranks > 1)}"
    where = "on this machine" if record.local else _state(ask_slurm(job))
    return f"{where}; {size}, submitted {record.submitted}"


def _state(state: JobState) -> str:
    if state.name == "UNKNOWN":
        return "not known to Slurm any more"
    parts = [state.name, state.reason and f"({state.reason})", state.nodes and f"on {state.nodes}", state.elapsed]
    failed = f"exit status {state.status}" if state.over and state.status else ""
    return " ".join(part for part in [*parts, failed] if part)


def progress(run: Path) -> list[tuple[str, str]]:
    """Stage, step, speed, resolution and last checkpoint, from the files of a run directory."""
    rows = [("stage", stage(run))]
    last = _last_row(run / "metrics.csv")
    if last:
        rows.append(("step", f"{last['step']}, epoch {last['epoch']}, loss {last['loss_full']}"))
        rows.append(("images/s", f"{float(last['images_per_second']):.0f}"))
    rows.append(("resolution", resolution(run)))
    saved = sorted(run.glob("checkpoints/step_*.pt"))
    rows.append(("last checkpoint", f"{saved[-1].name}, {_age(saved[-1])} ago" if saved else "none yet"))
    log = run / "run.log"
    if log.is_file():
        lines = log.read_text(errors="replace").splitlines()
        rows.append(("last words", f"{lines[-1] if lines else ''} ({_age(log)} ago)"))
    return rows


def stage(run: Path) -> str:
    """What a run is at, by the files that it has written."""
    if (run / "summary.json").is_file():
        return "complete"
    if not (run / "config.yaml").is_file():
        return "not begun: waiting, or reading images and summing them up"
    if _last_row(run / "metrics.csv"):
        return "training image by image"
    if list(run.glob("checkpoints/step_*.pt")):
        return "evaluation, or the first steps of training"
    return "begun; no checkpoint yet"


def resolution(run: Path) -> str:
    """That of summary.json; before there is one, what the log said last."""
    if (run / "summary.json").is_file():
        found = json.loads((run / "summary.json").read_text()).get("resolution_a")
        return "none" if found is None else f"{found:.2f} A"
    if (run / "run.log").is_file():
        said = [line for line in (run / "run.log").read_text(errors="replace").splitlines() if ": resolution " in line]
        if said:
            return said[-1].partition(": resolution ")[2].partition(",")[0]
    return "none yet"


def _last_row(path: Path) -> dict[str, str] | None:
    """The last whole row of a CSV file; a run may just be writing the next."""
    if not path.is_file():
        return None
    text = path.read_text()
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    return rows[-1] if rows else None


def _age(path: Path) -> str:
    seconds = max(0, time.time() - path.stat().st_mtime)
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


if __name__ == "__main__":
    sys.exit(main())
