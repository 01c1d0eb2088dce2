"""Sharpening a map: FSC weights, the B factor by a Guinier fit, and the low-pass at the resolution.

After Rosenthal & Henderson, J. Mol. Biol. 333 (2003) 721, as RELION does it. B is in A^2 and multiplies amplitudes by
exp(-B s^2 / 4) at the spatial frequency s, so a negative B sharpens. That is the sign that RELION prints.
"""

from dataclasses import dataclass

import numpy as np
import scipy.fft

from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, shell_index

MINIMUM_FIT_SHELLS = 5
"""Shells that a straight line is fitted to, at least: with fewer, two noisy ends decide the slope."""

EDGE_SHELLS = 2.0
"""Width of the low-pass's cosine edge, centred on the resolution, in Fourier voxels: less rings, more blurs."""

LARGEST_EXPONENT = 20.0
"""Of what B amplifies by, at the resolution: even -400 A^2 at 2.5 A is e^16."""


@dataclass(frozen=True)
class GuinierFit:
    """The straight line ln(amplitude) = intercept + slope s^2 over the shells of a range, by least squares.

    Attributes:
        slope: A^2; the decay exp(-b s^2 / 4) of the amplitudes has b = -4 slope.
        intercept: ln(amplitude) at s = 0.
        r_squared: fraction of the variance of ln(amplitude) that the line explains.
        from_a, to_a: the range, A.
        shells: how many are in it.
    """

    slope: float
    intercept: float
    r_squared: float
    from_a: float
    to_a: float
    shells: int

    @property
    def b_factor_a2(self) -> float:
        """The B that undoes the decay, A^2: negative where amplitudes fall."""
        return 4 * self.slope


@dataclass(frozen=True, eq=False)
class Sharpened:
    """A sharpened map and what led to it.

    Attributes:
        volume: (D, D, D) float32.
        pixel_size_a: A/px.
        resolution_a: where it is low-passed, A.
        b_factor_a2: the B applied, A^2.
        fit: of the weighted amplitudes; None where B was given.
        amplitudes: mean |F| (D // 2 + 1,) by shell of the map as it was ("map"), after FSC weighting ("weighted",
            if there was any), and sharpened and low-passed ("sharpened"). F is the unnormalised transform.
    """

    volume: np.ndarray
    pixel_size_a: float
    resolution_a: float
    b_factor_a2: float
    fit: GuinierFit | None
    amplitudes: dict[str, np.ndarray]


def fsc_weights(fsc: np.ndarray, between: str) -> np.ndarray:
    """Weight of every shell (n,): the correlation of the map with the truth; 0 from the first FSC that is not positive.

    Args:
        fsc: (n,) from shell 0, whose weight is 1.
        between: "half-maps": the FSC of the two halves of the data that are averaged in the map, F; then the map's own
            correlation with the truth is sqrt(2 F / (1 + F)) (Rosenthal & Henderson 2003). "truth": the FSC is that
            correlation itself, measured or estimated.

    >>> fsc_weights(np.array([1.0, 1.0, 1 / 7, -0.1, 0.2]), "half-maps").round(3).tolist()
    [1.0, 1.0, 0.5, 0.0, 0.0]
    """
    assert between in ("half-maps", "truth")
    fsc = np.clip(fsc, 0, 1)
    fsc[0] = 1.0
    stopped = np.flatnonzero(fsc <= 0)
    if len(stopped):
        fsc[stopped[0] :] = 0.0
    return np.sqrt(2 * fsc / (1 + fsc)) if between == "half-maps" else fsc


