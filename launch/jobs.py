"""Submitted jobs: what their folders say, and what Slurm knows of them."""

import datetime
import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from cryosplat.files import atomic_path

OVER = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
"""States of Slurm in which a job has ended; after some of them it may be queued again."""

RECORD = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """What a job was submitted as; kept in its folder beside its logs.

    Attributes:
        runs: run directory by job id; several for a sweep.
        local: it runs on this machine, and Slurm knows nothing of it.
    """

    folder: str
    runs: dict[str, str]
    nodes: int
    ranks: int
    submitted: str
    local: bool = False

    def log(self, job: str) -> Path:
        """What rank 0 prints; the other ranks' are ``JOB_1_log.out`` and so on beside it."""
        return Path(self.folder) / f"{job}_0_log.out"

    def result(self, job: str) -> Path:
        """Written by rank 0 when its training has returned or raised."""
        return Path(self.folder) / f"{job}_0_result.pkl"

    def write(self) -> None:
        with atomic_path(Path(self.folder) / RECORD) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1))


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job: PENDING, RUNNING, COMPLETED; ``status`` as a shell has it (128 + signal)."""

    name: str
    reason: str = ""
    nodes: str = ""
    elapsed: str = ""
    status: int = 0

    @property
    def over(self) -> bool:
        return self.name in OVER


UNKNOWN = JobState("UNKNOWN")


def now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")


def records(run_dir: Path) -> list[JobRecord]:
    """The jobs that were submitted for a run, or for the sweep that it belongs to, oldest first."""
    folders = [run_dir / "jobs", run_dir.parent / "jobs"]
    found = [JobRecord(**json.loads(path.read_text())) for folder in folders for path in folder.glob(f"*/{RECORD}")]
    mine = [record for record in found if any(run_dir.resolve() in _lineage(run) for run in record.runs.values())]
    return sorted(mine, key=lambda record: record.submitted)


def _lineage(run: str) -> list[Path]:
    path = Path(run).resolve()
    return [path, path.parent]


def ask_slurm(job: str) -> JobState:
    """The state of a job, or of one task of an array ("12_3"), by scontrol, and by sacct when that has forgotten it.

    UNKNOWN if neither answers: the controller is busy, or the job ended long ago and nothing keeps accounts.
    """
    answer = _output("scontrol", "--oneliner", "show", "job", job)
    for line in answer.splitlines():
        facts = dict(re.findall(r"(\w+)=(\S+)", line))
        if "JobState" in facts:
            return JobState(
                name=facts["JobState"],
                reason=facts.get("Reason", "").replace("None", ""),
                nodes=facts.get("NodeList", "").replace("(null)", ""),
                elapsed=facts.get("RunTime", ""),
                status=_status(facts.get("ExitCode", "0:0")),
            )
    answer = _output(
        "sacct", "--jobs", job, "--noheader", "--parsable2", "--format=JobID,State,ExitCode,NodeList,Elapsed"
    )
    for line in answer.splitlines():
        number, state, code, nodes, elapsed = (line.split("|") + [""] * 5)[:5]
        if number == job:
            # "CANCELLED by 1000"
            return JobState(state.split()[0], nodes=nodes, elapsed=elapsed, status=_status(code))
    return UNKNOWN


def _status(code: str) -> int:
    """Slurm's "exit:signal" as a shell has it."""
    numbers = [int(part) for part in re.findall(r"\d+", code)]
    status, signal = (numbers + [0, 0])[:2]
    return 128 + signal if signal else status


def _output(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
