"""Particle files go back with every other column as it was, to programs that read them as they read the original."""

import importlib.util
import pickle
import re
import shlex
import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import starfile
import tables
import training_set
from reader import run_cryodrgn, write_cs
from stacks import load, write_dataset

from cryosplat import cli
from cryosplat.columns import read_star
from cryosplat.exporting import star_label
from cryosplat.listing import read_listing
from cryosplat.scores import NUMBERS, read_scores
from cryosplat.tablecopies import copy_cs, copy_star
from cryosplat.unpickle import read_pickle

LABELS = [star_label(name) for name in NUMBERS]
QUICK = ("volume.steps=3", "data.check_signal=false")
needs_relion = pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="needs RELION, not installed here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stack, its star, cs and pickles, and runs of the first (star), of the cs and of the stack with pickles."""
    folder = tmp_path_factory.mktemp("export")
    stack = training_set.training_set(tmp_path_factory)
    for name in ("particles.mrcs", "particles.star", "poses.pkl", "ctf.pkl", "truth.mrc"):
        shutil.copy(stack / name, folder)
    write_cs(folder / "particles.cs", folder)
    cs = np.load(folder / "particles.cs")
    cs["blob/shape"] = training_set.BOX
    cs["alignments3D/shift"] *= training_set.BOX / 32
    with open(folder / "particles.cs", "wb") as handle:
        np.save(handle, cs)
    none = ("data.poses=null", "data.ctf=null")
    training_set.fitted(folder, folder / "star", *QUICK, *none)
    training_set.fitted(folder, folder / "cs", *QUICK, *none, "data.particles=particles.cs", "data.invert=true")
    (folder / "thirds.txt").write_text("".join(f"{row}\n" for row in range(300, -1, -3)))
    training_set.fitted(folder, folder / "subset", *QUICK, *none, "data.indices=thirds.txt")
    training_set.fitted(folder, folder / "stack", *QUICK, "data.particles=particles.mrcs", "data.indices=thirds.txt")
    return folder


@pytest.fixture
def export(folder, tmp_path, capsys):
    def call(run, name, *options):
        status = cli.main(["export", str(folder / run), "-o", str(tmp_path / name), *map(str, options)])
        found = capsys.readouterr()
        assert (status == 0) == (not found.err), found.err
        return tmp_path / name if status == 0 else found.err

    return call


def without_new_columns(text):
    """A spliced star file's text with what was added taken away again."""
    lines = []
    for line in text.splitlines(keepends=True):
        if not line.startswith(tuple(LABELS)):
            lines.append(line if "@" not in line else line[: [m.start() for m in re.finditer(" ", line)][-4]] + "\n")
    return "".join(lines)


def test_all_of_a_star_file_is_kept_to_the_letter_and_the_scores_are_beside_it(folder, export):
    path = export("star", "all.star")
    assert without_new_columns(path.read_text()) == (folder / "particles.star").read_text()
    particles, scores = starfile.read(path)["particles"], read_scores(folder / "star/particles.csv")
    for name in NUMBERS:
        np.testing.assert_allclose(particles[star_label(name)[1:]], scores.column(name), rtol=1e-5)


@needs_relion
def test_relion_makes_the_same_map_of_the_copy_as_of_the_original(folder, export, tmp_path):
    path = export("star", "all.star")
    shutil.copy(path, folder / "all.star")
    for name in ("particles", "all"):
        words = f"relion_reconstruct --i {name}.star --o {name}.mrc --ctf"
        subprocess.run(shlex.split(words), cwd=folder, check=True, capture_output=True)
    original, copy = (mrcfile.read(folder / f"{name}.mrc") for name in ("particles", "all"))
    assert original.std() > 0
    np.testing.assert_array_equal(original, copy)
    # Reads, selects and writes it, with the columns it does not know.
    words = "relion_star_handler --i all.star --o again.star --select rlnRandomSubset --minval 1 --maxval 1"
    subprocess.run(shlex.split(words), cwd=folder, check=True, capture_output=True)
    again = starfile.read(folder / "again.star")["particles"]
    ours = starfile.read(path)["particles"]
    ours = ours[ours["rlnRandomSubset"] == 1]
    assert again["rlnImageName"].tolist() == ours["rlnImageName"].tolist()
    for label in LABELS:
        np.testing.assert_array_equal(again[label[1:]], ours[label[1:]])


