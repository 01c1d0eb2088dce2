"""The FSC is what evaluate.py and the literature say it is, and bad input is refused by name."""

import importlib.util
import logging
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from cryosplat.errors import InputError
from cryosplat.fsc import (
    FscCurve,
    Resolution,
    fsc,
    masked_spectrum,
    mean_fsc,
    read_maps,
    resolution,
    shell_index,
    shell_sums,
    write_xml,
)
from cryosplat.images import logging_untouched
from cryosplat.volumes import write_map

PIXEL_SIZE_A = 2.05


def white(box, seed):
    return np.random.default_rng(seed).standard_normal((box, box, box))


def blob(box, width=0.1, seed=0):
    """A few smooth lumps off the centre: density positive, zero at the edge."""
    rng = np.random.default_rng(seed)
    x = np.arange(box) - box // 2
    volume = np.zeros((box, box, box))
    for place in rng.normal(0, 0.12 * box, (6, 3)):
        squares = [(x - coordinate) ** 2 for coordinate in place]
        volume += np.exp(-(squares[2][:, None, None] + squares[1][:, None] + squares[0]) / (2 * (width * box) ** 2))
    return volume


def soft_ball(box):
    x = np.arange(box) - box // 2
    radius = np.sqrt(x[:, None, None] ** 2 + x[:, None] ** 2 + x**2)
    return 0.5 * (1 + np.cos(np.pi * np.clip((radius - 0.3 * box) / 4, 0, 1)))


def curve_of(values, pixel_size_a=1.0):
    values = np.asarray(values, dtype=np.float64)
    return FscCurve(values, box=2 * (len(values) - 1), pixel_size_a=pixel_size_a)


