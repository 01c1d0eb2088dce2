"""FSC to the unknown truth, estimated from linear half maps: calibrated curves and the resolution they give.

Half maps of Gaussian mixtures share the model's bias, so their FSC says too much. Linear half maps L_a, L_b share
nothing but the truth T: L = T + noise, and the noise of one half is independent of whatever was made from the other.
So, summed over a shell and under one mask, <L_a, L_b> estimates <T, T>, and <Z_a, L_b> estimates <Z_a, T> for any map
Z_a made from half a alone. With them

    FSC(Z_a, T) = <Z_a, L_b> / sqrt( <Z_a, Z_a> <T, T> )

and for a map M = (Z_a + Z_b) / 2 of one part from each half

    FSC(M, T) = 1/2 ( <Z_a, L_b> + <Z_b, L_a> ) / sqrt( <M, M> <T, T> ).

Sums are averaged over neighbouring shells, as ratios to the map's own power, which takes out the fall of the spectrum.
Errors are jackknife errors over sectors of Fourier space. Where <T, T> is not three of its errors above zero nothing
can be said, and the curve ends.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.fft
import scipy.optimize

from cryosplat.backprojection import LinearHalf
from cryosplat.conventions import RESOLUTION_THRESHOLD_TRUTH, shell_to_angstrom
from cryosplat.fsc import FscCurve, Resolution, masked_spectrum, resolution
from cryosplat.sectors import SMOOTHING, SectorSums, jackknife, smooth

CERTAINTY = 3.0
"""Standard errors that the truth's power must be above zero."""

ALWAYS_CERTAIN = 4
"""Shells in which that is not asked: they hold too few voxels for a jackknife, and no data set fails in them alone."""

WANTED_ERROR = 0.06
"""Relative standard error of the truth's power in a shell that is good enough: 3 % of an FSC. With 0.04 even sets were
smoothed too much, with 0.08 preferred ones too little (benchmarks/quality.md)."""

LEAST_ERROR = 0.005
"""No shell counts as known better than this when the resolution is read off."""

SAFE_POWER = 1e-3
"""Least power of the truth, as a fraction of the noise's, in the weights of its own estimate."""


@dataclass(frozen=True, eq=False)
class Calibrated:
    """An estimated FSC to the truth.

    Attributes:
        curve: with standard errors; NaN beyond ``last_shell``.
        last_shell: the last for which the data say anything.
    """

    curve: FscCurve
    last_shell: int

    @property
    def ends_early(self) -> bool:
        """Whether the curve ends before Nyquist."""
        return self.last_shell < len(self.curve.fsc) - 1

    @property
    def resolution(self) -> Resolution | None:
        """Where the curve crosses 0.5; None if the data say nothing.

        The curve is taken to fall: of all curves that never rise the one nearest to it, shells weighted by their
        errors. One that runs flat along 0.5, as with views that are missing, would else be said to cross it where
        noise first makes it dip (benchmarks/quality.md: 4 of 18 were off by more than 5 %; with this 2 are). Half the
        way from there to here is part of the error.
        """
        if self.last_shell < ALWAYS_CERTAIN:
            return None
        found = resolution(self._falling(), RESOLUTION_THRESHOLD_TRUTH)
        if found.error_a is None:
            return found
        dip = resolution(self.curve, RESOLUTION_THRESHOLD_TRUTH)
        return replace(found, error_a=math.hypot(found.error_a, 0.5 * (dip.angstrom - found.angstrom)))

    def _falling(self) -> FscCurve:
        known = np.flatnonzero(np.isfinite(self.curve.fsc))
        values, weights = self.curve.fsc.copy(), 1 / np.maximum(self.curve.error[known], LEAST_ERROR) ** 2
        values[known] = scipy.optimize.isotonic_regression(values[known], weights=weights, increasing=False).x
        return FscCurve(values, self.curve.box, self.curve.pixel_size_a, self.curve.error)

    @property
    def end_a(self) -> float | None:
        """Resolution of the last shell that anything is known of, A; None if there is none."""
        if self.last_shell < ALWAYS_CERTAIN:
            return None
        return shell_to_angstrom(self.last_shell, self.curve.box, self.curve.pixel_size_a)


