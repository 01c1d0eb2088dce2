"""Images without the signal, or without its fine part: what an honest run can find nothing in."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosplat.errors import InputError


def null_shell(null_shell_a: float, box: int, pixel_size_a: float) -> float:
    """The first shell, not rounded, whose phases are random: box x A/px / ``null_shell_a``.

    Raises:
        InputError: it is beyond Nyquist, or nothing would be left.
    """
    shell = box * pixel_size_a / null_shell_a
    if not 1 < shell <= box // 2:
        raise InputError(
            f"data.null_shell_a={null_shell_a:g}: expected a resolution between {2 * pixel_size_a:.4g} A (Nyquist of "
            f"the training images) and {box * pixel_size_a:.4g} A (the box)"
        )
    return shell


def white_spectra(names: np.ndarray, box: int, seed: int) -> Tensor:
    """Half-spectra (n, D, D//2+1) complex64 of white noise images of unit variance, one for each name.

    Equal names give equal noise: copies of an image stay copies, so that halves that share images are found out. As
    transforms of real images they have Friedel symmetry, and so have their phases.

    Args:
        names: (n,) integers, 0 or more.
    """
    images = np.stack(
        [
            np.random.default_rng([seed, 0x9011, name]).standard_normal((box, box), dtype=np.float32)
            for name in names.tolist()
        ]
    )
    return torch.fft.rfft2(torch.from_numpy(images), norm="ortho")


@dataclass(frozen=True)
class Null:
    """What takes the signal out of images, always in the same way.

    Attributes:
        same: (N,) for every particle the first one whose image it shares.
        half: (N,) 0 or 1.
        level: (2, D, D//2+1) noise amplitude of either half.
        beyond: (D, D//2+1) where phases are random; None: the images are noise alone.
        seed: of what is drawn.
    """

    same: np.ndarray
    half: np.ndarray
    level: Tensor
    beyond: Tensor | None
    seed: int

    def change(self, pairs: Tensor, ids: np.ndarray) -> None:
        """Change held half-spectra (n, D, D//2+1, 2) of particles ``ids`` (n,), in place."""
        if not len(ids):
            return
        white = white_spectra(self.same[ids], pairs.shape[1], self.seed)
        if self.beyond is None:
            spectra = white * self.level[self.half[ids]]
        else:
            spectra = random_phases(torch.view_as_complex(pairs.float().cpu()), white, self.beyond)
        pairs.copy_(torch.view_as_real(spectra))


def random_phases(spectra: Tensor, white: Tensor, beyond: Tensor) -> Tensor:
    """Half-spectra (n, D, D//2+1) with the phases of ``white`` where ``beyond`` (D, D//2+1); amplitudes stay.

    Done to the images and not to the map, this shows what a whole reconstruction makes of noise: Chen et al.,
    Ultramicroscopy 135 (2013) 24.
    """
    turned = spectra.abs() * torch.polar(torch.ones_like(white.real), white.angle())
    return torch.where(beyond, turned, spectra)
