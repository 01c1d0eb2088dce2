"""How far an FSC may be off: independent voxels of a shell under a mask, and the standard error they leave."""

import numpy as np

from cryosplat.fsc import masked_spectrum, shell_sums


def voxels_in_shells(box: int) -> np.ndarray:
    """Fourier voxels of the full spectrum in every shell: float64 (box // 2 + 1,). As many independent real numbers.

    >>> voxels_in_shells(8)[:3]
    array([ 1., 18., 62.])
    """
    ones = np.ones((box, box, box // 2 + 1), dtype=np.complex64)
    return shell_sums(ones, ones)[1]


def independent_voxels(box: int, mask: np.ndarray | None = None, copies: int = 1) -> np.ndarray:
    """Effective number of independent real numbers in every shell: float64 (box // 2 + 1,).

    A mask m makes neighbouring Fourier voxels of white noise correlate: their covariance at distance d is W(d), the
    transform of m^2. A sum over n voxels that correlate so has the variance of one over

        n_eff = n / sum over d of |W(d)|^2 / |W(0)|^2 A(d),

    A(d) being the fraction of the shell's voxels that have another of the shell at distance d. Of a thin spherical
    shell of radius k and thickness 1 this is 1 / (2 |d|) for 0 < |d| < 2 k (from the lengths of chords of a sphere,
    which have the density s / 2 k^2), and 1 at 0.

    Of maps with a symmetry of ``copies`` operators that many voxels say the same.
    """
    voxels = voxels_in_shells(box) / copies
    if mask is None:
        return voxels
    spectrum = masked_spectrum(np.asarray(mask, dtype=np.float32) ** 2, dtype=np.float32)
    spectrum /= abs(spectrum[0, 0, 0])
    squares = np.fft.fftfreq(box, 1 / box).astype(np.float32) ** 2
    distances = np.sqrt(squares[:, None, None] + squares[:, None] + squares[: box // 2 + 1])
    distances[0, 0, 0] = np.inf  # a voxel and itself are counted apart
    spectrum /= np.sqrt(2 * distances)
    together = np.cumsum(shell_sums(spectrum, spectrum)[1])
    # A mask is smooth: what lies beyond the last shell, of distances up to 2 k, is nothing.
    return voxels / (1 + together[np.minimum(2 * np.arange(len(voxels)), len(voxels) - 1)])


def standard_error(fsc: np.ndarray, independent: np.ndarray) -> np.ndarray:
    """Standard error of an FSC whose shells have so many independent real numbers.

        se = (1 - F) sqrt( (1 + 2 F - F^2) / n )

    is the error of a correlation coefficient, to first order in 1 / n, when the signal is the same in every
    repetition and only the noise is drawn anew, as it is for one molecule. (With a signal drawn anew, too, it is
    Fisher's (1 - F^2) / sqrt(n), Metron 1 (1921) 3, which at F = 0.5 is larger by 13 %.)

    >>> standard_error(np.array([0.0, 0.5, 1.0]), np.array([100.0, 100.0, 100.0])).round(4)
    array([0.1   , 0.0661, 0.    ])
    """
    bounded = np.clip(fsc, 0.0, 1.0)  # a negative FSC is noise about 0
    return (1 - bounded) * np.sqrt((1 + 2 * bounded - bounded**2) / np.maximum(independent, 1.0))
