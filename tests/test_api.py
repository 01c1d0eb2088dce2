"""The public API: its names, what they do, and that the import alone costs nothing."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import training_set
from scipy.spatial.transform import Rotation
from test_outputs import mixture

import cryosplat
from cryosplat import api
from cryosplat.errors import InputError

BOX, PIXEL_SIZE_A = 32, 2.0


@pytest.fixture(scope="module")
def gaussians():
    found = mixture(40)
    found["means"] = np.clip(found["means"], -14, 14)
    found["scales"] = np.clip(found["scales"], 2, 4)
    return cryosplat.Mixture(**found, box=BOX, pixel_size_a=PIXEL_SIZE_A)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


def test_the_import_alone_brings_nothing_in():
    code = "import sys, cryosplat; sys.exit(any(m.startswith(('torch', 'numpy', 'cryosplat.')) for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_name_is_there_documented_and_typed():
    assert cryosplat.__all__ == api.__all__
    for name in cryosplat.__all__:
        assert getattr(cryosplat, name) is getattr(api, name) and getattr(api, name).__doc__
        assert name in dir(cryosplat)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        cryosplat.nonsense  # noqa: B018


def test_a_projection_is_the_sum_of_the_turned_map(gaussians):
    volume = cryosplat.voxelise(gaussians)
    images = cryosplat.project(gaussians, np.stack([np.eye(3), Rotation.from_euler("y", 90, degrees=True).as_matrix()]))
    np.testing.assert_allclose(images[0], volume.sum(0), atol=2e-3 * np.abs(images[0]).max())
    # x_image = R x_volume: x of the image is z of the volume, and the sum is over x.
    np.testing.assert_allclose(images[1][:, 1:], volume.sum(2).T[:, 1:], atol=2e-3 * np.abs(images[1]).max())


def test_a_shift_in_angstrom_moves_the_image_as_in_the_particles_files(gaussians):
    still, moved = (
        cryosplat.project(gaussians, np.eye(3), shifts_a=shift) for shift in (None, np.array([[2 * PIXEL_SIZE_A, 0]]))
    )
    np.testing.assert_allclose(moved[0][:, :-2], still[0][:, 2:], atol=1e-4 * np.abs(still).max())


def test_other_grids_keep_the_amplitude(gaussians):
    for box, pixel_size_a in ((BOX, PIXEL_SIZE_A), (64, 1.0)):
        volume = cryosplat.voxelise(gaussians, box, pixel_size_a)
        assert volume.shape == (box,) * 3
        assert volume.sum() * pixel_size_a**2 == pytest.approx(gaussians.amplitudes.sum(), rel=1e-3)


def test_arrays_of_another_shape_are_refused(gaussians):
    with pytest.raises(InputError, match=r"found \(2, 3, 3\) and \(1, 2\)"):
        cryosplat.project(gaussians, np.stack([np.eye(3)] * 2), shifts_a=np.zeros((1, 2)))


def test_particles_are_read_with_their_pixels(stack):
    table = cryosplat.load_particles(stack / "particles.star", first=20)
    assert len(table) == 20 and table.rotations.shape == (20, 3, 3)
    assert table.read(np.arange(3)).shape == (3, training_set.BOX, training_set.BOX)
    with pytest.raises(InputError, match="data.nonsense"):
        cryosplat.load_particles(stack / "particles.star", nonsense=1)


def test_a_reconstruction_is_a_run_that_can_be_loaded(stack, tmp_path):
    threads = torch.get_num_threads()
    settings = {"data.particles": stack / "particles.star", "run_dir": tmp_path / "run", "volume.steps": 5}
    settings |= {"train.threads": 1, "model.scale": 0.03, "data.mask": None, "data.check_signal": False}
    with training_set.without_figures():
        run = cryosplat.reconstruct(settings)
    torch.set_num_threads(threads)
    again = cryosplat.load_run(tmp_path / "run")
    assert again.summary == run.summary and run.summary["particles"] == training_set.IMAGES
    volume, pixel_size_a = again.map("mixture")
    assert pixel_size_a == pytest.approx(training_set.PIXEL_SIZE_A)
    made = cryosplat.voxelise(again.mixture())
    np.testing.assert_allclose(made, volume, atol=1e-3 * np.abs(volume).max())
    found = cryosplat.resolution(again.curves["linear_half_maps"], 0.143)
    assert found.angstrom == pytest.approx(run.summary["resolution_linear_a"], rel=1e-3)
    with pytest.raises(InputError, match="only a complete run"):
        cryosplat.load_run(tmp_path)


def test_a_mixture_goes_through_every_file(gaussians, tmp_path):
    for suffix in (".npz", ".ply"):
        gaussians.export(tmp_path / f"out{suffix}")
        found = cryosplat.load_mixture(tmp_path / f"out{suffix}")
        assert len(found) == 40 and found.box == BOX
        np.testing.assert_array_equal(found.means, gaussians.means)
    gaussians.export(tmp_path / "out.cif")
    np.savez(tmp_path / "bare.npz", **mixture())
    with pytest.raises(InputError, match="does not say its box"):
        cryosplat.load_mixture(tmp_path / "bare.npz")
    with pytest.raises(InputError, match="expected a file ending in"):
        gaussians.export(tmp_path / "out.xyz")
