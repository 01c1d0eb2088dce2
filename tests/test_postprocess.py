"""The postprocess command: what it takes, what it writes and records, what it refuses; and RELION gets the same."""

import hashlib
import json
import re
import shutil
import subprocess

import mrcfile
import numpy as np
import pytest

from cryosplat import __version__, cli
from cryosplat.fsc import FscCurve, fsc, write_csv
from cryosplat.postprocess import FILES, read_curve
from cryosplat.volumes import read_map, write_map

BOX, PIXEL_SIZE_A = 64, 2.0
DECAY_A2 = 120.0
NOISE = 1.0
"""Standard deviation of the noise of a half map a voxel; of the truth over the box it is 1."""


def decayed(volume, b_factor_a2):
    """A map times exp(-b s^2 / 4)."""
    frequency = np.fft.fftfreq(len(volume), PIXEL_SIZE_A)
    squares = frequency[:, None, None] ** 2 + frequency[:, None] ** 2 + frequency**2
    return np.fft.ifftn(np.fft.fftn(volume) * np.exp(-b_factor_a2 / 4 * squares)).real


def soft_ball(radius, edge):
    axis = np.arange(BOX) - BOX // 2
    distance = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    return 0.5 * (1 + np.cos(np.pi * np.clip((distance - radius) / edge, 0, 1)))


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Half maps of a ball of random density whose amplitudes fall by a known B, in white noise; truth and mask."""
    folder = tmp_path_factory.mktemp("maps")
    rng = np.random.default_rng(5)
    truth = decayed(rng.standard_normal((BOX,) * 3) * soft_ball(14, 4), DECAY_A2)
    truth /= truth.std()
    halves = {f"half{number}": truth + rng.normal(0, NOISE, truth.shape) for number in (1, 2)}
    for name, volume in {**halves, "truth": truth, "mask": soft_ball(18, 6)}.items():
        write_map(folder / f"{name}.mrc", volume, PIXEL_SIZE_A)
    return folder


@pytest.fixture
def run_dir(maps, tmp_path):
    """A run's directory, with the FSC of its map to the truth as the calibrated curve."""
    folder = tmp_path / "run"
    folder.mkdir()
    half1, half2, truth, mask = (read_map(maps / f"{name}.mrc")[0] for name in ("half1", "half2", "truth", "mask"))
    delivered = 0.5 * (half1 + half2)
    write_map(folder / "map.mrc", delivered, PIXEL_SIZE_A)
    write_map(folder / "mask.mrc", mask, PIXEL_SIZE_A)
    half_maps, calibrated = fsc(half1, half2, PIXEL_SIZE_A, mask), fsc(delivered, truth, PIXEL_SIZE_A, mask)
    write_csv(folder / "fsc.csv", {"half_maps": half_maps, "calibrated_map": calibrated})
    (folder / "summary.json").write_text(json.dumps({"resolution_a": 5.12, "box": BOX}))
    return folder


@pytest.fixture
def command(capsys):
    def run(*words):
        try:
            code = cli.main(["postprocess", *(str(word) for word in words)])
        except SystemExit as ended:  # of argparse
            code = ended.code
        return (code, *capsys.readouterr())

    return run


def of_halves(maps):
    return "--half1", maps / "half1.mrc", "--half2", maps / "half2.mrc", "--mask", maps / "mask.mrc"


def record_of(folder):
    return json.loads((folder / "postprocess.json").read_text())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What it does


def test_two_half_maps_are_averaged_weighted_by_their_fsc_and_sharpened_by_the_b_of_their_decay(
    command, maps, tmp_path
):
    code, output, errors = command(*of_halves(maps)[:4], "-o", tmp_path / "out")
    assert code == 0, errors
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    record = record_of(tmp_path / "out")
    assert record["b_factor_a2"] == pytest.approx(-DECAY_A2, rel=0.1) and record["b_factor_from"] == "Guinier fit"
    assert f"{record['b_factor_a2']:.1f} A^2, sharpens" in output and f"{record['resolution_a']:.2f} A" in output
    assert record["weighting"] == "half-maps" and "0.143" in record["resolution_from"]
    half1, half2 = (read_map(maps / f"{name}.mrc")[0] for name in ("half1", "half2"))
    sharpened, pixel_size_a = read_map(tmp_path / "out/postprocess.mrc")
    assert pixel_size_a == PIXEL_SIZE_A
    shells = int(BOX * PIXEL_SIZE_A / record["resolution_a"])
    assert fsc(sharpened, half1 + half2, PIXEL_SIZE_A).fsc[1 : shells - 1].min() > 0.999  # filters are radial


