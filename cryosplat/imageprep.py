"""What is done to every image by itself: background and noise level, transform, crop; and what it says of the noise.

Nothing here depends on halves, sign, poses or other images, so what comes out can be kept and used again: with the
``digest`` of the optics, which corrects images for aberrations and undoes what was done with their CTF.
"""

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosplat.errors import InputError
from cryosplat.fingerprints import NUMBERS, fingerprint
from cryosplat.particles import ParticleTable

IMAGES_PER_READ = 256

PREPARATION = 1
"""Number of the way images are prepared. What was kept of another is not used: raise it when anything here changes."""

IMAGES_AT_ONCE = 32
"""Prepared at a time on a CPU, so that a core's own cache holds them from one operation to the next: five times as fast
as 1024 of 128 px (benchmarks/data.md)."""

LEAST_DEVIATION = 1e-6
"""Standard deviation of the corners, over their mean, below which they are constant but for rounding."""

HALF_PRECISION_MAX = 6.0e4
"""Largest magnitude trusted to float16, whose own limit is 65504."""

_CONSTANT = "the image is constant outside its inner circle; remove it"


@dataclass
class Prepared:
    """Some images, prepared.

    Attributes:
        spectra: (n, D, D//2+1, 2) real and imaginary parts of orthonormal half-spectra of the training box, each image
            with its own background taken off and divided by its own noise level, in half or single precision.
        deviation: (n,) float64, that level: the standard deviation of the corners, in the stack's units.
        fingerprint: (n, 6) float64, what tells copies.
        power: (n, S) float32, radial noise power by shell of the stored box, summed over the shell's coefficients.
    """

    spectra: Tensor
    deviation: np.ndarray
    fingerprint: np.ndarray
    power: np.ndarray

    def part(self, places: slice) -> "Prepared":
        """Some of them, neighbours; what is written there is written here."""
        return Prepared(*(of_all[places] for of_all in (self.spectra, self.deviation, self.fingerprint, self.power)))


