"""The ``doctor`` command: what was built, what this machine has, and what a run would use here."""

import argparse
import contextlib
import importlib
import itertools
import os
import platform
import re
import shutil
import textwrap
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType

from cryosplat import __version__
from cryosplat.devices import Facts, dotted, find_facts, obstacles

PACKAGES = ("cryodrgn", "mrcfile", "starfile", "gemmi", "omegaconf", "tensorboard", "submitit", "scipy", "matplotlib")
"""What is installed with cryosplat and looked at here, beside PyTorch."""


@dataclass(frozen=True)
class Machine:
    """All that ``report`` speaks of.

    Attributes:
        core: path of the compiled core; empty if it is missing.
        core_error: why it is missing.
        architecture: of the processor, "x86_64".
        instruction_set: what the CPU kernels use here.
        isa_wanted: CRYOSPLAT_ISA, which lowers that; empty if not set.
        processor, memory_gib: of this machine.
        cores: those that this process may use.
        backends: what can carry tensors between ranks.
        packages: name of a package and its version.
        missing: name of a package and why it cannot be imported.
        slurm: whether Slurm's commands are there.
        facts: what decides about GPUs.
    """

    core: str = ""
    core_error: str = ""
    architecture: str = "x86_64"
    instruction_set: str = ""
    isa_wanted: str = ""
    processor: str = ""
    cores: int = 1
    memory_gib: float = 0.0
    backends: tuple[str, ...] = ()
    packages: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    slurm: bool = False
    facts: Facts = Facts()


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if something is broken that cryosplat cannot do without."""
    machine = find_machine()
    print("\n".join(report(machine)))
    return 1 if faults(machine) else 0


def report(machine: Machine) -> list[str]:
    """The lines that the command prints."""
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    rows = [
        ("cryosplat", f"{__version__}, Python {platform.python_version()}"),
        *_core_rows(machine),
        ("machine", f"{machine.processor}, {machine.cores} cores to use, {machine.memory_gib:.0f} GiB of memory"),
        *_gpu_rows(machine.facts),
        ("PyTorch", _pytorch(machine)),
        *zip(itertools.chain(["packages"], itertools.repeat("")), textwrap.wrap(packages, 100), strict=False),
        ("Slurm", "here" if machine.slurm else "not here, so jobs run on this machine"),
    ]
    lines = [f"{title:<12}{text}" for title, text in rows]
    return [*lines, "", *verdict(machine)]


def verdict(machine: Machine) -> list[str]:
    """What is broken; else whether GPUs can be used, and what a run computes on."""
    if broken := faults(machine):
        return ["No run can start here:", *(f"  - {sentence}" for sentence in broken)]
    if reasons := obstacles(machine.facts):
        return [
            "GPUs can be used: no",
            *(f"  - {reason}" for reason in reasons),
            "train.device=auto computes on the CPU here.",
        ]
    return ["GPUs can be used: yes", "train.device=auto computes on GPUs here."]


def faults(machine: Machine) -> list[str]:
    """What keeps any run from starting on this installation, and what to do."""
    found = [] if machine.core else [machine.core_error]
    if not machine.facts.torch:
        found.append("PyTorch is missing or does not load: pip install torch")
    elif "gloo" not in machine.backends and machine.core:
        found.append("this PyTorch has no gloo, which ranks talk over: pip install --force-reinstall torch")
    found += [f"{name} cannot be imported ({why}): pip install {name}" for name, why in machine.missing.items()]
    return found


def _core_rows(machine: Machine) -> list[tuple[str, str]]:
    if not machine.core:
        return [("core", "missing")]
    compiled = "AVX-512, AVX2, plain x86-64" if machine.architecture == "x86_64" else "no instruction set in particular"
    lowered = f" (CRYOSPLAT_ISA={machine.isa_wanted})" if machine.isa_wanted else ""
    facts = machine.facts
    names = " ".join(f"sm_{name}" for name in facts.architectures)
    cuda = f"CUDA {dotted(facts.cuda)}, {names}, PTX for GPUs between and after" if facts.cuda else "none"
    return [
        ("core", machine.core),
        ("  for CPUs", f"{compiled}; used here: {machine.instruction_set}{lowered}"),
        ("  for GPUs", cuda),
    ]


def _gpu_rows(facts: Facts) -> list[tuple[str, str]]:
    driver = "none"
    if facts.driver_cuda:
        driver = f"{facts.driver or 'of unknown version'}, runs CUDA up to {dotted(facts.driver_cuda)}"
    names = [f"{number}: {gpu}" for number, gpu in enumerate(facts.gpus)] or ["none"]
    return [("driver", driver), *(("" if number else "GPUs", name) for number, name in enumerate(names))]


def _pytorch(machine: Machine) -> str:
    facts = machine.facts
    if not facts.torch:
        return "missing"
    cuda = f"with CUDA {dotted(facts.torch_cuda)}" if facts.torch_cuda else "without CUDA"
    return f"{facts.torch}, {cuda}; between ranks: {', '.join(machine.backends) or 'nothing'}"


def find_machine() -> Machine:
    """Looks at this machine and this installation; nothing that is missing is an error here."""
    core, core_error = _find_core()
    packages, missing = _find_packages()
    return Machine(
        core=core.__file__ if core else "",
        core_error=core_error,
        architecture=platform.machine(),
        instruction_set=core.instruction_set() if core else "",
        isa_wanted=os.environ.get("CRYOSPLAT_ISA", ""),
        processor=_find_processor(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30,
        backends=_find_backends(core),
        packages=packages,
        missing=missing,
        slurm=all(shutil.which(name) for name in ("sbatch", "srun")),
        facts=find_facts(core),
    )


def _find_core() -> tuple[ModuleType | None, str]:
    try:
        from cryosplat._extension import core
    except ImportError as error:
        return None, str(error)
    return core, ""


def _find_backends(core: ModuleType | None) -> tuple[str, ...]:
    if core is None:  # without which that module does not load
        return ()
    try:
        from cryosplat.distributed import find_backends
    except (ImportError, OSError):
        return ()
    return tuple(find_backends())


def _find_packages() -> tuple[dict[str, str], dict[str, str]]:
    found, missing = {}, {}
    for name in PACKAGES:
        try:
            importlib.import_module(name)
            found[name] = metadata.version(name)
        except Exception as error:  # whatever a broken package raises
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def _find_processor() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.machine()
