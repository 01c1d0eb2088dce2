"""The sign of the data, found from the images: whether particles are white on dark or dark on white.

A molecule is denser than what surrounds it, so images of it correlate with those of a round body of density at its
centre, whatever the poses: balls and shells of several sizes are tried, at low resolution, through each image's CTF and
shift. Of the images' linear map this is its density in the centre against that round it (the sum over images of the
products below is the product of their back-projection with the body), but it needs no map, so that a few thousand
images tell in a second.

For image X_i, in units of its noise, and what is expected of it for a body, E_i, both Fourier coefficients:
p_i = <E_i, X_i> / noise. The body whose sum of p_i explains most, (sum p_i)^2 / sum <E_i, E_i> / noise, tells the sign
by that sum's own. How sure it is, in standard errors: by the noise, sum p_i / sqrt(sum <E_i, E_i> / noise), and by what
the p_i vary, sum p_i / sqrt(sum p_i^2); the smaller counts, since the first believes that noise is white within a shell
and the second that no image outweighs the others.
"""

import dataclasses
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cryosplat import distributed
from cryosplat.ctf import ctf_image
from cryosplat.dataset import ParticleDataset, half_plane_weights, shells_of_half_plane
from cryosplat.errors import InputError
from cryosplat.imageprep import fourier_crop
from cryosplat.particles import ParticleTable

logger = logging.getLogger(__name__)

CERTAINTY = 6.0
"""Standard errors at which the images are believed."""

MOST_IMAGES = 4096
"""Images that are asked, of either half alike; all cost as long as reading some of them does."""

IMAGES_AT_A_TIME = 256

CROPPED_BOX = 32
"""px; beyond shell 16 the bodies below have no signal left (4e-3 of the amplitude of the narrowest at 0)."""

BODIES = (
    *((0.0, width) for width in (0.05, 0.075, 0.11, 0.15)),
    *((radius, 0.05) for radius in (0.15, 0.2, 0.25, 0.3, 0.35)),
)
"""Radius of a shell (0: a ball) and standard deviation of its Gaussian profile, fractions of the box. Shells are for
particles with nothing in the middle, as capsids."""


@dataclass(frozen=True)
class Sign:
    """What is known of the sign of a run's data.

    Attributes:
        invert: true for particles white on dark, as ``data.invert`` has it: what the run uses.
        certainty: how sure the images are that they are white on dark, in standard errors; negative: dark on white.
        words: the decision in a sentence.
    """

    invert: bool
    certainty: float
    words: str

    def state(self) -> dict:
        """What a resumed run needs of it; plain values."""
        return dataclasses.asdict(self)


