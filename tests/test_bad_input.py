"""What users get wrong, a line each: the message names the file, the column, the row, and what mends it.

By the rows of sections A and B of what users of such programs ask for: half sets (1, 2), sign (11), poses (12), optics
groups (13), cryoSPARC's files (14), MRC headers and A/px (15), symmetry (19), noise and grey levels (20).
"""

import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import tables
from stacks import load, make_ctf, make_images, make_poses, write_dataset, write_pickle, write_stack, write_star
from tables import COUNT, cs, microscope, origins_a, origins_px, relion30, save_cs, with_value, write_star31

from cryosplat import cli
from cryosplat.dataset import ParticleDataset
from cryosplat.errors import InputError

OPTICS = {"OpticsGroup": [1, 2], "OpticsGroupName": ["old", "new"], "ImageSize": [8, 8], **microscope(2)}
PICKLES = {"poses": "poses.pkl", "ctf": "ctf.pkl"}


def star(**changes):
    """A star file of RELION 3.0 with these columns changed."""

    def make(folder):
        write_star(folder / "p.star", tables.NAMES, **relion30(**changes))
        return {"particles": "p.star"}

    return make


def star31(groups=(1,) * COUNT, optics=None, **changes):
    """The same of RELION 3.1 and 5."""

    def make(folder):
        write_star31(folder / "p.star", groups, optics, **changes)
        return {"particles": "p.star"}

    return make


def edited(old, new):
    """A star file with a piece of its text replaced."""

    def change(folder):
        keys, path = star31()(folder), folder / "p.star"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        return keys

    return change


def sparc(passthrough=None, **changes):
    """A .cs file with these columns changed, and the columns of a passthrough file."""

    def make(folder):
        save_cs(folder / "p.cs", cs(**changes))
        if passthrough is not None:
            save_cs(folder / "pass.cs", cs(**passthrough))
        return {"particles": "p.cs"} | ({} if passthrough is None else {"passthrough": "pass.cs"})

    return make


def pickled(name, value):
    """The stack with pickles, one of which holds ``value``."""

    def make(folder):
        write_pickle(folder / f"{name}.pkl", value)
        return {"particles": "particles.mrcs", **PICKLES, name: f"{name}.pkl"}

    return make


def stack(change):
    """The stack with pickles, changed by a function of its path."""

    def make(folder):
        change(folder / "particles.mrcs")
        return {"particles": "particles.mrcs", **PICKLES}

    return make


def option(**keys):
    """The stack with pickles and other settings."""
    return lambda folder: {"particles": "particles.mrcs", **PICKLES} | keys


def pose(row=2, turn=lambda rotation: rotation, shift=None):
    rotations, shifts = make_poses()
    rotations[row] = turn(rotations[row])
    shifts[row] = shifts[row] if shift is None else shift
    return rotations, shifts


def ctf(column, value, row=4):
    values = make_ctf()
    values[row, column] = value
    return values


def header(place, value):
    """Put a 32-bit integer into an MRC header."""

    def change(path):
        with open(path, "r+b") as handle:
            handle.seek(place)
            handle.write(np.array(value, "<i4").tobytes())

    return change


def big_endian(path):
    with mrcfile.new(path, overwrite=True) as handle:
        handle.set_data(make_images().astype(">f4"))


def image(value, row=3):
    """One image set to a value."""

    def change(path):
        images = make_images(COUNT, 8)
        images[row] = value
        write_stack(path, images)

    return change


NAN, MIXED = float("nan"), {"DetectorPixelSize": [2.0, 2.0, 2.0, 2.0, 2.6, 2.0]}
TWICE = {"OpticsGroup": [1, 1], "ImagePixelSize": [2.0, 2.0]}
SIZES = {**OPTICS, "ImagePixelSize": [1.5, 2.0]}
NANOMETRES = {**OPTICS, "ImagePixelSize": [2e-9, 2e-9]}
OTHER_UIDS, ONE_UID = np.arange(6, dtype=np.uint64), np.array([100, 101, 7, 103, 104, 105], np.uint64)

