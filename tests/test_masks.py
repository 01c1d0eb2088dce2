"""Masks cover the molecule and little else, however noisy the map; what is no mask is refused."""

import logging

import numpy as np
import pytest
from halfmaps import halves, molecule, noise

from cryosplat.errors import InputError
from cryosplat.fsc import fsc, resolution
from cryosplat.masks import check_mask, low_pass, mask_from_map, masks_from_map, spherical_mask

BOX, PIXEL_SIZE_A = 48, 4.0


@pytest.fixture(scope="module")
def truth():
    return molecule(BOX)


@pytest.fixture(scope="module")
def outline(truth):
    """Where the molecule is, at the smoothing of a mask."""
    smooth = low_pass(truth, 16.0, PIXEL_SIZE_A)
    return smooth > 0.1 * np.percentile(smooth, 99)


def covered(truth, mask):
    return float((truth * mask).sum() / truth.sum())


@pytest.mark.parametrize(("strength", "power"), [(0, 0), (0.5, 0), (1.5, 0), (2, 1), (6, 1), (3, 2), (9, 2)])
@pytest.mark.parametrize("kind", ["tight", "loose"])
def test_a_mask_made_from_a_noisy_map_covers_the_molecule_and_not_much_more(truth, outline, strength, power, kind):
    mask = mask_from_map(sum(halves(truth, strength, power)), PIXEL_SIZE_A, kind)
    assert mask.dtype == np.float32 and mask.min() == 0 and mask.max() == 1
    assert covered(truth, mask) > 0.99
    assert (mask > 0.5).sum() < {"tight": 2.0, "loose": 3.5}[kind] * outline.sum()
    assert mask[0, 0, 0] == 0


def test_that_noise_is_strong_enough_to_matter(truth, outline):
    found = [
        resolution(fsc(*halves(truth, strength, power), PIXEL_SIZE_A, outline), 0.143).angstrom
        for strength, power in ((1.5, 0), (6, 1), (9, 2))
    ]
    assert min(found) > 2.2 * PIXEL_SIZE_A and max(found) > 3 * PIXEL_SIZE_A


def test_scale_and_background_of_the_map_change_nothing(truth):
    volume = sum(halves(truth, 1.0))
    np.testing.assert_allclose(
        mask_from_map(1e-4 * volume + 7e-5, PIXEL_SIZE_A), mask_from_map(volume, PIXEL_SIZE_A), atol=1e-3
    )


def test_corners_set_to_zero_do_not_pass_for_a_quiet_background(truth, outline):
    volume = sum(halves(truth, 1.0)) * (spherical_mask(BOX, 0.5 * BOX, 0) > 0)
    mask = mask_from_map(volume, PIXEL_SIZE_A)
    assert covered(truth, mask) > 0.99 and (mask > 0.5).sum() < 2 * outline.sum()


@pytest.mark.parametrize("rise", [-0.7, 4.0])
def test_noise_that_falls_or_rises_towards_the_corners_moves_the_mask_little(truth, outline, rise):
    x = 2 * np.arange(BOX) / BOX - 1
    profile = 1 + rise * (x[:, None, None] ** 2 + x[:, None] ** 2 + x**2) / 3
    volume = truth + 0.7 * truth.std() * profile * noise(BOX, 5)
    mask = mask_from_map(volume, PIXEL_SIZE_A)
    assert covered(truth, mask) > 0.99 and (mask > 0.5).sum() < 2 * outline.sum()


def test_specks_are_dropped_and_holes_filled(truth):
    x = np.arange(BOX) - BOX // 2
    radius = np.sqrt(x[:, None, None] ** 2 + x[:, None] ** 2 + x**2)
    hollow = ((radius < 14) & (radius > 8)).astype(float)
    hollow[8:11, 8:11, 24] = 1.0
    mask = mask_from_map(hollow, PIXEL_SIZE_A)
    assert (mask[radius < 14] == 1).all() and mask[9, 9, 24] == 0


def test_the_loose_mask_holds_the_tight_one(truth):
    made = masks_from_map(truth, PIXEL_SIZE_A)
    assert (made["loose"] >= made["tight"]).all() and made["loose"].sum() > 1.3 * made["tight"].sum()
    np.testing.assert_array_equal(made["tight"], mask_from_map(truth, PIXEL_SIZE_A))


@pytest.mark.parametrize("volume", [noise(BOX, 1), -molecule(BOX), np.zeros((BOX, BOX, BOX))], ids=["noise", "-", "0"])
def test_a_map_without_density_is_refused(volume):
    with pytest.raises(InputError, match="clear of its background"):
        mask_from_map(volume, PIXEL_SIZE_A)


def test_a_spherical_mask_is_one_inside_half_in_the_middle_of_its_edge_and_nothing_outside():
    mask = spherical_mask(32, 8, 6)
    np.testing.assert_allclose(mask[16, 16, [16, 24, 27, 30]], [1, 1, 0.5, 0], atol=1e-6)
    assert spherical_mask(32)[16, 16, 0] == 0 and spherical_mask(32).mean() > 0.15
    assert spherical_mask(8)[4, 4, 0] == 0 and 0.1 < spherical_mask(8).mean() < 0.52  # the edge is narrower there
    with pytest.raises(InputError, match="positive"):
        spherical_mask(32, -1)


def test_a_mask_may_overshoot_by_rounding():
    mask = spherical_mask(16)
    mask[8, 8, 8] = 1 + 5e-5
    check_mask(mask)
    mask[8, 8, 8] = 1 + 5e-4
    with pytest.raises(InputError, match="from 0 to 1"):
        check_mask(mask)


def test_a_mask_that_keeps_most_of_the_box_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        check_mask(spherical_mask(16))
        assert not caplog.records
        check_mask(np.ones((16, 16, 16)), "full.mrc")
    assert "full.mrc keeps 100 % of the box" in caplog.text
