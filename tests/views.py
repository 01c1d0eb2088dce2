"""Images of a map by exact sums, with poses, CTF and noise, in place of a ParticleDataset that would read them."""

from collections.abc import Iterator

import finufft
import numpy as np
import torch
from scipy.spatial.transform import Rotation

from cryosplat.backprojection import LinearHalf, back_project, linear_half
from cryosplat.batches import Batch
from cryosplat.ctf import ctf_image
from cryosplat.distributed import World

WORLD = World(0, 1, 0, 1, torch.device("cpu"), "none", "single", 1)
PIXEL_SIZE_A = 3.0


class Views:
    """What ``back_project`` asks of a dataset. Particles are of half a and half b in turn.

    Args:
        truth: (D, D, D).
        rotations: (V, 3, 3).
        shifts: (V, 2) in pixels; None: none.
        ctf: (V, 7) as ``ctf_image`` takes them; None: no CTF.
        noise: standard deviation of a pixel's white noise.
        seed: of that noise.
    """

    def __init__(self, truth, rotations, shifts=None, ctf=None, noise=0.0, seed=0):
        self.box, self.pixel_size_a, self.reach = len(truth), PIXEL_SIZE_A, 1.0
        shifts = np.zeros((len(rotations), 2)) if shifts is None else shifts
        self.rotations, self.shifts = (torch.from_numpy(poses).float() for poses in (rotations, shifts))
        self.ctf = None if ctf is None else torch.from_numpy(ctf).float()
        self.half = torch.arange(len(rotations)) % 2
        # As they are rounded: the images are to be exact.
        self.images = torch.from_numpy(spectra(truth, self.rotations.double().numpy(), self.shifts.double().numpy()))
        if ctf is not None:
            self.images *= ctf_image(self.ctf.double(), self.box, PIXEL_SIZE_A)
        if noise:
            white = np.random.default_rng(seed).normal(0, noise, (len(rotations), self.box, self.box))
            self.images += torch.from_numpy(np.fft.rfft2(white, norm="ortho"))
        self.images = self.images.to(torch.complex64)

    def batches(self, order: list[np.ndarray]) -> Iterator[Batch]:
        for ids in order:
            ctf = None if self.ctf is None else self.ctf[ids]
            poses = self.rotations[ids], self.shifts[ids]
            yield Batch(*holding(self.images[ids]), *poses, ctf, self.half[ids], ids)

    def sums(self, symmetry: np.ndarray | None = None, halves: bool = True, world: World = WORLD, ids=None):
        ids = np.arange(len(self.images)) if ids is None else ids
        return back_project(self, ids, np.ones((2, self.box // 2 + 1)), world, symmetry, halves)

    def halves(self, symmetry: np.ndarray | None = None) -> tuple[LinearHalf, ...]:
        return tuple(linear_half(sums, self.box, symmetry) for sums in self.sums(symmetry))

    def map(self) -> LinearHalf:
        """Of all views together."""
        return linear_half(self.sums(halves=False)[0], self.box)


def holding(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``stored``, ``rows`` and ``gain`` of a batch with these half-spectra (B, D, D//2+1)."""
    return torch.view_as_real(images), torch.arange(len(images)), torch.ones(len(images), dtype=images.real.dtype)


def spectra(truth: np.ndarray, rotations: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Orthonormal half-spectra (V, D, D//2+1) of projections, by a non-uniform transform good to 1e-9."""
    box = len(truth)
    ky, kx = np.meshgrid(np.fft.fftfreq(box, 1 / box), np.fft.rfftfreq(box, 1 / box), indexing="ij")
    points = (
        2 * np.pi / box * (kx[..., None] * rotations[:, None, None, 0] + ky[..., None] * rotations[:, None, None, 1])
    )
    x, y, z = (np.ascontiguousarray(along.ravel()) for along in np.moveaxis(points, -1, 0))
    result = finufft.nufft3d2(z, y, x, truth.astype(np.complex128), eps=1e-9, isign=-1).reshape(-1, *kx.shape) / box
    origin = box // 2 - shifts[:, :, None, None]
    return result * np.exp(-2j * np.pi / box * (kx * origin[:, 0] + ky * origin[:, 1]))


def even_views(count: int, seed: int = 0) -> np.ndarray:
    return Rotation.random(count, random_state=seed).as_matrix()


def tilted_views(count: int, largest: float, seed: int = 0) -> np.ndarray:
    """Viewing directions within ``largest`` degrees of z."""
    random = np.random.default_rng(seed)
    tilt = np.degrees(np.arccos(random.uniform(np.cos(np.radians(largest)), 1, count)))
    angles = np.stack([random.uniform(0, 360, count), tilt, random.uniform(0, 360, count)], 1)
    return Rotation.from_euler("zyz", angles, degrees=True).as_matrix()


def random_shifts(count: int, box: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, box / 25, (count, 2))


def random_ctf(count: int, seed: int = 0) -> np.ndarray:
    """300 kV, underfocus 0.8 to 2 um with some astigmatism."""
    random = np.random.default_rng(seed)
    u = random.uniform(8000, 20000, count)
    rest = np.tile([300.0, 2.7, 0.1, 0.0], (count, 1))
    return np.column_stack([u, u - random.uniform(0, 800, count), random.uniform(0, np.pi, count), rest])
