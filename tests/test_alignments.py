"""Poses and CTF from a particle file's own columns: the same as by cryoDRGN's pickles, and bad columns by name."""

import logging

import numpy as np
import pytest
import training_set
from reader import run_cryodrgn, write_cs
from scipy.spatial.transform import Rotation
from stacks import load, make_images, write_dataset, write_stack, write_star

from cryosplat import cli
from cryosplat.alignments import load_ctf, load_poses, table_ctf, table_poses
from cryosplat.errors import InputError
from cryosplat.listing import read_listing
from cryosplat.stackfiles import rotation_to_euler
from cryosplat.volumes import read_map

DEGREES, ANGSTROM = 0.01, 0.01
COUNT, BOX, PIXEL_SIZE_A = 6, 8, 2.0


def assert_same_poses(found, expected, field_a):
    between = Rotation.from_matrix(found[0]) * Rotation.from_matrix(expected[0]).inv()
    assert np.degrees(between.magnitude().max()) < DEGREES
    assert np.abs(found[1] - expected[1]).max() * field_a < ANGSTROM


def assert_same_ctf(found, expected):
    """Of (n, 7) ours and (n, 9) cryoDRGN's."""
    expected = expected[:, 2:].copy()
    expected[:, [2, 6]] = np.radians(expected[:, [2, 6]])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# Real files


@pytest.mark.parametrize(
    ("name", "box", "pixel_size_a", "kind", "count"),
    [
        ("readers/sample_particles_relion31.star", 200, 1.4, "star", 17),
        ("readers/relion31.star", 256, 2.806, "star", 5),
        ("readers/empiar10017_images.star", 360, 1e4 * 14 / 39548, "star", 6496),
        ("readers/cryosparc_P12_J24_001_particles.cs", 180, 2.95, "csparc", 2019),
        ("empiar10025/cryosparc_P9_J209_000_particles.cs", 256, 1.0273438, "csparc", 11764),
    ],
)
def test_real_files_give_the_poses_and_ctf_that_cryodrgn_parses_from_them(
    shared, tmp_path, name, box, pixel_size_a, kind, count
):
    path = shared / "data" / name
    listing = read_listing(path, [])
    rows = np.arange(len(listing))
    assert len(rows) == count
    options = ["-D", str(box), "--Apix", str(pixel_size_a)] if kind == "star" else []
    pickles = tmp_path / "poses.pkl", tmp_path / "ctf.pkl"
    run_cryodrgn(f"parse_pose_{kind}", str(path), "-o", str(pickles[0]), *options)
    # cryoDRGN knows no star file without a phase shift.
    no_shift = ["--ps", "0"] if kind == "star" and "_rlnPhaseShift" not in listing.columns else []
    run_cryodrgn(f"parse_ctf_{kind}", str(path), "-o", str(pickles[1]), *options, *no_shift)
    poses = table_poses(listing, rows, box, pixel_size_a)
    assert np.abs(poses[1]).max() > 0 and np.ptp(poses[0], axis=0).max() > 0.1
    assert_same_poses(poses, load_poses(pickles[0]), box * pixel_size_a)
    assert_same_ctf(table_ctf(listing, rows), load_ctf(pickles[1]))


@pytest.mark.parametrize(
    ("cs", "poses", "ctf"),
    [
        ("readers/cryosparc_P12_J24_001_particles.cs", "readers/cryosparc_P12_J24_poses.pkl", None),
        ("empiar10025/cryosparc_P9_J209_000_particles.cs", "empiar10025/poses.pkl", "empiar10025/ctf.pkl"),
    ],
)
def test_real_refinements_of_cryosparc_are_as_in_the_pickles_made_of_them(shared, cs, poses, ctf):
    listing = read_listing(shared / "data" / cs, [])
    rows = np.arange(len(listing))[::-1]
    box, pixel_size_a = int(listing.box[0]), float(listing.pixel_size_a[0])
    expected = load_poses(shared / "data" / poses)
    found = table_poses(listing, rows, box, pixel_size_a)
    assert_same_poses(found, [part[rows] for part in expected], box * pixel_size_a)
    if ctf is not None:
        assert_same_ctf(table_ctf(listing, rows), load_ctf(shared / "data" / ctf)[rows])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile's, of an old header
def test_a_real_star_file_alone_is_a_whole_table(shared):
    table = load(shared / "data" / "readers", particles="sample_particles_relion31.star")
    assert (len(table), table.box, table.invert) == (17, 200, True) and table.pixel_size_a == 1.4
    assert table.ctf[0, 3:6].tolist() == [300, 2.7, 0.1] and "rlnRandomSubset" in table.half_origin
    assert table.shifts[0] == pytest.approx([0.1996 / 280, 0.1996 / 280])


# Files of our own


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """The training set with its particles listed by cryoSPARC too."""
    folder = tmp_path_factory.mktemp("stack")
    source = training_set.training_set(tmp_path_factory)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    write_cs(folder / "particles.cs", folder)
    return folder


PICKLES = {"poses": "poses.pkl", "ctf": "ctf.pkl"}


@pytest.mark.parametrize("particles", ["particles.star", "particles.cs"])
def test_a_simulated_stack_has_the_same_poses_ctf_and_halves_by_every_route(stack, particles):
    ours, theirs = load(stack, particles=particles), load(stack, particles="particles.star", **PICKLES)
    np.testing.assert_allclose(ours.rotations, theirs.rotations, atol=1e-6)
    np.testing.assert_allclose(ours.shifts, theirs.shifts, atol=1e-7)
    np.testing.assert_allclose(ours.ctf, theirs.ctf, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ours.half, theirs.half)
    assert ours.pixel_size_a == pytest.approx(theirs.pixel_size_a)


def difference(folder, other, name):
    maps = read_map(folder / name)[0], read_map(other / name)[0]
    return float(np.linalg.norm(maps[0] - maps[1]) / np.linalg.norm(maps[1]))


def test_linear_maps_of_the_star_file_alone_are_those_with_pickles(stack, tmp_path):
    for particles, pickles in (("star", True), ("star", False), ("cs", False)):
        words = [f"data_root={stack}", f"data.particles=particles.{particles}", "train.threads=1"]
        words += [f"data.{key}={name}" for key, name in PICKLES.items()] if pickles else []
        assert cli.main(["backproject", *words, "-o", str(tmp_path / f"{particles}{pickles}")]) == 0
    for found in ("starFalse", "csFalse"):
        for name in ("unregularised.mrc", "half_a.mrc", "half_b.mrc"):
            print(found, name, difference(tmp_path / found, tmp_path / "starTrue", name))
            assert difference(tmp_path / found, tmp_path / "starTrue", name) < 1e-6


def test_a_run_from_the_star_file_alone_is_the_run_with_pickles(stack, tmp_path):
    own = training_set.fitted(stack, tmp_path / "own", "data.poses=null", "data.ctf=null")
    pickles = training_set.fitted(stack, tmp_path / "pickles")
    for name in ("map.mrc", "mixture.mrc", "half_a.mrc", "half_b.mrc"):
        print(name, difference(own, pickles, name))
        assert difference(own, pickles, name) < 1e-6
