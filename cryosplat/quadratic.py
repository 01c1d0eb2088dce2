"""The likelihood of all images of a half set as a quadratic form of the map: what a mixture is fitted to in the volume.

With the sums n and d of csrc/insert.h, and F the transform of a map V on the padded grid, minus the log likelihood of
the images is, up to a constant,

    Q(V) = sum_q ( 1/2 d |F/D|^2 - Re n* F/D ) = 1/2 <V, K * V> - <b, V>

in nats: K(r), by lag, and b(r) are the transforms of d and n. Nothing of the images is lost but what insertion loses
(trilinear interpolation, undone here by its sinc^2). K * V costs two transforms of the molecule's own box, so a step
of a fit costs the same for a thousand images and for a million.

A circular convolution on a box a little larger than the molecule's wraps the longest lags round. K is small there: on
the sets of benchmarks/quality.md a fit with MARGIN 1.07 and one with twice the box end in the same map (FSC to the
truth equal to 1e-4 in every band), at a fifth of the cost.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 1.07
"""Side of the box of a convolution over that of the map's."""


def fast_size(least: float) -> int:
    """The next even number of prime factors 2, 3 and 5: transforms of such sides are fast.

    >>> [fast_size(n) for n in (7, 64, 129.1, 137)]
    [8, 64, 144, 144]
    """
    size = 2 * math.ceil(least / 2)
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """K and b of a half set.

    Attributes:
        kernel: (Q, Q, Q) float32, K by lag in FFT order, lags -Q/2 .. Q/2 - 1.
        data: (D, D, D) float32, b, axes [z, y, x], origin at D // 2.
    """

    kernel: Tensor
    data: Tensor

    @staticmethod
    def cut_kernel(denominator: Tensor, box: int) -> Tensor:
        """K from d in real space (P, P, P), origin first, as ``irfftn`` gives it."""
        padded = denominator.shape[0]
        side = min(fast_size(MARGIN * box), padded)
        return _cut(denominator, _lags(side, padded, denominator.device), padded**3 / box**2)

    @staticmethod
    def cut_data(numerator: Tensor, box: int) -> Tensor:
        """b from n in real space (P, P, P), origin first."""
        padded = numerator.shape[0]
        rows = (torch.arange(box, device=numerator.device) - box // 2) % padded
        return _cut(numerator, rows, padded**3 / box)

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        """Those of both sets of images together."""
        return NormalEquations(self.kernel + other.kernel, self.data + other.data)

    @property
    def box(self) -> int:
        """D."""
        return self.data.shape[0]

    def to(self, device: torch.device) -> "NormalEquations":
        """The same on another device."""
        return NormalEquations(self.kernel.to(device), self.data.to(device))

    def within(self, side: int) -> "QuadraticForm":
        """Q of maps that are zero outside the middle ``side`` voxels of the box, an even number."""
        wrapped = min(fast_size(MARGIN * side), self.kernel.shape[0])
        kernel, lags = self.kernel, _lags(wrapped, self.kernel.shape[0], self.kernel.device)
        for axis in range(3):
            kernel = kernel.index_select(axis, lags)
        first = self.box // 2 - side // 2
        middle = slice(first, first + side)
        return QuadraticForm(torch.fft.rfftn(kernel).real.contiguous(), self.data[middle, middle, middle].contiguous())


@dataclass(frozen=True, eq=False)
class QuadraticForm:
    """Q on a box of B voxels.

    Attributes:
        transfer: (N, N, N//2+1), the transform of K.
        data: (B, B, B), b.
    """

    transfer: Tensor
    data: Tensor

    @property
    def side(self) -> int:
        """B."""
        return self.data.shape[0]

    def convolved(self, volume: Tensor) -> Tensor:
        """K * V (B, B, B)."""
        shape, side = (self.transfer.shape[0],) * 3, self.side
        spectrum = torch.fft.rfftn(volume, s=shape)
        return torch.fft.irfftn(spectrum.mul_(self.transfer), s=shape)[:side, :side, :side]

    def __call__(self, volume: Tensor) -> tuple[Tensor, Tensor]:
        """Q(V) in nats, a float64 scalar, and its gradient (B, B, B)."""
        convolved = self.convolved(volume)
        gradient = convolved - self.data
        value = torch.dot((0.5 * convolved - self.data).double().flatten(), volume.double().flatten())
        return value, gradient

    def best_factor(self, volume: Tensor) -> float:
        """The number that V must be multiplied by for the least Q."""
        return float(torch.sum(self.data * volume) / torch.sum(volume * self.convolved(volume)))


def _lags(side: int, length: int, device: torch.device) -> Tensor:
    """Where the lags -side/2 .. side/2 - 1 lie along an axis of ``length`` in FFT order, in FFT order themselves."""
    half = side // 2
    return torch.cat([torch.arange(half), torch.arange(length - half, length)]).to(device)


def _cut(volume: Tensor, rows: Tensor, factor: float) -> Tensor:
    """Rows of a padded grid in real space along every axis, the trilinear kernel undone, times a factor."""
    along = 1 / torch.sinc(torch.fft.fftfreq(volume.shape[0], device=volume.device)[rows]) ** 2
    for axis in range(3):
        volume = volume.index_select(axis, rows)
    return volume.mul_(factor * along[:, None, None]).mul_(along[:, None]).mul_(along)
