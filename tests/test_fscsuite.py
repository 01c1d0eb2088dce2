"""The suite's curves are those of relion_postprocess, and what is odd about half maps is said."""

import dataclasses
import shutil
import subprocess

import numpy as np
import pytest
import scipy.ndimage
from halfmaps import frequencies, halves, molecule, noise

from cryosplat import fscchecks
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, fsc, resolution
from cryosplat.fscsuite import corrected, fsc_suite, randomisation_shell
from cryosplat.masks import low_pass, mask_from_map, spherical_mask
from cryosplat.uncertainty import voxels_in_shells
from cryosplat.volumes import write_map

BOX, PIXEL_SIZE_A = 48, 3.0


@pytest.fixture(scope="module")
def truth():
    return molecule(BOX)


@pytest.fixture(scope="module")
def pair(truth):
    return halves(truth, 1.0)


@pytest.fixture(scope="module")
def mask(truth):
    return mask_from_map(truth, PIXEL_SIZE_A, "loose")


@pytest.fixture(scope="module")
def suite(pair):
    return fsc_suite(*pair, PIXEL_SIZE_A)


def about(suite, words):
    return [warning for warning in suite.warnings if words in warning]


def test_the_suite_of_good_half_maps_has_all_curves_and_nothing_to_say(suite, pair):
    assert list(suite.curves) == ["unmasked", "sphere", "loose", "tight", "phase_randomised", "corrected"]
    assert suite.final == "corrected" and suite.warnings == []
    np.testing.assert_allclose(suite.curves["unmasked"].fsc, fsc(*pair, PIXEL_SIZE_A).fsc, atol=1e-6)
    np.testing.assert_allclose(suite.curves["tight"].fsc, fsc(*pair, PIXEL_SIZE_A, suite.mask).fsc, atol=1e-5)
    np.testing.assert_array_equal(suite.mask, mask_from_map(pair[0] + pair[1], PIXEL_SIZE_A))
    found = {name: levels[0.143].angstrom for name, levels in suite.resolutions.items()}
    assert found["unmasked"] > found["sphere"] > found["loose"] > found["corrected"]
    assert all(levels[0.143].error_a > 0 for levels in suite.resolutions.values())
    assert 0.7 < suite.anisotropy <= 1


