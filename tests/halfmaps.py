"""Half maps with a known truth, for tests of FSC and masks."""

import numpy as np
import scipy.fft
import scipy.ndimage


def molecule(box: int, radius: float = 0.28, seed: int = 0) -> np.ndarray:
    """A lump of 3000 atoms that walk at random within ``radius`` (of the box) of the origin: (box, box, box)."""
    rng = np.random.default_rng(seed)
    place, places = np.zeros(3), []
    while len(places) < 3000:
        step = place + rng.normal(0, 0.03 * box, 3)
        if np.linalg.norm(step / [1, 0.8, 0.6]) < radius * box:
            place = step
            places.append(place)
    edges = np.arange(box + 1) - box // 2 - 0.5
    counts, _ = np.histogramdd(np.array(places), (edges, edges, edges))
    return scipy.ndimage.gaussian_filter(counts, 0.8, mode="wrap")


def noise(box: int, seed: int, power: float = 0.0, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """Normal noise of variance 1 whose amplitude grows as frequency to the ``power``, times a Fourier ``weight``."""
    spectrum = scipy.fft.rfftn(np.random.default_rng(seed).standard_normal((box, box, box)))
    spectrum *= np.maximum(frequencies(box), 1) ** power * weight
    volume = scipy.fft.irfftn(spectrum, (box, box, box))
    return volume / volume.std()


def frequencies(box: int) -> np.ndarray:
    """Distance from the origin of the half-spectrum, in Fourier voxels."""
    full, half = np.fft.fftfreq(box, 1 / box), np.fft.rfftfreq(box, 1 / box)
    return np.sqrt(full[:, None, None] ** 2 + full[:, None] ** 2 + half**2)


def halves(truth: np.ndarray, strength: float, power: float = 0.0, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Two maps of a truth with noise of their own; ``strength`` in standard deviations of the truth."""
    scale = strength * truth.std()
    return tuple(truth + scale * noise(len(truth), seed + number, power) for number in (0, 1000))
