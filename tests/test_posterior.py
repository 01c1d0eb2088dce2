"""The delivered map: better than its parts where these are good, little worse where they are not, true in amplitude."""

import numpy as np
import pytest
from halfmaps import frequencies, molecule, noise
from linearhalves import filtered, half_noise, linear_half, mixture, uneven

from cryosplat.backprojection import LinearHalf
from cryosplat.fsc import fsc, masked_spectrum, shell_sums
from cryosplat.masks import spherical_mask
from cryosplat.posterior import deliver
from cryosplat.sectors import SectorSums

BOX, SEEDS = 48, 4
TRUTH, MASK, SUMS, RADIUS = molecule(BOX, 0.2), spherical_mask(BOX, 15), SectorSums(BOX), frequencies(BOX)
PATTERNS = {"even": 1.0, "uneven": uneven(BOX)}

MIXTURES = {
    "good": lambda own, seed: mixture(TRUTH, own, 12, bias=0.3, learnt=0.2),
    "overfitted": lambda own, seed: filtered(TRUTH + own, np.exp(-((RADIUS / 12) ** 2))),
    "noise": lambda own, seed: TRUTH.std() * filtered(noise(BOX, seed + 90), np.exp(-((RADIUS / 12) ** 2))),
    "a copy of its half's noise": lambda own, seed: filtered(own, np.exp(-((RADIUS / 12) ** 2))),
}


def true_fsc(volume):
    return fsc(volume, TRUTH, 3.0, MASK).fsc[1:]


def amplitude(volume):
    """Of the truth in a map, by shell: 1 if it is the truth's."""
    cross, _, power = shell_sums(masked_spectrum(volume, MASK), masked_spectrum(TRUTH, MASK))
    return (cross / power)[1:]


def draw(kind, strength, pattern, seed):
    noises = [half_noise(TRUTH, strength, seed + k, pattern) for k in (0, 1000)]
    halves = tuple(linear_half(TRUTH, own, pattern) for own in noises)
    return noises, halves, tuple(MIXTURES[kind](own, seed + k) for own, k in zip(noises, (0, 1), strict=True))


def curves(kind, strength, pattern):
    """True FSC (3, S) of the delivered map, of the linear maps alone, and of the mixtures; mean over seeds."""
    found = []
    for seed in range(SEEDS):
        _, halves, mixtures = draw(kind, strength, pattern, seed)
        maps = deliver(halves, mixtures, MASK, SUMS).map, deliver(halves, None, MASK, SUMS).map, sum(mixtures)
        found.append([true_fsc(volume) for volume in maps])
    return np.mean(found, 0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("strength", "gain"), [(1.0, 0.02), (4.0, 0.08)])
def test_with_good_mixtures_the_delivered_map_beats_the_linear_one_in_every_shell(strength, gain, pattern):
    delivered, linear, _ = curves("good", strength, PATTERNS[pattern])
    assert (delivered - linear).min() > -0.003
    assert (delivered - linear).mean() > gain


@pytest.mark.parametrize("pattern", PATTERNS)
def test_with_good_mixtures_the_delivered_map_beats_these_too_where_the_data_speak(pattern):
    """With much noise it stays behind the mixtures in the last shells, where it takes them only as far as they have
    earned before: by 0.03 at most in the mean over shells."""
    delivered, _, mixtures = curves("good", 1.0, PATTERNS[pattern])
    assert (delivered - mixtures).min() > -0.04 and (delivered - mixtures).mean() > 0.08
    delivered, _, mixtures = curves("good", 4.0, PATTERNS[pattern])
    assert (delivered - mixtures).mean() > -0.045


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["overfitted", "noise", "a copy of its half's noise"])
def test_useless_mixtures_do_little_harm(kind, pattern):
    """0.005 in any shell where there is some signal; with much noise 0.035, and 0.006 in the mean over shells."""
    delivered, linear, _ = curves(kind, 1.0, PATTERNS[pattern])
    assert (delivered - linear).min() > -0.006
    delivered, linear, _ = curves(kind, 4.0, PATTERNS[pattern])
    assert (delivered - linear).min() > -0.045 and (delivered - linear).mean() > -0.008


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grey", [0.2, 3.0])
def test_the_grey_scale_of_mixtures_makes_no_difference(grey, pattern):
    for seed in range(SEEDS):
        _, halves, mixtures = draw("good", 1.0, PATTERNS[pattern], seed)
        other = tuple(grey * volume for volume in mixtures)
        found, expected = (true_fsc(deliver(halves, maps, MASK, SUMS).map) for maps in (other, mixtures))
        assert np.abs(found - expected).max() < 0.03
        assert np.abs(found - expected).mean() < 0.004


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["good", "noise"])
def test_the_delivered_map_has_the_truths_amplitude_where_it_has_the_truth(kind, pattern):
    found, scores = [], []
    for seed in range(SEEDS):
        _, halves, mixtures = draw(kind, 1.0, PATTERNS[pattern], seed)
        delivered = deliver(halves, mixtures, MASK, SUMS).map
        found.append(amplitude(delivered))
        scores.append(true_fsc(delivered))
    told = np.mean(scores, 0) > 0.5
    assert told.sum() > 12
    assert np.abs(np.mean(found, 0)[told] - 1).max() < 0.1