def test_the_corrected_curve_is_that_of_noise_within_the_mask(truth, pair, mask):
    """Where noise is white, the FSC under a mask is signal / (signal + noise power that the mask lets through)."""
    suite = fsc_suite(*pair, PIXEL_SIZE_A, mask)
    shells = np.rint(frequencies(BOX)).astype(int)
    signal = np.bincount(shells.ravel(), (np.abs(np.fft.rfftn(truth * mask)) ** 2).ravel())[: BOX // 2 + 1]
    counts = np.bincount(shells.ravel())[: BOX // 2 + 1]
    expected = signal / (signal + counts * truth.std() ** 2 * (mask.astype(float) ** 2).sum())
    deviation = (suite.curves["corrected"].fsc - expected) / suite.curves["corrected"].error
    assert np.sqrt(np.mean(deviation[2:] ** 2)) < 1.7


@pytest.mark.skipif(not shutil.which("relion_postprocess"), reason="needs RELION's relion_postprocess")
def test_every_curve_is_that_of_relion_postprocess(tmp_path, pair, mask):
    for number, half in enumerate(pair, 1):
        write_map(tmp_path / f"half{number}.mrc", half, PIXEL_SIZE_A)
    write_map(tmp_path / "mask.mrc", mask, PIXEL_SIZE_A)
    runs = np.array([relion_curves(tmp_path, seed) for seed in range(1, 13)])
    theirs = dict(zip(("corrected", "unmasked", "masked", "phase_randomised"), runs.mean(0).T, strict=True))
    suite = fsc_suite(*pair, PIXEL_SIZE_A, mask)
    assert suite.randomisation_shell == np.flatnonzero(theirs["unmasked"] < 0.8)[0]
    # One set of random phases is off by the noise of two maps that share nothing: the mean of theirs is compared.
    spread = runs.std(0)[:, 3] / np.sqrt(len(runs))
    for name in ("masked", "corrected"):
        np.testing.assert_allclose(suite.curves[name].fsc[1:], theirs[name][1:], atol=0.01, err_msg=name)
    # RELION counts every voxel of the half-spectrum once, also those whose Friedel mate is not stored.
    spectra, shells = (np.fft.rfftn(half.astype(np.float32)) for half in pair), np.rint(frequencies(BOX)).astype(int)
    first, second = spectra
    sums = [
        np.bincount(shells.ravel(), values.ravel())[: BOX // 2 + 1]
        for values in ((first * second.conj()).real, abs(first) ** 2, abs(second) ** 2)
    ]
    np.testing.assert_allclose((sums[0] / np.sqrt(sums[1] * sums[2]))[1:], theirs["unmasked"][1:], atol=1e-4)
    assert (np.abs(suite.curves["unmasked"].fsc - theirs["unmasked"]) < suite.curves["unmasked"].error)[1:].all()
    difference = np.abs(suite.curves["phase_randomised"].fsc - theirs["phase_randomised"])[1:]
    assert (difference < 0.01 + 3.5 * spread[1:]).all()
    ours = suite.resolutions["corrected"][0.143]
    theirs_a = resolution(FscCurve(theirs["corrected"], BOX, PIXEL_SIZE_A), 0.143).angstrom
    assert ours.angstrom == pytest.approx(theirs_a, rel=0.02)


def relion_curves(folder, seed):
    """FSC corrected, unmasked, masked, with random phases: (shells, 4)."""
    words = f"--i half1.mrc --i2 half2.mrc --mask mask.mrc --angpix {PIXEL_SIZE_A} --random_seed {seed} --o s{seed}"
    # It fails at the end, where there is no gs to make a PDF of its curves; by then they are written.
    subprocess.run(["relion_postprocess", *words.split()], cwd=folder, check=False, capture_output=True)
    text = (folder / f"s{seed}.star").read_text().split("data_fsc")[1].split("data_")[0]
    lines = [line.split() for line in text.splitlines()]
    names = [words[0] for words in lines if words and words[0].startswith("_rln")]
    rows = np.array([words for words in lines if len(words) == len(names) and words[0].isdigit()], dtype=float)
    wanted = ("Corrected", "UnmaskedMaps", "MaskedMaps")
    columns = [names.index(f"_rlnFourierShellCorrelation{name}") for name in wanted]
    columns.append(names.index("_rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps"))
    return rows[:, columns]


def test_a_mask_that_makes_noise_correlate_is_corrected_for(truth, pair):
    """A hard-edged mask round nothing in particular spreads the low frequencies over the noise."""
    rng = np.random.default_rng(0)
    ragged = (scipy.ndimage.gaussian_filter(rng.standard_normal((BOX,) * 3), 1.2) > 0.1).astype(np.float32)
    smooth = [low_pass(truth, 30.0, PIXEL_SIZE_A) + 0.3 * truth.std() * noise(BOX, seed) for seed in (1, 2)]
    suite = fsc_suite(*smooth, PIXEL_SIZE_A, ragged)
    last = slice(3 * BOX // 8, None)
    assert suite.curves["masked"].fsc[last].mean() > 0.05
    assert abs(suite.curves["corrected"].fsc[last].mean()) < 0.4 * suite.curves["masked"].fsc[last].mean()
    assert about(suite, "the mask is too tight or its edge too sharp")


def test_correction_follows_the_formula_from_two_shells_beyond_the_randomisation_on():
    masked = FscCurve(np.array([1, 1, 0.9, 0.8, 0.7, 0.6, 0.5]), 12, 1.0, np.full(7, 0.01))
    randomised = FscCurve(np.array([1, 1, 0.9, 0.5, 0.2, 0.1, 0.1]), 12, 1.0, np.full(7, 0.01))
    curve = corrected(masked, randomised, 2)
    np.testing.assert_allclose(curve.fsc, [1, 1, 0.9, 0.8, 0.5 / 0.8, 0.5 / 0.9, 0.4 / 0.9])
    assert (curve.error[4:] > 0.01 / 0.9).all() and (curve.error[:4] == 0.01).all()


def test_randomisation_begins_at_the_first_shell_below_eight_tenths():
    assert randomisation_shell(FscCurve(np.array([0, 1, 0.8, 0.79, 0.9]), 8, 1.0)) == 3
    assert randomisation_shell(FscCurve(np.array([0, 1, 0.9]), 4, 1.0)) is None


def test_the_seed_matters_little_and_the_same_seed_not_at_all(pair, mask, suite):
    one, same, other = (fsc_suite(*pair, PIXEL_SIZE_A, mask, seed, directions=False) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.curves["corrected"].fsc, same.curves["corrected"].fsc)
    assert 0 < np.abs(one.curves["corrected"].fsc - other.curves["corrected"].fsc).max() < 0.005
    assert one.directional is None and one.anisotropy is None


@pytest.mark.parametrize("box", [31, 32, 33])
def test_odd_boxes_are_as_good_as_even_ones(box):
    suite = fsc_suite(*halves(molecule(box), 1.0), PIXEL_SIZE_A)
    masked, randomised = suite.curves["tight"].fsc, suite.curves["phase_randomised"].fsc
    assert len(masked) == box // 2 + 1
    np.testing.assert_allclose(
        randomised[: suite.randomisation_shell - 2], masked[: suite.randomisation_shell - 2], atol=0.05
    )
    assert np.abs(randomised[suite.randomisation_shell + 4 :]).max() < 0.1


def test_without_a_mask_nothing_is_corrected(pair):
    suite = fsc_suite(*pair, PIXEL_SIZE_A, "none")
    assert list(suite.curves) == ["unmasked", "sphere"] and suite.final == "unmasked"
    assert suite.mask is None and suite.randomised_beyond_a is None


def test_noise_alone_has_no_resolution_and_gets_a_sphere_for_a_mask():
    suite = fsc_suite(noise(BOX, 1), noise(BOX, 2), PIXEL_SIZE_A)
    assert about(suite, "a sphere is used instead")
    np.testing.assert_array_equal(suite.mask, spherical_mask(BOX))
    assert suite.resolutions["corrected"][0.143].angstrom > 0.2 * BOX * PIXEL_SIZE_A


# What is odd is said, and what it means


def test_identical_halves(pair):
    suite = fsc_suite(pair[0], pair[0], PIXEL_SIZE_A)
    assert about(suite, "identical") and suite.curves["corrected"] is suite.curves["tight"]


def test_inverted_halves(pair):
    (warning,) = fsc_suite(pair[0], -pair[1], PIXEL_SIZE_A, "none").warnings
    assert "inverted contrast" in warning


def test_a_curve_that_the_sampling_ends(truth):
    sharp = [scipy.ndimage.laplace(truth) + 0.02 * noise(BOX, seed) for seed in (1, 2)]
    assert about(fsc_suite(*sharp, PIXEL_SIZE_A, "none"), "the sampling is the limit")


def test_a_curve_that_comes_back(truth):
    gap = np.abs(frequencies(BOX) - 10) < 2
    pair = [truth + truth.std() * noise(BOX, seed, weight=1 + 60 * gap) for seed in (1, 2)]
    found = about(fsc_suite(*pair, PIXEL_SIZE_A, "none"), "is above it again")
    assert len(found) == 2 and "0.5" in found[0] and "0.143" in found[1]


@pytest.mark.parametrize("strength", [1.0, 6.0])
@pytest.mark.parametrize("shared", [0.3, 1.0])
def test_particles_in_both_halves(truth, strength, shared):
    common = shared * strength * truth.std() * noise(BOX, 7)
    pair = halves(low_pass(truth, 12.0, PIXEL_SIZE_A), strength)
    assert not about(fsc_suite(*pair, PIXEL_SIZE_A), "share particles")
    suite = fsc_suite(*(half + common for half in pair), PIXEL_SIZE_A)
    assert about(suite, "share particles")


def test_a_corrected_curve_that_dips_where_the_correction_begins():
    smooth = np.linspace(1, 0.2, 25)
    dipped = smooth.copy()
    dipped[9:11] -= 0.3
    for values, expected in ((smooth, 0), (dipped, 1)):
        curve = FscCurve(values, 48, 3.0, np.full(25, 0.01))
        curves = {"unmasked": curve, "corrected": curve, "phase_randomised": dataclasses.replace(curve, fsc=0 * smooth)}
        found = [warning for warning in fscchecks.warnings(curves, False, 7) if "dips by" in warning]
        assert len(found) == expected
    assert "20.57 A" in found[0]  # where phases are randomised: 48 px x 3 A / 7


def test_a_mask_that_hardly_masks(pair):
    assert about(fsc_suite(*pair, PIXEL_SIZE_A, np.ones((BOX,) * 3)), "hardly masks")


def test_maps_that_are_better_in_some_directions_than_in_others(truth):
    full = np.fft.fftfreq(BOX)
    near_z = np.abs(full[:, None, None]) > 0.8 * np.maximum(frequencies(BOX) / BOX, 1e-9)
    pair = [truth + truth.std() * noise(BOX, seed, weight=1 + 14 * near_z) for seed in (1, 2)]
    suite = fsc_suite(*pair, PIXEL_SIZE_A)
    assert suite.anisotropy < 0.5 and about(suite, "viewing directions")
    assert abs(suite.directional.directions[suite.directional.worst][2]) > 0.85


@pytest.mark.parametrize(
    ("second", "mask", "message"),
    [
        (np.zeros((10, 10, 10)), None, "half map b has a box of 10 px"),
        (np.full((8, 8, 8), np.nan), None, "half map b: 512 non-finite"),
        (np.ones((8, 8, 8)), np.ones((10, 10, 10)), "the mask has a box of 10 px"),
        (np.ones((8, 8, 8)), np.full((8, 8, 8), 1.5), "expected values from 0 to 1"),
        (np.ones((8, 8, 8)), np.zeros((8, 8, 8)), "keeps 0 % of the box"),
        (np.ones((8, 8, 8)), "automatic", "mask='automatic'"),
    ],
)
def test_what_makes_no_sense_is_refused(second, mask, message):
    with pytest.raises(InputError, match=message):
        fsc_suite(np.zeros((8, 8, 8)), second, 1.0, mask)


def test_errors_are_smaller_where_there_are_more_voxels(suite):
    error = suite.curves["unmasked"].error
    np.testing.assert_allclose(error[-1], 1 / np.sqrt(voxels_in_shells(BOX)[-1]), rtol=0.1)
