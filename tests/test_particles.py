"""The table of particles: what is in it, and what is refused before training."""

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from stacks import (
    CTF_ROW,
    load,
    make_ctf,
    make_images,
    make_poses,
    write_dataset,
    write_pickle,
    write_stack,
    write_star,
)

from cryosplat.errors import InputError


@pytest.fixture
def keys(tmp_path):
    return write_dataset(tmp_path)


def test_a_stack_with_poses_and_ctf_comes_back_as_it_was_written(tmp_path, keys):
    table = load(tmp_path, **keys)
    rotations, shifts = make_poses()
    assert len(table) == 6 and table.box == 8 and table.pixel_size_a == 2.0
    np.testing.assert_array_equal(table.read(np.arange(6)), make_images())
    np.testing.assert_array_equal(table.read(np.array([4, 0, 0, 5])), make_images()[[4, 0, 0, 5]])
    assert table.read(np.arange(0)).shape == (0, 8, 8)
    np.testing.assert_array_equal(table.rotations, rotations)
    np.testing.assert_array_equal(table.shifts, shifts)
    assert table.rotations.dtype == table.shifts.dtype == table.ctf.dtype == np.float64
    np.testing.assert_allclose(table.ctf[3], [12003, 11000, np.pi / 6, 300, 2.7, 0.1, np.pi / 2])
    assert table.rows.tolist() == [0, 1, 2, 3, 4, 5] and table.group.tolist() == [-1] * 6
    assert np.bincount(table.half).tolist() == [3, 3] and "drawn by particle from seed 0" in table.half_origin
    assert table.location(4) == f"{tmp_path}/particles.mrcs, image 4"


def test_pixel_size_follows_the_stored_box_of_a_resampled_stack(tmp_path, keys):
    write_stack(tmp_path / "particles.mrcs", make_images(6, 4))
    assert load(tmp_path, **keys).pixel_size_a == 4.0


def test_rotations_alone_mean_centred_particles(tmp_path, keys):
    for poses in (make_poses()[0], (make_poses()[0],)):
        write_pickle(tmp_path / "poses.pkl", poses)
        assert not load(tmp_path, **keys).shifts.any()


def test_indices_select_from_images_poses_ctf_and_halves_alike(tmp_path, keys):
    write_pickle(tmp_path / "rows.pkl", np.array([5, 2, 3, 0]))
    write_pickle(tmp_path / "halves.pkl", [0, 0, 1, 0, 0, 1])
    table = load(tmp_path, indices="rows.pkl", first=3, halves="halves.pkl", **keys)
    assert table.rows.tolist() == [5, 2, 3] and table.half.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(table.read(np.arange(3)), make_images()[[5, 2, 3]])
    np.testing.assert_array_equal(table.rotations, make_poses()[0][[5, 2, 3]])
    assert table.ctf[:, 0].tolist() == [12005, 12002, 12003]
    assert table.location(0).endswith("image 5")


def test_bad_rows_that_indices_leave_out_do_no_harm(tmp_path, keys):
    rotations, shifts = make_poses()
    rotations[1], shifts[1] = np.nan, 70
    write_pickle(tmp_path / "poses.pkl", (rotations, shifts))
    np.save(tmp_path / "good.npy", [0, 2, 3, 4, 5])
    assert len(load(tmp_path, indices="good.npy", **keys)) == 5


def with_pose(row=2, rotation=None, shift=None):
    rotations, shifts = make_poses()
    if rotation is not None:
        rotations[row] = rotation(rotations[row])
    if shift is not None:
        shifts[row] = shift
    return rotations, shifts


BAD_POSES = {
    "another count": (make_poses(5), r"poses\.pkl: 5 poses for the 6 images of .*particles\.mrcs"),
    "shifts of another count": ((make_poses(6)[0], make_poses(5)[1]), "6 rotations and 5 shifts"),
    "quaternions": (np.zeros((6, 4)), r"rotations: expected the shape \(N, 3, 3\), found \(6, 4\)"),
    "shifts in three dimensions": ((make_poses()[0], np.zeros((6, 3))), r"shifts: expected the shape \(N, 2\)"),
    "the wrong way round": (make_poses()[::-1], "rotations: expected the shape"),
    "three items": ((*make_poses(), np.zeros(6)), "found 3 items"),
    "a number": (7, "rotations: expected an array of numbers, found int"),
    "truth values": (np.ones((6, 3, 3), bool), "found bool"),
    "not finite": (with_pose(rotation=lambda r: r * np.nan), "row 2: the rotation is not finite"),
    "infinite shift": (with_pose(shift=np.inf), "row 2: the shift is not finite"),
    "scaled": (with_pose(rotation=lambda r: 1.01 * r), r"row 2: not a rotation matrix: R R\^T is off .* by 0\.02"),
    "huge": (with_pose(rotation=lambda r: 1e38 * r), "row 2: not a rotation matrix"),
    "mirrored": (with_pose(rotation=lambda r: -r), "row 2: a reflection"),
    "shift in pixels": (with_pose(shift=(0.3, -3.5)), r"row 2: a shift of 3\.5 boxes.*Divide pixels by the box"),
}


