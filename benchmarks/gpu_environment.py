"""An environment for the checks on a machine without network: what is there, carried wheels, and this package.

Standard library only: this runs before anything is installed. The environment sees the packages of the Python that made
it (PyTorch above all) through a .pth file, also where that Python is a virtual environment itself, which
`--system-site-packages` would look past.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "gpu-env"
WHEELS = ROOT / "build" / "wheels"
LEAST_SETUPTOOLS = 77
"""Its first version that knows how pyproject.toml names the licence."""

CAPABILITY = "import torch; print('%d%d' % torch.cuda.get_device_capability())"

Run = Callable[[list[str], dict[str, str]], None]
"""Runs a command with variables added to the environment; raises if it fails."""


def python() -> Path:
    """The environment's interpreter."""
    return FOLDER / "bin" / "python"


def fingerprint() -> str:
    """Of all that the environment is made from: another one means another build."""
    digest = hashlib.sha256(sys.executable.encode())
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "csrc").rglob("*.*"), *WHEELS.glob("*.whl")]
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def is_ready() -> bool:
    """Whether `prepare` has nothing to do."""
    stamp = FOLDER / "stamp"
    return stamp.exists() and stamp.read_text() == fingerprint()


def prepare(run: Run) -> None:
    """Make the environment, install the wheels, and build the package for the GPU that is here."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", str(FOLDER)], {})
    _show_parent(FOLDER)
    install = [str(python()), "-m", "pip", "install", "--no-index", "--no-deps", "--no-cache-dir"]
    if wheels := missing_wheels():
        run([*install, *wheels], {})
    capability = subprocess.run([str(python()), "-c", CAPABILITY], capture_output=True, text=True)
    if capability.returncode:
        raise RuntimeError(f"PyTorch finds no GPU here:\n{capability.stderr}")
    chip = os.environ.get("CRYOSPLAT_CUDA_ARCH") or capability.stdout.strip()
    run([*install, "--no-build-isolation", "-e", str(ROOT)], {"CRYOSPLAT_CUDA_ARCH": chip})
    (FOLDER / "stamp").write_text(fingerprint())


def missing_wheels() -> list[str]:
    """Wheels of packages that this Python has not: a newer pytest, say, than its plugins know would break them."""
    there = {_plain(found.name): found.version for found in importlib.metadata.distributions()}
    if int(there.get("setuptools", "0").partition(".")[0]) < LEAST_SETUPTOOLS:
        there.pop("setuptools", None)
    return sorted(str(path) for path in WHEELS.glob("*.whl") if _plain(path.name.partition("-")[0]) not in there)


def _plain(name: str) -> str:
    """A package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _show_parent(folder: Path) -> None:
    """Let the environment see this Python's own packages, behind those that it is given itself."""
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    parents = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    Path(own, "parent.pth").write_text("".join(f"{path}\n" for path in dict.fromkeys(parents)))
