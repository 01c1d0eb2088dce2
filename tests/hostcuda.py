"""The CUDA half on the host: its sources, unchanged, behind a shim that runs blocks and threads in turns.

``load()`` gives a module like ``core.cuda``. Inside ``on_host()`` the functions of cryosplat.cudaops, which allocate
and launch, take CPU tensors; ``splat``, ``voxelise`` and ``covariances`` are those of cryosplat.ops made from them.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pybind11
import pytest
import torch
from filelock import FileLock

from cryosplat import cudaops

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

SOURCE = """
#include "cuda/bindings.h"

PYBIND11_MODULE(%s, module) {
  cryosplat::cuda::bind<float>(module.def_submodule("float32"));
  cryosplat::cuda::bind<double>(module.def_submodule("float64"));
  module.def("turn_round", [](bool backwards) { shim::backwards = backwards; });
}
"""


FLAGS = "-std=c++17 -O1 -w -fPIC -fvisibility=hidden -ffp-contract=off -include cuda_host_shim.h -x c++".split()
"""Unfused products, as the kernels' rounding is stated; warnings are the CUDA compiler's business."""


def load(sources: Path = ROOT / "csrc") -> ModuleType:
    """The kernels under ``sources``, compiled once for all workers, and for all runs while nothing changes.

    Every version has a name of its own: Python would give the module it has already for a second one of that name.
    """
    files = [*sources.glob("*.h"), *sources.glob("cuda/*"), ROOT / "tests/cuda_host_shim.h", Path(__file__)]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]
    name = f"cuda_on_host_{digest}"
    folder = Path(tempfile.gettempdir(), f"cryosplat-cuda-on-host-{os.getuid()}", name)
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}{SUFFIX}"
    with FileLock(folder / "lock"):
        if not library.exists():
            _build(library, name, sources)
    return _import(library, name)


def _build(library: Path, name: str, sources: Path) -> None:
    door = library.parent / "door.cpp"
    door.write_text(SOURCE % name)
    include = [f"-I{path}" for path in (sources, ROOT / "tests", pybind11.get_include(), sysconfig.get_path("include"))]
    compilers, objects = [], []
    for file in (door, *sorted(sources.glob("cuda/*.cu"))):
        objects.append(library.parent / f"{file.stem}.o")
        command = ["g++", *FLAGS, *include, "-c", file, "-o", objects[-1]]
        compilers.append(subprocess.Popen(command, stderr=subprocess.PIPE))
    for compiler in compilers:
        message = compiler.communicate(timeout=600)[1].decode()
        assert compiler.returncode == 0, message[-4000:]
    subprocess.run(["g++", "-shared", *objects, "-o", f"{library}.new"], check=True)
    os.replace(f"{library}.new", library)


@functools.cache
def _import(library: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def on_host(module: ModuleType | None = None, backwards: bool = False) -> Iterator[None]:
    """Launches go to the host-run kernels."""
    module = module or load()
    module.turn_round(backwards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudaops, "kernels_of", lambda dtype: getattr(module, str(dtype).removeprefix("torch.")))
        patch.setattr(cudaops, "queue_of", lambda tensor: (0, 0))
        patch.setattr(cudaops, "_workspace", poisoned)
        yield


def poisoned(size: int, like: torch.Tensor) -> torch.Tensor:
    """A workspace at an address divisible by 256, of bytes that are NaN in every precision."""
    room = torch.full((size + 256,), 0xFF, dtype=torch.uint8)
    first = -room.data_ptr() % 256
    return room[first : first + size]


class _Splat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:6])
        ctx.box, ctx.cutoff = arguments[6:]
        return cudaops.splat(*arguments)

    @staticmethod
    def backward(ctx, grad_images):
        poses = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        gradients = cudaops.splat_backward(grad_images, *ctx.saved_tensors, ctx.box, ctx.cutoff, poses)
        return (*gradients[:3], *(gradients[3:] if poses else (None, None)), None, None, None)


class _Voxelise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:3])
        ctx.box, ctx.cutoff = arguments[3:]
        return cudaops.voxelise(*arguments)

    @staticmethod
    def backward(ctx, grad_volumes):
        return (*cudaops.voxelise_backward(grad_volumes, *ctx.saved_tensors, ctx.box, ctx.cutoff), None, None)


class _Covariances(torch.autograd.Function):
    @staticmethod
    def forward(ctx, quaternions, scales):
        ctx.save_for_backward(quaternions, scales)
        return cudaops.covariances(quaternions, scales)

    @staticmethod
    def backward(ctx, grad_entries):
        return cudaops.covariances_backward(grad_entries, *ctx.saved_tensors)


splat, voxelise, covariances = _Splat.apply, _Voxelise.apply, _Covariances.apply