class _Workspace:
    """Arrays that images are prepared in. Those of a thread are used again: to be given memory and to give it back cost
    as much as the transforms did, in page faults (benchmarks/data.md)."""

    def __init__(self, count: int, box: int, corners: int, device: torch.device):
        half = (count, box, box // 2 + 1)
        self.raw = np.empty((count, box, box), np.float32) if device.type == "cpu" else None
        self.background = torch.empty(count, corners, device=device)
        self.images, self.masked = torch.empty(2, count, box, box, device=device)
        self.spectra = torch.empty(half, dtype=torch.complex64, device=device)
        self.numbers = torch.empty(2 * self.spectra.numel(), device=device)

    def part(self, count: int) -> "_Workspace":
        """The first ``count`` of each."""
        if count == len(self.images):
            return self
        part = object.__new__(_Workspace)
        part.__dict__ = {name: array[:count] for name, array in self.__dict__.items()} | {"numbers": self.numbers}
        return part


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
        self._table, self._box, self.device = table, box, torch.device(device)
        self.dtype = torch.float16 if precision == "half" else torch.float32
        self._corners = corner_mask(table.box).float().to(self.device)
        self._at_corners = self._corners.flatten().nonzero()[:, 0]
        shells, shell_size = shells_of(table.box)
        self._shells, self.shells = torch.from_numpy(shells.ravel()).to(self.device), len(shell_size)
        self._of_thread = threading.local()

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def key(self) -> dict[str, int | str]:
        """All that prepared images depend on beside their pixels."""
        optics = self._table.optics
        corrected = "" if optics is None else optics.digest(self._table.ctf)
        return {"preparation": PREPARATION, "box": self._box, "precision": str(self.dtype), "optics": corrected}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, D//2+1, 2) of an image, prepared."""
        return self._box, self._box // 2 + 1, 2

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Raw pixels, float32 (n, D, D), of the particles ``ids`` (n,)."""
        return self._table.read(ids)

    def read_and_prepare(self, ids: np.ndarray) -> Prepared:
        """Both, one after the other."""
        if not self.on_cpu:
            return self.prepare(self.read(ids), ids)
        made = self._unmade(len(ids))
        for start in range(0, len(ids), IMAGES_AT_ONCE):
            part = slice(start, start + IMAGES_AT_ONCE)
            raw = self._workspace(len(ids[part])).raw
            self._prepare(self._table.read(ids[part], raw), ids[part], made.part(part))
        return made

    def prepare(self, raw: np.ndarray, ids: np.ndarray) -> Prepared:
        """Prepare images (n, D, D), float32, of the particles ``ids`` (n,).

        Raises:
            InputError: a non-finite or constant image, or one too bright for half precision (named).
        """
        made = self._unmade(len(ids))
        at_once = IMAGES_AT_ONCE if self.on_cpu else len(ids)
        for start in range(0, len(ids), at_once):
            part = slice(start, start + at_once)
            self._prepare(raw[part], ids[part], made.part(part))
        return made

    def _unmade(self, count: int) -> Prepared:
        return Prepared(
            torch.empty(count, *self.shape, dtype=self.dtype, device=self.device),
            np.empty(count),
            np.empty((count, NUMBERS)),
            np.empty((count, self.shells), dtype=np.float32),
        )

    def _workspace(self, count: int) -> "_Workspace":
        """Room for ``count`` images; on a CPU the same for every call of a thread."""
        if not self.on_cpu:
            return _Workspace(count, self._table.box, len(self._at_corners), self.device)
        kept = getattr(self._of_thread, "workspace", None)
        if kept is None:
            kept = _Workspace(IMAGES_AT_ONCE, self._table.box, len(self._at_corners), self.device)
            self._of_thread.workspace = kept
        return kept.part(count)

    def _prepare(self, raw: np.ndarray, ids: np.ndarray, made: Prepared) -> None:
        work = self._workspace(len(ids))
        images = torch.from_numpy(raw).to(self.device)
        if not bool(torch.isfinite(images.sum())):  # or so large that the sum is not
            self._table.require_finite(raw, ids)
        optics = self._table.optics
        if optics is not None:
            images = optics.restored(images, ids, self._table.ctf)
        background = torch.index_select(images.flatten(1), 1, self._at_corners, out=work.background)
        mean = background.mean(-1)
        deviation = torch.linalg.vector_norm(background.sub_(mean[:, None]), dim=-1).double()
        deviation /= (background.shape[1] - 1) ** 0.5
        self._require(deviation > LEAST_DEVIATION * mean.abs(), ids, _CONSTANT)
        # The noise level divides what comes out: fewer numbers, and it commutes with all that is done here.
        images, gain = torch.sub(images, mean[:, None, None], out=work.images), 1 / deviation
        power = self._noise_power(images, work)
        spectra = torch.fft.rfft2(images, norm="ortho", out=work.spectra)
        if optics is not None:
            spectra = optics.corrected(spectra, ids)
        spectra = torch.view_as_real(fourier_crop(spectra, self._box)).mul_(gain.float()[:, None, None, None])
        self._require_range(spectra, ids, work)
        made.spectra.copy_(spectra)
        made.deviation[:] = deviation.cpu().numpy()
        made.fingerprint[:] = (fingerprint(images) * gain[:, None]).cpu().numpy()
        made.power[:] = (power * (gain.square() / self._corners.double().mean())[:, None]).cpu().numpy()

    def _noise_power(self, images: Tensor, work: "_Workspace") -> Tensor:
        """Power (n, S), summed over shells, of the images' corners alone."""
        masked = torch.mul(images, self._corners, out=work.masked)
        noise = torch.view_as_real(torch.fft.rfft2(masked, norm="ortho", out=work.spectra))
        power = work.numbers[: noise.numel() // 2].view(noise.shape[:-1])
        power = torch.square(noise[..., 0], out=power).addcmul_(noise[..., 1], noise[..., 1]).flatten(1)
        return power.new_zeros(len(power), self.shells).index_add_(1, self._shells, power)

    def _require(self, good: Tensor, ids: np.ndarray, otherwise: str) -> None:
        if not bool(good.all()):
            first = int(ids[int((~good).nonzero()[0])])
            raise InputError(f"{self._table.location(first)}: {otherwise}")

    def _require_range(self, pairs: Tensor, ids: np.ndarray, work: "_Workspace") -> None:
        if self.dtype != torch.float16:
            return
        largest = torch.abs(pairs, out=work.numbers[: pairs.numel()].view(pairs.shape)).amax((1, 2, 3))
        self._require(
            largest <= HALF_PRECISION_MAX,
            ids,
            f"a Fourier coefficient is {float(largest.max()):.3g} times the noise, too large for half precision; the "
            "image is probably junk: remove it, or set data.precision=single",
        )


def training_box(wanted: int | None, table: ParticleTable) -> int:
    """``data.box``, or the stored one where that is not set.

    Raises:
        InputError: it is larger than the images.
    """
    if wanted is not None and wanted > table.box:
        raise InputError(f"data.box={wanted}: larger than the images, which are {table.box} px; leave it out")
    return wanted or table.box


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
