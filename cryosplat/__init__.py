"""Cryo-EM homogeneous reconstruction by Gaussian splatting.

The names below are what programs may rely on (docs/api.md); everything else may change. ``import cryosplat`` alone
imports nothing more: PyTorch and the compiled kernels come with the first name that is used.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "FscCurve",
    "InputError",
    "Mixture",
    "ParticleTable",
    "Resolution",
    "Run",
    "fsc_curve",
    "load_mixture",
    "load_particles",
    "load_run",
    "project",
    "read_map",
    "reconstruct",
    "resolution",
    "voxelise",
    "write_map",
]

if TYPE_CHECKING:
    from cryosplat.api import (
        FscCurve,
        InputError,
        Mixture,
        ParticleTable,
        Resolution,
        Run,
        fsc_curve,
        load_mixture,
        load_particles,
        load_run,
        project,
        read_map,
        reconstruct,
        resolution,
        voxelise,
        write_map,
    )


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("cryosplat.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