CASES = {
    # 1, 2: half sets
    "1 a subset that is none": (star(RandomSubset=[1, 2, 1, 2, 3, 1]), "p.star: row 4 is 3, expected 1 or 2"),
    "1 a subset in fractions": (star(RandomSubset=[1, 2, 1, 2, 1.5, 1]), "p.star", "row 4: _rlnRandomSubset is 1.5"),
    "1 a subset in words": (star(RandomSubset=[1, 2, 1, 2, "a", 1]), "p.star", "row 4: _rlnRandomSubset is 'a'"),
    "1 one subset only": (star(RandomSubset=[2] * 6), "half a has no particles", "p.star", "data.halves"),
    "1 halves of others": (pickled("halves", np.array([0, 1, 0])), "halves.pkl: 3 halves for the 6", "particles.mrcs"),
    "1 a third half": (pickled("halves", np.array([0, 1, 3, 0, 1, 0])), "halves.pkl", "row 2 is 3, expected 0 or 1"),
    "1 a split in fractions": (sparc(alignments3D__split=np.full(6, 0.5)), "p.cs", "alignments3D/split", "float64"),
    "2 a row used twice": (pickled("indices", np.array([3, 1, 3])), "indices.pkl: entry 2 repeats row 3", "once"),
    # 12: poses and shifts
    "12 no angles": (star(AngleRot=None, AngleTilt=None, AnglePsi=None), "p.star: no column", "data.poses"),
    "12 psi alone": (star(AngleRot=None, AngleTilt=None), "p.star: no column _rlnAngleRot, _rlnAngleTilt"),
    "12 an angle in words": (star(AngleTilt=with_value([0] * 6, "x")), "p.star: row 4: _rlnAngleTilt is 'x', expected"),
    "12 digits of others": (star(AngleTilt=with_value([0] * 6, "1_0")), "p.star: row 4: _rlnAngleTilt is '1_0'"),
    "12 an angle that is none": (star(AnglePsi=with_value([0] * 6, "nan")), "p.star: row 4: _rlnAnglePsi is nan"),
    "12 origins in A as px": (star(OriginX=with_value([0] * 6, 90)), "p.star: row 4", "11.25 boxes", "A/px and box"),
    "12 one origin": (star(OriginY=None), "p.star: no column _rlnOriginY (it has _rlnOriginX)", "data.poses"),
    "12 origins that differ": (
        star(**origins_a(), OriginX=with_value(origins_px()["OriginX"], 0.4)),
        *("p.star: row 4: _rlnOriginX", "_rlnOriginXAngst", "px; remove those that are out of date"),
    ),
    "12 shifts in px": (pickled("poses", pose(shift=(0.3, -3.5))), "poses.pkl: row 2", "3.5 boxes", "Divide pixels by"),
    "12 a scaled rotation": (pickled("poses", pose(turn=lambda r: 2 * r)), "poses.pkl: row 2: not a rotation matrix"),
    "12 a flipped axis": (pickled("poses", pose(turn=lambda r: -r)), "poses.pkl: row 2: a reflection", "is flipped"),
    "12 a pose that is none": (pickled("poses", pose(turn=lambda r: r * NAN)), "poses.pkl: row 2: the rotation is not"),
    "12 poses of others": (pickled("poses", make_poses(5)), "poses.pkl: 5 poses for the 6 images of", "particles.mrcs"),
    "12 CTF as poses": (pickled("poses", make_ctf()), "poses.pkl: rotations: expected the shape (N, 3, 3)", "(6, 9)"),
    "12 no poses": (option(poses=None), "data.poses is not set", "particles.mrcs has no poses; name a poses.pkl"),
    # 13: optics groups and CTF
    "13 an unknown group": (star31((1, 1, 1, 3, 1, 1)), "p.star: row 3: optics group 3 is not in", "add it"),
    "13 a group twice": (star31(optics=TWICE), "p.star, data_optics has the optics group 1 twice", "its own number"),
    "13 a group in words": (star31(with_value([1] * 6, "x")), "p.star: row 4: _rlnOpticsGroup is 'x', expected its"),
    "13 no groups": (star31(None, OPTICS), "p.star: 2 optics groups, but no column _rlnOpticsGroup in the particles"),
    "13 several A/px": (star31((1, 2) * 3, SIZES), "p.star: A/px from 1.5 to 2", "1 old (1.5", "data.indices"),
    "13 a voltage in V": (star(Voltage=with_value([300] * 6, 3e5)), "p.star: row 4", "(_rlnVoltage)", "Is it in V?"),
    "13 a voltage in words": (star31(optics={**SIZES, "Voltage": ["high", 300]}), "p.star", "_rlnVoltage is 'high'"),
    "13 no voltage": (star(Voltage=None), "p.star: no column _rlnVoltage", "so no CTF", "data.ctf=none"),
    "13 half a CTF": (star(DefocusV=None), "p.star: no column _rlnDefocusV", "so no CTF", "data.ctf=none"),
    "13 a defocus in words": (star(DefocusU=with_value([1e4] * 6, "low")), "p.star: row 4: _rlnDefocusU is 'low'"),
    "13 a defocus that is none": (pickled("ctf", ctf(3, NAN)), "ctf.pkl: row 4: defocus V (column 3) is not finite"),
    "13 contrast in per cent": (pickled("ctf", ctf(7, 7)), "ctf.pkl: row 4: amplitude contrast of 7 (column 7)"),
    "13 Cs below zero": (pickled("ctf", ctf(6, -2.7)), "ctf.pkl: row 4: Cs of -2.7 mm (column 6)"),
    "13 CTF of others": (pickled("ctf", make_ctf(7)), "ctf.pkl: 7 rows of CTF parameters for the 6", "particles.mrcs"),
    "13 poses as CTF": (pickled("ctf", make_poses()), "ctf.pkl: CTF parameters: expected an array of numbers"),
    "13 a row cut short": (edited("5@particles.mrcs", "5@particles.mrcs\n"), "p.star: line ", " has 1 values for "),
    "13 a column twice": (edited("_rlnAnglePsi", "_rlnAngleRot"), "p.star: the column _rlnAngleRot is there twice"),
    "13 two files in one": (
        edited("data_particles", "data_images\nloop_\n_rlnImageName\n1@particles.mrcs\n\ndata_particles"),
        *("p.star: line ", "a second table of particles begins here (data_particles)", "data_images", "join them"),
    ),
    "13 no loop_": (edited("loop_\n_rlnImageName", "_rlnImageName"), "p.star: line ", "no loop_ before their columns"),
    "13 an open quotation": (edited("5@particles.mrcs", "'5@particles.mrcs"), "p.star: line ", "no closing quotation"),
    "13 no image name": (edited("_rlnImageName", "_rlnName"), "p.star: no table with a column _rlnImageName"),
    "13 no image number": (edited("5@particles", "particles"), "p.star: row 4: _rlnImageName is 'particles.mrcs'", "@"),
    "13 image 0": (edited("5@particles", "0@particles"), "p.star: row 4 is image -1", "particles.mrcs", "6 images"),
    "13 an image too many": (edited("5@particles", "7@particles"), "p.star: row 4 is image 6", "which has 6 images"),
    # 14: cryoSPARC's files
    "14 no poses": (sparc(alignments3D__pose=None), "p.cs: no column alignments3D/pose", "data.passthrough"),
    "14 another job": (sparc({"uid": OTHER_UIDS}), "pass.cs: it lacks 6 of the 6", "row 0 (uid 100)", "the same job"),
    "14 a particle missing": (sparc({"uid": ONE_UID}), "pass.cs: it lacks 1 of the 6", "p.cs, the first in row 2"),
    "14 two signs": (sparc(blob__sign=np.array([1, 1, 1, 1, -1, 1])), "p.cs: row 4: blob/sign is -1", "data.indices"),
    "14 a sign that is none": (sparc(blob__sign=np.zeros(6)), "p.cs: row 0: blob/sign is 0, expected 1 or -1"),
    "14 no voltage": (sparc(ctf__accel_kv=None), "p.cs: no column ctf/accel_kv", "so no CTF", "data.ctf=none"),
    "14 poses as quaternions": (sparc(alignments3D__pose=np.zeros((6, 4))), "p.cs: alignments3D/pose", "3 numbers"),
    "14 an A/px of 0": (sparc(alignments3D__psize_A=np.zeros(6)), "p.cs: row 0: alignments3D/psize_A is 0"),
    "14 a stack that is not there": (
        sparc(blob__path=np.array([b">J1/a.mrcs"] + [b"particles.mrcs"] * 5)),
        *("p.cs: 1 of 2 stacks do not exist, for 1 of 6 rows", "J1/a.mrcs", "data.datadir"),
    ),
    # 15: stacks
    "15 a copy that stopped": (stack(lambda path: os.truncate(path, 2000)), "particles.mrcs: truncated", "again"),
    "15 an empty file": (stack(lambda path: os.truncate(path, 0)), "particles.mrcs: 0 bytes, too short"),
    "15 not square": (stack(lambda path: write_stack(path, np.zeros((6, 8, 6), "f4"))), "particles.mrcs", "square"),
    "15 odd": (stack(lambda path: write_stack(path, make_images(6, 7))), "particles.mrcs: images of 7", "crop or pad"),
    "15 big-endian": (stack(big_endian), "particles.mrcs: big-endian", "write it again with mrcfile or RELION"),
    "15 transforms": (stack(header(12, 4)), "particles.mrcs: MRC mode 4 (complex 32-bit)", "convert it to mode 2"),
    "15 not a stack": (stack(lambda path: path.write_text("x" * 5000)), "particles.mrcs: not an MRC stack"),
    "15 A/px in metres": (star31(optics=NANOMETRES), "p.star", "units"),
    "15 two A/px given": (option(pixel_size=2.5), "data.pixel_size is 2.5 A/px, but data.ctf gives 2", "remove"),
    "15 mixed A/px": (star(**MIXED), "p.star: A/px from 2 to 2.6", "data.indices"),
    # 20: grey levels; found as images are read
    "20 a pixel that is none": (stack(image(NAN)), "particles.mrcs, image 3: 64 of 64 pixels", "data.indices"),
    "20 an empty image": (stack(image(7.0)), "particles.mrcs, image 3: the image is constant", "remove it"),
    # Files that are missing or of another kind
    "no such file": (option(particles="none.mrcs"), "none.mrcs: no such file (data.particles; relative paths"),
    "no such poses": (option(poses="none.pkl"), "none.pkl: cannot be read"),
    "another kind": (option(particles="poses.pkl"), "poses.pkl: data.particles must be a .mrcs, .mrc"),
    "rows beyond the end": (pickled("indices", np.array([0, 6])), "indices.pkl: entry 1 is 6", "rows 0 to 5"),
    "a pickle of others": (pickled("poses", {"R": 1}), "poses.pkl: refused", "Nothing in the file was run"),
}  # fmt: skip
"""What a user did, and what the message says of it."""


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_named_with_file_column_row_and_what_mends_it(folder, name):
    make, *fragments = CASES[name]
    with pytest.raises(InputError) as caught:
        table = load(folder, **make(folder))
        ParticleDataset(table, np.arange(len(table)))
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_of_symmetry_that_is_none_is_named(folder, capsys):
    words = ["data.particles=particles.mrcs", "data.poses=poses.pkl", f"data_root={folder}", "--sym", "C0"]
    assert cli.main(["backproject", *words, "-o", str(folder / "maps")]) == 2
    assert "C0" in capsys.readouterr().err and not Path(folder / "maps").exists()