class Calibration:
    """What linear half maps say of the truth under a mask.

    Args:
        halves: linear half maps a and b.
        mask: (D, D, D), 0 to 1, that every term is under; None: no mask.
        pixel_size_a: A/px.
    """

    def __init__(self, halves: tuple[LinearHalf, LinearHalf], mask: np.ndarray | None, pixel_size_a: float):
        self.box, self.pixel_size_a, self.mask = len(halves[0].map), pixel_size_a, mask
        self.sums = SectorSums(self.box, halves[0].symmetry)
        seen = np.isfinite(halves[0].variance) & np.isfinite(halves[1].variance)
        self.spectra = tuple(self._spectrum(_only(half.map, seen, self.sums)) for half in halves)
        self._estimate_truth(halves, seen)

    def _spectrum(self, volume: np.ndarray) -> np.ndarray:
        return masked_spectrum(volume, self.mask, np.float32)

    def _estimate_truth(self, halves: tuple[LinearHalf, LinearHalf], seen: np.ndarray) -> None:
        """Sums of <L_a, L_b>, every voxel with the weight that tells most of |T|^2, were it the same all round.

        That is 1 / (|T|^2 + variance)^2. Of evenly spread views all voxels of a shell have the same weight. Of unevenly
        spread ones it is small where noise hides the truth anyway; unweighted, that noise would be all there is.
        """
        cross = self.sums.cross(*self.spectra)
        power = [self.sums.cross(spectrum, spectrum).sum(1) for spectrum in self.spectra]
        voxels = np.maximum(self.sums.voxels.sum(1), 1)
        truth = smooth(cross.sum(1) / voxels)
        noise = smooth((power[0] + power[1]) / (2 * voxels)) - truth
        pattern = relative_variance(halves, seen, self.mask, self.sums)
        self.noise = np.maximum(noise, 1e-30)
        for _ in range(2):  # the weights depend on the result, weakly
            table = np.maximum(truth, SAFE_POWER * self.noise)
            share = by_shell(table / (table + self.noise), self.sums)  # of the truth: scaled, so that nothing overflows
            weights = 1 / (share + (1 - share) * pattern) ** 2
            weights[~seen] = 0
            self.truth, self.weight = self.sums.cross(*self.spectra, weights), self.sums(weights.astype(np.float32))
            truth = smooth(self.truth.sum(1) / np.maximum(self.weight.sum(1), 1e-30))
        self.reach = self._reach()

    def _reach(self) -> np.ndarray:
        """Shells on either side (S,) to average over: as few as leave <T, T> an error of ``WANTED_ERROR``, at most 2.

        Where the truth is well known its curves are not smooth, and averaging would make them so.
        """

        def truth(truth, weight):
            return truth / np.maximum(weight, 1e-30)

        value, error = jackknife(truth, self.truth, self.weight)
        relative = np.divide(error, value, out=np.full_like(error, np.inf), where=value > 0)
        smoothed = np.sqrt(2 * np.arange(SMOOTHING + 1) + 1)[:, None]
        return np.where(relative > WANTED_ERROR * smoothed, 1, 0).sum(0).clip(max=SMOOTHING)

    def of_half(self, volume: np.ndarray, half: int) -> Calibrated:
        """FSC to the truth of a map (D, D, D) made from half 0 or 1 alone."""
        spectrum = self._spectrum(volume)
        return self._calibrated(self.sums.cross(spectrum, self.spectra[1 - half]), self.sums.cross(spectrum, spectrum))

    def of_both(self, part_a: np.ndarray, part_b: np.ndarray) -> Calibrated:
        """FSC to the truth of the mean of two maps (D, D, D), each made from one half alone."""
        parts = [self._spectrum(part) for part in (part_a, part_b)]
        cross = 0.5 * sum(self.sums.cross(part, other) for part, other in zip(parts, self.spectra[::-1], strict=True))
        mean = 0.5 * (parts[0] + parts[1])
        return self._calibrated(cross, self.sums.cross(mean, mean))

    def _calibrated(self, cross: np.ndarray, power: np.ndarray) -> Calibrated:
        voxels, reach = self.sums.voxels, self.reach

        def truth_over_power(truth, weight, voxels, power):
            estimate = truth / np.maximum(weight, 1e-30) * voxels
            return smooth(np.divide(estimate, power, out=np.zeros_like(estimate), where=power > 0), reach)

        def to_truth(cross, power, truth, weight, voxels):
            ratio = smooth(np.divide(cross, power, out=np.zeros_like(cross), where=power > 0), reach)
            relative = truth_over_power(truth, weight, voxels, power)
            return np.divide(ratio, np.sqrt(np.maximum(relative, 0)), out=np.zeros_like(ratio), where=relative > 0)

        relative, error = jackknife(truth_over_power, self.truth, self.weight, voxels, power)
        sure = relative > CERTAINTY * error
        sure[:ALWAYS_CERTAIN] |= relative[:ALWAYS_CERTAIN] > 0
        uncertain = np.flatnonzero(~sure[1:]) + 1
        last = int(uncertain[0]) - 1 if len(uncertain) else len(sure) - 1
        values, errors = jackknife(to_truth, cross, power, self.truth, self.weight, voxels)
        values, errors = np.clip(values, -1.0, 1.0), np.minimum(errors, 1.0)
        values[0], errors[0] = 1.0, 0.0  # the mean density, which takes part in nothing
        values[last + 1 :], errors[last + 1 :] = np.nan, np.nan
        return Calibrated(FscCurve(values, self.box, self.pixel_size_a, errors), last)


