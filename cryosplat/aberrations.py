"""Aberrations of an optics group: Zernike polynomials, magnification, and what of them a CTF's seven numbers can hold.

The signs and the order of coefficients are RELION's, found by experiment with its programs (docs/physics.md). With
s = M k, k a frequency of the image in 1/A and M its magnification matrix,

    image(k) = map(s)  sin( g(s) - Z_even(s) )  exp( i ( Z_odd(s) - 2 pi Cs lambda^2 |s|^2 (t . s) ) )

t is the beam tilt. Zernike polynomials are the plain ones, of s in 1/A.
"""

from dataclasses import dataclass
from math import factorial

import numpy as np
import torch

from cryosplat.ctf import RELATIVISTIC_PER_VOLT, WAVELENGTH_NUMERATOR_A

A_PER_MM = 1e7
RAD_PER_MRAD = 1e-3

NEGLIGIBLE_PHASE = 1e-3
"""Radians. An even phase that seven numbers cannot hold, and is smaller everywhere within Nyquist, is left out."""

TOLERATED_PHASE = np.pi / 4
"""Radians. A phase error of this size leaves cos(pi/4) = 0.71 of a coefficient: where it is first reached in any
direction, an aberration that is not modelled is said to limit the resolution."""


@dataclass(frozen=True)
class Aberrations:
    """What particles of one optics group have in common besides the CTF's seven numbers.

    Attributes:
        magnification: ((xx, xy), (yx, yy)), M above.
        tilt_mrad: beam tilt, x and y.
        odd: coefficients of odd Zernike polynomials, in the order of ``term``.
        even: of even ones.
        cs_mm: spherical aberration.
        voltage_kv: of the microscope.
    """

    magnification: tuple[tuple[float, float], tuple[float, float]]
    tilt_mrad: tuple[float, float]
    odd: tuple[float, ...]
    even: tuple[float, ...]
    cs_mm: float
    voltage_kv: float

    @property
    def is_odd(self) -> bool:
        return any(self.odd) or any(self.tilt_mrad)


def wavelength_a(voltage_kv: float) -> float:
    """Wavelength of an electron, A.

    >>> round(wavelength_a(300.0), 5)
    0.01969
    """
    volts = 1e3 * voltage_kv
    return float(WAVELENGTH_NUMERATOR_A / np.sqrt(volts + RELATIVISTIC_PER_VOLT * volts**2))


def term(index: int, odd: bool) -> tuple[int, int]:
    """Order n and angular frequency m of a coefficient: n rises, m from -n to n by twos within it.

    >>> [term(index, odd=True) for index in range(6)]
    [(1, -1), (1, 1), (3, -3), (3, -1), (3, 1), (3, 3)]
    >>> [term(index, odd=False) for index in range(4)]
    [(0, 0), (2, -2), (2, 0), (2, 2)]
    """
    n = 1 if odd else 0
    while index > n:
        index, n = index - n - 1, n + 2
    return n, 2 * index - n


