"""What is done to every image by itself: background and noise level, transform, crop; and what it says of the noise.

Nothing here depends on halves, sign, poses or other images, so what comes out can be kept and used again: with the
``key`` of the optics, which corrects images for aberrations and undoes what was done with their CTF.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosplat.errors import InputError
from cryosplat.fingerprints import fingerprint
from cryosplat.particles import ParticleTable

IMAGES_PER_READ = 256
HALF_PRECISION_MAX = 6.0e4
"""Largest magnitude trusted to float16, whose own limit is 65504."""


@dataclass
class Prepared:
    """Some images, prepared.

    Attributes:
        spectra: (n, D, D//2+1, 2) real and imaginary parts of orthonormal half-spectra of the training box, each image
            with its own background taken off and divided by its own noise level, in half or single precision.
        deviation: (n,) float64, that level: the standard deviation of the corners, in the stack's units.
        fingerprint: (n, 6) float64, what tells copies.
        power: (n, S) float64, radial noise power by shell of the stored box, summed over the shell's coefficients.
    """

    spectra: Tensor
    deviation: np.ndarray
    fingerprint: np.ndarray
    power: np.ndarray


class Preparer:
    """Prepares images of a table.

    Background and noise are those of the corners, outside the circle that touches the image's edges, where a particle
    with any shift has least to say.

    Args:
        table: all particles.
        box: training box in pixels, even, at most the stored one.
        precision: "half" or "single".
        device: where images are prepared.
    """

    def __init__(self, table: ParticleTable, box: int, precision: str, device: torch.device | str = "cpu"):
        self._table, self._box, self._device = table, box, torch.device(device)
        self.dtype = torch.float16 if precision == "half" else torch.float32
        self._corners = corner_mask(table.box).to(self._device)
        self._shells, shell_size = shells_of(table.box)
        self.shells = len(shell_size)

    def read(self, ids: np.ndarray) -> Prepared:
        """Read the images of the particles ``ids`` (n,), and prepare them."""
        return self.prepare(self._table.read(ids), ids)

    def prepare(self, raw: np.ndarray, ids: np.ndarray) -> Prepared:
        """Prepare images (n, D, D), float32, of the particles ``ids`` (n,).

        Raises:
            InputError: a non-finite or constant image, or one too bright for half precision (named).
        """
        table, corners = self._table, self._corners
        images = torch.from_numpy(raw).to(self._device)
        if not bool(torch.isfinite(images.sum())):  # or so large that the sum is not
            table.require_finite(raw, ids)
        if table.optics is not None:
            images = table.optics.restored(images, ids, table.ctf)
        background = images[:, corners]
        deviation = background.double().std(-1)
        if not bool((deviation > 0).all()):
            first = int(ids[int((~(deviation > 0)).nonzero()[0])])
            raise InputError(f"{table.location(first)}: the image is constant outside its inner circle; remove it")
        images = (images - background.mean(-1)[:, None, None]) / deviation.float()[:, None, None]
        noise = torch.fft.rfft2(images * corners, norm="ortho").abs().square().double() / corners.double().mean()
        spectra = torch.fft.rfft2(images, norm="ortho")
        if table.optics is not None:
            spectra = table.optics.corrected(spectra, ids)
        spectra = fourier_crop(spectra, self._box)
        return Prepared(
            self._stored(torch.view_as_real(spectra), ids),
            deviation.cpu().numpy(),
            fingerprint(images).cpu().numpy(),
            self._radial(noise.cpu().numpy()),
        )

    def _radial(self, noise: np.ndarray) -> np.ndarray:
        """Sums (n, S) over shells of (n, D, D//2+1)."""
        shells, count = self._shells.ravel(), self.shells
        return np.stack([np.bincount(shells, one.ravel(), minlength=count) for one in noise]).reshape(-1, count)

    def _stored(self, pairs: Tensor, ids: np.ndarray) -> Tensor:
        if self.dtype == torch.float16:
            largest = pairs.abs().amax((1, 2, 3))
            if bool((largest > HALF_PRECISION_MAX).any()):
                first = int(ids[int((largest > HALF_PRECISION_MAX).nonzero()[0])])
                raise InputError(
                    f"{self._table.location(first)}: a Fourier coefficient is {float(largest.max()):.3g} times the "
                    f"noise, too large for half precision; the image is probably junk: remove it, or set "
                    f"data.precision=single"
                )
        return pairs.to(self.dtype)


def corner_mask(box: int) -> Tensor:
    """True (D, D) outside the circle that touches the image's edges: 21 % of the pixels, background only.

    >>> round(float(corner_mask(128).float().mean()), 2)
    0.22
    """
    offset = torch.arange(box) - box // 2
    return offset[:, None] ** 2 + offset[None, :] ** 2 > (box // 2) ** 2


def fourier_crop(spectra: Tensor, box: int) -> Tensor:
    """Half-spectra (..., D, D//2+1) cut to a smaller even box (..., box, box//2+1).

    The field of view stays, and with it the phases, which refer to its first pixel. The orthonormal scale stays: white
    noise keeps its variance a pixel. The Nyquist lines of the new
    grid, where two frequencies fall together, are set to zero.

    >>> fourier_crop(torch.ones(1, 8, 5), 4).shape
    torch.Size([1, 4, 3])
    """
    size = spectra.shape[-2]
    if box == size:
        return spectra
    half = box // 2
    cropped = torch.cat([spectra[..., :half, : half + 1], spectra[..., size - half :, : half + 1]], dim=-2).clone()
    cropped[..., half, :] = 0
    cropped[..., :, half] = 0
    return cropped


def shells_of(box: int) -> tuple[np.ndarray, np.ndarray]:
    """Shell (D, D//2+1) of every coefficient of a half-spectrum, and the number of stored coefficients in each."""
    ky, kx = np.fft.fftfreq(box) * box, np.fft.rfftfreq(box) * box
    shells = np.rint(np.hypot(ky[:, None], kx[None, :])).astype(np.int64)
    return shells, np.maximum(np.bincount(shells.ravel()), 1)
