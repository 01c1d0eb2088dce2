"""Linear half maps and mixtures' maps with a known truth, noise and bias, for tests of what is made from them."""

import numpy as np
import scipy.fft
from halfmaps import frequencies, noise

from cryosplat.backprojection import LinearHalf


def filtered(volume: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A map (D, D, D) whose transform is multiplied by weights (D, D, D//2+1)."""
    return scipy.fft.irfftn(scipy.fft.rfftn(volume) * weights, volume.shape)


def uneven(box: int) -> np.ndarray:
    """A noise variance (D, D, D//2+1) that is 30 times larger along z than across."""
    z = np.fft.fftfreq(box, 1 / box)[:, None, None] / np.maximum(frequencies(box), 1)
    return np.broadcast_to(0.3 + 9 * z**4, (box, box, box // 2 + 1))


def half_noise(truth: np.ndarray, strength: float, seed: int, pattern: np.ndarray | float = 1.0) -> np.ndarray:
    """White noise of ``strength`` standard deviations of the truth, its variance times a pattern."""
    white = np.random.default_rng(seed).standard_normal(truth.shape)
    return strength * truth.std() * filtered(white, np.sqrt(pattern))


def linear_half(
    truth: np.ndarray, own: np.ndarray, pattern: np.ndarray | float = 1.0, seen: np.ndarray | None = None
) -> LinearHalf:
    """Truth plus noise within Nyquist, with its variance up to a factor; infinite, and the map zero, where not seen."""
    box = len(truth)
    seen = (frequencies(box) < box / 2) & (True if seen is None else seen)
    variance = np.where(seen, np.broadcast_to(pattern, seen.shape), np.inf)
    return LinearHalf(filtered(truth + own, seen).astype(np.float32), variance.astype(np.float32))


def mixture(truth: np.ndarray, own: np.ndarray, cutoff: float, bias: float = 0.5, learnt: float = 0.6) -> np.ndarray:
    """A model's map: the truth low-passed at a shell, a bias that all models share, and part of its half's noise."""
    box, radius = len(truth), frequencies(len(truth))
    low = 1 / (1 + (radius / cutoff) ** 4)
    shared = filtered(noise(box, 77), np.exp(-((radius / cutoff) ** 2)))
    shared *= bias * truth.std() / shared.std()
    return filtered(truth, low) + shared + learnt * filtered(own, low * np.exp(-((radius / (1.2 * cutoff)) ** 2)))
