"""Linear half maps against exact images: no bias, the noise that is stated, halves that do not know of each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from halfmaps import molecule
from test_distributed import run_ranks
from views import PIXEL_SIZE_A, WORLD, Views, even_views, random_ctf, random_shifts, tilted_views

from cryosplat import backprojection
from cryosplat.backprojection import back_project, linear_half
from cryosplat.fsc import fsc
from cryosplat.masks import spherical_mask
from cryosplat.sectors import SectorSums
from cryosplat.symmetry import point_group

BOX = 32


def views_of(truth, count, ctf, **words):
    shifts = random_shifts(count, len(truth))
    return Views(truth, even_views(count), shifts, random_ctf(count) if ctf else None, **words)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def noise_ratio(rotations, ctf, seeds=4):
    """Power of noise in the transforms of maps over the stated variance, (S, sectors), and number of maps."""
    sums, power, stated = SectorSums(BOX), 0, 0
    for seed in range(seeds):
        views = Views(np.zeros((BOX,) * 3), rotations, None, random_ctf(len(rotations)) if ctf else None, 1.0, seed)
        for half in views.halves():
            seen = np.isfinite(half.variance)
            assert (half.variance > 0).all()
            power = power + sums(np.where(seen, np.abs(np.fft.rfftn(half.map.astype(float))) ** 2, 0))
            stated = stated + sums(np.where(seen, half.variance, 0))
    return power, stated


@pytest.mark.parametrize("ctf", [False, True], ids=["plain", "ctf"])
def test_without_noise_the_map_is_the_truth_in_shape_and_grey_scale(ctf):
    """0.998 measured at 0.9 Nyquist. What is missing is at the border of Fourier space, where one side has no data."""
    truth = molecule(48, 0.18)
    for half in views_of(truth, 800, ctf).halves():
        curve = fsc(half.map, truth, PIXEL_SIZE_A).fsc
        assert curve[1 : int(0.9 * 24) + 1].min() > 0.995
        assert (half.map * truth).sum() / (truth**2).sum() == pytest.approx(1, abs=0.02)


def test_hand_and_centre_are_the_truths():
    truth = molecule(BOX, 0.18)
    found = views_of(truth, 400, True).map().map
    true = fsc(found, truth, PIXEL_SIZE_A).fsc[1:14].mean()
    turned = np.roll(truth[::-1, ::-1, ::-1], (1, 1, 1), (0, 1, 2))
    for wrong in (turned, np.roll(truth, 1, 0), np.roll(truth, 1, 1), np.roll(truth, 1, 2), truth.transpose(2, 1, 0)):
        assert fsc(found, wrong, PIXEL_SIZE_A).fsc[1:14].mean() < true - 0.25


@pytest.mark.parametrize("ctf", [False, True], ids=["plain", "ctf"])
def test_noise_of_even_views_has_the_stated_variance_by_shell_and_direction(ctf):
    """The factor is from 0.95 to 1.15 between shell 6 and the last but one; 1.2 to 1.35 in lower ones."""
    power, stated = noise_ratio(even_views(600), ctf)
    ratio = power[3:-1].sum(1) / stated[3:-1].sum(1)
    assert 0.95 < ratio.min() and ratio.max() < 1.35
    assert 0.95 < ratio[3:].min() and ratio[3:].max() < 1.15
    sectors = power[8:-1].sum(0) / stated[8:-1].sum(0)
    assert 0.9 < sectors.min() and sectors.max() < 1.15


@pytest.mark.parametrize("ctf", [False, True], ids=["plain", "ctf"])
def test_noise_of_uneven_views_has_the_stated_variance_by_shell_and_direction(ctf):
    """Four views in five within 40 degrees of z: the variance in a shell differs by 10 times with direction.

    The factor is from 0.8 to 1.25. Shells below 6, where the density of data changes over the kernel, reach 2.
    """
    rotations = np.concatenate([tilted_views(480, 40), even_views(120)])
    power, stated = noise_ratio(rotations, ctf)
    ratio = power[6:-1].sum(1) / stated[6:-1].sum(1)
    assert 0.85 < ratio.min() and ratio.max() < 1.25
    sectors = power[8:-1].sum(0) / stated[8:-1].sum(0)
    assert 0.8 < sectors.min() and sectors.max() < 1.25
    voxels = SectorSums(BOX).voxels[8:-1].sum(0)
    spread = stated[8:-1].sum(0) / voxels
    assert spread.max() > 8 * spread.min()  # so that the lines above say something


def test_the_map_of_a_sum_of_images_is_the_sum_of_their_maps():
    count = 100
    first, second = (views_of(molecule(BOX, 0.2, seed), count, True, noise=0.5, seed=seed) for seed in (0, 1))
    maps = [views.halves()[0].map for views in (first, second)]
    first.images += second.images
    both = first.halves()[0]
    assert relative(both.map, maps[0] + maps[1]) < 1e-5
    np.testing.assert_array_equal(both.variance, second.halves()[0].variance)


def test_half_a_does_not_change_by_a_bit_with_the_images_of_half_b():
    views = views_of(molecule(BOX, 0.2), 200, True, noise=0.5)
    before = views.halves()
    views.images[views.half == 1] *= 3
    after = views.halves()
    np.testing.assert_array_equal(before[0].map, after[0].map)
    np.testing.assert_array_equal(before[0].variance, after[0].variance)
    assert relative(after[1].map, 3 * before[1].map) < 1e-5


def test_symmetry_makes_the_map_symmetric_and_better():
    group = point_group("C4")
    lump = np.roll(molecule(BOX, 0.15), 5, axis=2)
    truth = sum(turned(lump, quarters) for quarters in range(4))
    views = Views(truth, even_views(100), None, random_ctf(100), noise=5 * truth.std())
    sphere = spherical_mask(BOX)
    plain, symmetric = (views.halves(operators)[0].map * sphere for operators in (None, group))
    assert relative(turned(symmetric, 1), symmetric) < 0.02 < 0.2 < relative(turned(plain, 1), plain)
    scores = [fsc(found, truth, PIXEL_SIZE_A).fsc[1:15].mean() for found in (plain, symmetric)]
    assert scores[1] > scores[0] + 0.1


@pytest.mark.parametrize("name", ["D2", "O", "I", "D3"])
def test_sums_symmetrised_on_the_grid_are_those_of_images_entered_in_all_views(name, monkeypatch):
    """But for the faces of the grid, at Nyquist, which a quarter turn takes off it."""
    views, group = views_of(molecule(24, 0.2), 60, True, noise=0.5), point_group(name)
    few = [linear_half(sums, 24, group) for sums in views.sums(group)]
    monkeypatch.setattr(backprojection, "split", lambda operators: (operators, np.eye(3)[None]))
    all_views = [linear_half(sums, 24, group) for sums in views.sums(group)]
    inside = SectorSums(24).shell < 11
    for one, other in zip(few, all_views, strict=True):
        spectra = [np.fft.rfftn(half.map) * inside for half in (one, other)]
        assert relative(*spectra) < 1e-4
        np.testing.assert_allclose(one.variance[inside], other.variance[inside], rtol=1e-3)
        assert relative(one.equations.data, other.equations.data) < 1e-4
        assert relative(one.equations.kernel, other.equations.kernel) < 5e-3  # 1.3e-3 of I, all of it at Nyquist


def test_the_likelihood_of_a_symmetric_map_is_that_of_the_images_once():
    """Sums over all copies, over their number: Q of a map with the symmetry is what it is without the copies."""
    group, lump = point_group("C4"), np.roll(molecule(BOX, 0.1), 4, axis=2)
    truth = sum(turned(lump, quarters) for quarters in range(4))
    views = Views(truth, even_views(200), random_shifts(200, BOX), random_ctf(200), noise=0.5)
    symmetric, plain = (views.halves(operators)[0].equations.within(BOX) for operators in (group, None))
    with_it, without = (torch.from_numpy(volume).float() for volume in (truth, lump))
    assert float(symmetric(with_it)[0]) == pytest.approx(float(plain(with_it)[0]), rel=5e-4)
    assert abs(float(symmetric(without)[0]) / float(plain(without)[0]) - 1) > 3e-3


@pytest.mark.parametrize("name", ["C7", "D2"])
def test_the_noise_of_a_symmetrised_map_is_that_of_as_many_images_as_views(name):
    """0.93 measured of C7 and 0.98 of D2, axes included, where copies of one image's noise add up."""
    group, sums, power, stated = point_group(name), SectorSums(BOX), 0, 0
    for seed in range(3):
        views = Views(np.zeros((BOX,) * 3), even_views(100), None, random_ctf(100), 1.0, seed)
        for half in views.halves(group):
            power = power + sums(np.abs(np.fft.rfftn(half.map.astype(float))) ** 2).sum(1)
            stated = stated + sums(np.where(np.isfinite(half.variance), half.variance, 0)).sum(1)
    assert 0.75 < (power / stated)[4:14].mean() < 1.25


