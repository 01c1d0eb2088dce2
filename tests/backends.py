"""The operators on every machine that has them, each with the arguments and results of cryosplat.ops, on the CPU."""

import contextlib
from collections.abc import Iterator
from types import ModuleType

import hostcuda
import pytest
import torch

from cryosplat import ops
from cryosplat._extension import HAS_CUDA

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and HAS_CUDA), reason="no GPU here, or the core was built without CUDA"
)


class OnGpu:
    """Arguments go to the GPU, results come back."""

    @staticmethod
    def _there_and_back(operator, arguments):
        return operator(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)).cpu()

    def splat(self, *arguments):
        return self._there_and_back(ops.splat, arguments)

    def voxelise(self, *arguments):
        return self._there_and_back(ops.voxelise, arguments)

    def covariances(self, *arguments):
        return self._there_and_back(ops.covariances, arguments)


BACKENDS = ["cpu", "host", pytest.param("gpu", marks=needs_gpu)]
"""The CPU kernels, the CUDA kernels run on the host, and these on a GPU."""


@contextlib.contextmanager
def backend_named(name: str) -> Iterator[ModuleType | OnGpu]:
    """What has ``splat``, ``voxelise`` and ``covariances``, while the context lasts."""
    if name != "host":
        yield ops if name == "cpu" else OnGpu()
        return
    with hostcuda.on_host():
        yield hostcuda