@needs_relion
def test_relion_makes_the_same_map_of_a_stack_with_pickles_as_of_its_own_star_file(folder, export):
    """Nearly: poses and CTF went through pickles in single precision, and a change of all angles by 1e-6 degrees moves
    RELION's map of these few images by 9 % of its standard deviation (measured), in shells they hardly fill."""
    path = export("stack", "new.star")
    shutil.copy(path, folder / "new.star")
    lines = (folder / "particles.star").read_text().splitlines(keepends=True)
    chosen = [line for line in lines if "@" not in line or int(line[:6]) % 3 == 1]
    (folder / "thirds.star").write_text("".join(chosen))
    for name in ("thirds", "new"):
        words = f"relion_reconstruct --i {name}.star --o {name}.mrc --ctf"
        subprocess.run(shlex.split(words), cwd=folder, check=True, capture_output=True)
    original, copy = (mrcfile.read(folder / f"{name}.mrc") for name in ("thirds", "new"))
    assert np.corrcoef(copy.ravel(), original.ravel())[0, 1] > 0.98


def test_cryodrgn_parses_the_copy_as_it_parses_the_original(folder, export, tmp_path):
    path = export("star", "all.star")
    for command, out in (("parse_pose_star", "poses"), ("parse_ctf_star", "ctf")):
        ours, theirs = (
            read_pickle(run_cryodrgn(command, str(star), "-o", str(tmp_path / f"{out}{number}.pkl")))
            for number, star in enumerate((path, folder / "particles.star"))
        )
        for one, two in zip(ours, theirs, strict=True) if out == "poses" else [(ours, theirs)]:
            np.testing.assert_array_equal(one, two)


def test_a_copy_is_particles_for_another_run_whose_export_replaces_the_columns(folder, export, tmp_path):
    path = export("star", "best.star", "--best", 100)
    shutil.copy(path, folder / "best.star")
    words = (*QUICK, "data.poses=null", "data.ctf=null", "data.particles=best.star")
    run = training_set.fitted(folder, tmp_path / "again", *words)
    assert cli.main(["export", str(run), "-o", str(tmp_path / "twice.star")]) == 0
    before, after = (starfile.read(star)["particles"] for star in (path, tmp_path / "twice.star"))
    assert list(before.columns) == list(after.columns)
    assert before.drop(columns=[label[1:] for label in LABELS]).equals(after.drop(columns=[x[1:] for x in LABELS]))
    np.testing.assert_allclose(after["rlnCryosplatGain"], read_scores(run / "particles.csv").column("gain"), rtol=1e-5)


def test_all_of_a_cs_file_is_kept_and_numpy_and_this_program_read_the_copy(folder, export):
    path = export("cs", "all.cs")
    original, copy = np.load(folder / "particles.cs"), np.load(path, allow_pickle=False)
    assert copy.dtype.names == (*original.dtype.names, *(f"cryosplat/{name}" for name in NUMBERS))
    for name in original.dtype.names:
        assert copy.dtype[name] == original.dtype[name]
        np.testing.assert_array_equal(copy[name], original[name])
    scores = read_scores(folder / "cs/particles.csv")
    np.testing.assert_allclose(copy["cryosplat/scale"], scores.column("scale"), rtol=1e-6)
    ours, theirs = (read_listing(file, []) for file in (path, folder / "particles.cs"))
    assert ours.names == theirs.names and (ours.half == theirs.half).all() and (ours.slices == theirs.slices).all()