def test_images_cropped_in_fourier_space_make_the_same_map_at_low_resolution():
    views = views_of(molecule(48, 0.15), 300, True)
    whole = views.map().map
    sums = back_project(views, np.arange(300), np.ones((2, 25)), WORLD, halves=False, crop=24)
    rows = np.r_[0:12, 36:48]
    low = np.fft.irfftn(np.fft.rfftn(whole)[rows][:, rows][:, :, :13], (24,) * 3, (0, 1, 2))
    assert fsc(linear_half(sums[0], 24).map, low, 2 * PIXEL_SIZE_A).fsc[1:11].min() > 0.99


def turned(volume: np.ndarray, quarters: int) -> np.ndarray:
    """A map turned by quarters about z, which moves voxels to voxels."""
    for _ in range(quarters):
        volume = np.roll(np.rot90(volume, axes=(1, 2)), 1, axis=1)
    return volume


@pytest.mark.parametrize("copies", [1, 1e3, 1e6])
def test_a_cone_without_views_is_empty_and_nothing_in_it_grows(copies):
    """All views within 30 degrees of z leave a cone of 60 degrees about z. As if every view came many times: what
    rounding errors of transforms leave in the cone must not pass for data."""
    views = Views(molecule(BOX, 0.18), tilted_views(400, 30), None, random_ctf(400), noise=1.0)
    half = linear_half(views.sums()[0] * copies, BOX)
    full, columns = np.fft.fftfreq(BOX, 1 / BOX), np.fft.rfftfreq(BOX, 1 / BOX)
    radius = np.sqrt(full[:, None, None] ** 2 + full[:, None] ** 2 + columns**2)
    cone = (np.abs(full[:, None, None]) > radius * np.cos(np.radians(30))) & (radius > 6) & (radius < BOX / 2)
    seen = np.isfinite(half.variance)
    assert cone.sum() > 1000 and not seen[cone].any()
    assert (half.variance > 0).all() and np.isfinite(half.map).all()
    power = np.abs(np.fft.rfftn(half.map)) ** 2
    assert power[~seen].max() < 1e-9 * power.max()
    # The views still see the rest: no more is empty than is left out of the cone of 60 degrees and a border.
    disc = (np.abs(full[:, None, None]) < radius * np.cos(np.radians(63))) & (radius > 1) & (radius < BOX / 2 - 1)
    assert seen[disc].all()


