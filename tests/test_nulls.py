"""Null images have random phases or noise where they should, and nothing else changed; copies of images are found."""

import numpy as np
import pytest
import torch
from test_dataset import BOX, COUNT, dataset_of, some_images, stack_of

from cryosplat.config import load_config
from cryosplat.dataset import radial_noise, shells_of_half_plane
from cryosplat.errors import InputError
from cryosplat.fingerprints import fingerprint, images_in_both_halves, same_images

SHELL_A = 5.0


@pytest.fixture
def table(tmp_path):
    return stack_of(tmp_path, some_images())


def spectra(table, kind=None, seed=0, owned=None, same=None, shell_a=SHELL_A, **words):
    dataset = dataset_of(table, owned=owned, precision="single", **words)
    if kind:
        noise = radial_noise(dataset.statistics.power, dataset.statistics.count)
        dataset.make_null(kind, seed, np.arange(len(table)) if same is None else same, noise, shell_a)
    return dataset.batch(dataset.owned).images, dataset


def test_phases_are_random_beyond_the_shell_only_and_amplitudes_stay(table):
    before, dataset = spectra(table)
    after, _ = spectra(table, "phases")
    shells = shells_of_half_plane(BOX)
    first = BOX * dataset.pixel_size_a / SHELL_A
    beyond = torch.from_numpy(shells >= first)
    assert 0 < int(beyond.sum()) < beyond.numel()
    assert torch.equal(before[:, ~beyond], after[:, ~beyond])
    torch.testing.assert_close(before.abs(), after.abs(), rtol=1e-4, atol=1e-5)
    inner = beyond.clone()
    inner[:, [0, BOX // 2]] = False  # their own mates have real coefficients
    turned = (after * before.conj())[:, inner]
    turned = turned / turned.abs().clamp(min=1e-9)
    assert abs(turned.mean()) < 4 / np.sqrt(turned.numel())


@pytest.mark.parametrize("kind", ["phases", "noise"])
@pytest.mark.parametrize("box", [None, BOX - 4])
def test_null_images_are_transforms_of_real_images(table, kind, box):
    after, dataset = spectra(table, kind, box=box)
    size = (dataset.box, dataset.box)
    again = torch.fft.rfft2(torch.fft.irfft2(after, s=size, norm="ortho"), norm="ortho")
    torch.testing.assert_close(after, again, rtol=1e-4, atol=1e-4)


def test_noise_has_the_spectrum_of_its_half(tmp_path):
    rng = np.random.default_rng(0)
    shells = shells_of_half_plane(BOX)
    colour = np.where(np.arange(800) % 2, 1.0, 2.0)[:, None, None] ** (shells / BOX)
    white = np.fft.rfft2(rng.standard_normal((800, BOX, BOX)), norm="ortho")
    table = stack_of(tmp_path, np.fft.irfft2(white * colour, s=(BOX, BOX), norm="ortho"))
    before, dataset = spectra(table)
    after, _ = spectra(table, "noise")
    for h in (0, 1):
        mine = torch.from_numpy(dataset.half == h)
        for shell in range(3, BOX // 2):
            there = torch.from_numpy(shells == shell)
            powers = [images[mine][:, there].abs().square().mean().item() for images in (before, after)]
            assert powers[1] == pytest.approx(powers[0], rel=0.08)
    overlap = (before * after.conj()).mean() / before.abs().square().mean()
    assert abs(overlap) < 0.01


def test_what_is_drawn_depends_on_seed_and_image_and_not_on_ranks(table):
    all_of_them, _ = spectra(table, "noise")
    other_seed, _ = spectra(table, "noise", seed=1)
    mine = np.arange(1, COUNT, 3)
    same = np.arange(COUNT)
    some = dataset_of(table, precision="single")
    noise = radial_noise(some.statistics.power, some.statistics.count)
    part = dataset_of(table, owned=mine, normalise=False, precision="single")
    part.normalise(some.statistics.deviation)
    part.make_null("noise", 0, same, noise)
    assert torch.equal(part.batch(mine).images, all_of_them[mine])
    assert not torch.isclose(all_of_them, other_seed).any(dim=-1).all()
    same[1] = 0
    copies, _ = spectra(table, "noise", same=same)
    ratio = copies[1] / copies[0]
    assert float(ratio.real.std()) < 0.2 and float(ratio.imag.abs().max()) < 1e-3


@pytest.mark.parametrize("shell_a", [0.5, 1000.0])
def test_a_shell_that_is_none_is_refused(table, shell_a):
    with pytest.raises(InputError, match=r"data\.null_shell_a=.*expected a resolution between"):
        spectra(table, "phases", shell_a=shell_a)


@pytest.mark.parametrize("words", [["data.null=phases"], ["data.null_shell_a=10"]])
def test_random_phases_need_a_shell_and_a_shell_needs_random_phases(words):
    with pytest.raises(InputError, match="go together"):
        load_config(None, words)


def test_copies_are_found_by_their_pixels_whatever_their_grey_levels_and_precision(tmp_path):
    images = np.random.default_rng(0).standard_normal((300, BOX, BOX)).astype(np.float32)
    images[201], images[120], images[7] = 100 * images[4] + 50, images[119].astype(np.float16), np.roll(images[8], 1)
    table = stack_of(tmp_path, images)
    same = same_images(dataset_of(table).statistics.fingerprint)
    expected = np.arange(300)
    expected[201], expected[120] = 4, 119
    assert same.tolist() == expected.tolist()
    assert images_in_both_halves(same, np.arange(300) % 2) == 2


def test_numbers_of_white_noise_are_independent_and_of_unit_variance():
    numbers = fingerprint(torch.randn(4000, 16, 16, generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(np.cov(numbers.T.numpy()), np.eye(6), atol=0.2)
