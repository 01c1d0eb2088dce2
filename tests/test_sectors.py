"""Sums over shells and sectors: complete, of equal size, and with errors that simulations agree with."""

import numpy as np
import pytest
from halfmaps import molecule, noise
from scipy import ndimage

from cryosplat.fsc import masked_spectrum, shell_sums
from cryosplat.masks import spherical_mask
from cryosplat.sectors import BANDS, WEDGES, SectorSums, jackknife, smooth
from cryosplat.symmetry import point_group


@pytest.mark.parametrize("box", [12, 16, 30])
def test_sums_over_sectors_are_the_sums_over_shells(box):
    first, second = (masked_spectrum(noise(box, seed)) for seed in (0, 1))
    sums = SectorSums(box)
    cross, power, _ = shell_sums(first, second)
    np.testing.assert_allclose(sums.cross(first, second).sum(1), cross, rtol=1e-9, atol=1e-9 * power.max())
    np.testing.assert_allclose(sums.cross(first, first).sum(1), power, rtol=1e-9)
    np.testing.assert_allclose(sums(np.abs(first) ** 2).sum(1), power, rtol=1e-9)


def test_weights_multiply_every_voxel():
    spectrum = masked_spectrum(noise(16, 0))
    weights = np.random.default_rng(0).random(spectrum.shape)
    sums = SectorSums(16)
    np.testing.assert_allclose(
        sums.cross(spectrum, spectrum, weights), sums.cross(np.sqrt(weights) * spectrum, np.sqrt(weights) * spectrum)
    )


