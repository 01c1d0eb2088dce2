"""What runs on the nodes: one training run that can be pickled and, when Slurm takes its nodes away, goes on later."""

import argparse
import dataclasses
import os
import sys
from typing import Any

from submitit.helpers import DelayedSubmission

from cryosplat.config import Config


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
        from cryosplat.cli import run_command
        from cryosplat.train import ending, train

        os.chdir(self.folder)
        summary: dict[str, Any] = {}
        status = run_command(lambda _: summary.update(train(self.config)), argparse.Namespace())
        if status:
            sys.exit(status)
        print(ending(summary), flush=True)
        return summary

    def checkpoint(self) -> DelayedSubmission:
        """submitit asks this at a time limit or a preemption: the same job again, from the last checkpoint."""
        return DelayedSubmission(dataclasses.replace(self, config=dataclasses.replace(self.config, resume="auto")))