@pytest.mark.skipif(importlib.util.find_spec("cryosparc") is None, reason="needs cryosparc-tools, not installed here")
def test_cryosparc_s_own_tools_read_the_copy(folder, export):
    from cryosparc.dataset import Dataset

    copy, original = Dataset.load(export("cs", "some.cs", "--best", 40)), np.load(folder / "particles.cs")
    assert len(copy) == 40 and set(original.dtype.names) < set(copy.fields())


def test_the_best_are_those_with_the_highest_values_in_the_order_of_the_file(folder, export):
    scores = read_scores(folder / "star/particles.csv")
    for options, by in (((), "gain"), (("--by", "correlation"), "correlation")):
        kept = starfile.read(export("star", f"{by}.star", "--best", 50, *options))["particles"]
        best = np.sort(np.argsort(-scores.column(by))[:50])
        assert kept["rlnImageName"].tolist() == [f"{row + 1:06d}@particles.mrcs" for row in best]
        assert (
            starfile.read(export("star", f"o{by}.star", "--best", 50, *options))["optics"]["rlnVoltage"].item() == 300
        )


@pytest.mark.parametrize("suffix", ["pkl", "npy", "txt"])
def test_rows_are_what_data_indices_takes(folder, export, tmp_path, suffix):
    scores = read_scores(folder / "star/particles.csv")
    cut = float(np.median(scores.column("scale")))
    path = export("star", f"rows.{suffix}", "--above", f"scale={cut}", "--below", "half=0")
    expected = scores.rows[(scores.column("scale") >= cut) & (scores.half == 0)]
    words = {"particles": "particles.star", "indices": str(path)}
    assert load(folder, half_maps=False, **words).rows.tolist() == expected.tolist()
    again = export("star", "again.pkl", "--indices", path, "--best", 7)
    assert len(pickle.loads(again.read_bytes())) == 7


def test_particles_that_a_run_left_out_are_not_in_its_copy(folder, export):
    scores = read_scores(folder / "subset/particles.csv")
    kept = starfile.read(export("subset", "subset.star"))["particles"]
    assert kept["rlnImageName"].tolist() == [f"{row + 1:06d}@particles.mrcs" for row in range(0, 301, 3)]
    by_row = dict(zip(scores.rows.tolist(), scores.column("gain").tolist(), strict=True))
    np.testing.assert_allclose(kept["rlnCryosplatGain"], [by_row[row] for row in range(0, 301, 3)], rtol=1e-5)


