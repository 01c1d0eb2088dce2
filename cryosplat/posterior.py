"""The delivered map: what the images say where they say it clearly, and the mixtures wherever they know better.

Linear half maps L_h and mixtures' maps G_h, each from its own half. By Fourier voxel, with the noise variance v of the
mean linear map and the truth's power P in the shell, the Wiener weight is W = P / (P + v). Of every half, in two steps,

    Y_h = s ( W L_h + gamma (1 - W) G_h ),    Z_h = s' ( Y_h + delta G_h ),    M = (Z_a + Z_b) / 2.

With gamma = s = 1 and delta = 0 this is the posterior mean with the other half's mixture as prior, regrouped by halves:
the mean of W L_b + (1 - W) G_a and W L_a + (1 - W) G_b. gamma, one number a shell, is what a least-squares fit to the
truth gives, by cross-validation: <W L, T> from the linear maps of the two halves, <G_a, T> from that of half b and the
other way round. It brings mixtures to the data's grey scale and leaves out what they merely repeat of their own half's
noise. delta is found in the same way: a mixture fitted to all images knows what is density and what is solvent, and can
be the better judge even of voxels that were seen well. Both are followed from shell to shell, and where the data no
longer tell them keep the value that they had: a mixture that agreed with the data as far as they went is believed
further, one that did not is not. s = 1 / (mean transfer of the truth) gives every shell the truth's own amplitude, so
that no radial filter is hidden in M; filtering and sharpening are for postprocess, where they are recorded.

Z_a is made from half a (but for a few numbers a shell), so the calibrated FSC of M holds as it stands. M is the twin of
what is delivered, in which the mixture of all images takes the place of two thirds of the halves' mean:

    M' = M with (1 - w) (G_a + G_b) / 2 + w G_full for (G_a + G_b) / 2,    w = 2/3.

A mixture of all images finds its way in half the noise, so M' is the better map. Its curve is not known without bias,
for G_full has seen both halves; that of M stands for it, and is a little too modest (benchmarks/quality.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.optimize

from cryosplat.backprojection import KERNEL_VOXELS, PADDING, LinearHalf
from cryosplat.calibration import by_shell, relative_variance
from cryosplat.fsc import masked_spectrum
from cryosplat.sectors import SectorSums, jackknife, smooth

FULL_SHARE = 2 / 3
"""w. With 1/2 to 1 the maps were as good within 0.002, between them best: mixtures that differ average well."""

LARGEST_GAMMA = 20.0
"""Mixtures that have not converged are too faint, by up to 5 times (seen); more is an accident of noise."""


SAFE_RATIO = 0.05
"""Least signal over noise that a Wiener weight is made with: far below it the ratio is an accident."""


WANDER, WANDER_SHARE = 0.1, 0.3
"""Change of gamma from shell to shell that is expected, and as a share of it: from 2 to 0 over ten shells was seen."""

LEAST_POWER = 1e-3
"""Least power of the truth in a shell, over that of the linear map, that anything is divided by."""

RISING_SHELLS = 8
"""Shells in which signal over noise may rise: the CTF is near zero at low frequency."""


@dataclass(frozen=True, eq=False)
class Delivered:
    """Maps (D, D, D) float32.

    Attributes:
        map: M', or M where there is no mixture of all images.
        parts: Z_a and Z_b, each of its own half.
        linear: the Wiener-filtered linear map of all particles, for looking at.
        gamma: (D//2+1,) by shell.
        delta: (D//2+1,) by shell.
        wiener: (D//2+1,) mean of W by shell.
    """

    map: np.ndarray
    parts: tuple[np.ndarray, np.ndarray]
    linear: np.ndarray
    gamma: np.ndarray
    delta: np.ndarray
    wiener: np.ndarray

    @property
    def twin(self) -> np.ndarray:
        """M."""
        return _mean(self.parts)


def deliver(
    halves: tuple[LinearHalf, LinearHalf],
    mixtures: tuple[np.ndarray, np.ndarray] | None,
    mask: np.ndarray | None,
    sums: SectorSums,
    full: np.ndarray | None = None,
) -> Delivered:
    """Put linear half maps and mixtures' maps (D, D, D) together.

    Args:
        halves: linear half maps a and b.
        mixtures: of the halves, in the same grey scale; None: the linear maps alone.
        mask: (D, D, D) that gamma and delta are fitted under; None: no mask.
        sums: of the box.
        full: map of the mixture of all images; None: M is delivered.
    """
    weights, wiener, seen = _wiener(halves, mask, sums)
    whole = _filtered(_mean([half.map for half in halves]), weights)
    # Scaled to the truth's amplitude before anything leaves the window: a steep radial filter would mix shells there.
    scale = 1 / by_shell(np.maximum(wiener, 1e-6), sums)
    linear = tuple(_filtered(half.map, weights * scale) for half in halves)
    if mixtures is None:
        none = np.zeros(sums.shells)
        return Delivered(_mean(linear), linear, whole, none, none, wiener)
    alone = None if seen[sums.inside].all() else _factor_alone(mixtures, halves, mask, seen, sums)
    fill = np.where(seen, (1 - weights) * scale, 0)
    filling = tuple(_filtered(volume, fill) for volume in mixtures)
    room = np.maximum(1 - wiener, 1e-3) / np.maximum(wiener, 1e-6)
    gamma, scale = _fit(_Products(linear, filling, halves, mask, room, sums))
    parts = tuple(
        _shaped(one, scale, sums) + _shaped(two, scale * gamma, sums) for one, two in zip(linear, filling, strict=True)
    )
    known = mixtures if alone is None else tuple(_filtered(volume, seen) for volume in mixtures)
    delta, again = _fit(_Products(parts, known, halves, mask, np.ones(sums.shells), sums))

    def of_mixture(volume: np.ndarray) -> np.ndarray:
        """All that a mixture's map brings."""
        found = _shaped(_filtered(volume, fill), again * scale * gamma, sums)
        found += _shaped(volume if alone is None else _filtered(volume, seen), again * delta, sums)
        return found if alone is None else found + _filtered(volume, alone)

    parts = tuple(
        _shaped(one, again * scale, sums) + of_mixture(two) for one, two in zip(linear, mixtures, strict=True)
    )
    delivered = _mean(parts)
    if full is not None:
        delivered += of_mixture(FULL_SHARE * (full - _mean(mixtures)))
    return Delivered(delivered, parts, whole, gamma, delta, wiener)


def _mean(pair: Sequence[np.ndarray]) -> np.ndarray:
    return 0.5 * (pair[0] + pair[1])


def _shaped(volume: np.ndarray, factors: np.ndarray, sums: SectorSums) -> np.ndarray:
    """A map whose shells are multiplied by factors (S,)."""
    spectrum = scipy.fft.rfftn(volume)
    spectrum *= by_shell(factors, sums)
    return scipy.fft.irfftn(spectrum, volume.shape, overwrite_x=True).astype(np.float32)


def _wiener(
    halves: tuple[LinearHalf, LinearHalf], mask: np.ndarray | None, sums: SectorSums
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W (D, D, D//2+1), 0 where a half is empty and in the corners; its mean by shell where not; and where not.

    Signal over noise is that under the mask: there the map is going to be looked at.
    """
    seen = np.isfinite(halves[0].variance) & np.isfinite(halves[1].variance) & sums.inside
    mask = _window(len(halves[0].map)) if mask is None else mask
    pattern = relative_variance(halves, seen, mask, sums)
    spectra = [masked_spectrum(half.map, mask, np.float32) for half in halves]
    voxels = np.maximum(sums.voxels.sum(1), 1)
    cross = sums.cross(*spectra).sum(1) / voxels
    power = sum(sums.cross(spectrum, spectrum).sum(1) for spectrum in spectra) / (2 * voxels)
    noise = np.maximum(smooth(power - cross), 1e-30) / 2  # of the mean of two halves
    told = np.where(seen, 1 / (1 + pattern) ** 2, 0)  # poorly seen voxels would bring nothing but noise
    truth = smooth(sums.cross(*spectra, told).sum(1) / np.maximum(sums(told).sum(1), 1e-30))
    ratio = np.maximum(_falling(truth / noise), SAFE_RATIO)
    weights = 1 / (1 + pattern / by_shell(ratio, sums))
    weights[~seen] = 0
    return weights, sums(weights).sum(1) / np.maximum(sums(seen.astype(np.float32)).sum(1), 1), seen


def _falling(ratio: np.ndarray) -> np.ndarray:
    """The nearest curve (S,) that nowhere rises beyond ``RISING_SHELLS``: signal over noise falls with frequency, and
    what rises again is chance. Uneven weights of neighbouring shells would mix under a mask."""
    fallen = ratio.copy()
    fallen[RISING_SHELLS:] = scipy.optimize.isotonic_regression(ratio[RISING_SHELLS:], increasing=False).x
    return smooth(fallen)


def _window(box: int) -> np.ndarray:
    """Real-space window (D, D, D) under which maps are weighted: noise far from the centre must not come back."""
    position = (np.arange(box) - box // 2) / (PADDING * box)
    along = np.exp(-((2 * math.pi * KERNEL_VOXELS * position) ** 2)).astype(np.float32)
    return along[:, None, None] * along[:, None] * along


def _filtered(volume: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A map whose transform under the window is multiplied by weights (D, D, D//2+1)."""
    window = _window(len(volume))
    spectrum = scipy.fft.rfftn(volume * window)
    spectrum *= weights
    # Not undone in the corners, where it would make noise thousands of times larger.
    undone = np.maximum(window, window[0, len(window) // 2, len(window) // 2])
    return (scipy.fft.irfftn(spectrum, volume.shape, overwrite_x=True) / undone).astype(np.float32)


class _Products:
    """Sums over shells and sectors that X (linear), Y (filling) and the truth make, under the mask.

    Y is divided by ``room`` (S,), the mean factor that mixtures enter it with, and all by the power of X, which takes
    out the fall of the spectrum.
    """

    def __init__(
        self,
        linear: tuple[np.ndarray, np.ndarray],
        filling: tuple[np.ndarray, np.ndarray],
        halves: tuple[LinearHalf, LinearHalf],
        mask: np.ndarray | None,
        room: np.ndarray,
        sums: SectorSums,
    ):
        def spectra(volumes):
            return [masked_spectrum(volume, mask, np.float32) for volume in volumes]

        self.room = room
        x, y, truth = spectra(linear), spectra(filling), spectra(half.map for half in halves)
        x_truth, y_truth = (0.5 * (sums.cross(p[0], truth[1]) + sums.cross(p[1], truth[0])) for p in (x, y))
        x, y = (0.5 * (parts[0] + parts[1]) for parts in (x, y))
        xx, room = sums.cross(x, x), room[:, None]
        scale = np.maximum(smooth(xx.sum(1)), 1e-30)[:, None]
        self.x_truth, self.y_truth = x_truth / scale, y_truth / room / scale
        self.xx, self.xy, self.yy = xx / scale, sums.cross(x, y) / room / scale, sums.cross(y, y) / room**2 / scale
        self.truth = sums.cross(*truth) / scale


def _fit(p: _Products) -> tuple[np.ndarray, np.ndarray]:
    """By shell: gamma, and the factor that then gives the sum the truth's amplitude.

    Least squares of T by alpha X + gamma Y, of which the ratio is taken. What Y says beyond X is <Y, T> -
    <X, Y> <X, T> / <X, X>, known with a jackknife error.
    """

    def beyond(x_truth, y_truth, xx, xy, yy):
        x_truth, y_truth, xx, xy, yy = (smooth(part) for part in (x_truth, y_truth, xx, xy, yy))
        return y_truth - xy * x_truth / np.maximum(xx, 1e-30)

    gain, error = jackknife(beyond, p.x_truth, p.y_truth, p.xx, p.xy, p.yy)
    x_truth, y_truth, xx, xy, yy = (smooth(part.sum(1)) for part in (p.x_truth, p.y_truth, p.xx, p.xy, p.yy))
    alone = yy * x_truth - xy * y_truth  # alpha, up to the determinant
    known, to_y = alone > 0, xx / p.room
    gamma = np.divide(to_y * gain, alone, out=np.zeros_like(gain), where=known)
    sure = ~known & (gain > error)  # mixtures tell all that the linear maps do, and more
    error = np.divide(to_y * error, alone, out=np.full_like(gain, np.inf), where=known)
    gamma[sure], error[sure] = LARGEST_GAMMA, 0.5 * LARGEST_GAMMA
    told, told_error = jackknife(transfer, p.y_truth, p.truth)
    told_error[smooth(p.truth.sum(1)) <= LEAST_POWER] = np.inf  # 0 there, whatever is left out
    gamma = _followed(gamma, error)
    return gamma, 1 / (1 + gamma * _followed(told, told_error) * p.room)


def _factor_alone(
    mixtures: tuple[np.ndarray, np.ndarray],
    halves: tuple[LinearHalf, LinearHalf],
    mask: np.ndarray | None,
    seen: np.ndarray,
    sums: SectorSums,
) -> np.ndarray:
    """Weights (D, D, D//2+1) of mixtures where no image of one half or the other has told anything.

    That is <G, T> / <G, G> of the voxels that are seen: what is overfitted there counts less here.
    """
    g = [masked_spectrum(_filtered(volume, seen.astype(np.float32)), mask, np.float32) for volume in mixtures]
    truth = [masked_spectrum(half.map, mask, np.float32) for half in halves]
    g_truth = 0.5 * (sums.cross(g[0], truth[1]) + sums.cross(g[1], truth[0]))
    g = 0.5 * (g[0] + g[1])
    power = sums.cross(g, g)
    scale = np.maximum(smooth(power.sum(1)), 1e-30)[:, None]
    factor = _followed(*jackknife(transfer, g_truth / scale, power / scale))
    return np.where(sums.inside & ~seen, by_shell(factor, sums), 0)


def transfer(map_truth: np.ndarray, truth_truth: np.ndarray) -> np.ndarray:
    """<map, T> / <T, T> (S,), smoothed: how much of the truth is in a map; 0 where the latter is below LEAST_POWER."""
    found, power = smooth(map_truth), smooth(truth_truth)
    return np.divide(found, power, out=np.zeros_like(found), where=power > LEAST_POWER)


def _followed(values: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """A curve (S,) of uncertain values followed from shell to shell (a Kalman filter for a random walk).

    Where the data tell gamma it is what they tell; where they fall silent it stays what it was in the last shells where
    they spoke. It is never negative.
    """
    followed, value, variance = np.zeros(len(values)), 0.0, LARGEST_GAMMA**2
    for shell in range(1, len(values)):
        variance = min(variance + (WANDER + WANDER_SHARE * value) ** 2, LARGEST_GAMMA**2)
        trust = variance / (variance + errors[shell] ** 2)
        value = float(np.clip(value + trust * (values[shell] - value), 0, LARGEST_GAMMA))
        variance *= 1 - trust
        followed[shell] = value
    return followed
