"""Sharpening undoes a known decay, weighs by how far the map is right, and ends at the resolution."""

import numpy as np
import pytest
import scipy.fft

from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, fsc
from cryosplat.sharpening import fsc_weights, guinier_fit, low_pass_weights, sharpen, shell_amplitudes

PIXEL_SIZE_A = 1.5


def white(box, seed):
    return np.random.default_rng(seed).standard_normal((box, box, box))


def decayed(volume, b_factor_a2, pixel_size_a=PIXEL_SIZE_A):
    """A map times exp(-b s^2 / 4)."""
    full, half = np.fft.fftfreq(len(volume), pixel_size_a), np.fft.rfftfreq(len(volume), pixel_size_a)
    squares = full[:, None, None] ** 2 + full[:, None] ** 2 + half**2
    return scipy.fft.irfftn(scipy.fft.rfftn(volume) * np.exp(-b_factor_a2 / 4 * squares), volume.shape)


def wave(box, shell):
    return np.broadcast_to(np.cos(2 * np.pi * shell * np.arange(box) / box), (box,) * 3)


@pytest.mark.parametrize("box", [47, 48])
@pytest.mark.parametrize("b_factor_a2", [40.0, 120.0])
def test_the_fit_finds_the_decay_and_sharpening_makes_amplitudes_level(box, b_factor_a2):
    result = sharpen(decayed(white(box, 1), b_factor_a2), PIXEL_SIZE_A, resolution_a=3.2)
    assert result.b_factor_a2 == pytest.approx(-b_factor_a2, rel=0.02)
    assert result.fit.r_squared > 0.99
    level = result.amplitudes["sharpened"][2 : int(box * PIXEL_SIZE_A / 3.2) - 1]
    assert level.std() / level.mean() < 0.05
    assert shell_amplitudes(scipy.fft.rfftn(result.volume))[2:20] == pytest.approx(result.amplitudes["sharpened"][2:20])


def test_a_fit_of_a_straight_line_is_that_line_over_the_shells_of_the_range():
    box, side_a = 64, 64 * PIXEL_SIZE_A
    squares = (np.arange(33) / side_a) ** 2
    amplitudes = np.exp(2.0 - 30 * squares)
    amplitudes[:9] = 100  # below 10 A: shell 9 is 10.67 A, shell 10 is 9.6 A
    amplitudes[25:] = 100  # beyond 4 A
    fit = guinier_fit(amplitudes, box, PIXEL_SIZE_A, 10.0, 4.0)
    assert (fit.slope, fit.intercept, fit.r_squared) == pytest.approx((-30, 2, 1))
    assert fit.b_factor_a2 == pytest.approx(-120) and fit.shells == 15  # shells 10 to 24
    noisy = amplitudes * np.exp(np.random.default_rng(1).normal(0, 0.1, 33))
    x, y = squares[10:25], np.log(noisy[10:25])
    assert guinier_fit(noisy, box, PIXEL_SIZE_A, 10, 4).r_squared == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)


@pytest.mark.parametrize("b_factor_a2, gains", [(-80.0, True), (80.0, False)])
def test_a_negative_b_amplifies_by_the_formula_and_a_positive_one_damps(b_factor_a2, gains):
    box, shell = 32, 8
    s = shell / (box * PIXEL_SIZE_A)
    result = sharpen(wave(box, shell), PIXEL_SIZE_A, 3.5, b_factor_a2=b_factor_a2)
    gain = np.exp(-b_factor_a2 * s**2 / 4)
    assert (gain > 1) == gains and result.fit is None and result.b_factor_a2 == b_factor_a2
    np.testing.assert_allclose(result.volume, gain * wave(box, shell), atol=1e-5)