def test_everything_that_decided_the_map_is_on_record_and_a_label_in_its_header(command, maps, tmp_path):
    assert command(*of_halves(maps), "-o", tmp_path, "--apply-mask", "--bfactor", "-80", "--resolution", 6)[0] == 0
    record = record_of(tmp_path)
    assert set(record["inputs"]) == {"half1", "half2", "mask"}
    for name, entry in record["inputs"].items():
        assert entry == {"path": str(maps / f"{name}.mrc"), "sha256": sha256(maps / f"{name}.mrc")}
    assert record["program"] == f"cryosplat {__version__}" and record["mask_applied"] is True
    assert (record["b_factor_a2"], record["b_factor_from"], record["fit"]) == (-80, "given", None)
    assert (record["resolution_a"], record["resolution_from"]) == (6, "as asked for")
    assert (record["box"], record["pixel_size_a"], record["low_pass_edge_shells"]) == (BOX, PIXEL_SIZE_A, 2)
    with mrcfile.open(tmp_path / "postprocess.mrc") as handle:
        labels = " ".join(handle.get_labels())
        assert "cryosplat postprocess: B -80 A^2, low-pass 6 A, FSC-weighted, masked" in labels
        assert not handle.data[read_map(maps / "mask.mrc")[0] == 0].any()


def test_the_fit_is_on_record_with_its_range_and_quality(command, maps, tmp_path):
    assert command(*of_halves(maps), "-o", tmp_path, "--fit-from", 16)[0] == 0
    record = record_of(tmp_path)
    fit = record["fit"]
    assert set(fit) == {"slope", "intercept", "r_squared", "from_a", "to_a", "shells"}
    assert fit["from_a"] == 16 and fit["to_a"] == record["resolution_a"] and 0.9 < fit["r_squared"] <= 1
    assert 4 * fit["slope"] == record["b_factor_a2"]
    assert fit["shells"] == int(BOX * PIXEL_SIZE_A / fit["to_a"]) - int(BOX * PIXEL_SIZE_A / 16) + 1


def test_a_run_gives_its_map_its_calibrated_curve_its_resolution_and_if_asked_its_mask(command, run_dir, tmp_path):
    code, output, errors = command(run_dir, "-o", tmp_path / "out")
    assert code == 0, errors
    record = record_of(tmp_path / "out")
    assert set(record["inputs"]) == {"map", "fsc"} and record["mask_applied"] is False
    assert record["weighting"] == "truth" and "the FSC to the truth itself" in output
    assert record["fsc_from"] == f"calibrated_map of {run_dir / 'fsc.csv'}" and not record["notes"]
    assert record["resolution_a"] == 5.12 and "summary.json" in record["resolution_from"]
    assert command(run_dir, "-o", tmp_path / "masked", "--apply-mask")[0] == 0
    assert record_of(tmp_path / "masked")["inputs"]["mask"]["path"] == str(run_dir / "mask.mrc")
    plain, masked = (read_map(tmp_path / name / "postprocess.mrc")[0] for name in ("out", "masked"))
    np.testing.assert_allclose(masked, plain * read_map(run_dir / "mask.mrc")[0], atol=1e-6)


def test_the_fsc_to_the_truth_and_that_of_half_maps_weigh_alike(command, run_dir, tmp_path):
    for column in ("calibrated_map", "half_maps"):
        assert command(run_dir, "--column", column, "--bfactor", 0, "-o", tmp_path / column)[0] == 0
    one, other = (read_map(tmp_path / column / "postprocess.mrc")[0] for column in ("calibrated_map", "half_maps"))
    assert np.linalg.norm(one - other) / np.linalg.norm(one) < 0.03  # C = sqrt(2 F / (1 + F)), but for noise
    assert record_of(tmp_path / "half_maps")["weighting"] == "half-maps"
    assert "calibrated" in record_of(tmp_path / "half_maps")["notes"][0]


def test_a_run_without_a_resolution_has_that_of_its_curve_at_the_threshold_of_its_kind(command, run_dir, tmp_path):
    (run_dir / "summary.json").write_text('{"resolution_a": null}')
    found = {}
    for column, threshold in (("calibrated_map", "0.5"), ("half_maps", "0.143")):
        assert command(run_dir, "--column", column, "-o", tmp_path / column)[0] == 0
        record = record_of(tmp_path / column)
        assert record["resolution_from"].startswith(f"FSC = {threshold}, {column}")
        found[column] = record["resolution_a"]
    assert found["calibrated_map"] == pytest.approx(found["half_maps"], rel=0.05)


