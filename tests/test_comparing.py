"""Runs side by side: the numbers of their summaries, what they differ in, and what their maps have in common."""

import csv
import json

import numpy as np
import pytest
import scipy.fft

from cryosplat import cli
from cryosplat.comparing import BETWEEN, _cropped, compare
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, write_csv
from cryosplat.volumes import write_map

BOX, PIXEL_SIZE_A = 24, 3.0


def molecule(box, pixel_size_a):
    """Round blobs on any grid, so smooth that the coarsest holds them; its origin at voxel box // 2."""
    places = np.random.default_rng(3).uniform(-12, 12, (9, 3))
    z, y, x = (np.indices((box,) * 3) - box // 2) * pixel_size_a
    squares = ((np.stack([x, y, z], -1)[..., None, :] - places) ** 2).sum(-1)
    return np.exp(-squares / (2 * 4.5**2)).sum(-1)


def run(folder, box=BOX, pixel_size_a=PIXEL_SIZE_A, noise=0.0, settings="train:\n  lr: 0.001\n", **summary):
    folder.mkdir()
    rng = np.random.default_rng(box)
    write_map(folder / "map.mrc", molecule(box, pixel_size_a) + noise * rng.standard_normal((box,) * 3), pixel_size_a)
    write_map(folder / "mask.mrc", np.ones((box,) * 3, np.float32), pixel_size_a)
    curve = FscCurve(np.linspace(1, 0, box // 2 + 1), box, pixel_size_a)
    write_csv(folder / "fsc.csv", {"calibrated_map": curve, "half_maps": curve})
    facts = {"box": box, "pixel_size_a": pixel_size_a, "particles": 1000, "gaussians": 50, "resolution_a": 7.25}
    (folder / "summary.json").write_text(json.dumps(facts | {"wall_seconds": 8000, "world_size": 1} | summary))
    (folder / "config.yaml").write_text(f"run_dir: {folder}\n{settings}")
    return folder


def test_numbers_settings_and_curves_of_two_runs_stand_side_by_side(tmp_path, capsys):
    one = run(tmp_path / "one")
    two = run(tmp_path / "two", noise=0.3, settings="train:\n  lr: 0.01\n  whiten: false\n", resolution_a=9.5)
    assert cli.main(["compare", str(one), str(two)]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "two"] in told and ["particles", "1,000", "1,000"] in told
    assert ["resolution,", "calibrated", "7.25", "A", "9.50", "A"] in told
    assert ["train.lr", "0.001", "0.01"] in told and ["train.whiten", "(unknown)", "false"] in told
    assert not any("run_dir" in line for line in told)
    found = compare([one, two])
    assert set(found.panels) == {
        "delivered map to the truth, calibrated", "half maps of mixtures (naive)", BETWEEN
    }  # fmt: skip
    assert 0.3 < found.between[0, 1].fsc[1:].mean() < 0.95


def test_equal_maps_agree_entirely_also_on_grids_of_one_field_of_view(tmp_path):
    runs = [run(tmp_path / "fine", 36, 2.0), run(tmp_path / "odd", 25, 72 / 25), run(tmp_path / "coarse")]
    found = compare(runs)
    assert all(curve.fsc[1:7].min() > 0.999 for curve in found.between.values())
    assert found.between[0, 1].box == 25 and found.between[0, 2].box == 24


@pytest.mark.parametrize(("fine", "coarse"), [(36, 24), (36, 25), (25, 18), (33, 21)])
def test_cutting_a_grid_leaves_the_origin_where_it_is(fine, coarse):
    cut, made = _cropped(molecule(fine, 72 / fine), coarse), molecule(coarse, 72 / coarse)
    assert np.linalg.norm(cut - made) < 2e-2 * np.linalg.norm(made)
    assert scipy.fft.rfftn(cut)[0, 0, 0].real == pytest.approx(cut.sum())


def test_boxes_of_other_width_have_their_curves_compared_and_not_their_maps(tmp_path, capsys):
    runs = [run(tmp_path / "one"), run(tmp_path / "two", 32)]
    assert cli.main(["compare", *map(str, runs)]) == 0
    assert "not comparable: the boxes are 72.0 A and 96.0 A wide" in capsys.readouterr().out
    assert BETWEEN not in compare(runs).panels


def test_the_files_asked_for_are_written_and_never_over_others(tmp_path, capsys):
    runs = [str(run(tmp_path / name)) for name in ("one", "a<b")]
    files = [tmp_path / f"out.{suffix}" for suffix in ("png", "html", "csv")]
    words = [word for file in files for word in ("-o", str(file))]
    assert cli.main(["compare", *runs, *words]) == 0
    assert files[0].read_bytes().startswith(b"\x89PNG")
    page = files[1].read_text()
    assert "a&lt;b" in page and "a<b" not in page and "data:image/png;base64," in page
    assert "http" not in page and "src=" in page  # nothing from elsewhere
    with open(files[2], newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["run"] for row in rows} == {"one", "a<b", "one × a<b"}
    assert {int(row["shell"]) for row in rows} == set(range(1, BOX // 2 + 1))
    assert cli.main(["compare", *runs, "-o", str(files[0])]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["compare", *runs, "-o", str(tmp_path / "out.pdf")]) == 2


def test_what_cannot_be_compared_is_refused(tmp_path):
    one = run(tmp_path / "one")
    with pytest.raises(InputError, match="two run directories or more"):
        compare([one])
    (tmp_path / "two").mkdir()
    with pytest.raises(InputError, match="summary.json: no such file; only a complete run"):
        compare([one, tmp_path / "two"])


def test_a_run_without_curves_has_its_numbers_compared(tmp_path):
    runs = [run(tmp_path / "one"), run(tmp_path / "two")]
    (runs[1] / "fsc.csv").unlink()
    found = compare(runs)
    assert set(found.panels["delivered map to the truth, calibrated"]) == {"one"}
