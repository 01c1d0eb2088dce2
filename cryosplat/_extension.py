"""Loads the compiled core, ``cryosplat._C``, as ``core``; says what to run if it is not there."""

import sysconfig
from pathlib import Path

try:
    from cryosplat import _C as core
except ImportError as error:
    _folder = Path(__file__).resolve().parent
    _wanted = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if (_folder / _wanted).exists():
        _reason = f"{_folder / _wanted} is there but does not load ({error})"
    elif _others := sorted(path.name for path in _folder.glob("_C*.so")):
        _reason = f"{_folder} has {', '.join(_others)} but this Python needs {_wanted}"
    else:
        _reason = f"{_folder} has no {_wanted}: it was never built"
    raise ImportError(
        f"The compiled core of cryosplat is missing: {_reason}.\n"
        "Build it in the checkout: 'make venv', or 'pip install -e .' in an environment of your own (needs g++)."
    ) from error

HAS_CUDA = hasattr(core, "cuda")
"""Whether the core was compiled with its CUDA half."""

__all__ = ["HAS_CUDA", "core"]
