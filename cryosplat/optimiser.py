"""The optimiser and its rate: Adam whose updates stop, on the device, at the first non-finite value."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cryosplat.settings import TrainConfig

EPSILON = 1e-15
"""Adam's guard against division by zero. Gradients of single Gaussians are tiny, so torch's 1e-8 would damp them."""


class GatedAdam:
    """Adam on the mixtures' parameters, behind a gate that closes for good at a non-finite gradient or loss.

    The gate is a number on the device that torch's fused Adam reads itself, so nothing waits for the
    host. The gradient it judges is all-reduced, hence the same on all ranks: all gates close together.

    Args:
        mixtures: one parameter a model.
        rate: learning rate to begin with.
    """

    def __init__(self, mixtures: Sequence[nn.Parameter], rate: float):
        self._mixtures = list(mixtures)
        device = self._mixtures[0].device
        # A graph of the step (``stepgraph``) reads the rate where it lies, so on a GPU that must be the device.
        on_gpu = device.type == "cuda"
        self._own = {"lr": torch.tensor(rate, device=device) if on_gpu else rate, "capturable": on_gpu}
        self._adam = torch.optim.Adam(self._mixtures, eps=EPSILON, fused=True, **self._own)
        self._closed = torch.zeros((), device=device)
        # Where torch.amp's GradScaler puts its verdict; the fused kernel skips the update if it is 1.
        self._adam.grad_scale = None
        self._adam.found_inf = self._closed

    def zero_grad(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps from now on."""
        if self._own["capturable"]:
            self._own["lr"].fill_(rate)
        else:
            self._adam.param_groups[0]["lr"] = rate

    @torch.no_grad()
    def step(self, losses: Tensor, counts: Sequence[int]) -> None:
        """Update, unless the gate is closed or this gradient, or one of ``losses`` (M,), closes it.

        A model without a particle in this batch (``counts``) is left alone: momentum would move it.
        """
        finite = torch.isfinite(losses.sum() + sum(mixture.grad.sum() for mixture in self._mixtures))
        torch.maximum(self._closed, (~finite).to(self._closed.dtype), out=self._closed)
        for mixture, count in zip(self._mixtures, counts, strict=True):
            if count == 0:
                mixture.grad = None
        self._adam.step()

    def blocked(self) -> bool:
        """Whether the gate has closed; waits for the device."""
        return bool(self._closed)

    def state_dict(self) -> dict:
        """The same on every device: what is a GPU's alone is left out."""
        state = self._adam.state_dict()
        groups = [group | {"lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    def load_state_dict(self, state: dict) -> None:
        self._adam.load_state_dict(state)
        self._adam.param_groups[0] |= self._own


class ColumnAdam:
    """Adam on one tensor with a rate for each of its columns.

    Args:
        parameters: (G, C), a leaf that gradients are collected in.
        rates: (C,).
        betas: decay of the two moments.
    """

    def __init__(self, parameters: nn.Parameter, rates: Tensor, betas: tuple[float, float]):
        self._parameters, self._rates, self._betas, self._steps = parameters, rates, betas, 0
        self._mean, self._square = torch.zeros_like(parameters), torch.zeros_like(parameters)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update at ``factor`` times the rates, and clear the gradient."""
        self._steps += 1
        first, second = self._betas
        gradient = self._parameters.grad
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        # Bias corrections put into the step; EPSILON guards a moment that has never been other than zero.
        size = factor * math.sqrt(1 - second**self._steps) / (1 - first**self._steps)
        self._parameters.sub_(self._mean / (self._square.sqrt() + EPSILON) * (self._rates * size))
        self._parameters.grad = None

    def state(self) -> dict:
        """What it goes on from, on the CPU."""
        return {"steps": self._steps, "mean": self._mean.cpu().clone(), "square": self._square.cpu().clone()}

    def load_state(self, state: dict) -> None:
        self._steps = state["steps"]
        self._mean.copy_(state["mean"])
        self._square.copy_(state["square"])


def learning_rate(config: TrainConfig, progress: float, epoch: int) -> float:
    """Rate of a step.

    Args:
        config: ``schedule`` "constant", "exponential" (``lr_gamma`` an epoch, the paper's) or "cosine" (smooth from
            ``lr`` to ``lr_final * lr`` at the end).
        progress: fraction of all steps done, 0 to 1.
        epoch: epoch of the step.

    >>> learning_rate(TrainConfig(lr=1.0, schedule="exponential", lr_gamma=0.1), 0.5, 2) == 0.1**2
    True
    """
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "exponential":
        return config.lr * config.lr_gamma**epoch
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * progress)))