def test_a_stack_with_pickles_becomes_a_star_file_with_the_same_poses_ctf_and_halves(folder, export):
    path = export("stack", "new.star", "--best", 40)
    listing = read_listing(path, [])
    rows = listing.slices
    new, old = load(path.parent, particles=path.name), load(folder, particles="particles.mrcs", **pickles())
    assert new.pixel_size_a == old.pixel_size_a and len(new) == 40 and set(rows % 3) == {0}
    np.testing.assert_allclose(new.rotations, old.rotations[rows], atol=1e-7)
    np.testing.assert_allclose(new.shifts, old.shifts[rows], atol=1e-7)
    np.testing.assert_allclose(new.ctf, old.ctf[rows], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(new.read(np.arange(40)), old.read(rows))
    in_run = load(folder, particles="particles.mrcs", indices="thirds.txt", **pickles())
    half = dict(zip(in_run.rows.tolist(), in_run.half.tolist(), strict=True))
    assert new.half.tolist() == [half[row] for row in rows.tolist()]


def pickles():
    return {"poses": "poses.pkl", "ctf": "ctf.pkl"}


@pytest.mark.parametrize(
    ("run", "name", "options", "message"),
    [
        ("star", "a.cs", [], "the particles of the run are in particles.star, so name a .star file"),
        ("cs", "a.star", [], "the particles of the run are in particles.cs, so name a .cs file"),
        ("stack", "a.cs", [], "the particles of the run are in particles.mrcs, so name a .star file"),
        ("star", "a", [], "so name a .star file (or .pkl, .npy or .txt"),
        ("star", "there.star", [], "there.star exists already"),
        ("star", "no/a.star", [], "does not exist"),
        ("star", "a.star", ["--above", "gain"], "expected COLUMN=NUMBER, COLUMN one of residual, scale"),
        ("star", "a.star", ["--above", "gain=much"], "--above gain=much: expected COLUMN=NUMBER"),
        ("star", "a.star", ["--below", "gane=1"], "--below gane=1: expected COLUMN=NUMBER"),
        ("star", "a.star", ["--below", "gain=nan"], "--below gain=nan: expected COLUMN=NUMBER"),
        ("star", "a.star", ["--above", "gain=1e9"], "none of the run's 301 particles is left"),
        ("star", "a.star", ["--best", "0"], "--best 0: expected at least 1"),
        ("subset", "a.star", ["--indices", "{folder}/rows.txt"], "entry 1 is row 4, which is none of the run's 101"),
        ("no", "a.star", [], "summary.json: no such file; only of a complete run"),
        ("damaged", "a.star", [], "summary.json: not as a run writes it"),
    ],
)
def test_what_cannot_be_exported_is_said(folder, export, tmp_path, run, name, options, message):
    (tmp_path / "there.star").write_text("precious")
    (folder / "rows.txt").write_text("3\n4\n")
    (folder / "damaged").mkdir(exist_ok=True)
    (folder / "damaged/summary.json").write_text("{}")
    assert message in export(run, name, *(option.format(folder=folder) for option in options))
    assert (tmp_path / "there.star").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["there.star"]


def test_a_particle_file_that_changed_or_went_since_the_run_is_noticed(folder, tmp_path, capsys):
    stack = tmp_path / "moved"
    stack.mkdir()
    for name in ("particles.mrcs", "particles.star", "truth.mrc"):
        shutil.copy(folder / name, stack)
    run = training_set.fitted(stack, tmp_path / "run", *QUICK, "data.poses=null", "data.ctf=null")
    star = stack / "particles.star"
    star.write_text(star.read_text().replace("000007@", "000008@", 1))
    assert cli.main(["export", str(run), "-o", str(tmp_path / "a.star")]) == 2
    assert "particles.star: the file has changed since the run" in capsys.readouterr().err
    star.unlink()
    assert cli.main(["export", str(run), "-o", str(tmp_path / "a.star")]) == 2
    assert "is not there any more; put it back" in capsys.readouterr().err


# Files as others write them


STARS = {
    "relion 3.0, trailing spaces, tabs": (
        "\ndata_images\n\nloop_ \n_rlnVoltage #1 \n_rlnImageName #2 \n"
        "  300.000000 000042@a.mrcs  \n\t300.10\t000050@a.mrcs\t\n 3e2 000112@a.mrcs\n\n",
        "\ndata_images\n\nloop_ \n_rlnVoltage #1 \n_rlnImageName #2 \n_rlnCryosplatGain #3\n_rlnCryosplatScale #4\n"
        "  300.000000 000042@a.mrcs   1.5 7\n 3e2 000112@a.mrcs -2e-09 0.333333\n\n",
    ),
    "windows": (
        "data_\r\nloop_\r\n_rlnImageName\r\n1@a.mrcs\r\n2@a.mrcs\r\n3@a.mrcs\r\n",
        "data_\r\nloop_\r\n_rlnImageName\r\n_rlnCryosplatGain #2\r\n_rlnCryosplatScale #3\r\n"
        "1@a.mrcs 1.5 7\r\n3@a.mrcs -2e-09 0.333333\r\n",
    ),
    "no last line end": (
        "data_\nloop_\n_rlnImageName #1\n1@a.mrcs\n2@a.mrcs\n3@a.mrcs",
        "data_\nloop_\n_rlnImageName #1\n_rlnCryosplatGain #2\n_rlnCryosplatScale #3\n"
        "1@a.mrcs 1.5 7\n3@a.mrcs -2e-09 0.333333",
    ),
    "quotes, comments and other tables": (
        "# made by hand\ndata_general\n_name 'a b'\n\ndata_particles\nloop_\n_rlnMicrographName #1 (of what)\n# here\n"
        "_rlnImageName #2\n# and here\n\"my film.mrc\" '1@a b.mrcs'\n# between\n m.mrc 2@a.mrcs\n_m.mrc 3@a.mrcs\n\n"
        "data_more\nloop_\n_x\n1@2\n\n",
        "# made by hand\ndata_general\n_name 'a b'\n\ndata_particles\nloop_\n_rlnMicrographName #1 (of what)\n# here\n"
        "_rlnImageName #2\n_rlnCryosplatGain #3\n_rlnCryosplatScale #4\n# and here\n"
        "\"my film.mrc\" '1@a b.mrcs' 1.5 7\n# between\n_m.mrc 3@a.mrcs -2e-09 0.333333\n\n"
        "data_more\nloop_\n_x\n1@2\n\n",
    ),
    "with the columns of another run": (
        "data_\nloop_\n_rlnCryosplatGain #1\n_rlnImageName #2\n_rlnVoltage #3\n"
        "1 '1@a b.mrcs'  300\n 22  2@a.mrcs .1\n3.33 3@a.mrcs 3e2 \n",
        "data_\nloop_\n_rlnCryosplatGain #1\n_rlnImageName #2\n_rlnVoltage #3\n_rlnCryosplatScale #4\n"
        "1.5 '1@a b.mrcs'  300 7\n-2e-09 3@a.mrcs 3e2  0.333333\n",
    ),
}
"""Files of three particles, and what they become if the second is left out and two columns come to the others."""


@pytest.mark.parametrize("name", STARS)
def test_star_files_of_every_make_are_copied_to_the_letter(tmp_path, name):
    source, expected = (text.encode() for text in STARS[name])
    (tmp_path / "a.star").write_bytes(source)
    copy_star(tmp_path / "a.star", tmp_path / "same.star", np.arange(3), {})
    assert (tmp_path / "same.star").read_bytes() == source
    values = {"_rlnCryosplatGain": np.array([1.5, -2e-9]), "_rlnCryosplatScale": np.array([7, 1 / 3])}
    copy_star(tmp_path / "a.star", tmp_path / "b.star", np.array([0, 2]), values)
    assert (tmp_path / "b.star").read_bytes() == expected
    table = next(table for table in read_star(tmp_path / "b.star").values() if "_rlnImageName" in table.text)
    assert len(table) == 2


def test_real_star_files_are_copied_to_the_letter(shared, tmp_path):
    stars = [*(shared / "data/readers").glob("*.star")]
    assert len(stars) == 5
    for path in stars:
        if path.name == "sample.star":
            continue
        copy = tmp_path / path.name
        count = len(read_listing(path, []))
        copy_star(path, copy, np.arange(count), {"_rlnCryosplatGain": np.arange(count) + 0.25})
        before, after = (file.read_text().splitlines() for file in (path, copy))
        added = [line for line in after if line.startswith("_rlnCryosplatGain")]
        assert len(added) == 1
        after.remove(added[0])
        row = 0
        for one, two in zip(before, after, strict=True):
            assert two in (one, f"{one} {row + 0.25:.6g}")
            row += two != one
        assert row == count


def test_a_cs_file_keeps_what_it_has_of_any_type(tmp_path):
    write_dataset(tmp_path)
    columns = tables.cs() | {"text": np.array([b"a", b"bb", b"", b"d", b"e", b"f"]), "cryosplat/gain": np.ones(6)}
    tables.save_cs(tmp_path / "p.cs", columns)
    copy_cs(tmp_path / "p.cs", tmp_path / "q.cs", np.array([1, 4]), {"cryosplat/gain": np.array([3.0, 4.0])})
    copy = np.load(tmp_path / "q.cs", allow_pickle=False)
    assert copy["text"].tolist() == [b"bb", b"e"] and copy["cryosplat/gain"].tolist() == [3, 4]
    assert copy["blob/shape"].tolist() == [[8, 8], [8, 8]] and copy["uid"].dtype == np.uint64