@pytest.mark.parametrize("snr", [0.3, 1.0])
def test_the_weight_of_half_maps_is_the_correlation_of_their_mean_with_the_truth(snr):
    box, truth = 48, white(48, 1)
    half1, half2 = (truth + white(box, seed) / np.sqrt(snr) for seed in (2, 3))
    curve = fsc(half1, half2, PIXEL_SIZE_A).fsc
    curve[:8] = 1.0  # shells of few voxels, where noise alone may end the curve
    weights = fsc_weights(curve, "half-maps")
    measured = fsc(half1 + half2, truth, PIXEL_SIZE_A).fsc
    error = np.abs(weights - measured)[8:]
    assert error.max() < 0.06 and error.mean() < 0.02


def test_a_curve_to_the_truth_is_the_weight_itself_and_nothing_is_taken_beyond_its_end():
    curve = np.array([0.2, 1.1, 0.9, 0.5, 0.0, 0.4, -0.1])
    assert fsc_weights(curve, "truth").tolist() == [1, 1, 0.9, 0.5, 0, 0, 0]
    assert curve[0] == 0.2  # the caller's is left alone


def test_weights_multiply_the_map_shell_by_shell():
    box = 32
    curve = FscCurve(np.where(np.arange(17) < 10, 0.6, 0.0), box, PIXEL_SIZE_A)
    halves = sharpen(wave(box, 5), PIXEL_SIZE_A, 3.0, curve, "half-maps", b_factor_a2=0.0)
    np.testing.assert_allclose(halves.volume, np.sqrt(1.2 / 1.6) * wave(box, 5), atol=1e-5)
    truth = sharpen(wave(box, 5) + wave(box, 12), PIXEL_SIZE_A, 3.0, curve, "truth", b_factor_a2=0.0)
    np.testing.assert_allclose(truth.volume, 0.6 * wave(box, 5), atol=1e-5)


def test_the_low_pass_keeps_what_is_within_the_resolution_and_ends_softly_at_it():
    box = 32
    resolution_a = box * PIXEL_SIZE_A / 10
    for shell, kept in ((3, 1), (9, 1), (10, 0.5), (11, 0), (15, 0)):
        result = sharpen(wave(box, shell), PIXEL_SIZE_A, resolution_a, b_factor_a2=0.0)
        np.testing.assert_allclose(result.volume, kept * wave(box, shell), atol=1e-5)
    assert np.all(np.diff(low_pass_weights(np.linspace(0, 20, 50), 10.0)) <= 0)


def test_the_mean_density_stays():
    volume = decayed(white(32, 1), 50) + 3.0
    curve = FscCurve(np.full(17, 0.5), 32, PIXEL_SIZE_A)
    assert sharpen(volume, PIXEL_SIZE_A, 4.0, curve, fit_from_a=15).volume.mean() == pytest.approx(volume.mean())


def test_what_cannot_be_sharpened_is_refused_with_the_reason():
    volume = white(32, 1)
    with pytest.raises(InputError, match=r"3 shells of signal from 4.8 A \(--fit-from\) to 4 A.*needs 5"):
        sharpen(volume, PIXEL_SIZE_A, 4.0, fit_from_a=4.8)
    with pytest.raises(InputError, match="resolution 2.5 A: .* 1.5 A/px, so Nyquist is 3 A"):
        sharpen(volume, PIXEL_SIZE_A, 2.5)
    for nonsense in (0.0, -4.0, np.nan, np.inf):
        with pytest.raises(InputError, match="resolution"):
            sharpen(volume, PIXEL_SIZE_A, nonsense)
    with pytest.raises(InputError, match="nothing to sharpen"):
        sharpen(np.ones((16, 16, 16)), PIXEL_SIZE_A, 4.0)
    with pytest.raises(InputError, match="nothing to sharpen"):
        sharpen(volume, PIXEL_SIZE_A, 4.0, FscCurve(np.zeros(17), 32, PIXEL_SIZE_A))
    with pytest.raises(InputError, match="--bfactor"):
        sharpen(volume, PIXEL_SIZE_A, 4.0, b_factor_a2=-1e5)