def test_the_linear_map_for_looking_at_is_wiener_filtered():
    _, halves, _ = draw("good", 4.0, 1.0, 0)
    found = deliver(halves, None, MASK, SUMS)
    assert not found.gamma.any()
    kept = amplitude(found.linear)
    assert kept[0] > 0.9 and np.abs(kept[18:]).max() < 0.2 < amplitude(found.map)[:12].min()
    assert (np.diff(found.wiener[8:]) < 1e-6).all() and 0 <= found.wiener.min() and found.wiener.max() <= 1


def test_what_half_a_gives_knows_nothing_of_the_noise_of_half_b():
    """Over draws, Z_a does not correlate with the noise of half b: the few numbers a shell that it has of both halves
    carry none of it. It does correlate with that of half a."""
    products = {0: [], 1: []}
    for seed in range(20):
        noises, halves, mixtures = draw("good", 2.0, 1.0, 10 * seed)
        part = masked_spectrum(deliver(halves, mixtures, MASK, SUMS).parts[0], MASK)
        for half, own in enumerate(noises):
            cross, *powers = shell_sums(part, masked_spectrum(own, MASK))
            products[half].append(cross[3:] / np.sqrt(powers[0] * powers[1])[3:])
    of_a, of_b = (np.array(products[half]) for half in (0, 1))
    standard = of_b.std(0) / np.sqrt(len(of_b))
    assert np.abs(of_b.mean(0) / standard).max() < 4 and abs(of_b.mean()) < 0.01
    assert of_a.mean() > 0.3


def test_other_images_in_half_b_change_what_half_a_gives_by_numbers_a_shell_alone():
    """Of even views, the new Z_a is by shell a sum of the former and of the linear map of a: 0.97 of its power is, up
    to shell 15 (beyond, the mask mixes shells). In the lowest ten shells it changes by 1.4 %.
    """
    _, halves, mixtures = draw("good", 1.0, 1.0, 0)
    own = half_noise(TRUTH, 1.0, 77)
    before = deliver(halves, mixtures, MASK, SUMS).parts[0]
    pairs = (halves[0], linear_half(TRUTH, own)), (mixtures[0], MIXTURES["good"](own, 5))
    after = deliver(*pairs, MASK, SUMS).parts[0]
    linear = deliver(halves, None, MASK, SUMS).parts[0]
    spectra = [masked_spectrum(volume, MASK) for volume in (after, before, linear)]
    for shell in range(1, 16):
        there = (SUMS.shell == shell) & SUMS.inside
        found, *known = (np.concatenate([spectrum[there].real, spectrum[there].imag]) for spectrum in spectra)
        fit = np.linalg.lstsq(np.stack(known, 1), found, rcond=None)[0] @ np.array(known)
        assert ((found - fit) ** 2).sum() < 0.03 * (found**2).sum(), shell
    lowest = filtered(after - before, RADIUS < 10), filtered(before, RADIUS < 10)
    assert np.linalg.norm(lowest[0] * MASK) < 0.05 * np.linalg.norm(lowest[1] * MASK)


@pytest.mark.filterwarnings("error")
def test_empty_voxels_and_odd_halves_give_finite_maps():
    _, halves, mixtures = draw("good", 1.0, 1.0, 0)
    cone = np.abs(np.fft.fftfreq(BOX, 1 / BOX)[:, None, None]) <= 0.7 * np.maximum(RADIUS, 1)
    with_cone = tuple(linear_half(TRUTH, half_noise(TRUTH, 1.0, seed), seen=cone) for seed in (0, 1000))
    empty = LinearHalf(np.zeros_like(halves[0].map), np.full_like(halves[0].variance, np.inf))
    zero = LinearHalf(np.zeros_like(halves[0].map), halves[0].variance)
    nothing = (np.zeros_like(TRUTH),) * 2
    pairs = {"cone": with_cone, "one with a cone": (halves[0], with_cone[1]), "empty": (empty, empty)}
    pairs |= {"zero": (zero, zero), "identical": (halves[0], halves[0]), "good": halves}
    for name, pair in pairs.items():
        for maps in (None, mixtures, nothing):
            for mask in (None, MASK):
                found = deliver(pair, maps, mask, SUMS)
                for volume in (*found.parts, found.linear, found.map):
                    assert np.isfinite(volume).all() and volume.dtype == np.float32, name
                assert np.isfinite(found.gamma).all() and (found.gamma >= 0).all(), name
                assert np.isfinite(found.wiener).all(), name


