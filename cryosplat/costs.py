"""What a run takes: seconds of its stages, images, memory; over all its parts, if it was interrupted."""

import resource
import sys
import time
from typing import Any

import torch

from cryosplat import distributed
from cryosplat.trainer import Report


def peak_memory_gib(device: torch.device | str = "cpu") -> dict[str, float]:
    """Largest memory of this process so far, GiB: "cpu_max_rss", and "gpu_max_reserved" on a CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    memory = {"cpu_max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if torch.device(device).type == "cuda":
        memory["gpu_max_reserved"] = torch.cuda.max_memory_reserved(device) / 2**30
    return memory


class Costs:
    """What one rank has taken so far.

    Args:
        world: the ranks.
        before: ``state()`` of the run's parts before this one, or None.

    Attributes:
        images: trained on in this part, over all ranks.
        training_seconds: of this part.
        fit_seconds: of the fits in the volume.
    """

    def __init__(self, world: distributed.World, before: dict[str, float] | None):
        self._world, self._began = world, time.perf_counter()
        self._before = before or {"wall": 0.0, "cpu": 0.0, "training": 0.0}
        self.images, self.training_seconds, self._waited = 0, 0.0, 0.0
        self.fit_seconds = self._before.get("fit", 0.0)

    def add(self, report: Report) -> None:
        """Count some steps of training."""
        self.images += report.images
        self.training_seconds += report.seconds
        self._waited += report.waited

    def state(self) -> dict[str, float]:
        """Over all parts: wall seconds of the run, its fit and its training, CPU seconds of this rank."""
        return {
            "fit": self.fit_seconds,
            "wall": self._before["wall"] + time.perf_counter() - self._began,
            "cpu": self._before["cpu"] + time.process_time(),
            "training": self._before["training"] + self.training_seconds,
        }

    def summary(self) -> dict[str, Any]:
        """The entries of summary.json; a collective."""
        mine = time.process_time(), peak_memory_gib(self._world.device), self._waited
        cpu, memory, waited = zip(*distributed.gather_objects(mine, self._world), strict=True)
        seconds, trained = self.state(), self.training_seconds
        return {
            "images_per_second": self.images / trained if trained else None,
            "waiting": max(waited) / trained if trained else None,
            "cpu_seconds": self._before["cpu"] + sum(cpu),
            "wall_seconds": seconds["wall"],
            "peak_memory_gib": sum(of_rank["cpu_max_rss"] for of_rank in memory),
            "peak_memory_gib_by_rank": [round(of_rank["cpu_max_rss"], 4) for of_rank in memory],
            "peak_gpu_memory_gib": max(of_rank.get("gpu_max_reserved", 0.0) for of_rank in memory),
            "volume_fit_seconds": seconds["fit"],
            "training_seconds": seconds["training"],
        }
