"""Local resolution is that of the place."""

import numpy as np
import pytest
from halfmaps import molecule, noise

from cryosplat.errors import InputError
from cryosplat.fsc import fsc, resolution
from cryosplat.localresolution import default_window_a, local_resolution
from cryosplat.masks import cosine_edge, spherical_mask

BOX, PIXEL_SIZE_A = 48, 2.0


@pytest.fixture(scope="module")
def truth():
    """Signal everywhere, so that every place has a resolution."""
    rng = np.random.default_rng(1)
    return sum(np.roll(molecule(BOX, 0.35, seed), rng.integers(0, BOX, 3), (0, 1, 2)) for seed in range(3))


def test_each_half_of_a_map_has_the_resolution_of_its_noise(truth):
    quiet = np.arange(BOX) < BOX // 2
    strength = np.where(quiet, 0.3, 2.5)[:, None, None] * truth.std()
    pair = [truth + strength * noise(BOX, seed) for seed in (1, 2)]
    local = local_resolution(*pair, PIXEL_SIZE_A, 36.0)
    assert local.dtype == np.float32 and local.shape == (BOX,) * 3
    for middle in (BOX // 4, 3 * BOX // 4):
        slab = cosine_edge(np.abs(np.arange(BOX) - middle) - 4.0, 5.0)[:, None, None] * np.ones((BOX,) * 3)
        expected = resolution(fsc(*pair, PIXEL_SIZE_A, slab), 0.143).angstrom
        assert np.median(local[middle - 2 : middle + 3]) == pytest.approx(expected, rel=0.25)
    assert np.median(local[12]) < 0.75 * np.median(local[36])


def test_a_better_threshold_is_a_worse_resolution_and_values_stay_within_their_limits(truth):
    pair = [truth + truth.std() * noise(BOX, seed) for seed in (1, 2)]
    strict, usual = (local_resolution(*pair, PIXEL_SIZE_A, 30.0, threshold) for threshold in (0.5, 0.143))
    assert (strict >= usual - 1e-4).all() and strict.mean() > usual.mean()
    assert usual.min() >= 2 * PIXEL_SIZE_A and strict.max() <= 30.0 + 1e-4


def test_without_noise_it_is_nyquist_and_without_signal_the_window(truth):
    np.testing.assert_allclose(local_resolution(truth, 2 * truth, PIXEL_SIZE_A, 30.0), 4.0, rtol=1e-5)
    unrelated = local_resolution(noise(BOX, 1), noise(BOX, 2), PIXEL_SIZE_A, 30.0)
    assert np.median(unrelated) > 20.0


def test_outside_the_mask_stands_the_largest_value(truth):
    pair = [truth + truth.std() * noise(BOX, seed) for seed in (1, 2)]
    mask = spherical_mask(BOX, 8, 3)
    local = local_resolution(*pair, PIXEL_SIZE_A, 30.0, mask=mask)
    assert (local[mask == 0] == 30.0).all()
    np.testing.assert_array_equal(local[mask > 0], local_resolution(*pair, PIXEL_SIZE_A, 30.0)[mask > 0])


@pytest.mark.parametrize("window_a", [20.0, 50.0, -1.0])
def test_a_window_that_is_too_small_or_too_large_is_refused(truth, window_a):
    with pytest.raises(InputError, match="expected 12 to 24 px, that is 24 to 48 A"):
        local_resolution(truth, truth, PIXEL_SIZE_A, window_a)


def test_the_default_window_is_seven_resolutions_within_what_is_allowed():
    assert [default_window_a(angstrom, 100, 2.0) for angstrom in (2.0, 10.0, 40.0)] == [24.0, 70.0, 100.0]