def test_images_without_noise_beyond_a_shell_give_a_map_up_to_there():
    """Images low-passed at shell 12 of 16, noise and all: no noise is no reason to believe in zeros."""
    truth = molecule(BOX, 0.18)
    views = views_of(truth, 400, True, noise=1.0)
    ky, kx = np.fft.fftfreq(BOX, 1 / BOX)[:, None], np.fft.rfftfreq(BOX, 1 / BOX)
    views.images *= torch.from_numpy(np.hypot(ky, kx) < 12.5)
    full = views.map().map
    radial = np.where(np.arange(BOX // 2 + 1) <= 12, 1.0, 0.0)[None].repeat(2, 0)
    low_passed = linear_half(back_project(views, np.arange(400), radial, WORLD, halves=False)[0], BOX).map
    assert np.isfinite(low_passed).all()
    curves = [fsc(found, truth, PIXEL_SIZE_A).fsc[1:11] for found in (full, low_passed)]
    assert (curves[1] > curves[0] - 0.03).all()


def test_no_images_give_an_empty_map():
    views = views_of(molecule(16), 4, True)
    half = linear_half(views.sums(ids=np.arange(0))[0], 16)
    assert not half.map.any() and np.isinf(half.variance).all()


def test_images_that_are_zero_give_a_map_of_zero():
    views = Views(np.zeros((16,) * 3), even_views(200))
    half = views.map()
    assert not half.map.any() and np.isfinite(half.variance[0, 0, :7]).all()


RANK_PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
import torch
from halfmaps import molecule
from test_backprojection import views_of
from cryosplat import distributed
from cryosplat.config import load_config

distributed.PIECE = 10_000
config = load_config(None, ["data.particles=a", "data.poses=b", "run_dir=c", "train.device=cpu", "train.threads=1"])
with distributed.join(config) as world:
    views = views_of(molecule(16), 60, True, noise=1.0)
    sums = views.sums(world=world, ids=np.arange(world.rank, 60, 2))
    if world.is_main:
        torch.save(sums, {path!r})
    else:
        assert sums is None
"""


def test_two_ranks_give_the_sums_of_one(tmp_path):
    path = str(tmp_path / "sums.pt")
    tests = str(Path(__file__).resolve().parent)
    for code, _, errors in run_ranks(tmp_path, RANK_PROGRAM.format(tests=tests, path=path)):
        assert code == 0, errors
    expected = views_of(molecule(16), 60, True, noise=1.0).sums()
    assert relative(torch.load(path, weights_only=True).numpy(), expected.numpy()) < 1e-5