def by_shell(table: np.ndarray, sums: SectorSums) -> np.ndarray:
    """Values (D//2+1,) by shell put on the half-spectrum's grid (D, D, D//2+1); the corners get the last."""
    return np.asarray(table, dtype=np.float32)[sums.shell]


def relative_variance(
    halves: tuple[LinearHalf, LinearHalf], seen: np.ndarray, mask: np.ndarray | None, sums: SectorSums
) -> np.ndarray:
    """Noise variance (D, D, D//2+1) of the mean of two half maps under a mask, as a multiple of its shell's mean.

    A mask m convolves the transform with its own, so noise that differs from voxel to voxel has the variance convolved
    with |F[m]|^2: in real space, its transform times the autocorrelation of the mask.
    """
    variance = _over_shell_mean(np.where(seen, halves[0].variance + halves[1].variance, 0), seen, sums)
    if mask is None:
        return variance
    shape = (sums.box,) * 3
    autocorrelation = scipy.fft.irfftn(np.abs(scipy.fft.rfftn(np.asarray(mask, dtype=np.float32))) ** 2, shape)
    mixed = scipy.fft.rfftn(scipy.fft.irfftn(variance.astype(np.complex64), shape) * autocorrelation).real
    return _over_shell_mean(np.maximum(mixed, 1e-6 * np.abs(mixed).max()), seen, sums)


def _over_shell_mean(variance: np.ndarray, seen: np.ndarray, sums: SectorSums) -> np.ndarray:
    mean = sums(variance * seen).sum(1) / np.maximum(sums(seen.astype(np.float32)).sum(1), 1)
    mean = by_shell(np.maximum(mean, 1e-30), sums)
    return np.where(seen, variance / mean, 1).astype(np.float32)


def _only(volume: np.ndarray, seen: np.ndarray, sums: SectorSums) -> np.ndarray:
    """A map without the Fourier voxels that are empty in either half."""
    if seen[sums.inside].all():
        return volume
    return scipy.fft.irfftn(scipy.fft.rfftn(volume) * seen, volume.shape)