def radial(n: int, m: int) -> dict[int, float]:
    """Coefficients of the radial Zernike polynomial R_n^m, m >= 0, by power.

    >>> radial(4, 2)
    {4: 4.0, 2: -3.0}
    """
    return {
        n - 2 * k: (-1.0) ** k
        * factorial(n - k)
        / (factorial(k) * factorial((n + m) // 2 - k) * factorial((n - m) // 2 - k))
        for k in range((n - m) // 2 + 1)
    }


def _monomials(coefficients: tuple[float, ...], odd: bool) -> dict[tuple[int, int], float]:
    """The sum of Zernike polynomials as terms s^p cos(m phi), or sin(|m| phi) for m < 0, by (p, m)."""
    found: dict[tuple[int, int], float] = {}
    for index, coefficient in enumerate(coefficients):
        if coefficient:
            n, m = term(index, odd)
            for power, factor in radial(n, abs(m)).items():
                found[power, m] = found.get((power, m), 0.0) + coefficient * factor
    return found


def _sum_of(monomials: dict[tuple[int, int], float], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    z, squared, total = x + 1j * y, x**2 + y**2, np.zeros(np.broadcast(x, y).shape)
    for (power, m), coefficient in monomials.items():
        turned = z ** abs(m)
        total += coefficient * squared ** ((power - abs(m)) // 2) * (turned.real if m >= 0 else turned.imag)
    return total


def frequencies(box: int, pixel_size_a: float, magnification=((1.0, 0.0), (0.0, 1.0))) -> tuple[np.ndarray, np.ndarray]:
    """M k in 1/A, x and y, each (D, D//2+1), on the grid of ``rfft2``."""
    ky = np.fft.fftfreq(box, pixel_size_a)[:, None]
    kx = np.fft.rfftfreq(box, pixel_size_a)[None, :]
    (xx, xy), (yx, yy) = magnification
    return xx * kx + xy * ky, yx * kx + yy * ky


def odd_phase(group: Aberrations, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Radians that odd aberrations add to the phase of an image's transform at s = (x, y), 1/A."""
    tilt_x, tilt_y = (RAD_PER_MRAD * tilt for tilt in group.tilt_mrad)
    coma = 2 * np.pi * group.cs_mm * A_PER_MM * wavelength_a(group.voltage_kv) ** 2
    return _sum_of(_monomials(group.odd, True), x, y) - coma * (x**2 + y**2) * (tilt_x * x + tilt_y * y)


def even_phase(group: Aberrations, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Radians that even aberrations take from the phase of the CTF at s = (x, y), 1/A: Z_even."""
    return _sum_of(_monomials(group.even, False), x, y)


def odd_filter(group: Aberrations, box: int, pixel_size_a: float) -> torch.Tensor:
    """What takes the odd aberrations out of half-spectra: complex64 (D, D//2+1) of modulus 1.

    On the Nyquist lines, where a frequency and its mate fall together, it is 1.
    """
    phase = odd_phase(group, *frequencies(box, pixel_size_a, group.magnification))
    if box % 2 == 0:
        phase[box // 2], phase[:, box // 2] = 0, 0
    return torch.from_numpy(np.exp(-1j * phase)).to(torch.complex64)


@dataclass(frozen=True, eq=False)
class Folded:
    """Even aberrations as changes of the CTF's seven numbers, and the terms that are left.

    Attributes:
        constant: added to the phase shift, rad.
        defocus_a: (2, 2) added to the quadratic form of defocus, A.
        cs_mm: added to the spherical aberration.
        rest: by (power, m), what seven numbers cannot hold.
    """

    constant: float
    defocus_a: np.ndarray
    cs_mm: float
    rest: dict[tuple[int, int], float]


def fold_even(group: Aberrations) -> Folded:
    """Split ``-Z_even`` into what defocus, astigmatism, phase shift and Cs can hold, exactly, and the rest."""
    terms = _monomials(group.even, False)
    length = wavelength_a(group.voltage_kv)
    mean, cosine, sine = (terms.pop((2, m), 0.0) for m in (0, 2, -2))
    form = -np.array([[mean + cosine, sine], [sine, mean - cosine]]) / (np.pi * length)
    constant, fourth = -terms.pop((0, 0), 0.0), terms.pop((4, 0), 0.0)
    return Folded(constant, form, 2 * fourth / (np.pi * length**3) / A_PER_MM, terms)


def fold_ctf(parameters: np.ndarray, group: Aberrations) -> np.ndarray:
    """CTF parameters (n, 7), float64, of particles of a group, with its aberrations and magnification in them.

    The quadratic form of defocus becomes M^T Q M. Cs takes the mean of |M e|^4 over directions e, which is exact for a
    matrix that only scales; what is missing else is in ``even_rest``.
    """
    folded, matrix = fold_even(group), np.array(group.magnification)
    u, v, angle = parameters[:, :3].T
    cosine, sine = (u - v) / 2 * np.cos(2 * angle), (u - v) / 2 * np.sin(2 * angle)
    form = np.stack([(u + v) / 2 + cosine, sine, sine, (u + v) / 2 - cosine], 1).reshape(-1, 2, 2) + folded.defocus_a
    form = matrix.T @ form @ matrix
    mean = (form[:, 0, 0] + form[:, 1, 1]) / 2
    cosine, sine = (form[:, 0, 0] - form[:, 1, 1]) / 2, form[:, 0, 1]
    result = parameters.copy()
    result[:, 0], result[:, 1] = mean + np.hypot(cosine, sine), mean - np.hypot(cosine, sine)
    result[:, 2] = np.arctan2(sine, cosine) / 2
    result[:, 4] = (parameters[:, 4] + folded.cs_mm) * _mean_fourth_power(matrix)
    result[:, 6] += folded.constant
    return result


def _mean_fourth_power(matrix: np.ndarray) -> float:
    """Mean of |M e|^4 over the directions e of the plane."""
    gram = matrix.T @ matrix
    return (np.trace(gram) ** 2 / 2 + np.sum(gram**2)) / 4


def even_rest(group: Aberrations, box: int, pixel_size_a: float) -> np.ndarray:
    """Radians (D, D//2+1) to be added to the phase of a CTF with the parameters of ``fold_ctf``.

    Terms of the fourth power with an angle, all of higher powers, and what an uneven magnification makes of Cs.
    """
    folded, matrix = fold_even(group), np.array(group.magnification)
    x, y = frequencies(box, pixel_size_a, group.magnification)
    kx, ky = frequencies(box, pixel_size_a)
    spherical = np.pi / 2 * (group.cs_mm + folded.cs_mm) * A_PER_MM * wavelength_a(group.voltage_kv) ** 3
    uneven = (x**2 + y**2) ** 2 - _mean_fourth_power(matrix) * (kx**2 + ky**2) ** 2
    return -_sum_of(folded.rest, x, y) - spherical * uneven


def is_negligible(phase: np.ndarray) -> bool:
    """Whether an even phase (D, D//2+1) matters nowhere within Nyquist."""
    box = len(phase)
    ky, kx = np.fft.fftfreq(box)[:, None], np.fft.rfftfreq(box)[None, :]
    return bool(np.abs(phase[kx**2 + ky**2 <= 0.25]).max() < NEGLIGIBLE_PHASE)


def limit_a(phase, pixel_size_a: float) -> float | None:
    """Resolution in A at which a phase error first reaches ``TOLERATED_PHASE`` in any direction, or None if beyond
    Nyquist; ``phase`` gives radians for arrays of x and y in 1/A."""
    s = np.linspace(0, 0.5 / pixel_size_a, 1001)[1:, None]
    angle = np.linspace(0, np.pi, 180, endpoint=False)
    over = (np.abs(phase(s * np.cos(angle), s * np.sin(angle))) >= TOLERATED_PHASE).any(axis=1)
    return float(1 / s[np.argmax(over), 0]) if over.any() else None