def test_a_map_alone_needs_no_curve_if_none_shall_weigh(command, maps, tmp_path):
    words = "--map", maps / "truth.mrc", "--weighting", "none", "--resolution", 5
    assert command(*words, "-o", tmp_path)[0] == 0
    record = record_of(tmp_path)
    assert record["weighting"] == "none" and record["b_factor_a2"] == pytest.approx(-DECAY_A2, rel=0.03)


def test_a_curve_of_another_name_weighs_when_it_is_said_what_it_compares(command, run_dir, tmp_path):
    curve = FscCurve(np.full(BOX // 2 + 1, 0.5), BOX, PIXEL_SIZE_A)
    write_csv(tmp_path / "mine.csv", {"fsc": curve})
    words = "--map", run_dir / "map.mrc", "--fsc", tmp_path / "mine.csv", "--column", "fsc", "--resolution", 6
    code, _, errors = command(*words, "-o", tmp_path / "out")
    assert code == 2 and "column fsc can be any curve; say what it compares with --weighting" in errors
    assert command(*words, "--weighting", "truth", "-o", tmp_path / "out")[0] == 0
    assert record_of(tmp_path / "out")["weighting"] == "truth"


def test_where_a_curve_says_nothing_it_is_zero(tmp_path):
    rows = [
        "shell,resolution_a,frequency_inv_a,calibrated_map",
        "1,8,0.125,0.9",
        "2,4,0.25,nan",
        "3,2.6667,0.375,",
        "4,2,.5,",
    ]
    (tmp_path / "fsc.csv").write_text("\n".join(rows) + "\n")
    assert read_curve(tmp_path / "fsc.csv", "calibrated_map", 8, 1.0).fsc.tolist() == [1, 0.9, 0, 0, 0]


def test_the_figure_is_drawn(command, run_dir, tmp_path):
    assert command(run_dir, "-o", tmp_path)[0] == 0
    assert (tmp_path / "guinier.png").read_bytes().startswith(b"\x89PNG")


# What it refuses

HALVES = ["--half1", "half1.mrc", "--half2", "half2.mrc"]


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_overwritten(command, run_dir, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    code, _, errors = command(run_dir, "-o", tmp_path / "out")
    assert code == 2 and f"{name} exists already" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "expected one of: a run directory, --map, or --half1 with --half2"),
        (["--half1", "half1.mrc"], "expected one of"),
        (["--map", "truth.mrc", "--half1", "half1.mrc", "--half2", "half2.mrc"], "expected one of"),
        (["--map", "truth.mrc"], "--map has no FSC by itself: give --fsc"),
        (["--map", "truth.mrc", "--weighting", "none"], "give it with --resolution"),
        (["--map", "none.mrc", "--weighting", "none", "--resolution", "5"], "none.mrc: no such map"),
        (["--half1", "half1.mrc", "--half2", "small.mrc"], "small.mrc has a box of 32 px, half1.mrc one of 64 px"),
        (["--half1", "half1.mrc", "--half2", "other.mrc"], "other.mrc has 2.5 A/px, half1.mrc has 2"),
        ([*HALVES, "--mask", "small.mrc"], "small.mrc has a box of 32 px"),
        ([*HALVES, "--mask", "half1.mrc"], "half1.mrc: expected values from 0 to 1"),
        ([*HALVES, "--weighting", "truth"], "is between half maps"),
        ([*HALVES, "--column", "x"], "--column x: of which table"),
        ([*HALVES, "--apply-mask"], "there is no mask; give one with --mask"),
        ([*HALVES, "--fit-from", "5", "--resolution", "4.6"], "2 shells of signal from 5 A (--fit-from) to 4.6 A"),
        ([*HALVES, "--fit-from", "-1"], "--fit-from -1: expected a resolution"),
        ([*HALVES, "--bfactor", "nan"], "--bfactor nan: expected a number in A^2"),
        ([*HALVES, "--resolution", "3.9"], "Nyquist is 4 A"),
        (["run", "--resolution", "3.9"], "resolution 3.9 A: the map has 2 A/px, so Nyquist is 4 A"),
        (["run", "--column", "corrected"], "fsc.csv: no column corrected; there are half_maps, calibrated_map"),
        (["run", "--fsc", "run/fsc.csv"], "which curve? Name it with --column; there are half_maps, calibrated_map"),
        (["run", "--fsc", "none.csv", "--column", "half_maps"], "none.csv: not a readable table"),
        (["run", "--fsc", "run/summary.json", "--column", "x"], "expected the columns shell and resolution_a"),
        (["run", "--fsc", "short.csv", "--column", "half_maps"], "16 shells of a box of 64 A, but the map has 32"),
        (["run", "--fsc", "words.csv", "--column", "half_maps"], "column half_maps: expected numbers"),
        (["nowhere"], "nowhere: no complete run of cryosplat (it has no map.mrc)"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong_is_named(command, maps, run_dir, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    for path in maps.iterdir():
        (tmp_path / path.name).symlink_to(path)
    write_map("small.mrc", np.zeros((32,) * 3), PIXEL_SIZE_A)
    write_map("other.mrc", np.zeros((BOX,) * 3), 2.5)
    write_csv("short.csv", {"half_maps": FscCurve(np.ones(17), 32, PIXEL_SIZE_A)})
    (tmp_path / "words.csv").write_text("shell,resolution_a,half_maps\n1,128,much\n")
    code, output, errors = command(*words, "-o", "out")
    assert code == 2 and not output and "Traceback" not in errors
    assert message in errors.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_run_whose_curve_knows_only_a_simulations_truth_must_be_told_to_use_it(command, run_dir, tmp_path):
    write_csv(run_dir / "fsc.csv", {"truth": FscCurve(np.full(33, 0.9), BOX, PIXEL_SIZE_A)}, overwrite=True)
    code, _, errors = command(run_dir, "-o", tmp_path / "out")
    assert code == 2 and "which curve? Name it with --column; there are truth" in errors
    assert command(run_dir, "--column", "truth", "-o", tmp_path / "out")[0] == 0


# RELION itself


def relion_postprocess(maps, folder, *words):
    """RELION's sharpened map, its fitted B and its corrected FSC, of the half maps under the mask."""
    if shutil.which("relion_postprocess") is None:
        pytest.skip("needs relion_postprocess of RELION, which is not installed here")
    for half in ("half1", "half2"):
        shutil.copy(maps / f"{half}.mrc", folder / f"{half}_class001_unfil.mrc")
    (folder / "relion").mkdir()  # for a PDF
    halves = "--i", "half1_class001_unfil.mrc", "--i2", "half2_class001_unfil.mrc"
    options = "--mask", maps / "mask.mrc", "--angpix", PIXEL_SIZE_A, "--auto_bfac", "--o", "relion"
    arguments = [str(word) for word in ("relion_postprocess", *halves, *options, *words)]
    ended = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert (folder / "relion.mrc").exists(), ended.stderr
    text = (folder / "relion.star").read_text()
    b_factor_a2 = float(re.search(r"_rlnBfactorUsedForSharpening\s+(\S+)", text)[1])
    table = re.search(r"data_fsc(.*?)data_", text, re.DOTALL)[1]
    rows = [line.split() for line in table.splitlines() if re.match(r"\s*\d", line)]
    return read_map(folder / "relion.mrc")[0], b_factor_a2, np.array(rows, dtype=float)[:, 3]


def test_relion_fits_the_same_b_and_makes_the_same_map(command, maps, tmp_path):
    resolution_a = BOX * PIXEL_SIZE_A / 25
    theirs, b_factor_a2, corrected = relion_postprocess(
        maps, tmp_path, "--low_pass", resolution_a, "--autob_highres", resolution_a - 0.01
    )
    write_csv(tmp_path / "relion.csv", {"corrected": FscCurve(corrected, BOX, PIXEL_SIZE_A)})
    with_theirs = "--fsc", tmp_path / "relion.csv", "--column", "corrected"
    for name, words in {"own": (), "theirs": with_theirs}.items():
        words = (*of_halves(maps), *words, "--resolution", resolution_a)
        assert command(*words, "-o", tmp_path / name)[0] == 0
        assert record_of(tmp_path / name)["b_factor_a2"] == pytest.approx(b_factor_a2, rel=0.01)
        ours = read_map(tmp_path / name / "postprocess.mrc")[0]
        assert fsc(ours, theirs, PIXEL_SIZE_A).fsc[1:26].min() > 0.999
        assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.01
