"""Training steps recorded once as CUDA graphs and replayed: one launch in place of some hundred.

Awaiting a GPU: the recording has not run on one yet (benchmarks/gpu.md). A step of few images takes a GPU less time
than the host needs to start its kernels one by one; a graph starts them together. It may hold only what is the same in
every step: addresses, shapes, and numbers that were known when it was recorded. So particles and counts are copied to
the same places before each replay, the learning rate lies on the device (``optimiser``), and there is a graph for each
size of a batch. What differs otherwise (a half without a particle, micro-batches, images from the host, several ranks)
is not for this module: the caller runs it step by step.
"""

import collections
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP = 3
"""Steps of a size before it is recorded: libraries make plans and the optimiser its moments, which no graph may do."""

Work = Callable[[Tensor, Tensor], Tensor]
"""A step on the device: from particles (B,) and counts (M,), both int64, to losses (views, B)."""


@dataclass(frozen=True)
class _Recorded:
    graph: "torch.cuda.CUDAGraph"
    at: Tensor
    counts: Tensor
    losses: Tensor


class StepGraphs:
    """Steps of a function, replayed from the fourth of each size on.

    If recording fails, that is said once, and all steps are run as they come.

    Args:
        work: the step; must not wait for the device.
    """

    def __init__(self, work: Work):
        self._work = work
        self._seen: collections.Counter[int] = collections.Counter()
        self._recorded: dict[int, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()  # for all: they never run at the same time
        self._failed = False

    def run(self, at: Tensor, counts: Tensor) -> Tensor:
        """One step; the losses are not overwritten by the next."""
        size = len(at)
        self._seen[size] += 1
        if size not in self._recorded and not self._failed and self._seen[size] > WARM_UP:
            self._record(at, counts)
        if size not in self._recorded:
            return self._work(at, counts)
        recorded = self._recorded[size]
        recorded.at.copy_(at)
        recorded.counts.copy_(counts)
        recorded.graph.replay()
        return recorded.losses.clone()

    def _record(self, at: Tensor, counts: Tensor) -> None:
        """Nothing is computed meanwhile, so a failure leaves everything as it was."""
        at, counts, graph = at.clone(), counts.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                losses = self._work(at, counts)
        except RuntimeError as error:
            self._failed = True
            logger.warning(
                "the training step could not be recorded as a CUDA graph and runs without (%s); train.cuda_graph=off "
                "does not try",
                str(error).splitlines()[0],
            )
        else:
            self._recorded[len(at)] = _Recorded(graph, at, counts, losses)