@pytest.fixture(scope="module")
def evaluate(shared):
    spec = importlib.util.spec_from_file_location("evaluate", shared / "bench" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def voxels_in_shells(box):
    """Voxels of the full sphere in each shell, counted the slow way."""
    f = np.fft.fftfreq(box, 1 / box)
    radius = np.rint(np.sqrt(f[:, None, None] ** 2 + f[:, None] ** 2 + f**2)).astype(int)
    return np.bincount(radius.ravel())[: box // 2 + 1]


@pytest.mark.parametrize("box", [15, 16, 17, 31, 32, 33])
def test_shells_are_rounded_distances_from_the_origin(box):
    shells = shell_index(box)
    assert shells.shape == (box, box, box // 2 + 1) and shells.dtype == np.int32
    assert shells[0, 0, 0] == 0
    assert shells[-1, 0, 0] == shells[0, -1, 0] == shells[0, 0, 1] == 1
    assert shells[1, 1, 1] == 2  # sqrt(3)


def test_a_map_correlates_perfectly_with_itself_scaled_and_warns_only_if_identical(caplog):
    volume = white(16, 1)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(fsc(volume, 3.7 * volume, PIXEL_SIZE_A).fsc, 1, atol=1e-12)
        assert not caplog.records
        np.testing.assert_allclose(fsc(volume, volume.copy(), PIXEL_SIZE_A).fsc, 1, atol=1e-12)
    assert "identical" in caplog.text


def test_inverted_contrast_gives_minus_one():
    np.testing.assert_allclose(fsc(white(16, 1), -white(16, 1), PIXEL_SIZE_A).fsc, -1, atol=1e-12)


@pytest.mark.parametrize("box", [16, 17])
def test_independent_noise_stays_in_its_band_of_one_over_root_n(box):
    curves = [fsc(white(box, seed), white(box, 1000 + seed), PIXEL_SIZE_A).fsc[1:] for seed in range(60)]
    deviations = np.array(curves) * np.sqrt(voxels_in_shells(box)[1:])  # in standard deviations: n real numbers a shell
    assert (np.abs(deviations) <= 3).mean() > 0.99
    assert np.sqrt(np.mean(deviations**2)) == pytest.approx(1, abs=0.1)  # Friedel mates counted once too often: 1.41


@pytest.mark.parametrize("snr", [0.2, 1.0, 5.0])
def test_a_known_signal_to_noise_ratio_gives_its_fsc(snr):
    box, signal = 48, np.sqrt(snr) * white(48, 3)
    curve = fsc(signal + white(box, 1), signal + white(box, 2), PIXEL_SIZE_A)
    band = 3 / np.sqrt(voxels_in_shells(box))
    error = np.abs(curve.fsc - snr / (1 + snr))
    assert (error <= band)[1:].mean() > 0.95
    assert mean_fsc(curve) == pytest.approx(snr / (1 + snr), abs=0.03)


def test_a_shell_that_is_empty_in_one_map_has_fsc_zero():
    x = np.arange(16)
    wave = np.broadcast_to(np.cos(2 * np.pi * 3 * x / 16), (16, 16, 16))
    curve = fsc(wave, wave + np.roll(wave, 1, axis=2), PIXEL_SIZE_A)
    assert curve.fsc[3] == pytest.approx(np.cos(np.pi * 3 / 16))
    assert np.isfinite(curve.fsc).all()


@pytest.mark.parametrize("box", [15, 16, 17, 32, 33, 48])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_projects_yardstick(evaluate, box, masked):
    signal = blob(box, 0.05)
    map1, map2 = (signal + 0.1 * white(box, seed) for seed in (1, 2))
    mask = soft_ball(box) if masked else None
    curve = fsc(map1, map2, PIXEL_SIZE_A, mask)
    expected, _, _ = evaluate.fsc(map1, map2, mask)
    assert np.abs(curve.fsc - expected).max() < 1e-9
    if box % 2 == 0:  # evaluate.py takes the box to be twice the last shell
        for threshold in (0.143, 0.5, 0.9):
            angstrom, limited = evaluate.resolution(expected, threshold, PIXEL_SIZE_A)
            found = resolution(curve, threshold)
            assert found.angstrom == pytest.approx(angstrom, rel=1e-9) and found.limited_by_nyquist == limited


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # torch under numpy 2
def test_it_agrees_with_cryodrgn_whose_shells_lie_half_a_voxel_lower():
    torch = pytest.importorskip("torch")
    with logging_untouched():
        cryodrgn_fsc = pytest.importorskip("cryodrgn.commands_utils.fsc")
    box, signal = 48, blob(48, 0.03)
    map1, map2 = (signal + 0.01 * white(box, seed) for seed in (1, 2))
    theirs = cryodrgn_fsc.get_fsc_curve(torch.tensor(map1), torch.tensor(map2)).fsc.to_numpy()
    ours = fsc(map1, map2, PIXEL_SIZE_A).fsc
    # Their shell i holds i - 1 <= |q| < i, ours rounds: theirs is between our shells i - 1 and i. The two see different
    # voxels, so they differ by the noise of a shell, too.
    between = 0.5 * (ours[1:-2] + ours[2:-1])
    noise = 3 / np.sqrt(voxels_in_shells(box)[2:-1])
    assert ours[2] > 0.99 and ours[-1] < 0.2
    assert (np.abs(theirs[2:] - between) < 0.02 + noise).all()


def test_resolution_is_linear_in_frequency_between_two_shells():
    curve = curve_of([1, 1, 0.75, 0.25, 0], pixel_size_a=1.5)
    assert resolution(curve, 0.5) == Resolution(8 * 1.5 / 2.5, False)


def test_resolution_is_read_at_the_first_crossing_even_if_the_curve_comes_back():
    assert resolution(curve_of([1, 1, 0, 1, 1, 0]), 0.5) == Resolution(10 / 1.5, False)


def test_a_curve_that_never_falls_is_limited_by_nyquist():
    found = resolution(curve_of([1, 1, 0.9, 0.8, 0.7], pixel_size_a=2.0), 0.5)
    assert found == Resolution(4.0, True)
    assert str(found) == "4.00 A (Nyquist)"


def test_a_value_equal_to_the_threshold_is_not_below_it():
    assert resolution(curve_of([1, 1, 0.5, 0.5]), 0.5).limited_by_nyquist


def test_a_curve_below_the_threshold_from_the_start_has_the_box_as_its_resolution():
    assert resolution(curve_of([1, -1, -1, -1, -1], pixel_size_a=2.0), 0.143) == Resolution(16.0, False)


def test_the_mean_density_takes_part_in_nothing():
    assert mean_fsc(curve_of([-1, 0.5, 0.3])) == pytest.approx(0.4)
    volume = blob(16)
    np.testing.assert_allclose(fsc(volume, volume + 100, PIXEL_SIZE_A).fsc[1:], 1, atol=1e-9)


def test_frequencies_of_an_odd_box_are_those_of_its_own_size():
    curve = fsc(white(15, 1), white(15, 2), 2.0)
    np.testing.assert_allclose(curve.frequency, np.arange(8) / 30)
    assert resolution(curve_of([1] * 8), 0.5).angstrom == 2.0
    assert resolution(FscCurve(np.ones(8), 15, 2.0), 0.5).angstrom == pytest.approx(30 / 7)


@pytest.mark.parametrize(
    ("map1", "map2", "mask", "message"),
    [
        (np.zeros((8, 8, 8)), np.zeros((10, 10, 10)), None, "box of 10 px"),
        (np.zeros((8, 8, 8)), np.ones((8, 8, 8)), np.ones((10, 10, 10)), "the mask has a box of 10 px"),
        (np.zeros((8, 8, 6)), np.zeros((8, 8, 6)), None, "cubic"),
        (np.zeros((8, 8, 8)), np.full((8, 8, 8), np.nan), None, "the second map: 512 non-finite"),
        (np.zeros((8, 8, 8)), np.ones((8, 8, 8)), np.full((8, 8, 8), 1.1), "0 to 1"),
        (np.zeros((8, 8, 8)), np.ones((8, 8, 8)), np.full((8, 8, 8), -0.1), "0 to 1"),
        (np.zeros((8, 8, 8)), np.ones((8, 8, 8)), np.full((8, 8, 8), 5e-4), "0.05 % of the box"),
    ],
)
def test_bad_maps_and_masks_are_refused(map1, map2, mask, message):
    with pytest.raises(InputError, match=message):
        fsc(map1, map2, 1.0, mask)


def test_maps_of_another_pixel_size_are_refused_by_file_name(tmp_path):
    write_map(tmp_path / "a.mrc", blob(16), 2.0)
    write_map(tmp_path / "b.mrc", blob(16), 2.001)
    write_map(tmp_path / "c.mrc", blob(16), 2.01)
    _, pixel_size = read_maps([tmp_path / "a.mrc", tmp_path / "b.mrc"])
    assert pixel_size == pytest.approx(2.0)
    with pytest.raises(InputError, match=r"c\.mrc has 2\.01 A/px, .*a\.mrc has 2"):
        read_maps([tmp_path / "a.mrc", tmp_path / "c.mrc"])


@pytest.mark.parametrize("box", [15, 16, 33])
def test_sums_over_shells_are_those_of_the_full_spectrum(box):
    map1, map2 = white(box, 1), white(box, 2)
    full1, full2 = np.fft.fftn(map1), np.fft.fftn(map2)
    f = np.fft.fftfreq(box, 1 / box)
    shells = np.rint(np.sqrt(f[:, None, None] ** 2 + f[:, None] ** 2 + f**2)).astype(int)
    expected = [
        np.bincount(shells.ravel(), values.ravel())[: box // 2 + 1]
        for values in ((full1 * full2.conj()).real, abs(full1) ** 2, abs(full2) ** 2)
    ]
    np.testing.assert_allclose(shell_sums(masked_spectrum(map1), masked_spectrum(map2)), expected, rtol=1e-9)
    single = shell_sums(masked_spectrum(map1, dtype=np.float32), masked_spectrum(map2, dtype=np.float32))
    np.testing.assert_allclose(single[1:], expected[1:], rtol=1e-5)


def test_a_mask_multiplies_the_map_before_its_transform():
    volume, mask = white(16, 1), soft_ball(16)
    np.testing.assert_allclose(masked_spectrum(volume, mask), np.fft.rfftn(volume * mask), atol=1e-9)


def test_the_deposited_curve_has_one_coordinate_a_shell(tmp_path):
    curve = curve_of([1, 0.9, 0.5, 0.1], pixel_size_a=2.0)
    write_xml(tmp_path / "fsc.xml", curve, "a & b")
    root = ElementTree.parse(tmp_path / "fsc.xml").getroot()
    assert root.tag == "fsc" and root.attrib["title"] == "a & b" and {"xaxis", "yaxis"} <= set(root.attrib)
    assert [[child.tag for child in coordinate] for coordinate in root] == [["x", "y"]] * 3
    found = [[float(child.text) for child in coordinate] for coordinate in root]
    np.testing.assert_allclose(found, np.c_[curve.frequency, curve.fsc][1:], atol=1e-6)
