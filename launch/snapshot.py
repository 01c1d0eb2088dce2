"""A copy of the code that a job runs, so that a queued job is not changed by editing the checkout."""

import shutil
from pathlib import Path

import cryosplat.config
from cryosplat.errors import InputError


def take_snapshot(folder: Path) -> None:
    """Copy the package, with its compiled core, and this folder to ``folder``, which must not exist.

    Raises:
        InputError: the core is not compiled, or the copy cannot be written.
    """
    package, launch = Path(cryosplat.config.__file__).parent, Path(__file__).parent
    if not list(package.glob("_C*.so")):
        raise InputError(f"{package}: the core is not compiled; run 'make venv' (or pip install -e .) first")
    skip = shutil.ignore_patterns("__pycache__")
    try:
        for source in (package, launch):
            shutil.copytree(source, folder / source.name, ignore=skip)
    except (OSError, shutil.Error) as error:
        raise InputError(f"{folder}: cannot copy the code there: {error}") from error
