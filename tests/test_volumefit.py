"""Fitting mixtures in the volume: the likelihood rises, the map is as good as the linear one, halves stay apart."""

import dataclasses

import numpy as np
import pytest
import torch
import training_set
from views import WORLD

from cryosplat.backprojection import LinearHalf, back_project, linear_half
from cryosplat.dataset import radial_noise
from cryosplat.errors import InputError
from cryosplat.fsc import fsc
from cryosplat.gaussians import AMPLITUDE, MEAN, SCALE, GaussianMixture
from cryosplat.masks import mask_from_map, spherical_mask
from cryosplat.quadratic import NormalEquations
from cryosplat.reconstruction import Reconstruction
from cryosplat.sectors import SectorSums
from cryosplat.settings import ModelConfig, VolumeConfig
from cryosplat.volumefit import FEWEST, Problem, _deal, fit, fit_all, whole, wiener_alone

BOX, PIXEL_SIZE_A = training_set.BOX, training_set.PIXEL_SIZE_A
RANGE = (0.5 / BOX, 0.1)
MODEL = ModelConfig(gaussians=200, scale=0.03)
SUMS = SectorSums(BOX)
TRUTH = training_set.true_map()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Of the training set, and their radial noise power (2, S)."""
    dataset = training_set.images(tmp_path_factory)
    return dataset, radial_noise(dataset.statistics.power, dataset.statistics.count)


@pytest.fixture(scope="module")
def inserted(images):
    """Sums of both halves."""
    dataset, noise = images
    return back_project(dataset, dataset.owned, noise, WORLD)


@pytest.fixture(scope="module")
def halves(inserted):
    return tuple(linear_half(sums, BOX) for sums in inserted)


def problem_of(half, name="full", seed=0, share=1.0):
    return Problem(half, PIXEL_SIZE_A, name, seed, share)


def fitted(half, model=MODEL, volume=VolumeConfig(), **words):  # noqa: B008
    return fit(problem_of(half, **words), model, volume, RANGE)


def mixture_of(found, amplitudes="signed"):
    mixture = GaussianMixture(1, len(found.parameters), amplitudes, RANGE)
    with torch.no_grad():
        mixture.mixtures[0].copy_(found.parameters)
        mixture.unit[0] = found.unit
    return mixture


def map_of(found, amplitudes="signed"):
    return mixture_of(found, amplitudes).voxelise(BOX)[0].numpy()


def score(volume, mask=None):
    """Mean FSC to the truth over shells."""
    return fsc(volume, TRUTH, PIXEL_SIZE_A, spherical_mask(BOX) if mask is None else mask).fsc[1:].mean()


@pytest.fixture(scope="module")
def both(halves):
    return whole(halves)


@pytest.fixture(scope="module")
def default(both):
    return fitted(both)


def test_the_likelihood_rises_to_its_end(default):
    gains = np.array(default.gains)
    assert len(gains) == VolumeConfig().steps and gains[0] > 0
    assert gains[-1] > 1.1 * gains[0]
    # Adam's steps are large at first; in the last third, with rates that fall, nothing is lost.
    assert (np.diff(gains[-40:]) > -1e-3 * gains[-1]).all()
    assert gains[-1] > 0.999 * gains.max()


def test_the_gain_is_that_of_the_images_one_by_one(images, default):
    """Projected by splatting, with their CTF, against pixels: 7e-4 less than the last step but one said."""
    dataset, noise = images
    batch = dataset.batch(dataset.owned)
    shown = Reconstruction(mixture_of(default), BOX, PIXEL_SIZE_A).predict(batch)[0].detach().numpy()
    seen = batch.images.numpy()
    ky, kx = np.fft.fftfreq(BOX, 1 / BOX)[:, None], np.fft.rfftfreq(BOX, 1 / BOX)
    once = (kx**2 + ky**2 < (BOX / 2) ** 2) & ((kx > 0) | (ky >= 0))
    power = noise[batch.half.numpy()][:, np.minimum(np.rint(np.hypot(kx, ky)).astype(int), BOX // 2)]
    gain = ((np.abs(seen) ** 2 - np.abs(seen - shown) ** 2) * once / power).sum(dtype=np.float64)
    assert default.gains[-1] == pytest.approx(gain, rel=2e-3)


def test_the_mixture_is_as_good_as_the_linear_map_with_the_best_filter(both, default):
    """By 0.84 against 0.68 in the mean over shells: blobs are what a mixture is made of."""
    linear = wiener_alone(both, SUMS)[0]
    assert score(map_of(default)) > score(linear) + 0.1
    assert score(map_of(default)) > 0.8


def test_positive_amplitudes_can_be_fitted(both, default):
    found = fitted(both, dataclasses.replace(MODEL, amplitudes="positive"))
    assert found.gains[-1] > 1.05 * found.gains[0] > 0
    assert score(map_of(found, "positive")) > score(map_of(default)) - 0.1


def shares(found):
    """Amplitudes over the mean one of the start."""
    return mixture_of(found).shares()[0].detach().numpy() * len(found.parameters)


def test_the_prior_holds_amplitudes_together(both):
    spreads = [shares(fitted(both, volume=VolumeConfig(steps=60, prior=prior))).std() for prior in (0, 1e2, 1e4, 1e9)]
    assert spreads[0] > 2 * spreads[2] and spreads[1] > spreads[2] and spreads[3] < 0.05


def test_amplitudes_become_negative_only_where_images_insist(both):
    """29 of 200 without a prior, 27 with the usual one, which takes 1e-5 of the likelihood; none with a hundred times
    that, which takes 1e-3."""
    found = {prior: fitted(both, volume=VolumeConfig(prior=prior)) for prior in (0.0, 0.5, 50.0)}
    negative = {prior: int((shares(one) < 0).sum()) for prior, one in found.items()}
    assert negative[0.0] >= negative[0.5] > negative[50.0] == 0
    assert found[0.5].gains[-1] > 0.9995 * found[0.0].gains[-1]
    assert 0.995 < found[50.0].gains[-1] / found[0.0].gains[-1] < 1


def test_a_fit_is_the_same_every_time_and_another_with_another_seed(both):
    few = VolumeConfig(steps=5)
    one, again, other = (fitted(both, volume=few, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.parameters, again.parameters) and one.gains == again.gains and one.unit == again.unit
    assert not torch.equal(one.parameters, other.parameters)


def test_gaussians_stay_within_their_bounds_and_the_box(default):
    scales = torch.nn.functional.softplus(default.parameters[:, SCALE])
    assert float(scales.min()) >= RANGE[0] * 0.9999 and float(scales.max()) <= 3.0 / BOX * 1.0001
    assert float(default.parameters[:, MEAN].abs().max()) < 0.5
    assert default.parameters[:, AMPLITUDE].isfinite().all()


def test_the_start_is_drawn_from_the_density(both):
    """Points lie under the molecule's mask, and where it is dense: 2.1 times the mean under the mask."""
    found = fitted(both, volume=VolumeConfig(steps=1, step_px=1e-9))
    voxels = (found.parameters[:, MEAN] * BOX).round().long().numpy() + BOX // 2
    mask = mask_from_map(both.map, PIXEL_SIZE_A)
    assert (mask[voxels[:, 2], voxels[:, 1], voxels[:, 0]] > 0).mean() > 0.95
    assert TRUTH[voxels[:, 2], voxels[:, 1], voxels[:, 0]].mean() > 1.5 * TRUTH[mask > 0.3].mean()