def test_voxels_are_counted_on_the_whole_sphere_and_shared_out_equally():
    box = 48
    sums = SectorSums(box)
    z, y, x = np.indices((box,) * 3) - box // 2
    shells = np.rint(np.sqrt(x**2 + y**2 + z**2)).astype(int)
    np.testing.assert_array_equal(sums.voxels.sum(1), np.bincount(shells.ravel())[: box // 2 + 1])
    share = sums.voxels[12:] / sums.voxels[12:].sum(1, keepdims=True) * BANDS * WEDGES
    assert 0.6 < share.min() and share.max() < 1.4
    assert np.abs(share.mean(0) - 1).max() < 0.15


def test_a_voxel_is_inside_within_the_sphere_of_nyquist_alone():
    sums = SectorSums(8)
    assert sums.inside[0, 0].tolist() == [True, True, True, True, False]
    assert sums.inside[0, 3, 2] and not sums.inside[0, 3, 3]  # sqrt 13 and sqrt 18, of 4
    assert sums.shell[0, 3, 3] == sums.shell[4, 4, 4] == 4  # the corners are told apart by `inside` only


def test_mates_lie_in_sectors_that_add_them_up_once():
    """A voxel of the plane x = 0 and its mate are both stored; each counts once, like all others."""
    sums = SectorSums(8)
    one = np.zeros((8, 8, 5))
    one[2, 1, 0] = 1
    assert sums(one).sum() == 1
    one[:] = 0
    one[2, 1, 2] = 1
    assert sums(one).sum() == 2


def test_jackknife_errors_of_a_ratio_are_those_of_a_simulation():
    """FSC-like ratios of 24 sectors: the mean estimated variance is the variance seen over a thousand draws."""
    random = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(1000):
        signal = random.normal(1, 0.3, (1, 24))
        cross, power = signal + random.normal(0, 0.4, (1, 24)), signal + random.exponential(0.5, (1, 24))
        value, error = jackknife(lambda cross, power: cross / power, cross, power)
        found.append(value[0])
        errors.append(error[0])
    assert np.mean(np.square(errors)) == pytest.approx(np.var(found), rel=0.1)
    # "An error known to 15 %": the square root of 1 / (2 x 23).
    assert np.std(errors) / np.mean(errors) == pytest.approx(0.147, abs=0.05)


def test_jackknife_errors_of_a_correlation_of_maps_are_those_of_a_simulation():
    truth, box = molecule(20, 0.25), 20
    sums, found, errors = SectorSums(box), [], []
    for seed in range(60):
        spectrum, other = (masked_spectrum(truth + 0.7 * truth.std() * noise(box, 2 * seed + k)) for k in (0, 1))
        sums_of_both = sums.cross(spectrum, other), sums.cross(spectrum, spectrum)
        value, error = jackknife(lambda cross, power: smooth(cross / np.maximum(power, 1e-30)), *sums_of_both)
        found.append(value)
        errors.append(error)
    ratio = np.sqrt(np.mean(np.square(errors), 0)) / np.std(found, 0)
    assert 0.8 < np.median(ratio[4:]) < 1.25


@pytest.mark.parametrize(("name", "plain_too_small"), [("C2", 0.8), ("D7", 0.5), ("O", 0.35)])
def test_jackknife_errors_of_symmetric_maps_are_those_of_a_simulation(name, plain_too_small):
    """Of FSC of noise. Sectors that know nothing of the symmetry take copies for repetitions."""
    box, group, mask = 32, point_group(name), spherical_mask(32, 10)
    spectra = [masked_spectrum(averaged(noise(box, seed), group), mask) for seed in range(30)]
    ratios = []
    for sums in (SectorSums(box, group), SectorSums(box)):
        powers, found = [sums.cross(spectrum, spectrum) for spectrum in spectra], []
        for first in range(len(spectra)):
            second = (first + 7) % len(spectra)
            cross = sums.cross(spectra[first], spectra[second])
            found.append(jackknife(fsc_of_sums, cross, powers[first], powers[second]))
        values, errors = np.array(found)[:, :, 6:12].transpose(1, 0, 2)
        ratios.append(np.sqrt(np.mean(errors**2) / np.mean(values**2)))
    assert 0.7 < ratios[0] < 1.2 and ratios[1] < plain_too_small


def fsc_of_sums(cross, power, other):
    return cross / np.sqrt(np.maximum(power * other, 1e-30))


def averaged(volume, group):
    """The mean over S of V(S x), by cubic splines."""
    box = len(volume)
    coefficients = ndimage.spline_filter(ndimage.gaussian_filter(volume, 0.6))
    xyz = np.indices(volume.shape)[::-1].reshape(3, -1) - box // 2
    turned = ((turn @ xyz)[::-1] + box // 2 for turn in group)
    return sum(ndimage.map_coordinates(coefficients, zyx, prefilter=False) for zyx in turned).reshape(volume.shape)


@pytest.mark.parametrize("name", ["C7", "I"])
def test_sectors_of_a_symmetry_are_of_nearly_equal_size_and_complete(name):
    first, sums = masked_spectrum(noise(40, 0)), SectorSums(40, point_group(name))
    np.testing.assert_allclose(sums.cross(first, first).sum(1), shell_sums(first, first)[1], rtol=1e-9)
    large = sums.voxels[12:-1].sum(0)
    assert large.min() > 0.85 * large.max()


def test_a_mean_has_the_textbook_error():
    sums = np.random.default_rng(0).normal(size=(5, 24))
    value, error = jackknife(lambda total: total / 24, sums)
    np.testing.assert_allclose(value, sums.mean(1))
    np.testing.assert_allclose(error, sums.std(1, ddof=1) / np.sqrt(24))


def test_smoothing_leaves_lines_and_low_shells_as_they_are():
    line = np.arange(20.0)
    np.testing.assert_allclose(smooth(line), line)
    curve = np.random.default_rng(0).normal(size=20)
    smoothed = smooth(curve)
    np.testing.assert_array_equal(smoothed[:4], curve[:4])
    assert smoothed[5] == pytest.approx(curve[4:7].mean())
    assert smoothed[12] == pytest.approx(curve[10:15].mean())
    # Windows stay symmetrical up to the last shell.
    assert smoothed[18] == pytest.approx(curve[17:20].mean()) and smoothed[19] == curve[19]


def test_smoothing_takes_curves_of_sectors_and_leaves_its_argument_alone():
    curves = np.random.default_rng(0).normal(size=(20, 3))
    before = curves.copy()
    smoothed = smooth(curves)
    np.testing.assert_array_equal(curves, before)
    for column in range(3):
        np.testing.assert_allclose(smoothed[:, column], smooth(curves[:, column]))
