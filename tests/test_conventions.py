"""Axes, hand, origin, sign and units: formulas against SciPy's, maps that superpose on the truth without alignment."""

import itertools
import json

import mrcfile
import numpy as np
import pytest
import torch
import training_set
from scipy.spatial.transform import Rotation
from stacks import write_pickle, write_stack

from cryosplat import conventions
from cryosplat.errors import InputError
from cryosplat.fsc import fsc
from cryosplat.volumes import read_map


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    return training_set.reference_run(tmp_path_factory)


def under_mask(run_dir, name):
    """A map of a run times the run's mask: noise of the solvent has no place in a comparison with a molecule."""
    return read_map(run_dir / name)[0] * read_map(run_dir / "mask.mrc")[0]


@pytest.fixture(scope="module")
def volume(reference_run):
    return under_mask(reference_run, "map.mrc")


def mean_fsc(volume, truth):
    """Over all shells but the first."""
    return fsc(volume, truth, 1.0).fsc[1:].mean()


def relative(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# The formulas


def test_euler_angles_are_relions_zyz():
    """RELION's rotation is SciPy's intrinsic ZYZ rotation transposed: it turns the frame, not the molecule."""
    rot, tilt, psi = np.random.default_rng(0).uniform(-180, 180, (3, 100))
    expected = Rotation.from_euler("ZYZ", np.stack([rot, tilt, psi], 1), degrees=True).as_matrix().transpose(0, 2, 1)
    np.testing.assert_allclose(conventions.euler_to_rotation(rot, tilt, psi), expected, atol=1e-12)


def test_a_tilt_of_90_degrees_shows_the_x_axis_of_the_volume_end_on():
    (rotation,) = conventions.euler_to_rotation(np.array([0.0]), np.array([90.0]), np.array([0.0]))
    np.testing.assert_allclose(rotation @ [1, 0, 0], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(rotation @ [0, 0, 1], [-1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(rotation @ [0, 1, 0], [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize("box", [15, 16])
def test_the_centre_is_where_fftshift_puts_frequency_zero(box):
    assert np.fft.fftshift(np.fft.fftfreq(box))[conventions.centre(box)] == 0


def test_shells_are_waves_per_box():
    assert conventions.shell_to_angstrom(16, 32, 4.0) == 8.0  # Nyquist
    assert conventions.shell_to_angstrom(1, 32, 4.0) == 128.0  # the box
    assert conventions.rescaled_pixel_size(4.0, 32, 24) * 24 == 4.0 * 32


# A trained map, and the molecule it was trained on


def symmetries():
    """The 48 ways to permute and flip the axes of a volume about its origin, by name; the first leaves it alone."""

    def flip(volume, axis):
        # Index i becomes -i about D // 2.
        return np.roll(np.flip(volume, axis), 1, axis)

    for order in itertools.permutations(range(3)):
        for flips in itertools.product((False, True), repeat=3):

            def change(volume, order=order, flips=flips):
                for axis in range(3):
                    volume = flip(volume, axis) if flips[axis] else volume
                return volume.transpose(order)

            yield f"axes {order}, flips {flips}", change


def test_the_map_is_the_molecule_and_no_other_of_its_48_images(volume):
    """Of these 24 have the other hand."""
    truth = training_set.true_map()
    found = {name: mean_fsc(change(volume), truth) for name, change in symmetries()}
    (name, best), (second, next_best) = sorted(found.items(), key=lambda item: -item[1])[:2]
    assert name == "axes (0, 1, 2), flips (False, False, False)" and best > 0.75
    assert next_best < best - 0.3, second


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("step", [-1, 1])
def test_the_map_has_the_origin_of_the_molecule(volume, axis, step):
    truth = training_set.true_map()
    assert mean_fsc(np.roll(volume, step, axis), truth) < mean_fsc(volume, truth) - 0.2


def test_the_map_is_shifted_by_less_than_a_tenth_of_a_voxel(volume):
    """By the vertex of a parabola through the peak of the cross-correlation with the truth."""
    correlation = np.fft.ifftn(np.fft.fftn(volume) * np.fft.fftn(training_set.true_map()).conj()).real
    for axis in range(3):
        before, peak, after = (np.roll(correlation, step, axis)[0, 0, 0] for step in (1, 0, -1))
        assert peak == correlation.max()
        assert abs((before - after) / (before - 2 * peak + after) / 2) < 0.1


def test_density_is_positive_and_where_the_blobs_are(volume):
    """At the given coordinates in A, x being the last axis; and not at their mirror images."""

    def at(points):
        x, y, z = np.rint(points / training_set.PIXEL_SIZE_A).astype(int).T + training_set.BOX // 2
        return volume[z, y, x]

    assert (at(training_set.BLOBS_A) > 3 * volume.std()).all()
    assert np.median(at(training_set.BLOBS_A * [-1, 1, 1])) < 0.2 * np.median(at(training_set.BLOBS_A))


def test_gaussians_lie_on_the_molecule_in_angstrom(reference_run):
    with np.load(reference_run / "gaussians.npz") as mixture:
        means, amplitudes = mixture["means"], mixture["amplitudes"]
    nearest = np.linalg.norm(means[:, None] - training_set.BLOBS_A, axis=-1).min(1)
    assert np.average(nearest, weights=amplitudes) < 1.5 * training_set.BLOB_SIGMA_A


@pytest.mark.parametrize("name", ["map.mrc", "half_a.mrc", "half_b.mrc"])
def test_maps_are_valid_and_have_the_pixel_size_of_the_stack(reference_run, name, capsys):
    assert mrcfile.validate(reference_run / name), capsys.readouterr().out
    with mrcfile.open(reference_run / name) as handle:
        assert handle.voxel_size.item() == pytest.approx((training_set.PIXEL_SIZE_A,) * 3)
        assert handle.is_volume() and handle.header.origin.item() == (0, 0, 0)
        assert handle.header.nxstart == handle.header.nystart == handle.header.nzstart == 0


def test_both_half_maps_superpose_on_the_molecule_too(reference_run):
    for name in ("half_a.mrc", "half_b.mrc", "mixture_half_a.mrc", "mixture_half_b.mrc"):
        assert mean_fsc(under_mask(reference_run, name), training_set.true_map()) > 0.65, name


def test_a_map_of_a_smaller_box_superposes_on_the_molecule_at_its_pixel_size(stack, tmp_path):
    small = 24
    run_dir = training_set.trained(stack, tmp_path / "run", f"data.box={small}", "data.truth=null")
    volume, pixel_size_a = read_map(run_dir / "map.mrc")
    assert volume.shape == (small,) * 3 and pixel_size_a == pytest.approx(training_set.PIXEL_SIZE_A * 32 / small)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["box"] == small and summary["pixel_size_a"] == pytest.approx(pixel_size_a)
    spectrum = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(training_set.true_map())))
    inner = slice(16 - small // 2, 16 + small // 2)
    truth = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(spectrum[inner, inner, inner])).real)
    curve = fsc(volume, truth, pixel_size_a).fsc[1 : small // 2]
    assert curve.mean() > 0.75
    assert fsc(volume[:, :, ::-1].copy(), truth, pixel_size_a).fsc[1 : small // 2].mean() < 0.5
    assert fsc(np.roll(volume, 1, 0), truth, pixel_size_a).fsc[1 : small // 2].mean() < curve.mean() - 0.1


def write_analytic_set(folder):
    """The same molecule imaged by nothing of this package: blobs summed pixel by pixel, cryoDRGN's CTF, mrcfile.

    A blob at r is seen at pixel (R r)_xy + D//2 - t D. cryoDRGN's CTF is negative at zero frequency, and its default
    is to negate the data, so the particles here are minus its CTF times the projection: white on dark.
    """
    compute_ctf = pytest.importorskip("cryodrgn.ctf").compute_ctf
    box, count, pixel_size_a = training_set.BOX, 300, training_set.PIXEL_SIZE_A
    rng = np.random.default_rng(0)
    rotations = Rotation.random(count, random_state=0).as_matrix()
    shifts = rng.normal(0, 2 / box, (count, 2))
    seen = (training_set.BLOBS_A / pixel_size_a) @ rotations.transpose(0, 2, 1)[:, :, :2]
    seen += box // 2 - shifts[:, None] * box
    sigma, pixels = training_set.BLOB_SIGMA_A / pixel_size_a, np.arange(box)
    along_x, along_y = (np.exp(-((pixels - seen[..., axis, None]) ** 2) / (2 * sigma**2)) for axis in (0, 1))
    images = np.einsum("iby,ibx->iyx", along_y, along_x)
    ctf = np.tile([box, pixel_size_a, 0, 0, 25.0, 300.0, 2.7, 0.1, 0.0], (count, 1))
    ctf[:, 2] = rng.uniform(8000, 20000, count)
    ctf[:, 3] = ctf[:, 2] - 800
    frequency = np.fft.fftfreq(box, pixel_size_a)
    grid = torch.from_numpy(np.stack(np.meshgrid(frequency, frequency), -1).reshape(-1, 2))
    for image, row in zip(images, ctf, strict=True):
        filtered = np.fft.fft2(image) * -compute_ctf(grid, *torch.from_numpy(row[2:])).numpy().reshape(box, box)
        image[:] = np.fft.ifft2(filtered).real
    images += images.std() * rng.standard_normal(images.shape)
    folder.mkdir()
    write_stack(folder / "particles.mrcs", images.astype(np.float32), pixel_size_a)
    write_pickle(folder / "poses.pkl", (rotations, shifts))
    write_pickle(folder / "ctf.pkl", ctf)


def test_a_stack_made_by_nothing_of_this_package_gives_the_molecule_too(tmp_path):
    write_analytic_set(tmp_path / "stack")
    words = ("data.particles=particles.mrcs", "data.truth=null")
    volume = under_mask(training_set.trained(tmp_path / "stack", tmp_path / "run", *words), "map.mrc")
    truth = training_set.true_map()
    found = {name: mean_fsc(change(volume), truth) for name, change in symmetries()}
    (name, best), (_, next_best) = sorted(found.items(), key=lambda item: -item[1])[:2]
    assert name == "axes (0, 1, 2), flips (False, False, False)" and best > 0.75 and next_best < best - 0.3
    for axis in range(3):
        for step in (-1, 1):
            assert mean_fsc(np.roll(volume, step, axis), truth) < best - 0.2


# Grey levels and sign


@pytest.mark.parametrize("precision, tolerance", [("half", 1e-3), ("single", 1e-4)])
def test_a_stack_times_100_plus_50_gives_the_same_map_but_for_its_scale(stack, volume, tmp_path, precision, tolerance):
    """Rounding limits it, of the images to half precision in memory, and of the stack itself to single."""
    other = training_set.altered(stack, tmp_path / "stack", lambda images: 100 * images + 50)
    words = (f"data.precision={precision}",)
    scaled = under_mask(training_set.trained(other, tmp_path / "scaled", *words), "map.mrc")
    if precision != "half":
        volume = under_mask(training_set.trained(stack, tmp_path / "plain", *words), "map.mrc")
    assert relative(scaled, volume) < tolerance


@pytest.mark.parametrize("words", [(), ("data.invert=false",)], ids=["found", "set"])
def test_a_flipped_stack_gives_the_same_map(stack, reference_run, tmp_path, words):
    flipped = training_set.altered(stack, tmp_path / "stack", lambda images: -images)
    with pytest.raises(InputError, match=r"the images look inverted.*Leave data\.invert out"):
        training_set.trained(flipped, tmp_path / "run", "data.invert=true")
    training_set.trained(flipped, tmp_path / "run", *words)
    for name in ("map.mrc", "half_a.mrc", "half_b.mrc"):
        np.testing.assert_array_equal(read_map(tmp_path / "run" / name)[0], read_map(reference_run / name)[0])


def test_whoever_knows_better_can_train_on_an_inverted_stack(stack, tmp_path):
    words = ("data.invert=false", "data.check_sign=false", "model.amplitudes=signed", "train.epochs=1")
    run_dir = training_set.trained(stack, tmp_path / "run", *words)
    volume = read_map(run_dir / "map.mrc")[0]
    assert fsc(volume, training_set.true_map(), 4.0).fsc[1:6].mean() < 0