def test_mixtures_fill_an_empty_cone():
    """Linear maps have nothing within 45 degrees of z, where mixtures have the truth."""
    inside = np.abs(np.fft.fftfreq(BOX, 1 / BOX)[:, None, None]) > 0.7 * np.maximum(RADIUS, 1)
    noises = [half_noise(TRUTH, 1.0, seed) for seed in (0, 1000)]
    halves = tuple(linear_half(TRUTH, own, seen=~inside) for own in noises)
    mixtures = tuple(MIXTURES["good"](own, 0) for own in noises)
    weights = inside & (RADIUS > 2) & (RADIUS < 12)
    scores = []
    for maps in (mixtures, None):
        found = masked_spectrum(deliver(halves, maps, MASK, SUMS).map, MASK) * weights
        scores.append(shell_sums(found, masked_spectrum(TRUTH, MASK) * weights)[:, 3:12])
    filled, bare = (cross / power for cross, _, power in scores)
    assert abs(bare.mean()) < 0.1 and 0.7 < filled.mean() < 1.1 and filled.max() < 1.3, filled


# A mixture of all images


def test_the_twin_is_what_is_delivered_where_no_mixture_of_all_images_is():
    _, halves, mixtures = draw("good", 1.0, 1.0, 0)
    for maps in (mixtures, None):
        found = deliver(halves, maps, MASK, SUMS)
        np.testing.assert_array_equal(found.map, found.twin)
        np.testing.assert_array_equal(found.twin, 0.5 * (found.parts[0] + found.parts[1]))


@pytest.mark.parametrize("cone", [False, True], ids=["all views", "an empty cone"])
def test_a_mixture_of_all_images_that_is_the_mean_of_the_halves_changes_nothing(cone):
    _, halves, mixtures = draw("good", 1.0, 1.0, 0)
    if cone:
        seen = np.abs(np.fft.fftfreq(BOX, 1 / BOX)[:, None, None]) <= 0.7 * np.maximum(RADIUS, 1)
        halves = tuple(linear_half(TRUTH, half_noise(TRUTH, 1.0, seed), seen=seen) for seed in (0, 1000))
    mean = 0.5 * (mixtures[0] + mixtures[1])
    found = deliver(halves, mixtures, MASK, SUMS, mean)
    assert np.linalg.norm(found.map - found.twin) < 1e-6 * np.linalg.norm(found.twin)


@pytest.mark.parametrize(("strength", "gain"), [(1.0, 0.05), (4.0, 0.15)])
def test_a_better_mixture_of_all_images_makes_a_better_map(strength, gain):
    """Without noise or bias, and finer: by 0.08 and 0.21 in the mean over shells."""
    better, gains = filtered(TRUTH, 1 / (1 + (RADIUS / 16) ** 4)), []
    for seed in range(SEEDS):
        _, halves, mixtures = draw("good", strength, 1.0, seed)
        found = deliver(halves, mixtures, MASK, SUMS, better)
        gains.append(true_fsc(found.map) - true_fsc(found.twin))
    assert np.mean(gains) > gain and np.mean(gains, 0).min() > -0.001


def test_the_change_is_linear_in_what_the_mixtures_differ_by():
    _, halves, mixtures = draw("good", 1.0, 1.0, 0)
    mean, other = 0.5 * (mixtures[0] + mixtures[1]), filtered(TRUTH, np.exp(-((RADIUS / 15) ** 2)))
    once, twice = (deliver(halves, mixtures, MASK, SUMS, mean + factor * (other - mean)) for factor in (1, 2))
    changes = [found.map - found.twin for found in (once, twice)]
    assert np.linalg.norm(changes[1] - 2 * changes[0]) < 1e-4 * np.linalg.norm(changes[0]) > 0


def test_what_the_halves_give_does_not_depend_on_the_mixture_of_all_images():
    _, halves, mixtures = draw("good", 1.0, 1.0, 0)
    plain = deliver(halves, mixtures, MASK, SUMS)
    for full in (TRUTH.astype(np.float32), np.zeros_like(mixtures[0]), 100 * mixtures[0]):
        found = deliver(halves, mixtures, MASK, SUMS, full)
        for ours, theirs in zip((*found.parts, found.linear), (*plain.parts, plain.linear), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for name in ("gamma", "delta", "wiener"):
            np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
        assert not np.array_equal(found.map, plain.map)
