"""How the jobs of a run do: what Slurm says of them, and how far the run directory has come.

  python launch/status.py runs/10049
  python launch/status.py runs/*

Of a sweep's folder each run is shown. Without Slurm's part, and several runs in one table: cryosplat status.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs import JobRecord, JobState, ask_slurm, records

from cryosplat.errors import InputError
from cryosplat.status import read_status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    options = parser.parse_args(arguments)
    try:
        for run in [member for name in options.runs for member in members(Path(name).expanduser())]:
            print(f"{run}")
            begun = read_status(run).rows() if run.is_dir() else [("state", "not begun: it has no folder yet")]
            for name, value in [*jobs_of(run), *begun]:
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


if __name__ == "__main__":
    sys.exit(main())