@pytest.mark.parametrize("name", BAD_POSES)
def test_bad_poses_are_refused_with_file_and_first_row(tmp_path, keys, name):
    poses, message = BAD_POSES[name]
    write_pickle(tmp_path / "poses.pkl", poses)
    with pytest.raises(InputError, match=r"poses\.pkl: ") as caught:
        load(tmp_path, **keys)
    assert caught.match(message)


def test_rotations_rounded_to_three_digits_become_rotations_and_others_stay_as_they_are(tmp_path, keys):
    rotations, shifts = make_poses()
    stored = rotations.copy()
    stored[2] = stored[2].round(3)
    write_pickle(tmp_path / "poses.pkl", (stored, shifts))
    found = load(tmp_path, **keys).rotations
    np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(rotations, 2, 0))
    assert np.abs(found[2] @ found[2].T - np.eye(3)).max() < 1e-12 < np.abs(stored[2] @ stored[2].T - np.eye(3)).max()
    assert np.abs(found[2] - rotations[2]).max() < 1e-3


def with_ctf(column, value, row=4):
    ctf = make_ctf()
    ctf[row, column] = value
    return ctf


BAD_CTF = {
    "another count": (make_ctf(7), r"7 rows of CTF parameters for the 6 images"),
    "without the box": (make_ctf()[:, 1:], r"expected the shape \(N, 9\), found \(6, 8\)"),
    "defocus": (with_ctf(3, np.nan), r"row 4: defocus V \(column 3\) is not finite"),
    "angle": (with_ctf(4, np.inf), r"row 4: astigmatism angle \(column 4\) is not finite"),
    "box": (with_ctf(0, 0), "row 4: box of 0 px"),
    "pixel size": (with_ctf(1, -1.5), r"row 4: -1\.5 A/px"),
    "voltage in V": (with_ctf(5, 300000), "row 4: voltage of 300000 kV"),
    "Cs": (with_ctf(6, -2.7), r"row 4: Cs of -2\.7 mm"),
    "amplitude contrast": (with_ctf(7, 7), "row 4: amplitude contrast of 7 "),
    "mixed pixel sizes": (with_ctf(1, 2.01), r"row 4: 2\.01 A/px, but 2 in row 0"),
}


@pytest.mark.parametrize("name", BAD_CTF)
def test_bad_ctf_parameters_are_refused_with_file_and_first_row(tmp_path, keys, name):
    ctf, message = BAD_CTF[name]
    write_pickle(tmp_path / "ctf.pkl", ctf)
    with pytest.raises(InputError, match=r"ctf\.pkl: ") as caught:
        load(tmp_path, **keys)
    assert caught.match(message)


def test_rows_are_named_as_in_the_file_also_for_a_subset(tmp_path, keys):
    write_pickle(tmp_path / "ctf.pkl", with_ctf(5, 3.0))
    (tmp_path / "rows.txt").write_text("1\n4\n5\n")
    with pytest.raises(InputError, match=r"row 4: voltage of 3 kV .*\(1 of 3 rows\)"):
        load(tmp_path, indices="rows.txt", **keys)


def test_pickles_of_the_subset_get_told_that_indices_apply_to_all(tmp_path, keys):
    write_pickle(tmp_path / "poses.pkl", make_poses(4))
    with pytest.raises(InputError, match="4 poses for the 6 images .* select from images, poses and CTF alike"):
        load(tmp_path, first=4, **keys)


def test_poses_that_are_all_the_same_are_warned_of(tmp_path, keys, caplog):
    write_pickle(tmp_path / "poses.pkl", np.tile(np.eye(3), (6, 1, 1)))
    with caplog.at_level(logging.WARNING, logger="cryosplat"):
        load(tmp_path, **keys)
    assert "all 6 rotations are the same" in caplog.text


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"particles": ""}, "data.particles is not set"),
        ({"poses": ""}, "data.poses is not set"),
        ({"particles": "none.mrcs"}, r"none\.mrcs: no such file"),
        ({"particles": "poses.pkl"}, r"must be a \.mrcs, \.mrc, \.star, \.cs or \.txt file, not '\.pkl'"),
        ({"poses": "none.pkl"}, r"none\.pkl: cannot be read"),
        ({"ctf": "none.pkl"}, r"none\.pkl: cannot be read"),
        ({"datadir": "nowhere"}, "data.datadir: .*nowhere is not a folder"),
        ({"first": 0}, "data.first is 0"),
        ({"indices": "high.txt"}, r"high\.txt: entry 1 is 6, but .*particles\.mrcs has the rows 0 to 5"),
        ({"indices": "negative.txt"}, r"negative\.txt: entry 0 is -1"),
        ({"indices": "twice.txt"}, r"twice\.txt: entry 2 repeats row 3"),
        ({"indices": "none.txt"}, r"none\.txt: selects no particles"),
        ({"pixel_size": -2.0}, "data.pixel_size is -2"),
        ({"pixel_size": 2.5}, r"data.pixel_size is 2\.5 A/px, but data.ctf gives 2 "),
    ],
)
def test_bad_requests_are_refused(tmp_path, keys, extra, message):
    for name, text in {"high": "0\n6", "negative": "-1\n2", "twice": "3\n1\n3", "none": ""}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        load(tmp_path, **{**keys, **extra})