@pytest.mark.parametrize("name", ["full", "half_a"])
def test_a_random_start_finds_the_molecule(both, halves, name):
    model = dataclasses.replace(MODEL, start="random", spread=0.12)
    half = both if name == "full" else halves[0]
    found = fitted(half, model, VolumeConfig(steps=200, step_px=0.6), name=name)
    assert len(found.parameters) == MODEL.gaussians
    assert found.gains[-1] > 5 * max(found.gains[0], 1)
    start = fitted(half, model, VolumeConfig(steps=1, step_px=1e-9), name=name)
    assert score(map_of(found)) > score(map_of(start)) + 0.2


# Numbers of Gaussians


def test_every_model_has_the_number_of_gaussians_that_its_own_map_asks_for(halves, both):
    own = dataclasses.replace(MODEL, gaussians=None)
    short = VolumeConfig(steps=1)
    alone = len(fitted(halves[0], own, short, name="half_a", share=0.5).parameters)
    settings = own, short, RANGE
    problems = [problem_of(both), problem_of(halves[0], "half_a", 1, 0.5), problem_of(halves[1], "half_b", 2, 0.5)]
    counts = [len(found.parameters) for found in fit_all(problems, 3, settings, WORLD)]
    assert counts[1] == alone
    noise = np.random.default_rng(0).normal(0, 30, halves[0].map.shape).astype(np.float32)
    worse = dataclasses.replace(halves[1], map=halves[1].map + noise, variance=halves[1].variance * 1e6)
    problems[2] = problem_of(worse, "half_b", 2, 0.5)
    others = [len(found.parameters) for found in fit_all(problems, 3, settings, WORLD)]
    assert others[:2] == counts[:2] and others[2] != counts[2]


