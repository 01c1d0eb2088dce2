"""Poses and CTF from a particle file's own columns: the same as by cryoDRGN's pickles, and bad columns by name."""

import logging
import re

import numpy as np
import pytest
import training_set
from reader import run_cryodrgn, write_cs
from scipy.spatial.transform import Rotation
from stacks import load, make_images, write_dataset, write_stack, write_star
from tables import (
    BOX,
    COUNT,
    DEFOCUS_U,
    NAMES,
    PIXEL_SIZE_A,
    ROTATIONS,
    SHIFTS,
    angles,
    cs,
    microscope,
    origins_a,
    origins_px,
    relion30,
    save_cs,
    with_value,
    write_star31,
)

from cryosplat import cli
from cryosplat.alignments import load_ctf, load_poses, read_rotations, table_ctf, table_poses
from cryosplat.errors import InputError
from cryosplat.listing import read_listing
from cryosplat.volumes import read_map

DEGREES, ANGSTROM = 0.01, 0.01


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
            assert difference(tmp_path / found, tmp_path / "starTrue", name) < 1e-6


def test_a_dark_stack_whose_cs_file_says_so_gives_the_map_of_the_white_one(stack, tmp_path):
    dark = training_set.altered(stack, tmp_path / "dark", lambda images: -images)
    listed = np.load(stack / "particles.cs")
    signed = np.zeros(len(listed), [*listed.dtype.descr, ("blob/sign", "<f4")])
    for name in listed.dtype.names:
        signed[name] = listed[name]
    signed["blob/sign"] = -1
    with open(dark / "signed.cs", "wb") as handle:
        np.save(handle, signed)
    for folder, particles in ((stack, "particles.cs"), (dark, "signed.cs")):
        words = [f"data_root={folder}", f"data.particles={particles}", "train.threads=1", "--no-halves"]
        assert cli.main(["backproject", *words, "-o", str(tmp_path / particles)]) == 0
    assert difference(tmp_path / "signed.cs", tmp_path / "particles.cs", "unregularised.mrc") < 1e-6


def test_a_run_from_the_star_file_alone_is_the_run_with_pickles(stack, tmp_path):
    """But for the single precision of the pickles, which a fit of 120 steps makes 2e-6 of."""
    own = training_set.fitted(stack, tmp_path / "own", "data.poses=null", "data.ctf=null")
    pickles = training_set.fitted(stack, tmp_path / "pickles")
    for name in ("map.mrc", "mixture.mrc", "half_a.mrc", "half_b.mrc"):
        assert difference(own, pickles, name) < 1e-5


@pytest.fixture
def folder(tmp_path):
    """particles.mrcs of six images, and pickles of other poses and another CTF than those above."""
    write_dataset(tmp_path)
    return tmp_path


def assert_as_written(table, atol=1e-6):
    np.testing.assert_allclose(table.rotations, ROTATIONS, atol=atol)
    np.testing.assert_allclose(table.shifts, SHIFTS, atol=atol)
    assert table.ctf[:, 0].tolist() == DEFOCUS_U.tolist() and table.ctf[:, 1].tolist() == (DEFOCUS_U - 500).tolist()
    np.testing.assert_allclose(table.ctf[:, 2:], np.tile([np.pi / 6, 300, 2.7, 0.1, 0], (COUNT, 1)), rtol=1e-6)
    assert table.pixel_size_a == PIXEL_SIZE_A


def test_a_star_file_of_relion_30_has_origins_in_pixels(folder):
    write_star(folder / "p.star", NAMES, **relion30())
    assert_as_written(load(folder, particles="p.star"))


def test_a_star_file_of_relion_31_has_origins_in_angstrom_and_optics_groups(folder):
    write_star31(folder / "p.star")
    assert_as_written(load(folder, particles="p.star"))
    rows = [5, 1]
    np.save(folder / "rows.npy", rows)
    np.testing.assert_allclose(
        load(folder, particles="p.star", indices="rows.npy").rotations, ROTATIONS[rows], atol=1e-6
    )


