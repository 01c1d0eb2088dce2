"""Which images are the same, whatever they are called: a few numbers of each tell."""

import functools

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from torch import Tensor

NUMBERS = 6
"""Of each image. Of 10^6 images of independent noise a pair agrees in all six by chance once in some 10^8 data sets."""

TOLERANCE = 1e-3
"""Largest difference between copies, of numbers that vary by 1 between images. Rounding of single precision moves them
by 1e-6, storing a copy in half precision or with other grey levels by some 1e-4."""


def fingerprint(images: Tensor) -> Tensor:
    """Numbers (n, 6) of normalised images (n, D, D): their products with fixed patterns of +1 and -1, divided by D.

    White noise of unit variance has numbers of unit variance, independent between images. Since the images are
    normalised first, a copy with other grey levels has the same numbers; one that was shifted or filtered does not.
    """
    box = images.shape[-1]
    return torch.nn.functional.linear(images.reshape(len(images), -1).float(), _patterns(box, images.device)) / box


@functools.lru_cache(maxsize=2)
def _patterns(box: int, device: torch.device) -> Tensor:
    """(6, D^2) of +1 and -1."""
    patterns = np.random.default_rng(0xF1).integers(0, 2, (box * box, NUMBERS)) * 2.0 - 1.0
    return torch.from_numpy(np.ascontiguousarray(patterns.T)).float().to(device)


def same_images(numbers: np.ndarray) -> np.ndarray:
    """For every image (N,) the first one that it is a copy of, itself if there is none, from fingerprints (N, 6).

    >>> numbers = np.arange(24.0).reshape(4, 6)
    >>> same_images(numbers[[0, 1, 0, 3]])
    array([0, 1, 0, 3])
    """
    count = len(numbers)
    pairs = cKDTree(numbers).query_pairs(TOLERANCE, p=np.inf, output_type="ndarray")
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, first, image = np.unique(connected_components(links, directed=False)[1], return_index=True, return_inverse=True)
    return first[image]


def images_in_both_halves(same: np.ndarray, half: np.ndarray) -> int:
    """How many different images have copies in half a and in half b, from ``same_images`` (N,) and halves (N,)."""
    return len(np.intersect1d(same[half == 0], same[half == 1]))
