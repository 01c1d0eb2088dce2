"""The likelihood of all images as a quadratic form of the map, against the images themselves one by one."""

import numpy as np
import pytest
import torch
from halfmaps import molecule
from views import PIXEL_SIZE_A, WORLD, Views, even_views, random_ctf, random_shifts, spectra

from cryosplat.backprojection import back_project, linear_half
from cryosplat.ctf import ctf_image
from cryosplat.quadratic import MARGIN, NormalEquations, QuadraticForm, fast_size

BOX, VIEWS = 32, 200
TRUTH = molecule(BOX, 0.18)
RADIAL = np.stack([1.5 - 0.05 * np.arange(BOX // 2 + 1), 0.6 + 0.04 * np.arange(BOX // 2 + 1)])
"""Noise power (2, S) of either half: coloured, and another for each."""


def views_of(truth, ctf, seed=0):
    return Views(
        truth, even_views(VIEWS, seed), random_shifts(VIEWS, BOX, seed), random_ctf(VIEWS, seed) if ctf else None,
        noise=5 * TRUTH.std(), seed=seed,
    )  # fmt: skip


def equations_of(views):
    """Of both halves."""
    sums = back_project(views, np.arange(VIEWS), RADIAL, WORLD)
    return [linear_half(of_half, BOX).equations for of_half in sums]


def image_by_image(views, volume):
    """Minus the log likelihood of the images of either half, less that of an empty map, from their pixels' transforms.

    A coefficient and its mate are one; they are taken up to Nyquist, as insertion does. Frequency zero, its own mate,
    counts like any other pair: twice what it should, of which a shift of grey levels alone would notice.
    """
    expected = spectra(volume, views.rotations.double().numpy(), views.shifts.double().numpy())
    if views.ctf is not None:
        expected = expected * ctf_image(views.ctf.double(), BOX, PIXEL_SIZE_A).numpy()
    images = views.images.numpy().astype(np.complex128)
    ky, kx = np.fft.fftfreq(BOX, 1 / BOX)[:, None], np.fft.rfftfreq(BOX, 1 / BOX)
    once = (kx**2 + ky**2 < (BOX / 2) ** 2) & ((kx > 0) | (ky >= 0))
    shell = np.minimum(np.rint(np.hypot(kx, ky)).astype(int), BOX // 2)
    half = views.half.numpy()
    terms = (np.abs(images - expected) ** 2 - np.abs(images) ** 2) * once / RADIAL[half][:, shell]
    return [terms[half == h].sum() for h in (0, 1)]


@pytest.fixture(scope="module")
def views():
    return {ctf: views_of(TRUTH, ctf) for ctf in (False, True)}


@pytest.fixture(scope="module")
def equations(views):
    return {ctf: equations_of(of) for ctf, of in views.items()}


def value(form, volume):
    return float(form(torch.as_tensor(np.ascontiguousarray(volume), dtype=form.data.dtype))[0])


@pytest.mark.parametrize("ctf", [False, True], ids=["plain", "ctf"])
@pytest.mark.parametrize("what", ["the truth", "another molecule", "the truth at a tenth", "the truth inverted"])
def test_the_form_is_minus_the_log_likelihood_of_the_images(views, equations, what, ctf):
    """To 2e-3 of the terms it is made of: what trilinear insertion loses (6e-4 measured)."""
    volume = {
        "the truth": TRUTH, "another molecule": 0.7 * molecule(BOX, 0.18, 3),
        "the truth at a tenth": 0.1 * TRUTH, "the truth inverted": -TRUTH,
    }[what]  # fmt: skip
    for of_half, expected in zip(equations[ctf], image_by_image(views[ctf], volume), strict=True):
        assert value(of_half.within(BOX), volume) == pytest.approx(expected, rel=2e-3)


def test_both_halves_together_are_their_sum(equations):
    a, b = equations[True]
    total = (a + b).within(BOX)
    other = molecule(BOX, 0.18, 3)
    assert value(total, other) == pytest.approx(value(a.within(BOX), other) + value(b.within(BOX), other), rel=1e-6)
    views = views_of(TRUTH, True)
    views.half = torch.zeros(VIEWS, dtype=torch.int64)
    one = linear_half(back_project(views, np.arange(VIEWS), np.ones((2, BOX // 2 + 1)), WORLD, halves=False)[0], BOX)
    views.half = torch.arange(VIEWS) % 2
    two = [linear_half(s, BOX) for s in back_project(views, np.arange(VIEWS), np.ones((2, BOX // 2 + 1)), WORLD)]
    summed = two[0].equations + two[1].equations
    torch.testing.assert_close(summed.kernel, one.equations.kernel, rtol=0, atol=1e-5 * float(summed.kernel.max()))
    torch.testing.assert_close(summed.data, one.equations.data, rtol=0, atol=1e-5 * float(summed.data.abs().max()))


def double(form):
    return QuadraticForm(form.transfer.double(), form.data.double())


def test_the_gradient_is_that_of_the_value(equations):
    """Of a quadratic form, the central difference along a direction is exact, whatever the step."""
    form = double(equations[True][0].within(24))
    generator = torch.Generator().manual_seed(0)
    volume, *directions = torch.randn(4, 24, 24, 24, generator=generator, dtype=torch.float64)
    gradient = form(volume)[1]
    for along in directions:
        difference = (form(volume + along)[0] - form(volume - along)[0]) / 2
        assert float(difference) == pytest.approx(float((gradient * along).sum()), rel=1e-9)
    voxel = torch.zeros_like(volume)
    voxel[3, 17, 9] = 1.0
    difference = (form(volume + voxel)[0] - form(volume - voxel)[0]) / 2
    assert float(difference) == pytest.approx(float(gradient[3, 17, 9]), rel=1e-6)


def test_the_form_is_positive_definite_and_least_near_the_truth(equations):
    form = double((equations[True][0] + equations[True][1]).within(BOX))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        volume = torch.randn(BOX, BOX, BOX, generator=generator, dtype=torch.float64)
        assert float((volume * form.convolved(volume)).sum()) > 0
    best = value(form, TRUTH)
    for wrong in (0.8 * TRUTH, 1.2 * TRUTH, np.roll(TRUTH, 1, 0), TRUTH[::-1], TRUTH.transpose(2, 1, 0)):
        assert value(form, wrong) > best


def cropped(volume, side):
    first = len(volume) // 2 - side // 2
    middle = (slice(first, first + side),) * 3
    return volume[middle]


@pytest.mark.parametrize("box", [32, 33])
def test_a_smaller_box_gives_the_same_for_a_kernel_of_short_reach(box):
    """Nothing is wrapped round then, so only the places of lags and voxels can be wrong: equal to rounding."""
    side, full = 14, fast_size(MARGIN * box)
    lag = torch.fft.fftfreq(full, 1 / full)
    along = torch.where(lag.abs() <= 2, torch.exp(-(lag**2) / 4), 0.0)
    kernel = along[:, None, None] * along[:, None] * along
    equations = NormalEquations(kernel, torch.randn(box, box, box, generator=torch.Generator().manual_seed(0)))
    first = box // 2 - side // 2
    small = torch.randn(side - 2, side - 2, side - 2, generator=torch.Generator().manual_seed(1))
    volume = torch.zeros(side, side, side)
    volume[1:-1, 1:-1, 1:-1] = small
    whole = torch.zeros(2 * (box // 2), 2 * (box // 2), 2 * (box // 2))
    whole[(slice(first, first + side),) * 3] = volume
    form, of_all = equations.within(side), equations.within(2 * (box // 2))
    assert form.side == side and form.transfer.shape[0] < of_all.transfer.shape[0]
    assert value(form, volume) == pytest.approx(value(of_all, whole), rel=1e-5)
    torch.testing.assert_close(form(volume)[1], cropped(of_all(whole)[1], side), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ctf", [False, True], ids=["plain", "ctf"])
def test_a_smaller_box_gives_nearly_the_same_for_the_kernel_of_images(equations, ctf):
    """The longest lags are wrapped round: 1 % of the value at most."""
    side = 20
    volume = np.zeros_like(TRUTH)
    first = BOX // 2 - side // 2
    middle = (slice(first, first + side),) * 3
    volume[middle] = TRUTH[middle]
    of_half = equations[ctf][0]
    found, expected = value(of_half.within(side), volume[middle]), value(of_half.within(BOX), volume)
    assert found == pytest.approx(expected, rel=0.01)


def test_the_best_factor_is_where_the_form_is_least_along_a_map(equations):
    form = double(equations[True][0].within(BOX))
    volume = torch.from_numpy(0.3 * molecule(BOX, 0.18, 3)).double()
    factor = form.best_factor(volume)
    least = value(form, factor * volume)
    assert least < min(value(form, (factor + change) * volume) for change in (-1e-3, 1e-3))
    assert form.best_factor(2 * volume) == pytest.approx(factor / 2)
    assert double((equations[True][0] + equations[True][1]).within(BOX)).best_factor(
        torch.from_numpy(TRUTH).double()
    ) == pytest.approx(1, abs=0.03)


def test_fast_sizes_are_the_next_even_numbers_of_small_factors():
    def smooth(number):
        for prime in (2, 3, 5):
            while number % prime == 0:
                number //= prime
        return number == 1

    for least in (1, 2, 3, 31.9, 97, 128, 129, 256.1, 361):
        found = fast_size(least)
        assert found >= least and found % 2 == 0 and smooth(found)
        assert not any(smooth(n) for n in range(2 * int(np.ceil(least / 2)), found, 2))