def test_every_particle_has_its_own_optics_groups_voltage_cs_and_contrast(folder):
    optics = {"OpticsGroup": [7, 2], "OpticsGroupName": ["krios", "arctica"], "ImagePixelSize": [2.0, 2.0]}
    optics |= {"Voltage": [300, 200], "SphericalAberration": [2.7, 2.0], "AmplitudeContrast": [0.1, 0.07]}
    groups = np.array([2, 7, 7, 2, 2, 7])
    # What the particles say themselves does not count where their group says it.
    write_star31(folder / "p.star", groups, optics, PhaseShift=15.0 * np.arange(COUNT), Voltage=[100] * COUNT)
    table = load(folder, particles="p.star")
    assert table.ctf[:, 3].tolist() == np.where(groups == 7, 300, 200).tolist()
    assert table.ctf[:, 4].tolist() == np.where(groups == 7, 2.7, 2.0).tolist()
    assert table.ctf[:, 5].tolist() == np.where(groups == 7, 0.1, 0.07).tolist()
    np.testing.assert_allclose(np.degrees(table.ctf[:, 6]), 15 * np.arange(COUNT))


def test_a_stack_that_was_resampled_keeps_its_field_of_view(folder, caplog):
    write_stack(folder / "particles.mrcs", make_images(COUNT, BOX // 2))
    write_star31(folder / "p.star")
    table = load(folder, particles="p.star")
    np.testing.assert_allclose(table.shifts, SHIFTS, atol=1e-6)
    assert table.pixel_size_a == 2 * PIXEL_SIZE_A and "p.star says 8 px, its stacks have 4" in caplog.text


def test_a_cs_file_alone_gives_poses_ctf_halves_and_sign(folder):
    save_cs(folder / "p.cs", cs())
    table = load(folder, particles="p.cs")
    assert_as_written(table)
    assert table.half.tolist() == [1, 0, 1, 1, 0, 0] and "alignments3D/split" in table.half_origin
    assert not table.invert and load(folder, particles="p.cs", invert=True).invert
    save_cs(folder / "p.cs", cs(blob__sign=np.ones(COUNT)))
    assert load(folder, particles="p.cs").invert
    save_cs(folder / "p.cs", cs(blob__sign=None))
    assert load(folder, particles="p.cs").invert


def test_shifts_of_a_refinement_in_another_box_are_in_its_pixels(folder):
    columns = cs(alignments3D__shift=SHIFTS * BOX / 4, alignments3D__psize_A=np.full(COUNT, 4 * PIXEL_SIZE_A))
    save_cs(folder / "p.cs", columns)
    assert_as_written(load(folder, particles="p.cs"))
    save_cs(folder / "p.cs", cs(alignments3D__psize_A=None))
    assert_as_written(load(folder, particles="p.cs"))


@pytest.mark.parametrize("here", ["alignments3D", "blob"])
def test_a_passthrough_file_adds_columns_by_uid_in_any_order(folder, here):
    columns = cs()
    save_cs(folder / "p.cs", {name: values for name, values in columns.items() if name.startswith((here, "uid"))})
    order = np.array([3, 0, 5, 1, 4, 2])
    others = {name: values[order] for name, values in columns.items() if not name.startswith(here)}
    more = {
        name: np.append(values, values[:1]) if values.ndim == 1 else np.append(values, values[:1], 0)
        for name, values in others.items()
    }
    more["uid"][-1] = 7  # a particle that was left out of the refinement
    # Where both have a column it is the main file's that counts.
    more["alignments3D/split"] = np.append(columns["alignments3D/split"][order], 0).astype(np.uint32)
    if here == "alignments3D":
        more["alignments3D/split"][:] = 0
    save_cs(folder / "p_passthrough.cs", more)
    table = load(folder, particles="p.cs", passthrough="p_passthrough.cs")
    assert_as_written(table)
    assert table.half.tolist() == [1, 0, 1, 1, 0, 0]
    assert ("p_passthrough.cs" in table.half_origin) == (here == "blob")
    np.testing.assert_array_equal(table.read(np.arange(COUNT)), make_images())


def test_the_halves_say_whether_the_poses_are_of_the_same_refinement(folder):
    write_star(folder / "p.star", NAMES, **relion30(), RandomSubset=[1, 2, 1, 2, 2, 1])
    np.save(folder / "halves.npy", [0, 1, 1, 0, 1, 0])
    own = "rlnRandomSubset in .*p.star; the poses are from that file too"
    other = "rlnRandomSubset in .*p.star; they are independent if the poses were refined in these halves"
    file = "data.halves, .*halves.npy; they are independent if the poses were refined in these halves"
    for words, expected in (({}, own), (PICKLES, other), ({"halves": "halves.npy"}, file)):
        assert re.search(expected, load(folder, particles="p.star", **words).half_origin)


def test_a_file_that_is_named_comes_before_the_particles_own_columns_and_the_log_says_so(folder, caplog):
    write_star(folder / "p.star", NAMES, **relion30())
    with caplog.at_level(logging.INFO, logger="cryosplat"):
        table = load(folder, particles="p.star", **PICKLES)
    np.testing.assert_array_equal(table.rotations, load_poses(folder / "poses.pkl")[0])
    assert table.ctf[:, 0].tolist() == load_ctf(folder / "ctf.pkl")[:, 2].tolist()
    assert "poses are those of data.poses" in caplog.text and "the CTF is that of data.ctf" in caplog.text
    assert "p.star are not used" in caplog.text and "p.star is not used" in caplog.text
    # Nor do faults of the columns that are not used matter.
    write_star(folder / "q.star", NAMES, **relion30(DefocusV=None, AngleRot=None, OriginX=["x"] * COUNT))
    np.testing.assert_array_equal(load(folder, particles="q.star", **PICKLES).ctf, table.ctf)
    # The CTF of the file itself is taken with poses of another one, not left out in silence.
    assert load(folder, particles="p.star", poses="poses.pkl").ctf[:, 0].tolist() == DEFOCUS_U.tolist()


@pytest.mark.parametrize("name", ["p.star", "q.star", "p.cs"])
def test_rotations_alone_are_read_from_any_file_of_poses(folder, name):
    write_star(folder / "p.star", NAMES, **relion30())
    write_star31(folder / "q.star")
    save_cs(folder / "p.cs", cs())
    np.testing.assert_allclose(read_rotations(folder / name), ROTATIONS, atol=1e-6)


def test_images_without_a_ctf_are_said_to_be_or_warned_of(folder, caplog):
    write_star(folder / "p.star", NAMES, **relion30())
    assert load(folder, particles="p.star", ctf="none").ctf is None
    assert not caplog.text
    write_star(folder / "p.star", NAMES, **relion30(DefocusU=None, DefocusV=None, DefocusAngle=None))
    assert load(folder, particles="p.star").ctf is None
    assert "p.star: no CTF in it, and data.ctf is not set" in caplog.text


def test_a_star_file_without_origins_has_centred_particles_and_is_warned_of(folder, caplog):
    write_star(folder / "p.star", NAMES, **relion30(OriginX=None, OriginY=None))
    assert not load(folder, particles="p.star").shifts.any() and "all shifts are taken for 0" in caplog.text
    write_star(folder / "p.star", NAMES, **relion30(), **origins_a())
    assert_as_written(load(folder, particles="p.star"))


def test_bad_rows_that_indices_leave_out_do_no_harm(folder):
    tilt = [f"{value}" for value in angles()["AngleTilt"]]
    tilt[3] = "null"
    write_star(folder / "p.star", NAMES, **relion30(AngleTilt=tilt))
    np.save(folder / "rows.npy", [0, 1, 2, 4, 5])
    assert len(load(folder, particles="p.star", indices="rows.npy")) == 5


# What is wrong is named


BAD_COLUMNS = {
    "no angles": (
        {"AngleRot": None, "AngleTilt": None, "AnglePsi": None},
        "no column _rlnAngleRot, _rlnAngleTilt, _rlnAnglePsi, so no poses; take the star file of a 3D refinement",
    ),
    "2D classification": ({"AngleRot": None, "AngleTilt": None}, r"_rlnAngleTilt \(it has _rlnAnglePsi\), so no poses"),
    "one origin": ({"OriginY": None}, r"no column _rlnOriginY \(it has _rlnOriginX\), so no shifts"),
    "mixed origins": (
        {"OriginY": None, "OriginYAngst": origins_a()["OriginYAngst"]},
        r"no column _rlnOriginY \(it has _rlnOriginX\)",
    ),
    "origins that differ": (
        {**origins_a(), "OriginX": with_value(origins_px()["OriginX"], origins_px()["OriginX"][4] + 0.5)},
        r"row 4: _rlnOriginX, .* differ by 0\.5 px; remove those that are out of date",
    ),
    "angle in words": (
        {"AngleTilt": with_value(angles()["AngleTilt"], "x")},
        "row 4: _rlnAngleTilt is 'x', expected a",
    ),
    "angle that is none": ({"AnglePsi": with_value(angles()["AnglePsi"], "nan")}, "row 4: _rlnAnglePsi is nan"),
    "infinite origin": ({"OriginX": with_value([0] * COUNT, "inf")}, r"row 4: _rlnOriginX is inf.*\(1 of 6 rows\)"),
    "origin in A": ({"OriginX": with_value([0] * COUNT, 90)}, r"row 4: a shift of 11\.25 boxes.*Are its A/px and box"),
    "no defocus V": ({"DefocusV": None}, r"no column _rlnDefocusV \(it has .*\), so no CTF; .*data.ctf=none"),
    "no voltage": ({"Voltage": None}, "no column _rlnVoltage .*so no CTF"),
    "voltage in V": ({"Voltage": with_value([300] * COUNT, 3e5)}, r"row 4: voltage of 300000 kV \(_rlnVoltage\)"),
    "defocus in words": ({"DefocusU": with_value(DEFOCUS_U, "low")}, "row 4: _rlnDefocusU is 'low'"),
    "subset": (
        {"RandomSubset": with_value([1, 2, 1, 2, 1, 2], 1.5)},
        r"row 4: _rlnRandomSubset is 1\.5, expected 1 or 2",
    ),
    "mixed A/px": (
        {"DetectorPixelSize": with_value([2.0] * COUNT, 2.5)},
        r"A/px from 2 to 2\.5; particles of one run must have the same A/px.*data.indices",
    ),
}


@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_columns_of_a_star_file_are_named(folder, name):
    changes, message = BAD_COLUMNS[name]
    write_star(folder / "p.star", NAMES, **relion30(**changes))
    with pytest.raises(InputError, match=rf"p\.star: .*{message}"):
        load(folder, particles="p.star")


BAD_OPTICS = {
    "unknown group": ((1, 1, 1, 3, 1, 1), None, "row 3: optics group 3 is not in data_optics, which has 1; "),
    "a group twice": (
        (1,) * COUNT,
        {"OpticsGroup": [1, 1], "ImagePixelSize": [2.0, 2.0]},
        "has the optics group 1 twice",
    ),
    "no groups": (None, {"OpticsGroup": [1, 2]}, "2 optics groups, but no column _rlnOpticsGroup in the particles"),
    "no numbers": ((1,) * COUNT, {"Voltage": [300, 200]}, "no column _rlnOpticsGroup in data_optics"),
    "several A/px": (
        (5, 5, 5, 3, 3, 5),
        {"OpticsGroup": [3, 5], "OpticsGroupName": ["old", "new"], "ImagePixelSize": [1.5, 2.0], **microscope(2)},
        r"A/px from 1\.5 to 2; .*optics groups: 3 old \(1\.5 A/px\), 5 new \(2 A/px\)\. Choose those of near A/px",
    ),
    "a group in words": (with_value([1] * COUNT, "x"), None, "row 4: _rlnOpticsGroup is 'x', expected its number"),
    "words": (
        (1,) * COUNT,
        {"OpticsGroup": [1], **microscope(1), "Voltage": ["high"]},
        r"row 0: _rlnVoltage is 'high', expected a number \(6 of 6 rows\)",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTICS)
def test_bad_optics_groups_are_named(folder, name):
    groups, optics, message = BAD_OPTICS[name]
    write_star31(folder / "p.star", groups, optics)
    with pytest.raises(InputError, match=rf"p\.star.*: .*{message}|p\.star, data_optics {message}"):
        load(folder, particles="p.star")


BAD_CS = {
    "no poses": (cs(alignments3D__pose=None), "no column alignments3D/pose .*so no poses; .*data.passthrough"),
    "poses of another shape": (
        cs(alignments3D__pose=np.zeros((COUNT, 4))),
        r"alignments3D/pose is float64 of the shape \(N, 4\), expected 3 numbers a row",
    ),
    "poses in words": (cs(alignments3D__pose=np.full((COUNT, 3), b"x")), "alignments3D/pose is .*expected 3 numbers"),
    "a pose that is none": (
        cs(alignments3D__pose=np.array(with_value(np.ones((COUNT, 3)), [1, np.nan, 0]))),
        "row 4: alignments3D/pose is .*nan.*expected a number",
    ),
    "pixels of no size": (cs(alignments3D__psize_A=np.zeros(COUNT)), "row 0: alignments3D/psize_A is 0; it must be"),
    "no voltage": (cs(ctf__accel_kv=None), "no column ctf/accel_kv .*so no CTF"),
    "contrast": (cs(ctf__amp_contrast=np.full(COUNT, 7.0)), r"row 0: amplitude contrast of 7 \(ctf/amp_contrast\)"),
    "two signs": (cs(blob__sign=np.array([1, 1, 1, 1, -1, 1])), "row 4: blob/sign is -1, but 1 in row 0"),
    "no sign": (cs(blob__sign=np.zeros(COUNT)), "row 0: blob/sign is 0, expected 1 or -1"),
    "two A/px": (cs(blob__psize_A=np.array([2, 2, 2, 2, 3, 2.0])), "A/px from 2 to 3; particles of one run"),
    "split in fractions": (cs(alignments3D__split=np.full(COUNT, 0.5)), "alignments3D/split is of type float64"),
}


@pytest.mark.parametrize("name", BAD_CS)
def test_bad_columns_of_a_cs_file_are_named(folder, name):
    columns, message = BAD_CS[name]
    save_cs(folder / "p.cs", columns)
    with pytest.raises(InputError, match=rf"p\.cs: .*{message}"):
        load(folder, particles="p.cs")


BAD_PASSTHROUGHS = {
    "another job": (cs(uid=np.arange(COUNT, dtype=np.uint64)), "lacks 6 of the 6 particles of .*the first in row 0"),
    "one missing": (
        cs(uid=np.array([100, 101, 7, 103, 104, 105], np.uint64)),
        r"lacks 1 of the 6 particles of .*p\.cs, the first in row 2 \(uid 102\)",
    ),
    "one twice": (cs(uid=np.array([100, 101, 102, 100, 104, 105], np.uint64)), "row 3 repeats the uid 100"),
}


@pytest.mark.parametrize("name", BAD_PASSTHROUGHS)
def test_bad_passthrough_files_are_named(folder, name):
    columns, message = BAD_PASSTHROUGHS[name]
    save_cs(folder / "p.cs", cs())
    save_cs(folder / "passthrough.cs", columns)
    with pytest.raises(InputError, match=rf"passthrough\.cs: .*{message}"):
        load(folder, particles="p.cs", passthrough="passthrough.cs")


def test_a_passthrough_file_goes_with_a_cs_file_and_both_have_uids(folder):
    with pytest.raises(InputError, match=r"data\.passthrough=.*: only a \.cs file has one"):
        load(folder, particles="particles.mrcs", passthrough="passthrough.cs", **PICKLES)
    without = np.zeros(COUNT, [("blob/path", "S20"), ("blob/idx", "<u4")])
    for name in ("p.cs", "q.cs"):
        with open(folder / name, "wb") as handle:
            np.save(handle, without)
    with pytest.raises(InputError, match=r"p\.cs: no column uid of whole numbers, by which"):
        load(folder, particles="p.cs", passthrough="q.cs")


def test_a_file_beside_it_that_may_have_what_a_cs_file_lacks_is_named(folder):
    save_cs(folder / "p.cs", cs(alignments3D__pose=None))
    save_cs(folder / "J7_passthrough_particles.cs", cs())
    with pytest.raises(InputError, match=r"data\.passthrough=.*J7_passthrough_particles\.cs"):
        load(folder, particles="p.cs")


def test_a_stack_alone_has_no_poses(folder):
    with pytest.raises(InputError, match=r"data.poses is not set, and .*particles\.mrcs has no poses; name a"):
        load(folder, particles="particles.mrcs")
