"""What mixtures are before any image has trained them: saved, at random, or fitted in the volume."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cryosplat.gaussians import GaussianMixture
from cryosplat.reconstruction import MODEL_NAMES
from cryosplat.settings import Config, ModelConfig, VolumeConfig
from cryosplat.symmetry import operators
from cryosplat.volumefit import Fitted

NARROWEST_PX = 0.5
"""Least standard deviation of a Gaussian. Images and maps are samples at pixel centres, and the sum over pixels of a
narrower one depends on where between them it lies (docs/physics.md): by 3 % at 0.5 px, several times at 0.25 px."""


def models(config: Config) -> int:
    """How many mixtures a run has: the full one, and those of the halves if they are asked for."""
    return len(MODEL_NAMES) if config.maps.halves else 1


def fit_settings(config: Config, box: int) -> tuple[ModelConfig, VolumeConfig, tuple[float, float]]:
    """What ``volumefit.fit_all`` is to do: model and fit, and the range of scales in fractions of the box."""
    return replace(config.model, scale=_first_scale(config, box)), config.volume, _scale_range(config, box)


def at_random(config: Config, box: int) -> GaussianMixture:
    """Gaussians round the centre."""
    symmetry = operators(config.model.symmetry)
    copies = 1 if symmetry is None else len(symmetry)
    mixture = _mixture(config, box, math.ceil(config.model.gaussians / copies))
    mixture.start_randomly(config.model.spread, _first_scale(config, box), config.train.seed)
    return mixture


def as_saved(config: Config, box: int, saved: Sequence[Tensor]) -> GaussianMixture:
    """Mixtures of the sizes that a checkpoint has, whose state is still to be loaded."""
    return _mixture(config, box, [len(parameters) for parameters in saved])


def as_fitted(config: Config, box: int, fitted: Sequence[Fitted]) -> GaussianMixture:
    """The mixtures that fits in the volume ended with."""
    mixture = _mixture(config, box, [len(one.parameters) for one in fitted])
    with torch.no_grad():
        for m, one in enumerate(fitted):
            mixture.mixtures[m].copy_(one.parameters)
            mixture.unit[m] = one.unit
    return mixture


def gains(fitted: Sequence[Fitted]) -> dict[str, list[float]]:
    """How the fits went, by model; and how the first one's held-out images saw it, if there are any."""
    found = {name: one.gains for name, one in zip(MODEL_NAMES, fitted, strict=False)}
    if fitted[0].held_out_gains:
        found |= {f"{name}_held_out": one.held_out_gains for name, one in zip(MODEL_NAMES, fitted, strict=False)}
    return found


def _mixture(config: Config, box: int, gaussians: int | list[int]) -> GaussianMixture:
    scales = _scale_range(config, box)
    return GaussianMixture(models(config), gaussians, config.model.amplitudes, scales, operators(config.model.symmetry))


def _scale_range(config: Config, box: int) -> tuple[float, float]:
    narrowest = NARROWEST_PX / box
    return max(config.model.scale_min, narrowest), max(config.model.scale_max, 4 * narrowest)


def _first_scale(config: Config, box: int) -> float:
    return max(config.model.scale, 1.5 * NARROWEST_PX / box)