def body_spectra(box: int, device: torch.device | str = "cpu") -> Tensor:
    """Projections of the bodies as half-spectra (bodies, box, box//2+1), real, centred on the origin, 1 at zero.

    The transform of a thin shell of radius r is sin(2 pi k r) / (2 pi k r); its section is that of any projection.
    """
    ky = torch.fft.fftfreq(box, 1 / box, device=device)
    radius = torch.hypot(ky[:, None], torch.arange(box // 2 + 1, device=device)[None])
    spectra = [torch.sinc(2 * radius * r) * torch.exp(-2 * (torch.pi * width * radius) ** 2) for r, width in BODIES]
    return torch.stack(spectra)


def sums_of(dataset: ParticleDataset, ids: np.ndarray, noise: np.ndarray) -> Tensor:
    """Sums over images of p, of the square of p, and of <E, E> / noise: float64 (3, bodies), on the CPU.

    Args:
        dataset: normalised, with any sign.
        ids: (n,) which of its particles.
        noise: (2, S) radial noise power of either half, as ``dataset.radial_noise`` gives it.
    """
    box, device = min(CROPPED_BOX, dataset.box), dataset.device
    pixel_size_a = dataset.pixel_size_a * dataset.box / box
    shells = np.minimum(shells_of_half_plane(box), noise.shape[1] - 1)
    inside = half_plane_weights(box) * torch.from_numpy(shells < box // 2)
    weights = (inside / torch.from_numpy(noise).clamp(min=1e-3)[:, shells]).float().to(device)
    bodies, sums = body_spectra(box, device), torch.zeros(3, len(BODIES), dtype=torch.float64)
    ky = torch.fft.fftfreq(box, 1 / box, device=device)
    kx = torch.arange(box // 2 + 1, device=device)
    to_centre = (1 - 2 * ((ky[:, None] + kx).abs() % 2)).float()  # the origin is pixel n // 2, the phases' the first
    for batch in dataset.batches(np.split(ids, range(IMAGES_AT_A_TIME, len(ids), IMAGES_AT_A_TIME))):
        # An image is centred by moving it by its shift, see conventions.
        turns = (ky[:, None] * batch.shifts[:, 1, None, None] + kx * batch.shifts[:, 0, None, None]) / dataset.box
        centred = fourier_crop(batch.images, box) * torch.polar(to_centre.expand_as(turns), -2 * torch.pi * turns)
        ctf = 1.0 if batch.ctf is None else ctf_image(batch.ctf, box, pixel_size_a)
        weight = weights[batch.half]
        products = torch.einsum("bij,nij->bn", centred.real * ctf * weight, bodies).double()
        powers = torch.einsum("bij,nij->bn", weight * ctf * ctf, bodies.square()).double()
        sums += torch.stack([products.sum(0), products.square().sum(0), powers.sum(0)]).cpu()
    return sums


def certainty_of(sums: Tensor) -> float:
    """How sure images are that their density is positive, in standard errors, from ``sums_of`` them all.

    >>> certainty_of(torch.tensor([[-3.0, 4.0], [1.0, 2.0], [9.0, 4.0]], dtype=torch.float64))
    2.0
    """
    products, squares, powers = sums.double()
    by_noise = products / powers.sqrt().clamp(min=1e-300)
    best = int(by_noise.abs().argmax())
    by_images = float(products[best] / squares[best].sqrt().clamp(min=1e-300))
    return min(float(by_noise[best]), by_images, key=abs)


def choose_images(half: np.ndarray, usable: np.ndarray, seed: int) -> np.ndarray:
    """Some particles of either half, ascending: all, or ``MOST_IMAGES``; the same for any number of ranks.

    Args:
        half: (N,) 0 or 1.
        usable: (N,) bool.
        seed: of the choice.
    """
    random = np.random.default_rng([seed, 0x5167])
    halves = [np.flatnonzero(usable & (half == h)) for h in (0, 1)]
    return np.sort(np.concatenate([random.permutation(ids)[: MOST_IMAGES // 2] for ids in halves]))


def find_sign(
    dataset: ParticleDataset,
    table: ParticleTable,
    noise: np.ndarray,
    world: distributed.World,
    seed: int,
    check: bool,
) -> Sign:
    """Find the sign of the data and give it to the dataset; a collective, the same on all ranks.

    Args:
        dataset: this rank's, normalised with the sign of ``table``.
        table: all particles, and what the input says of their sign.
        noise: (2, S) radial noise power of either half.
        seed: of the choice of images.
        check: whether a sign that was set and is clearly the other one is an error.

    Raises:
        InputError: it is, on all ranks.
    """
    chosen = choose_images(table.half, ~table.held_out, seed)
    mine = chosen[dataset.holds(chosen)]
    sums = distributed.together(lambda: sums_of(dataset, mine, noise), world)
    certainty = certainty_of(distributed.sum_over_ranks(sums, world)) * (1 if dataset.invert else -1)
    try:
        sign = decide(certainty, table, check)
    except InputError as error:
        raise distributed.common_error(str(error), world) from None
    if world.is_main:
        contradicted = table.sign_origin and abs(certainty) >= CERTAINTY and table.invert != (certainty > 0)
        logger.log(logging.WARNING if contradicted else logging.INFO, "%s", sign.words)
    dataset.set_sign(sign.invert)
    return sign


def decide(certainty: float, table: ParticleTable, check: bool = True) -> Sign:
    """What follows from how sure the images are, in standard errors (positive: white on dark), and from the input.

    Raises:
        InputError: ``data.invert`` is set and clearly wrong, and ``check``.
    """
    found, sure = certainty > 0, abs(certainty) >= CERTAINTY
    seen = f"the particles are {_look(found)} ({certainty:+.1f} standard errors)"
    flag = f"data.invert={_yaml(found)}"
    if not sure:
        origin = table.sign_origin or "cryoDRGN's default"
        words = (
            f"the images do not tell the sign of the data ({certainty:+.1f} standard errors, {CERTAINTY:g} would): they"
            f" are taken for {_look(table.invert)}, by {origin}; data.invert={_yaml(not table.invert)} is the other"
        )
        return Sign(table.invert, certainty, words)
    if table.sign_origin == "data.invert" and table.invert != found:
        text = f"the images look inverted: {seen}, but data.invert={_yaml(table.invert)} is set"
        if check:
            raise InputError(
                f"{text}. Leave data.invert out, and the sign is found from the images, or set {flag}; "
                "data.check_sign=false takes them as they are said to be, if you know better"
            )
        return Sign(table.invert, certainty, f"{text}; data.check_sign=false: they are taken as that says")
    if table.sign_origin and table.invert != found:
        return Sign(found, certainty, f"{seen}: {flag}, although {table.sign_origin} says the opposite")
    return Sign(found, certainty, f"{seen}: {flag}")


def _look(invert: bool) -> str:
    return "white on dark" if invert else "dark on white"


def _yaml(value: bool) -> str:
    return str(value).lower()