def test_more_noise_asks_for_fewer_gaussians(both):
    own, short = dataclasses.replace(MODEL, gaussians=None), VolumeConfig(steps=1)
    noisy = dataclasses.replace(both, variance=both.variance * 100)
    counts = [len(fitted(half, own, short).parameters) for half in (both, noisy)]
    assert counts[0] > counts[1] >= FEWEST


def test_what_a_fit_gives_does_not_depend_on_the_others(halves, both):
    settings = MODEL, VolumeConfig(steps=5), RANGE
    problems = [problem_of(both), problem_of(halves[0], "half_a", 1, 0.5), problem_of(halves[1], "half_b", 2, 0.5)]
    together = fit_all(problems, 3, settings, WORLD)
    alone = fit(problems[1], *settings)
    assert torch.equal(together[1].parameters, alone.parameters) and together[1].gains == alone.gains
    assert torch.equal(fit_all(problems[:1], 1, settings, WORLD)[0].parameters, together[0].parameters)


# Linear maps


def test_the_whole_is_the_optimal_mean(halves):
    """By Fourier voxel: (F_a / v_a + F_b / v_b) / (1 / v_a + 1 / v_b), of variance 1 / (1 / v_a + 1 / v_b)."""
    found = whole(halves)
    spectra = [np.fft.rfftn(half.map.astype(np.float64)) for half in halves]
    inverse = [1 / half.variance.astype(np.float64) for half in halves]
    total = inverse[0] + inverse[1]
    known = total > 0
    expected = np.where(known, sum(f * w for f, w in zip(spectra, inverse, strict=True)) / np.where(known, total, 1), 0)
    difference = np.fft.rfftn(found.map.astype(np.float64)) - expected
    assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(found.variance[known], 1 / total[known], rtol=1e-5)
    assert np.isinf(found.variance[~known]).all() and (~known).any()
    # And it is that of all images: their sums added up.
    assert torch.equal(found.equations.data, halves[0].equations.data + halves[1].equations.data)


def test_the_whole_is_the_map_of_all_images(inserted, halves):
    sphere, expected = spherical_mask(BOX), linear_half(inserted[0] + inserted[1], BOX)
    difference = (whole(halves).map - expected.map) * sphere
    assert np.linalg.norm(difference) < 0.08 * np.linalg.norm(expected.map * sphere)
    known = np.isfinite(expected.variance)
    np.testing.assert_array_equal(known, np.isfinite(whole(halves).variance))
    assert np.median(whole(halves).variance[known] / expected.variance[known]) == pytest.approx(1, abs=0.05)
    # What one half has not seen, the other has.
    empty = LinearHalf(np.zeros_like(halves[0].map), np.full_like(halves[0].variance, np.inf), halves[0].equations)
    found = whole((empty, halves[1]))
    np.testing.assert_allclose(found.map, halves[1].map, atol=1e-5 * np.abs(halves[1].map).max())
    np.testing.assert_allclose(found.variance, halves[1].variance, rtol=1e-6)


def test_a_linear_map_is_filtered_by_its_own_signal_and_noise(both):
    """It correlates with the truth by 0.985 then, by 0.931 before. The less the noise, the more is resolved, and is
    let through."""
    filtered, resolved = wiener_alone(both, SUMS)

    def agreement(volume):
        return np.corrcoef(volume.ravel(), TRUTH.ravel())[0, 1]

    assert agreement(filtered) > 0.975 > agreement(both.map) + 0.02
    found = [wiener_alone(dataclasses.replace(both, variance=factor * both.variance), SUMS) for factor in (10, 100)]
    shells = [resolved, *(shell for _, shell in found)]
    powers = [(volume**2).sum() for volume in (both.map, filtered, *(volume for volume, _ in found))]
    assert BOX // 2 >= shells[0] > shells[1] > shells[2] >= 1
    assert powers[0] > powers[1] > powers[2] > powers[3] > 0


