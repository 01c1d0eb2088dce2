"""What runs on the nodes: one training run that can be pickled and, when Slurm takes its nodes away, goes on later."""

import argparse
import dataclasses
import os
import signal
import subprocess
import sys
import time
from typing import Any

from submitit.helpers import DelayedSubmission

from cryosplat.settings import Config

QUEUEING_S = 60.0
"""How long ranks wait for rank 0 to queue the job again, which ends them."""


@dataclasses.dataclass
class TrainingJob:
    """Called once by every task of the job; the tasks find each other in cryosplat.distributed.

    ``folder`` is where it was submitted: relative paths of the configuration start there, and not in the snapshot of
    the code, in which the job starts.
    """

    config: Config
    folder: str

    def __call__(self) -> dict[str, Any]:
        # Here and not above, so that submitting to Slurm needs neither PyTorch nor the compiled core.
        from cryosplat.cli import GO_ON_LATER, run_command
        from cryosplat.train import ending, train

        os.chdir(self.folder)
        # submitit's, which queues the job again at once; training takes its place, and saves first.
        queue_again = signal.getsignal(signal.SIGUSR2)
        summary: dict[str, Any] = {}
        status = run_command(lambda _: summary.update(train(self.config)), argparse.Namespace())
        if status == GO_ON_LATER and callable(queue_again) and _may_be_queued_again():
            queue_again(signal.SIGUSR2, None)  # does not come back on rank 0
            if "SLURM_JOB_ID" in os.environ:
                # A rank that has gone would end the step before rank 0 has queued the job again.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(QUEUEING_S)
        if status:
            sys.exit(status)
        print(ending(summary), flush=True)
        return summary

    def checkpoint(self) -> DelayedSubmission:
        """submitit asks this at a time limit or a preemption: the same job again, from the last checkpoint."""
        return DelayedSubmission(dataclasses.replace(self, config=dataclasses.replace(self.config, resume="auto")))


def _may_be_queued_again() -> bool:
    """Whether Slurm still wants this job: one that scancel ends gets the same SIGTERM as one that makes room."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return True
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%T %r"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return True  # queueing again will tell
    return asked.startswith("RUNNING") or "TimeLimit" in asked
