"""Following jobs: their logs on the screen until they end, and how they ended as the exit status."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import submitit
from jobs import UNKNOWN, JobRecord, JobState, ask_slurm

READ_S = 0.5
ASK_S, ASK_AT_END_S = 5.0, 1.0
"""Seconds between looks at the logs, which cost nothing, and questions to Slurm, which a controller has to answer."""

SURE_S = 15.0
"""How long an end must last that may not be one: a preempted job, or one whose node is lost, is queued again."""

MAYBE_QUEUED_AGAIN = ("PREEMPTED", "NODE_FAIL", "CANCELLED", "BOOT_FAIL")


@dataclass
class _Tail:
    """A log, as far as it was shown."""

    path: Path
    prefix: str = ""
    seen: int = 0

    def show(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "rb") as log:
            log.seek(self.seen)
            new = log.read()
        whole = new if not self.prefix else new[: new.rfind(b"\n") + 1]
        self.seen += len(whole)
        text = whole.decode(errors="replace")
        if self.prefix:
            text = "".join(f"{self.prefix}{line}\n" for line in text.splitlines())
        sys.stdout.write(text)
        sys.stdout.flush()


@dataclass
class _Watched:
    """One job of Slurm, and what is known of it."""

    job: str
    run: Path
    tail: _Tail
    state: JobState = UNKNOWN
    since: float = field(default_factory=time.monotonic)
    status: int | None = None

    def look(self) -> None:
        """Ask for the state, say so if it has changed, and decide whether this is the end."""
        state = ask_slurm(self.job)
        if (state.name, state.reason) != (self.state.name, self.state.reason):
            self.since = time.monotonic()
            reason = f" ({state.reason})" if state.reason else ""
            print(f"{self.tail.prefix}job {self.job}: {state.name}{reason} {state.nodes}".rstrip(), file=sys.stderr)
        self.state = state
        patience = SURE_S if state.name in MAYBE_QUEUED_AGAIN else 0.0
        if state.over and time.monotonic() - self.since >= patience:
            self.status = state.status or (0 if state.name == "COMPLETED" else 1)
            if self.status == 0 and not (self.run / "summary.json").exists():
                # Seen when a node's daemon is killed: Slurm takes the job for complete, whatever the ranks did.
                print(f"job {self.job} is COMPLETED to Slurm, but {self.run} is not complete", file=sys.stderr)
                self.status = 1


def follow_slurm(record: JobRecord) -> int:
    """Show what rank 0 of every job prints until all have ended.

    Returns:
        The job's exit status, of several the highest; 130 after Ctrl-C, and then the jobs go on.
    """
    several = len(record.runs) > 1
    watched = [
        _Watched(job, Path(run), _Tail(record.log(job), f"[{Path(run).name}] " if several else ""))
        for job, run in record.runs.items()
    ]
    asked = -ASK_S
    try:
        while any(one.status is None for one in watched):
            # A rank 0 that has returned says that the end is near.
            ending = any(one.status is None and record.result(one.job).exists() for one in watched)
            if time.monotonic() - asked >= (ASK_AT_END_S if ending else ASK_S):
                asked = time.monotonic()
                for one in watched:
                    if one.status is None:
                        one.look()
            for one in watched:
                one.tail.show()
            time.sleep(READ_S)
    except KeyboardInterrupt:
        print(f"not followed any more; the job goes on (scancel {' '.join(record.runs)} ends it)", file=sys.stderr)
        return 130
    for one in watched:
        one.tail.show()
        if one.status:
            print(f"job {one.job} ended {one.state.name}; the logs are in {record.folder}", file=sys.stderr)
    return max(one.status for one in watched)


def follow_local(job: submitit.Job, record: JobRecord) -> int:
    """The same for a job of this machine, which Ctrl-C ends; 0 if all ranks succeeded."""
    tail = _Tail(record.log(job.job_id))
    try:
        while True:
            ended = job.done()  # asked before the last read, so that nothing written before the end is missed
            tail.show()
            if ended:
                break
            time.sleep(READ_S)
    except KeyboardInterrupt:
        job.cancel()
        return 130
    # A rank without a result was killed or has left with an error message; asking submitit for it would wait.
    tasks = [job.task(rank) for rank in range(job.num_tasks)]
    failed = [task.task_id for task in tasks if not task.paths.result_pickle.exists() or task.exception() is not None]
    if failed:
        ranks = ", ".join(str(rank) for rank in failed)
        print(f"job {job.job_id} failed on rank {ranks}; the logs are in {record.folder}", file=sys.stderr)
    return 1 if failed else 0