def test_a_half_is_filtered_as_for_the_noise_of_all_images(both):
    """Its share of them lowers the noise that it is weighed with, not the signal that is found in it."""
    whole_map, alone = wiener_alone(both, SUMS)
    shared_map, shared = wiener_alone(both, SUMS, share=0.1)
    assert shared >= alone and (shared_map**2).sum() > (whole_map**2).sum()


def test_a_map_of_nothing_is_still_a_map(both):
    nothing = dataclasses.replace(both, map=np.zeros_like(both.map))
    filtered, resolved = wiener_alone(nothing, SUMS)
    assert not filtered.any() and resolved == 1
    found = fitted(nothing, dataclasses.replace(MODEL, gaussians=None), VolumeConfig(steps=3))
    assert len(found.parameters) == FEWEST and found.parameters.isfinite().all()


# What goes wrong


def test_a_fit_that_does_not_stay_finite_is_refused_by_name(both):
    with pytest.raises(
        InputError,
        match=r"half_a: its fit .* did not stay finite; lower volume\.step_px \(0\.06\) or volume\.prior \(1e\+38\)",
    ):
        fitted(both, volume=VolumeConfig(steps=20, prior=1e38), name="half_a")
    bad = NormalEquations(both.equations.kernel, both.equations.data.clone())
    bad.data[BOX // 2, BOX // 2, BOX // 2] = torch.nan
    with pytest.raises(InputError, match=r"half_b: its fit .* did not stay finite; lower volume\.step_px \(0\.06\)"):
        fitted(dataclasses.replace(both, equations=bad), name="half_b")


def test_an_absurd_step_stays_within_the_box_and_loses_likelihood(both, default):
    found = fitted(both, volume=VolumeConfig(step_px=1e39))
    assert found.parameters.isfinite().all() and float(found.parameters[:, MEAN].abs().max()) <= 0.5
    assert found.gains[-1] < 0.5 * default.gains[-1]


def test_points_are_dealt_in_proportion_and_alike_to_maps_equal_up_to_rounding():
    rng = np.random.default_rng(0)
    weight, threshold = np.maximum(rng.normal(size=4000), 0), rng.random(4000)
    place, turn = _deal(weight, threshold, 1500)
    number = np.bincount(place, minlength=4000)
    due = 1500 * weight / weight.sum()
    assert len(place) == len(turn) == 1500 and (number[weight == 0] == 0).all()
    assert np.abs(number - due).max() < 1.2  # a draw with replacement would give some voxel three too many
    assert turn.max() == number.max() - 1
    again = _deal(weight * (1 + 1e-7 * rng.normal(size=4000)), threshold, 1500)[0]
    assert np.abs(number - np.bincount(again, minlength=4000)).sum() <= 2
    assert len(_deal(np.ones(8), np.full(8, 0.5), 20)[0]) == 20  # though all voxels get their next point at once


def test_overfitting_is_seen_by_images_held_out(halves, caplog):
    """Half b, with much more noise, watches half a: without a prior a fit learns noise until they have lost much."""
    noise = halves[1].equations.kernel, 0 * halves[1].equations.data  # images of nothing but noise, seen by no noise
    watched = dataclasses.replace(problem_of(halves[0], "full"), held_out=halves[1].equations)
    firm = fit(watched, MODEL, VolumeConfig(), RANGE)
    assert len(firm.held_out_gains) == len(firm.gains) and firm.held_out_gains[-1] > 0.9 * firm.gains[-1]
    firm.warn("full")
    assert not caplog.records
    loose = fit(dataclasses.replace(watched, held_out=NormalEquations(*noise)), MODEL, VolumeConfig(steps=5), RANGE)
    assert max(loose.held_out_gains) < 0  # any density is wrong for them
    gains = [1.0, 4.0, 2.9]
    dataclasses.replace(firm, held_out_gains=gains).warn("full")
    assert "full: after step 1" in caplog.text and "model.gaussians" in caplog.text
