"""The errors stated are the spread of repeated experiments."""

import numpy as np
import pytest
from halfmaps import molecule, noise
from numpy.testing import assert_allclose

from cryosplat.fsc import FscCurve, fsc, resolution, shell_index
from cryosplat.masks import spherical_mask
from cryosplat.uncertainty import independent_voxels, standard_error, voxels_in_shells

BOX, PIXEL_SIZE_A, REPEATS = 24, 3.0, 150


@pytest.fixture(scope="module", params=[None, 5.0], ids=["no mask", "a small ball"])
def experiments(request):
    """FSC (repeats, shells) of one molecule with noise drawn anew, and the mask."""
    mask = None if request.param is None else spherical_mask(BOX, request.param, 4)
    truth = molecule(BOX, 0.2)
    truth /= 0.7 * truth.std()
    curves = [
        fsc(truth + noise(BOX, seed), truth + noise(BOX, 5000 + seed), PIXEL_SIZE_A, mask).fsc
        for seed in range(REPEATS)
    ]
    return np.array(curves), mask


def test_the_standard_error_is_the_spread_of_repeated_experiments(experiments):
    curves, mask = experiments
    expected = standard_error(curves.mean(0), independent_voxels(BOX, mask))
    ratio = curves.std(0)[2:] / expected[2:]
    assert 0.93 < np.sqrt(np.mean(ratio**2)) < 1.07
    assert ratio.min() > 0.75 and ratio.max() < 1.25
    assert curves.mean(0)[2] > 0.9 and curves.mean(0)[-1] < 0.3  # from signal to noise


def test_the_error_of_a_resolution_is_the_spread_of_repeated_experiments(experiments):
    curves, mask = experiments
    independent = independent_voxels(BOX, mask)
    found = [
        resolution(FscCurve(curve, BOX, PIXEL_SIZE_A, standard_error(curve, independent)), 0.5) for curve in curves
    ]
    spread = np.std([each.angstrom for each in found if each.error_a is not None])
    stated = np.median([each.error_a for each in found if each.error_a is not None])
    assert 0.6 < stated / spread < 1.6


def test_copies_by_symmetry_are_not_independent():
    assert_allclose(independent_voxels(16, spherical_mask(16), 7), independent_voxels(16, spherical_mask(16)) / 7)


def test_voxels_are_counted_on_the_full_sphere():
    shells = np.rint(np.linalg.norm(np.indices((17, 17, 17)) - 8, axis=0)).astype(int)
    assert_allclose(voxels_in_shells(17), np.bincount(shells.ravel())[:9])


@pytest.mark.parametrize("radius", [3.0, 5.0])
def test_independent_voxels_are_those_of_the_definition(radius):
    """n_eff = n^2 / sum over all pairs of a shell of |W(k - k')|^2 / |W(0)|^2, by brute force."""
    box, shell = 16, 6
    mask = spherical_mask(box, radius, 3)
    power = np.abs(np.fft.fftn(mask.astype(float) ** 2)) ** 2
    power /= power[0, 0, 0]
    half = np.argwhere(shell_index(box) == shell)
    voxels = np.unique(np.concatenate([half, (-half) % box]), axis=0)
    difference = (voxels[:, None] - voxels) % box
    exact = len(voxels) ** 2 / power[tuple(np.moveaxis(difference, -1, 0))].sum()
    assert independent_voxels(box, mask)[shell] == pytest.approx(exact, rel=0.08)
    assert independent_voxels(box, mask)[shell] < 0.6 * voxels_in_shells(box)[shell]


def test_a_resolution_has_no_error_where_the_curve_has_none_or_does_not_cross():
    assert resolution(FscCurve(np.array([1, 1, 0.6, 0.4]), 6, 1.0), 0.5).error_a is None
    assert resolution(FscCurve(np.ones(4), 6, 1.0, np.full(4, 0.1)), 0.5).error_a is None


def test_a_flat_curve_does_not_tell_where_it_crosses():
    steep, flat = (
        FscCurve(np.array([1, *np.linspace(0.5 + rise, 0.5 - rise, 8)]), 16, 1.0, np.full(9, 0.05))
        for rise in (0.4, 0.01)
    )
    assert resolution(flat, 0.5).error_a > 3 * resolution(steep, 0.5).error_a
