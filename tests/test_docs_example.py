"""The worked example of docs/physics.md has the numbers that the program computes."""

import math

import numpy as np
import pytest
import torch
from reader import ROOT, table
from views import holding

from cryosplat.batches import Batch
from cryosplat.conventions import euler_to_rotation, rescaled_pixel_size, shell_to_angstrom
from cryosplat.ctf import RELATIVISTIC_PER_VOLT, WAVELENGTH_NUMERATOR_A, ctf_image
from cryosplat.gaussians import GaussianMixture
from cryosplat.ops import covariances, splat
from cryosplat.reconstruction import Reconstruction


def example() -> dict[str, list[float]]:
    """The quantities of the worked example, computed with the program."""
    box, pixel_size_a, shift = 32, 2.0, torch.tensor([[1 / 32, -1 / 32]], dtype=torch.float64)
    mixture, rotation = one_gaussian(box * pixel_size_a), torch.from_numpy(euler_to_rotation([90.0], [90.0], [0.0]))
    out = mixture.export(0, box, pixel_size_a)
    covariance = covariances(out["quaternions"], out["scales"])[0]
    seen = rotation[0] @ symmetric(covariance) @ rotation[0].T / pixel_size_a**2
    moved = rotation[0] @ out["means"][0]
    model = torch.zeros(1, dtype=torch.long)
    image = mixture.project(rotation, shift * box, model, box, cutoff=8.0)[0]
    cropped = mixture.project(rotation, shift * 16, model, 16, cutoff=8.0)[0]
    volume = mixture.voxelise(box)[0]
    nothing = torch.zeros(1, box, box // 2 + 1, dtype=torch.complex128)
    batch = Batch(*holding(nothing), rotation, shift * box, None, model, np.zeros(1, int))
    reconstruction = Reconstruction(mixture, box, pixel_size_a, cutoff=8.0).double()
    return {
        "covariance xx, yy, zz (A^2)": [float(covariance[entry]) for entry in (0, 3, 5)],
        "R, first row": rotation[0, 0].tolist(),
        "R, second row": rotation[0, 1].tolist(),
        "R times the mean (A)": moved.tolist(),
        "centre in the image x, y (px)": centroid(image),
        "rlnOriginXAngst, rlnOriginYAngst (A)": (shift[0] * box * pixel_size_a).tolist(),
        "projected covariance xx, xy, yy (px^2)": [float(seen[0, 0]), float(seen[0, 1]), float(seen[1, 1])],
        "amplitude on this grid (image units times px^2)": [float(mixture.in_pixels(box)[2])],
        "image at y = 11, x = 12": [float(image[11, 12])],
        "image at y = 11, x = 13": [float(image[11, 13])],
        "image at y = 12, x = 12": [float(image[12, 12])],
        "sum of the image": [float(image.sum())],
        "loss against an image of zeros, no CTF": reconstruction.view_losses(batch)[0].tolist(),
        "map at z = 19, y = 12, x = 22": [float(volume[19, 12, 22])],
        "sum of the map": [float(volume.sum())],
        "centre in the image of 16 px x, y (px)": centroid(cropped),
        "resolution of shell 8 (A)": [shell_to_angstrom(8, box, pixel_size_a)],
        "Nyquist (A)": [shell_to_angstrom(box // 2, box, pixel_size_a)],
        "A/px after cropping to 16 px": [rescaled_pixel_size(pixel_size_a, box, 16)],
        "left out of an image at a cut of 3.5": [math.sqrt(2 * math.erfc(3.5))],
        "left out of an image at a cut of 4.8": [math.sqrt(2 * math.erfc(4.8))],
        "sum over pixels of a Gaussian of 0.5 px, on a pixel's centre and between four": [
            total(0.5, 0),
            total(0.5, 0.5),
        ],
        "the same of 0.3 px": [total(0.3, 0), total(0.3, 0.5)],
        **example_ctf(box, pixel_size_a, torch.fft.rfft2(image, norm="ortho")[3, 4]),
    }


def one_gaussian(side_a: float) -> GaussianMixture:
    """The example's Gaussian as training would hold it."""
    mixture = GaussianMixture(1, 1, "positive", (0.004, 0.1)).double()

    def inverse_softplus(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).expm1().log()

    numbers = [
        torch.tensor([12.0, -8.0, 6.0]) / side_a,
        inverse_softplus([2 / side_a, 4 / side_a, 2 / side_a]),
        torch.tensor([1.0, 0.0, 0.0, 1.0]),
        inverse_softplus([100 / side_a**2]),
    ]
    with torch.no_grad():
        mixture.mixtures[0].copy_(torch.cat(numbers)[None])
    return mixture.requires_grad_(False)


def symmetric(entries: torch.Tensor) -> torch.Tensor:
    xx, xy, xz, yy, yz, zz = entries
    return torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz]).reshape(3, 3)


def centroid(image: torch.Tensor) -> list[float]:
    """Centre of mass x, y in pixels."""
    index = torch.arange(len(image), dtype=image.dtype)
    return [float((image.sum(axis) * index).sum() / image.sum()) for axis in (0, 1)]


def total(scale_px: float, offset_px: float) -> float:
    """Sum over the pixels of a round Gaussian of amplitude 1, off a pixel's centre in x and y."""
    variance = scale_px**2
    mean = torch.tensor([[[offset_px, offset_px, 0.0]]], dtype=torch.float64)
    covariance = torch.tensor([[[variance, 0, 0, variance, 0, variance]]], dtype=torch.float64)
    pose = torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 2, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    return float(splat(mean, covariance, one, *pose, torch.zeros(1, dtype=torch.long), 16, 8.0).sum())


def example_ctf(box: int, pixel_size_a: float, transform: torch.Tensor) -> dict[str, list[float]]:
    u, v, angle, volts = 12000.0, 11000.0, math.radians(30), 300e3
    ctf = ctf_image(torch.tensor([[u, v, angle, 300.0, 2.7, 0.1, 0.0]], dtype=torch.float64), box, pixel_size_a)[0]
    direction = math.atan2(3, 4)
    return {
        "wavelength (A)": [WAVELENGTH_NUMERATOR_A / math.sqrt(volts + RELATIVISTIC_PER_VOLT * volts**2)],
        "CTF at frequency zero": [float(ctf[0, 0])],
        "frequency of kx = 4, ky = 3 (1/A)": [math.hypot(4, 3) / (box * pixel_size_a)],
        "defocus in that direction (A)": [(u + v + (u - v) * math.cos(2 * (direction - angle))) / 2],
        "CTF at kx = 4, ky = 3": [float(ctf[3, 4])],
        "transform of the image at kx = 4, ky = 3, real and imaginary part": [
            float(transform.real),
            float(transform.imag),
        ],
        "the same times the CTF": [float(ctf[3, 4] * transform.real), float(ctf[3, 4] * transform.imag)],
    }


def test_the_worked_example_has_the_numbers_that_the_program_computes():
    said = {row[0]: row[1].split(", ") for row in table(ROOT / "docs/physics.md", "## Worked example")}
    computed = example()
    assert set(said) == set(computed)
    for quantity, values in said.items():
        for text, value in zip(values, computed[quantity], strict=True):
            last_digit = 10.0 ** -len(text.partition(".")[2])
            assert float(text) == pytest.approx(value, rel=0, abs=0.501 * last_digit), quantity
