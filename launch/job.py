"""What runs on the nodes: one training run that can be pickled and, when Slurm takes its nodes away, goes on later."""

import dataclasses
import sys
from typing import Any

from submitit.helpers import DelayedSubmission

from cryosplat.config import Config
from cryosplat.errors import InputError


@dataclasses.dataclass
class TrainingJob:
    """Called once by every task of the job; the tasks find each other in cryosplat.distributed."""

    config: Config

    def __call__(self) -> dict[str, Any]:
        from cryosplat.train import train  # here and not above, so that submitting needs neither PyTorch nor the core

        try:
            return train(self.config)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    def checkpoint(self) -> DelayedSubmission:
        """submitit asks this at a time limit or a preemption: the same job again, from the last checkpoint."""
        return DelayedSubmission(TrainingJob(dataclasses.replace(self.config, resume="auto")))
