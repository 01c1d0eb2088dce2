"""The steps of a fit in the volume: Adam on one mixture, which can be stopped after any of them and gone on with."""

import math
from typing import Any

import torch
from torch import Tensor

from cryosplat.errors import InputError
from cryosplat.gaussians import AMPLITUDE, MEAN, NUMBERS, QUATERNION, SCALE, GaussianMixture, inverse_softplus
from cryosplat.optimiser import ColumnAdam
from cryosplat.quadratic import QuadraticForm
from cryosplat.settings import VolumeConfig

CUTOFF = 3.5
"""Standard deviations drawn in a fit. Of a map, the error is 2e-3, far below the noise."""

LARGEST_SCALE_PX = 3.0
"""Greatest standard deviation in a fit, or twice that of its start: wider Gaussians cost the cube of their width, and
tell the least."""

SCALE_RATE, QUATERNION_RATE, AMPLITUDE_RATE = 0.04, 0.04, 0.2
"""Adam's steps: of the logarithm of a scale, of a quaternion's entries, of an amplitude over its start. Positions have
theirs in pixels, ``VolumeConfig.step_px``."""

LAST_RATE = 0.1
"""Rates fall by half a cosine to this fraction."""

BETAS = (0.9, 0.99)


class Descent:
    """A mixture on its way down.

    Args:
        mixture: of one model, at its start; changed in place.
        form: what it is fitted to.
        box: D.
        volume: of the run.
        held_out: the same of images that nothing is fitted to; None: there are none.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        form: QuadraticForm,
        box: int,
        volume: VolumeConfig,
        held_out: QuadraticForm | None,
    ):
        self._mixture, self._form, self._box, self._volume, self._held_out = mixture, form, box, volume, held_out
        self.steps = 0
        self._gains: list[Tensor] = []
        self._held_out_gains: list[Tensor] = []
        parameters = mixture.mixtures[0]
        self._reach = (form.side / 2 - 1) / box
        # Few Gaussians start wide, and may widen.
        widest = max(LARGEST_SCALE_PX / box, 2 * float(mixture.scales().detach().max()))
        self._bounds = mixture.raw_scale_range[0], min(mixture.raw_scale_range[1], inverse_softplus(widest))
        rates = torch.empty(NUMBERS, device=parameters.device)
        rates[MEAN], rates[SCALE] = volume.step_px / box, SCALE_RATE
        rates[QUATERNION], rates[AMPLITUDE] = QUATERNION_RATE, AMPLITUDE_RATE * _raw_share(mixture)
        self._adam = ColumnAdam(parameters, rates, BETAS)

    def step(self) -> None:
        """The next one; the first also finds the grey scale."""
        mixture, parameters = self._mixture, self._mixture.mixtures[0]
        if self.steps == 0:
            self._begin()
        drawn = self._draw()
        with torch.no_grad():
            value, gradient = self._form(drawn.detach())
        self._gains.append(-value)
        if self._held_out is not None:
            self._held_out_gains.append(-self._held_out(drawn.detach())[0])
        wanted = 0.5 * self._volume.prior * (mixture.shares() * mixture.drawn[0] - 1).square().sum()
        torch.autograd.backward([drawn, wanted], [gradient, torch.ones_like(wanted)])
        progress = self.steps / self._volume.steps
        self._adam.step(LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))
        _settle(parameters, self._bounds, self._reach)
        self.steps += 1

    def gains(self, name: str) -> tuple[list[float], list[float]]:
        """Log likelihood over an empty map before every step, of the mixture's own images and of those held out.

        Read at the end alone: a GPU would wait for the host at every step.

        Raises:
            InputError: the fit did not stay finite; ``name`` is the model's.
        """
        gains = torch.stack(self._gains).tolist()
        held_out = torch.stack(self._held_out_gains).tolist() if self._held_out_gains else []
        if not all(map(math.isfinite, gains)) or not bool(torch.isfinite(self._mixture.mixtures[0]).all()):
            raise InputError(
                f"{name}: its fit in the volume did not stay finite; lower volume.step_px ({self._volume.step_px:g}) "
                f"or volume.prior ({self._volume.prior:g})"
            )
        return gains, held_out

    def state(self) -> dict[str, Any]:
        """Everything it goes on from, after a step; tensors on the CPU."""
        return {
            "steps": self.steps,
            "parameters": self._mixture.mixtures[0].detach().cpu().clone(),
            "unit": self._mixture.unit.cpu().clone(),
            "adam": self._adam.state(),
            "bounds": list(self._bounds),
            "gains": torch.stack(self._gains).cpu(),
            "held_out_gains": torch.stack(self._held_out_gains).cpu() if self._held_out_gains else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()`` of a descent of the same form, settings and number of Gaussians."""
        parameters = self._mixture.mixtures[0]
        self.steps = state["steps"]
        with torch.no_grad():
            parameters.copy_(state["parameters"])
            self._mixture.unit.copy_(state["unit"])
        self._adam.load_state(state["adam"])
        self._bounds = tuple(state["bounds"])
        self._gains = list(state["gains"].to(parameters.device))
        if state["held_out_gains"] is not None:
            self._held_out_gains = list(state["held_out_gains"].to(parameters.device))

    def _begin(self) -> None:
        _settle(self._mixture.mixtures[0], self._bounds, self._reach)
        with torch.no_grad():
            # The best grey scale, if it is one: amplitudes near zero could not move.
            factor = self._form.best_factor(self._draw())
            self._mixture.unit *= factor if math.isfinite(factor) and factor > 1e-3 else 1.0

    def _draw(self) -> Tensor:
        return self._mixture.draw(self._box, self._form.side, CUTOFF)[0]


@torch.no_grad()
def _settle(parameters: Tensor, bounds: tuple[float, float], reach: float) -> None:
    parameters[:, SCALE].clamp_(*bounds)
    parameters[:, MEAN].clamp_(-reach, reach)


def _raw_share(mixture: GaussianMixture) -> float:
    """By how much a raw amplitude changes while an equal share changes by itself."""
    return 1.0 if mixture.positive else mixture.raw_amplitude_of_equals(mixture.gaussians)