def test_without_ctf_the_pixel_size_is_asked_for_or_found_in_the_files(tmp_path, keys, caplog):
    del keys["ctf"]
    stack = tmp_path / "particles.mrcs"
    assert load(tmp_path, **keys).ctf is None and load(tmp_path, **keys).pixel_size_a == 2.0
    assert load(tmp_path, pixel_size=1.5, **keys).pixel_size_a == 1.5
    for meaningless in (0.0, 1.0):
        write_stack(stack, make_images(), meaningless)
        with pytest.raises(InputError, match="neither it nor its stacks give the A/px; set data.pixel_size"):
            load(tmp_path, **keys)
    names = [f"{image + 1}@particles.mrcs" for image in range(6)]
    write_star(tmp_path / "p.star", names, DetectorPixelSize=[5.0] * 6, Magnification=[38168] * 6)
    assert load(tmp_path, **{**keys, "particles": "p.star"}).pixel_size_a == pytest.approx(1.309998)
    write_star(tmp_path / "p.star", names, ImagePixelSize=[1.0, 1.0, 1.0, 1.3, 1.0, 1.0])
    with pytest.raises(InputError, match=r"A/px from 1 to 1\.3"):
        load(tmp_path, **{**keys, "particles": "p.star"})
    with caplog.at_level(logging.WARNING, logger="cryosplat"):
        load(tmp_path, **{**keys, "particles": "p.star", "ctf": "ctf.pkl"})
    assert "p.star says 1 A/px, data.ctf 2 for the same images" in caplog.text


def test_paths_are_relative_to_the_data_root_and_not_to_the_working_folder(tmp_path, keys, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    assert len(load(tmp_path, **keys)) == 6
    assert len(load("/nowhere", **{key: str(tmp_path / name) for key, name in keys.items()})) == 6


@pytest.mark.filterwarnings("ignore:Data array contains NaN")
def test_a_pixel_that_is_not_finite_is_named_with_its_image(tmp_path, keys):
    images = make_images()
    images[4, 1, 2:4] = np.nan, np.inf
    images[5] = np.nan
    write_stack(tmp_path / "particles.mrcs", images)
    table, ids = load(tmp_path, **keys), np.array([1, 4, 5])
    table.require_finite(table.read(ids[:1]), ids[:1])
    with pytest.raises(InputError, match=r"particles\.mrcs, image 4: 2 of 64 pixels are not finite"):
        table.require_finite(table.read(ids), ids)


def test_reading_particles_leaves_logging_and_standard_output_alone(tmp_path, keys):
    script = (
        "import logging, sys, numpy as np\n"
        f"logging.basicConfig(filename={str(tmp_path / 'log')!r}, filemode='w', level=logging.INFO)\n"
        "logger = logging.getLogger('cryosplat'); handlers = logging.getLogger().handlers[:]\n"
        "from stacks import load\n"
        f"load({str(tmp_path)!r}, **{keys!r}).read(np.array([0, 3]))\n"
        "assert 'cryodrgn' in sys.modules and logging.getLogger().handlers == handlers and not logger.disabled\n"
        "logger.warning('still here')\n"
    )
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "still here" in (tmp_path / "log").read_text()


def test_importing_the_table_does_not_import_cryodrgn():
    script = "import sys, cryosplat.particles; assert 'cryodrgn' not in sys.modules"
    folder = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)


def test_a_hundred_thousand_particles_are_checked_in_seconds_with_their_rows_named(tmp_path):
    count = 100_000
    write_stack(tmp_path / "s.mrcs", np.zeros((count, 2, 2), np.float16))
    names = [f"{row + 1:06d}@s.mrcs" for row in range(count)]
    write_star(tmp_path / "p.star", names, MicrographName=[f"m{row // 150}.mrc" for row in range(count)])
    rotations, shifts = np.tile(make_poses()[0], (count, 1, 1))[:count], np.zeros((count, 2))
    write_pickle(tmp_path / "poses.pkl", (rotations, shifts))
    write_pickle(tmp_path / "ctf.pkl", np.tile(CTF_ROW, (count, 1)))
    keys = {"particles": "p.star", "poses": "poses.pkl", "ctf": "ctf.pkl"}
    start = sum(os.times()[:2])
    table = load(tmp_path, **keys)
    # 0.6 s of CPU time; a loop over rows in any of the checks takes far longer than this bound.
    assert sum(os.times()[:2]) - start < 10
    assert abs(int(np.bincount(table.half)[0]) - count // 2) <= 150
    rotations[99_998, 0] *= -1
    write_pickle(tmp_path / "poses.pkl", (rotations, shifts))
    with pytest.raises(InputError, match="row 99998: a reflection"):
        load(tmp_path, **keys)