def shell_amplitudes(spectrum: np.ndarray) -> np.ndarray:
    """Mean |F| over each shell 0 .. D // 2 of a half-spectrum (D, D, D // 2 + 1); both Friedel mates count."""
    box = len(spectrum)
    shells = shell_index(box)
    mates = np.full(shells.shape[2], 2.0)
    mates[0] = 1.0
    if box % 2 == 0:
        mates[-1] = 1.0
    count, total = np.zeros((2, int(shells.max()) + 1))
    for plane, values in zip(shells, spectrum, strict=True):  # plane by plane, to need no large temporaries
        count += np.bincount(plane.ravel(), np.broadcast_to(mates, plane.shape).ravel(), len(count))
        total += np.bincount(plane.ravel(), (np.abs(values) * mates).ravel(), len(total))
    return total[: box // 2 + 1] / count[: box // 2 + 1]


def guinier_fit(amplitudes: np.ndarray, box: int, pixel_size_a: float, from_a: float, to_a: float) -> GuinierFit:
    """Fit a line to ln(amplitude) against 1/d^2 over the shells from ``from_a`` to ``to_a`` (A), ends included.

    Args:
        amplitudes: (box // 2 + 1,) by shell; shells without amplitude are left out.

    Raises:
        InputError: fewer than 5 shells in the range.
    """
    frequency = np.arange(len(amplitudes)) / (box * pixel_size_a)
    inside = (frequency * from_a >= 1 - 1e-6) & (frequency * to_a <= 1 + 1e-6) & (amplitudes > 0)
    shells = int(inside.sum())
    if shells < MINIMUM_FIT_SHELLS:
        raise InputError(
            f"B factor: {shells} shells of signal from {from_a:.4g} A (--fit-from) to {to_a:.4g} A, the resolution; a "
            f"fit needs {MINIMUM_FIT_SHELLS}. Fit from a lower resolution (a larger --fit-from), or give --bfactor"
        )
    squares, logarithms = frequency[inside] ** 2, np.log(amplitudes[inside])
    slope, intercept = np.polyfit(squares, logarithms, 1)
    residual = logarithms - intercept - slope * squares
    spread = logarithms.var()
    r_squared = 1 - residual.var() / spread if spread > 0 else 1.0
    return GuinierFit(float(slope), float(intercept), float(r_squared), float(from_a), float(to_a), shells)


def low_pass_weights(radius: np.ndarray, cut_off: float) -> np.ndarray:
    """1 within, 0 beyond, and a raised cosine 2 voxels wide that is 1/2 at ``cut_off``; both in Fourier voxels.

    >>> low_pass_weights(np.array([8.0, 9.0, 10.0, 11.0]), 10.0).round(6).tolist()
    [1.0, 1.0, 0.5, 0.0]
    """
    return 0.5 * (1 + np.cos(np.pi * np.clip((radius - cut_off) / EDGE_SHELLS + 0.5, 0, 1)))


def sharpen(
    volume: np.ndarray,
    pixel_size_a: float,
    resolution_a: float,
    curve: FscCurve | None = None,
    between: str = "half-maps",
    b_factor_a2: float | None = None,
    fit_from_a: float = 10.0,
) -> Sharpened:
    """Weight a map by its FSC, sharpen it, and low-pass it at its resolution.

        F(k) -> F(k) w(shell) exp(-B s^2 / 4) l(|k|)

    with w of ``fsc_weights`` and l of ``low_pass_weights``. The fit is of the weighted map, so that the amplitudes of
    noise, which do not fall, hide no decay.

    Args:
        volume: (D, D, D), [z, y, x], neither masked nor filtered.
        pixel_size_a: A/px.
        resolution_a: where to low-pass and how far to fit, A; not beyond Nyquist.
        curve: FSC of this map on its grid; None for no weighting.
        between: what the curve compares, as in ``fsc_weights``.
        b_factor_a2: B, A^2, negative to sharpen; None fits it from ``fit_from_a`` (A) to the resolution.

    Raises:
        InputError: the resolution is beyond Nyquist, no signal, too few shells to fit, or a B beyond reason.
    """
    box = len(volume)
    check_resolution(resolution_a, pixel_size_a)
    spectrum = scipy.fft.rfftn(np.asarray(volume, dtype=np.float64))
    amplitudes = {"map": shell_amplitudes(spectrum)}
    if curve is not None:
        shells = shell_index(box)
        weights = np.zeros(int(shells.max()) + 1)  # corners beyond the last shell have no FSC
        weights[: len(curve.fsc)] = fsc_weights(curve.fsc, between)
        spectrum *= weights[shells]
        amplitudes["weighted"] = shell_amplitudes(spectrum)
    weighted = amplitudes.get("weighted", amplitudes["map"])
    if not weighted[1:].any():
        raise InputError("there is nothing to sharpen: the map is constant, or its FSC is 0 from the first shell on")
    fit = None
    if b_factor_a2 is None:
        fit = guinier_fit(weighted, box, pixel_size_a, fit_from_a, resolution_a)
        b_factor_a2 = fit.b_factor_a2
    spectrum *= _filter(box, pixel_size_a, resolution_a, b_factor_a2)
    amplitudes["sharpened"] = shell_amplitudes(spectrum)
    sharpened = scipy.fft.irfftn(spectrum, volume.shape).astype(np.float32)
    return Sharpened(sharpened, pixel_size_a, resolution_a, float(b_factor_a2), fit, amplitudes)


def _filter(box: int, pixel_size_a: float, resolution_a: float, b_factor_a2: float) -> np.ndarray:
    """Low-pass times exp(-B s^2 / 4) on the grid of ``scipy.fft.rfftn``."""
    full, half = np.fft.fftfreq(box, 1 / box), np.fft.rfftfreq(box, 1 / box)
    radius = np.sqrt(full[:, None, None] ** 2 + full[:, None] ** 2 + half**2)
    side_a = box * pixel_size_a
    passed = low_pass_weights(radius, side_a / resolution_a)
    # The exponent only where something passes: in the corners it would grow for nothing.
    exponent = -b_factor_a2 / 4 * np.where(passed > 0, radius / side_a, 0) ** 2
    if exponent.max() > LARGEST_EXPONENT:
        raise InputError(
            f"B of {b_factor_a2:.4g} A^2 amplifies the resolution of {resolution_a:.4g} A by more than "
            f"e^{LARGEST_EXPONENT:g}: that is noise; give another B with --bfactor"
        )
    return passed * np.exp(exponent)


def check_resolution(resolution_a: float, pixel_size_a: float) -> None:
    """Refuse a resolution that is not positive or beyond Nyquist.

    Raises:
        InputError: saying what Nyquist is.
    """
    nyquist_a = 2 * pixel_size_a
    if not 0 < resolution_a < np.inf or resolution_a < nyquist_a * (1 - 1e-3):  # A/px in headers are rounded
        raise InputError(
            f"resolution {resolution_a:.4g} A: the map has {pixel_size_a:.4g} A/px, so Nyquist is {nyquist_a:.4g} A; "
            "give one that is not beyond it with --resolution"
        )
