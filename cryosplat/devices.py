"""Whether the GPUs of a machine can be used: by this build of the core, this driver and this PyTorch; if not, why not.

The rules are NVIDIA's. A driver runs programs of its own CUDA's major version and of older ones, whatever the minor
version (docs.nvidia.com/deploy/cuda-compatibility). Machine code runs on GPUs of its own major compute capability, from
its own minor one on. PTX runs on all from its own capability on, if the driver is no older than the compiler that
wrote it.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

Version = tuple[int, int]

MINIMUM_DRIVER = {12: 525, 13: 580}
"""First driver for programs of each major version of CUDA (NVIDIA's table of minor version compatibility)."""

OLDEST_CAPABILITY = (7, 0)
"""Volta: the kernels are written for nothing older."""

OLDEST_OF_CUDA_13 = (7, 5)
"""Turing: CUDA 13, and what PyTorch compiles with CUDA 12.8 or newer, know nothing older."""

OLDEST_BLACKWELL = (10, 0)
"""Of what PyTorch compiles with CUDA 12, only that of 12.8 knows these."""

WHEELS = "https://download.pytorch.org/whl"


@dataclass(frozen=True)
class Gpu:
    """A GPU by name, compute capability (9, 0) and memory in GiB."""

    name: str
    capability: Version
    memory_gib: float

    def __str__(self) -> str:
        return f"{self.name} (compute capability {dotted(self.capability)}, {self.memory_gib:.0f} GiB)"


@dataclass(frozen=True)
class Facts:
    """What decides whether GPUs can be used here.

    Attributes:
        cuda: version that the core was built with; None for a core without CUDA half.
        architectures: its machine code ("75", "90a"), lowest first; the first and the last are there as PTX too.
        driver: version of the NVIDIA driver, "580.65.06"; empty if unknown.
        driver_cuda: newest CUDA that the driver runs; None without a driver.
        torch: version of PyTorch; empty without it.
        torch_cuda: version that PyTorch was built with; None for a PyTorch without CUDA.
        torch_architectures: its code ("sm_90", "compute_120"); empty if unknown.
        gpus: those that PyTorch sees; if it sees none, those of nvidia-smi.
        seen: whether PyTorch sees them.
        visible: CUDA_VISIBLE_DEVICES; None if that is not set.
    """

    cuda: Version | None = None
    architectures: tuple[str, ...] = ()
    driver: str = ""
    driver_cuda: Version | None = None
    torch: str = ""
    torch_cuda: Version | None = None
    torch_architectures: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()
    seen: bool = False
    visible: str | None = None


def dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def obstacles(facts: Facts) -> list[str]:
    """Why no GPU can be used, a sentence each with what to do; empty where every visible GPU can be.

    One GPU that cannot be used is an obstacle for all, or ranks of one host would compute on different devices.
    """
    found = [_driver(facts), _core(facts), _torch(facts)]
    if facts.driver_cuda and facts.torch_cuda and not found[2]:
        found.append(_nothing_seen(facts))
    for gpu in dict.fromkeys(facts.gpus):
        found += [_code_of_core(gpu, facts), _code_of_torch(gpu, facts)]
    return [sentence for sentence in found if sentence]


def _driver(facts: Facts) -> str | None:
    if facts.driver_cuda is None:
        return (
            "no NVIDIA driver answers here (a machine without a GPU has none; on a cluster ask for a GPU; a container "
            "must be given it: docker --gpus all, apptainer --nv)"
        )
    if facts.cuda is None or facts.driver_cuda[0] >= facts.cuda[0]:
        return None
    return (
        f"the core was built with CUDA {dotted(facts.cuda)}, which needs NVIDIA driver {_first_driver(facts.cuda)} or "
        f"newer, and {_said(facts)}: update the driver, or build again with a toolkit of CUDA {facts.driver_cuda[0]} "
        f"(12.4 or newer): CUDA_HOME=/usr/local/cuda-{facts.driver_cuda[0]} make venv"
    )


def _first_driver(cuda: Version) -> str:
    return str(MINIMUM_DRIVER.get(cuda[0], f"of CUDA {cuda[0]}"))


def _said(facts: Facts) -> str:
    return f"driver {facts.driver or 'here'} runs CUDA {dotted(facts.driver_cuda)} at most"


def _core(facts: Facts) -> str | None:
    if facts.cuda:
        return None
    old = any(gpu.capability < OLDEST_OF_CUDA_13 for gpu in facts.gpus)
    only_12 = old or (facts.driver_cuda is not None and facts.driver_cuda[0] < 13)
    which = "12.4 or newer, but not 13" if only_12 else "12.4 to 13.x"
    return (
        f"the core was built without CUDA: install a CUDA toolkit ({which}), set CUDA_HOME to it, and build again "
        "(make venv, or pip install -e .)"
    )


def _torch(facts: Facts) -> str | None:
    if not facts.torch:
        return "PyTorch is missing: pip install torch"
    if facts.torch_cuda is None:
        return f"PyTorch {facts.torch} was built without CUDA: {_install(facts)}"
    if facts.driver_cuda and facts.driver_cuda[0] < facts.torch_cuda[0]:
        return (
            f"PyTorch {facts.torch} was built with CUDA {dotted(facts.torch_cuda)}, which needs NVIDIA driver "
            f"{_first_driver(facts.torch_cuda)} or newer, and {_said(facts)}: update the driver, or {_install(facts)}"
        )
    return None


def _install(facts: Facts) -> str:
    """The command that installs a PyTorch for this driver and these GPUs."""
    if any(gpu.capability < OLDEST_OF_CUDA_13 for gpu in facts.gpus):
        name = "cu126"
    elif facts.driver_cuda is None or facts.driver_cuda[0] >= 13:
        name = "cu130"
    else:
        name = "cu128" if any(gpu.capability >= OLDEST_BLACKWELL for gpu in facts.gpus) else "cu126"
    return f"pip install --force-reinstall torch --index-url {WHEELS}/{name}"


def _nothing_seen(facts: Facts) -> str | None:
    if facts.seen:
        return None
    if facts.visible is not None:
        return (
            f"CUDA_VISIBLE_DEVICES={facts.visible!r} shows no GPU to this process: unset it, or name one that is there"
        )
    return "there is a driver, but PyTorch sees no GPU: ask for one (srun --gpus 1), or let it into the container"


def _code_of_core(gpu: Gpu, facts: Facts) -> str | None:
    if facts.cuda is None or any(runs_on(gpu.capability, name) for name in facts.architectures):
        return None
    if gpu.capability < OLDEST_CAPABILITY:
        return (
            f"{gpu} is too old, the kernels need {dotted(OLDEST_CAPABILITY)} or newer: hide it by CUDA_VISIBLE_DEVICES"
        )
    own = f"{gpu.capability[0]}{gpu.capability[1]}"
    compiled = f"the core has no code for {gpu}, but for {' '.join(f'sm_{name}' for name in facts.architectures)}"
    if any(compiles_on(gpu.capability, name) for name in (facts.architectures[0], facts.architectures[-1])):
        if facts.driver_cuda is None or facts.driver_cuda >= facts.cuda:
            return None
        return (
            f"{compiled}, and {_said(facts)}, so it cannot compile what CUDA {dotted(facts.cuda)} wrote: update it, or "
            f"build again with CRYOSPLAT_CUDA_ARCH={own}"
        )
    toolkit = " and a toolkit of CUDA 12 (CUDA 13 does not know it)" if gpu.capability < OLDEST_OF_CUDA_13 else ""
    return f"{compiled}: build again with CRYOSPLAT_CUDA_ARCH={own}{toolkit}"


def _code_of_torch(gpu: Gpu, facts: Facts) -> str | None:
    codes = [name.partition("_") for name in facts.torch_architectures]
    can = {"sm": runs_on, "compute": compiles_on}
    if not codes or any(kind in can and can[kind](gpu.capability, name) for kind, _, name in codes):
        return None
    return f"PyTorch {facts.torch} has no code for {gpu}: {_install(facts)}"


def runs_on(capability: Version, architecture: str) -> bool:
    """Whether machine code of an architecture ("90", "90a") runs on a GPU.

    >>> runs_on((8, 9), "86"), runs_on((8, 0), "86"), runs_on((9, 0), "89")
    (True, False, False)
    """
    least, kind = _split(architecture)
    return capability == least if kind == "a" else capability[0] == least[0] and capability >= least


def compiles_on(capability: Version, architecture: str) -> bool:
    """Whether PTX of an architecture runs on a GPU, once its driver has compiled it.

    >>> compiles_on((11, 0), "90"), compiles_on((8, 0), "90"), compiles_on((10, 0), "90a")
    (True, False, False)
    """
    least, kind = _split(architecture)
    return runs_on(capability, architecture) if kind else capability >= least


def _split(architecture: str) -> tuple[Version, str]:
    digits, kind = re.fullmatch(r"(\d+)([a-z]?)", architecture).groups()
    return (int(digits[:-1]), int(digits[-1])), kind


def find_facts(core: ModuleType | None) -> Facts:
    """What this machine and process have; asks PyTorch and the driver. ``core`` is the compiled core, or None."""
    try:
        import torch
    except (ImportError, OSError):  # a shared library of PyTorch's that does not load is an OSError
        torch = None
    gpus = _gpus_of_torch(torch) if torch else ()
    return Facts(
        cuda=read_version(core.cuda_version) if core else None,
        architectures=tuple(core.cuda_architectures.split()) if core else (),
        driver=_find_driver(),
        driver_cuda=_ask_driver(),
        torch=torch.__version__ if torch else "",
        torch_cuda=read_version(torch.version.cuda or "") if torch else None,
        torch_architectures=tuple(torch.cuda.get_arch_list()) if gpus else (),
        gpus=gpus or _gpus_of_nvidia_smi(),
        seen=bool(gpus),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def read_version(text: str) -> Version | None:
    """
    >>> read_version("13.0"), read_version("12.6.3"), read_version("")
    ((13, 0), (12, 6), None)
    """
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _gpus_of_torch(torch: ModuleType) -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(one.name, (one.major, one.minor), one.total_memory / 2**30) for one in properties)


def _gpus_of_nvidia_smi() -> tuple[Gpu, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(read_gpus(done.stdout.splitlines())) if done.returncode == 0 else ()


def read_gpus(lines: Iterable[str]) -> list[Gpu]:
    """GPUs from nvidia-smi's ``name, compute_cap, memory.total``, the last in MiB.

    >>> read_gpus(["NVIDIA H100 80GB HBM3, 9.0, 81559"])[0].capability
    (9, 0)
    """
    rows = [re.fullmatch(r"(.*), (\d+\.\d+), (\d+)", line.strip()) for line in lines]
    return [Gpu(row[1], read_version(row[2]), int(row[3]) / 1024) for row in rows if row]


def _find_driver() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        return found[0] if found else ""
    return ""


def _ask_driver() -> Version | None:
    """The newest CUDA that the driver runs, as the driver itself says it, without setting a GPU up."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return (version.value // 1000, version.value % 1000 // 10) if version.value else None
