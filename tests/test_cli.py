"""The commands: help, what they print and write, and one clear error for everything that a user can get wrong."""

import csv
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys

import mrcfile
import numpy as np
import pytest
import training_set
from ranks import environment
from stacks import make_ctf, make_images, make_poses, write_dataset, write_pickle, write_stack, write_star

from cryosplat import __version__, cli, train
from cryosplat.ending import ending
from cryosplat.fsc import fsc
from cryosplat.outputs import SUMMARY_KEYS
from cryosplat.volumes import read_map


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    return training_set.reference_run(tmp_path_factory)


@pytest.fixture
def command(capsys):
    """Runs a command in this process: exit code, output and errors. Leaves the logging of other tests as it was."""
    package = logging.getLogger("cryosplat")
    before = package.handlers, package.level, package.propagate

    def run(*words, main=cli.main):
        try:
            code = main([str(word) for word in words])
        except SystemExit as ended:  # of argparse
            code = ended.code
        return (code, *capsys.readouterr())

    yield run
    package.handlers, package.level, package.propagate = before


def error_of(outcome):
    """The one error of a command that stops with it, without a traceback."""
    code, output, errors = outcome
    assert code == 2, errors
    lines = errors.splitlines()
    (first,) = (place for place, line in enumerate(lines) if line.startswith("error: "))
    assert "Traceback" not in errors and not output
    return "\n".join(lines[first:]).removeprefix("error: ")


# Help


def test_help_names_the_commands_without_waiting_for_pytorch():
    program = "import sys; from cryosplat import cli; code = cli.main(['--help'])"
    check = f"try:\n {program}\nexcept SystemExit as ended:\n assert ended.code == 0 and 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment())
    assert ended.returncode == 0, ended.stderr
    for name in "train simulate voxelise fsc postprocess backproject validate doctor inspect info".split():
        assert re.search(rf"^ +{name}\s", ended.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "name, options",
    {
        "train": ("--config", "key=value", "torchrun"),
        "simulate": ("--model", "--map", "--snr", "--ctf", "--poses", "--images", "--out"),
        "voxelise": ("--box", "--pixel-size", "--output", "--model"),
        "fsc": ("--mask",),
        "status": ("RUN",),
        "gaussians": ("RUN_OR_FILE", "--output", "--model"),
        "compare": ("RUN", "--output"),
        "postprocess": ("--map", "--half1", "--mask", "--fsc", "--column", "--bfactor", "--fit-from", "--apply-mask"),
        "backproject": ("--config", "key=value", "--output", "--sym", "--halves", "--no-halves", "torchrun"),
        "inspect": ("FILE", "key=value", "--write", "--json"),
        "info": ("FILE",),
    }.items(),
)
def test_every_command_has_help_that_names_its_options(command, name, options):
    code, output, errors = command(name, "--help")
    assert code == 0 and not errors
    assert output.startswith(f"usage: cryosplat {name}") and all(option in output for option in options)


def test_python_m_cryosplat_train_has_the_same_help(command):
    code, output, _ = command("--help", main=train.main)
    assert code == 0 and "usage: python -m cryosplat.train" in output and "--config" in output and "key=value" in output


def test_the_version_is_told(command):
    assert command("--version")[:2] == (0, f"cryosplat {__version__}\n")


def test_an_unknown_command_is_refused(command):
    code, _, errors = command("reconstruct")
    assert code == 2 and "invalid choice" in errors


# Looking at files


def test_info_tells_of_a_run(command, reference_run):
    code, output, _ = command("info", reference_run)
    assert code == 0
    rows = dict(line.split(None, 1) for line in output.splitlines())
    summary = json.loads((reference_run / "summary.json").read_text())
    expected = {"particles": "301", "gaussians": "128", "box": "32", "pixel_size_a": "4", "mask": "mask.mrc"}
    expected |= {"resolution_a": f"{summary['resolution_a']:.6g}"}
    assert expected.items() <= rows.items()


def test_info_tells_of_a_run_that_is_not_complete(command, reference_run, tmp_path):
    shutil.copytree(reference_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    code, output, _ = command("info", tmp_path / "run")
    assert code == 0 and "not complete" in output and "step_000000057.pt" in output


@pytest.mark.parametrize("name", ["gaussians.npz", "gaussians.ply"])
def test_info_tells_of_a_mixture(command, reference_run, name):
    code, output, _ = command("info", reference_run / name)
    assert code == 0 and "Gaussians  128" in output and "32 px at 4.0 A" in output


def test_info_tells_of_a_map_and_of_a_stack(command, reference_run, stack):
    code, output, _ = command("info", reference_run / "map.mrc")
    assert code == 0 and "32 voxels, 128.0 A" in output and "voxel size  4 A" in output
    code, output, _ = command("info", stack / "particles.mrcs")
    assert code == 2 and "particles     301" in output and "32 px" in output and "no poses" in output


def test_info_refuses_what_it_does_not_know(command, stack, tmp_path):
    assert "nothing there" in error_of(command("info", tmp_path / "none.mrc"))
    assert "expected a run directory, particles" in error_of(command("info", stack / "simulation.json"))
    assert "no run of cryosplat" in error_of(command("info", tmp_path))
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    assert "not a readable .npz file" in error_of(command("info", tmp_path / "bad.npz"))


@pytest.mark.parametrize("name, words", [("mixture", ()), ("mixture_half_b", ("--model", "half_b"))])
def test_voxelise_gives_the_mixtures_maps_of_the_run(command, reference_run, tmp_path, name, words):
    code, output, _ = command("voxelise", reference_run / "gaussians.npz", "-o", tmp_path / "map.mrc", *words)
    assert code == 0 and "32 voxels at 4 A, 128 Gaussians" in output
    found, pixel_size_a = read_map(tmp_path / "map.mrc")
    expected = read_map(reference_run / f"{name}.mrc")[0]
    assert pixel_size_a == pytest.approx(4)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_voxelise_samples_on_other_grids_of_the_same_field_of_view(command, reference_run, tmp_path):
    for words, box, pixel_size_a in (
        (("--box", 64), 64, 2.0),
        (("--pixel-size", 2.0), 64, 2.0),
        (("--box", 40, "--pixel-size", 2.0), 40, 2.0),
    ):
        out = tmp_path / f"{len(words)}{words[0]}.mrc"
        assert command("voxelise", reference_run / "gaussians.ply", "-o", out, *words)[0] == 0
        volume, found = read_map(out)
        assert len(volume) == box and found == pytest.approx(pixel_size_a)
        # Every second voxel is a voxel of the mixture's map; a voxel of half the depth holds half of it.
        expected = read_map(reference_run / "mixture.mrc")[0]
        inner = slice(0, None) if box == 64 else slice(6, 26)
        expected = expected[inner, inner, inner]
        assert np.linalg.norm(2 * volume[::2, ::2, ::2] - expected) < 1e-3 * np.linalg.norm(expected)


def test_voxelise_overwrites_nothing_and_checks_its_grid(command, reference_run, tmp_path):
    mixture, out = reference_run / "gaussians.npz", tmp_path / "map.mrc"
    assert command("voxelise", mixture, "-o", out)[0] == 0
    before = out.read_bytes()
    assert "map.mrc exists already" in error_of(command("voxelise", mixture, "-o", out))
    assert out.read_bytes() == before
    assert "--box must be at least 1" in error_of(command("voxelise", mixture, "-o", tmp_path / "b.mrc", "--box", 0))
    assert "--pixel-size above 0" in error_of(
        command("voxelise", mixture, "-o", tmp_path / "b.mrc", "--pixel-size", "nan")
    )
    assert "full model only" in error_of(
        command("voxelise", reference_run / "gaussians.ply", "-o", tmp_path / "b.mrc", "--model", "half_a")
    )
    assert not (tmp_path / "b.mrc").exists()


def test_fsc_compares_the_maps_of_a_run(command, reference_run):
    code, output, _ = command("fsc", reference_run / "half_a.mrc", reference_run / "half_b.mrc")
    assert code == 0 and "8.00 A" in output


# What a run leaves


def test_the_summary_has_what_others_rely_on(reference_run, stack):
    summary = json.loads((reference_run / "summary.json").read_text())
    assert list(summary)[: len(SUMMARY_KEYS)] == list(SUMMARY_KEYS)
    for name in ("resolution_a", "resolution_naive_a", "resolution_linear_a", "resolution_truth_a"):
        assert 8.0 <= summary[name] < 20, name
    # The delivered map is good beyond where the linear half maps can tell, and that is said.
    assert summary["resolution_at_limit_of_data"] and summary["resolution_error_a"] is None
    assert 8.0 <= summary["resolution_truth_a"] <= summary["resolution_a"] == summary["calibrated_to_a"]
    assert 0.7 < summary["fsc_linear_truth_mean"] < summary["fsc_truth_mean"] < 1  # mixtures add to the data
    assert 0.8 < summary["fsc_mixture_truth_mean"] < 1
    assert summary["mask"] == "mask.mrc" and "linear map" in summary["mask_origin"]
    assert 0 < summary["anisotropy"] <= 1 and isinstance(summary["warnings"], list)
    assert (summary["particles"], summary["gaussians"], summary["box"], summary["pixel_size_a"]) == (301, 128, 32, 4.0)
    assert summary["gaussians_by_model"] == {"full": 128, "half_a": 128, "half_b": 128}
    assert summary["world_size"] == 1 and summary["epochs"] == 3 and summary["steps"] == 57
    assert summary["volume_fit_seconds"] == 0
    for name in ("images_per_second", "cpu_seconds", "wall_seconds", "peak_memory_gib", "training_seconds"):
        assert summary[name] > 0
    assert summary["training_seconds"] < summary["wall_seconds"] < 600 and summary["peak_memory_gib"] < 16
    assert "rlnRandomSubset" in summary["halves"] and summary["run_dir"] == str(reference_run)


def test_a_run_leaves_all_its_products_and_nothing_half_written(reference_run):
    names = sorted(path.name for path in reference_run.iterdir())
    assert names == [
        "checkpoints", "config.yaml", "directional.png", "fsc.csv", "fsc.png", "fsc.xml", "fsc_half_maps.png",
        "gaussians.cif", "gaussians.npz", "gaussians.ply", "half_a.mrc", "half_b.mrc", "halves.npy", "linear.mrc",
        "loss.png", "map.mrc", "mask.mrc", "metrics.csv", "mixture.mrc", "mixture_half_a.mrc", "mixture_half_b.mrc",
        "particles.csv", "projections.png", "report.html", "run.log", "sections.png", "summary.json", "tensorboard",
        "view.cxc", "viewing_directions.png",
    ]  # fmt: skip
    assert all(path.stat().st_size for path in reference_run.rglob("*") if path.is_file() and path.name != "run.log")
    assert sorted(path.name for path in (reference_run / "checkpoints").iterdir()) == [
        "step_000000038.pt", "step_000000057.pt",
    ]  # fmt: skip


def test_tensorboard_shows_loss_rate_fsc_resolution_memory_and_pictures(reference_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reference_run / "tensorboard")).Reload()
    scalars, images = events.Tags()["scalars"], events.Tags()["images"]
    for words in ("loss/full", "loss/half_a", "loss/half_b", "rate", "images", "memory", "GiB", "resolution", "fsc"):
        assert any(words.lower() in tag.lower() for tag in scalars), (words, scalars)
    for words in ("sections", "projections", "particle", "fsc"):
        assert any(words in tag for tag in images), (words, images)
    losses = events.Scalars("loss/full")
    assert [event.step for event in losses][-1] == 57 and losses[-1].value < losses[0].value
    assert {"run/config/text_summary", "run/hardware/text_summary"} <= set(events.Tags()["tensors"])


def test_the_ending_says_what_came_out_and_where_it_is(command, stack, reference_run):
    """A complete run, started again, says so and does nothing but repeat its ending."""
    code, output, errors = command(*training_set.settings(stack, reference_run), main=train.main)
    assert code == 0 and "the run is complete; nothing to do" in errors
    summary = json.loads((reference_run / "summary.json").read_text())
    expected = (
        f"  resolution  {summary['resolution_a']:.2f} A or better (the data say nothing beyond) (calibrated FSC",
        f"naive resolution  {summary['resolution_naive_a']:.2f} A",
        "they share the model's bias, so it says too much",
        "against the truth", "map.mrc", "half_a.mrc, half_b.mrc (linear, unfiltered: for deposition)",
        f"cryosplat postprocess {reference_run}", "tensorboard --",
        "Gaussians, particles  128 (128 and 128 in the halves)",
        "s of training, ", "loss.png",
    )  # fmt: skip
    for words in expected:
        assert words in output
    assert "fitting in the volume" not in output and "volume_fit.png" not in output
    known = summary | {"resolution_a": 12.0, "resolution_error_a": 0.25, "resolution_at_limit_of_data": False}
    assert "  resolution  12.00 A +- 0.25 (calibrated FSC 0.5, a little modest, under mask.mrc)" in ending(known)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"resolution_a": None}, "resolution  none (calibrated"),
        ({"resolution_a": 8.0, "resolution_at_nyquist": True}, "resolution  8.00 A (Nyquist) (calibrated"),
        (
            {"resolution_a": 9.0, "resolution_at_limit_of_data": True},
            "resolution  9.00 A or better (the data say nothing beyond) (calibrated",
        ),
    ],
)
def test_the_ending_says_what_limits_the_resolution(reference_run, found, words):
    summary = json.loads((reference_run / "summary.json").read_text())
    limits = {"resolution_error_a": None, "resolution_at_nyquist": False, "resolution_at_limit_of_data": False}
    assert f"  {words}" in ending(summary | limits | found)


def test_the_curves_of_a_run_are_of_its_maps(reference_run):
    """Curves that can be computed from the files beside them are what they are called."""
    with open(reference_run / "fsc.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    mask = read_map(reference_run / "mask.mrc")[0]
    for name, files in {
        "half_maps": ("mixture_half_a", "mixture_half_b"),
        "linear_half_maps": ("half_a", "half_b"),
    }.items():
        volumes = [read_map(reference_run / f"{file}.mrc")[0] for file in files]
        expected = fsc(*volumes, training_set.PIXEL_SIZE_A, mask).fsc[1:]
        np.testing.assert_allclose([float(row[name]) for row in rows], expected, atol=1e-4)
    for name, file in (("truth", "map"), ("mixture_truth", "mixture"), ("linear_truth", "linear")):
        truth = training_set.true_map()
        expected = fsc(read_map(reference_run / f"{file}.mrc")[0], truth, training_set.PIXEL_SIZE_A, mask).fsc[1:]
        np.testing.assert_allclose([float(row[name]) for row in rows], expected, atol=1e-4)
    errors = {name.removesuffix("_error") for name in rows[0] if name.endswith("_error")}
    assert errors >= {"calibrated_map", "corrected"} and errors <= set(rows[0])


def test_a_run_is_sharpened_by_its_calibrated_curve_at_its_resolution(command, reference_run, tmp_path):
    code, output, errors = command("postprocess", reference_run, "-o", tmp_path / "out", "--fit-from", 40)
    assert code == 0, errors
    record = json.loads((tmp_path / "out" / "postprocess.json").read_text())
    summary = json.loads((reference_run / "summary.json").read_text())
    assert record["fsc_from"] == f"calibrated_map of {reference_run / 'fsc.csv'}" and record["weighting"] == "truth"
    assert record["resolution_a"] == summary["resolution_a"] and not record["notes"]


def nested(settings):
    """Settings by section, in a form that YAML reads."""
    sections = {}
    for name, value in settings.items():
        section, dot, key = name.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
        else:
            sections[section] = value
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in sections.items()}


def test_the_same_run_through_cryosplat_train_and_a_file(command, stack, reference_run, tmp_path):
    settings = dict(word.split("=") for word in training_set.settings(stack, tmp_path / "run"))
    (tmp_path / "small.yaml").write_text("\n".join(f"{name}: {value}" for name, value in nested(settings).items()))
    with training_set.without_figures():
        code, _, errors = command("train", "--config", tmp_path / "small.yaml", "train.epochs=1")
    assert code == 0 and (tmp_path / "run" / "map.mrc").exists()
    assert "the particles are white on dark" in errors and "epochs: 1" in (tmp_path / "run" / "config.yaml").read_text()


# What a user can get wrong


@pytest.fixture
def keys(tmp_path):
    return write_dataset(tmp_path)


def words_of(folder, keys, *others):
    """Settings of a run on the six images of ``write_dataset``."""
    unchecked = ("data.check_sign=false", "data.check_signal=false")
    small = ("model.gaussians=8", "volume.steps=3", "train.epochs=1", "train.threads=1", *unchecked)
    paths = [f"data.{name}={value}" for name, value in keys.items()]
    return [f"data_root={folder}", *paths, f"run_dir={folder / 'run'}", *small, *others]


def truncated(folder):
    content = (folder / "particles.mrcs").read_bytes()
    (folder / "particles.mrcs").write_bytes(content[:-300])


def with_nan(folder):
    with mrcfile.open(folder / "particles.mrcs", "r+") as handle:
        handle.data[4, 2, 3] = np.nan


def star(folder, *names, **columns):
    write_star(folder / "particles.star", list(names), **columns)
    return ("data.particles=particles.star",)


def moved(folder):
    (folder / "particles.mrcs").unlink()


def missing_in_a_star(folder):
    return star(folder, *(f"{image:06d}@{'particles' if image < 5 else 'gone'}.mrcs" for image in range(1, 7)))


def all_in_one_half(folder):
    return star(folder, *(f"{image:06d}@particles.mrcs" for image in range(1, 7)), RandomSubset=[1] * 6)


def odd(folder):
    write_stack(folder / "particles.mrcs", make_images(6, 9))


def malicious(folder):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(folder / "hacked"),)

    (folder / "poses.pkl").write_bytes(pickle.dumps(Payload()))


BAD_INPUTS = {
    "a truncated stack": (truncated, r"particles\.mrcs: truncated: the header promises 6 images, the file has 4"),
    "a stack with NaN": (with_nan, r"particles\.mrcs, image 4: 1 of 64 pixels are not finite"),
    "no stack": (moved, r"data\.particles: there is no file .*particles\.mrcs"),
    "fewer poses than images": (
        lambda folder: write_pickle(folder / "poses.pkl", make_poses(5)) and None,
        r"poses\.pkl: 5 poses for the 6 images of .*particles\.mrcs",
    ),
    "fewer CTF rows than images": (
        lambda folder: write_pickle(folder / "ctf.pkl", make_ctf(4)) and None,
        r"ctf\.pkl: 4 rows of CTF parameters for the 6 images",
    ),
    "poses of the wrong shape": (
        lambda folder: write_pickle(folder / "poses.pkl", (np.zeros((6, 4)), np.zeros((6, 2)))) and None,
        r"poses\.pkl: rotations: expected the shape \(N, 3, 3\), found \(6, 4\)",
    ),
    "a CTF file of the wrong shape": (
        lambda folder: write_pickle(folder / "ctf.pkl", make_ctf()[:, 1:]) and None,
        r"ctf\.pkl: CTF parameters: expected the shape \(N, 9\), found \(6, 8\)",
    ),
    "a pickle that would run something": (malicious, r"poses\.pkl"),
    "an unknown key": (lambda folder: ("train.epoch=3",), r"no setting 'train\.epoch'; did you mean train\.epochs\?"),
    "a value of the wrong type": (lambda folder: ("train.epochs=many",), r"train\.epochs: expected a whole number"),
    "a value out of range": (lambda folder: ("train.batch=0",), r"train\.batch = 0: expected at least 1 image"),
    "no equals sign": (lambda folder: ("train.epochs",), r"'train\.epochs' on the command line: expected key=value"),
    "no configuration file": (lambda folder: ("--config", "nothing.yaml"), r"no configuration file nothing\.yaml"),
    "a stack that the star file names and is not there": (missing_in_a_star, r"gone\.mrcs"),
    "images of odd size": (odd, r"images of 9 pixels; the box must be even"),
    "an odd box": (lambda folder: ("data.box=9",), r"data\.box = 9: expected an even number of pixels"),
    "a box larger than the images": (lambda folder: ("data.box=10",), r"data\.box=10: larger than the images"),
    "no particle in half b": (all_in_one_half, r"half [ab] has no particles.*maps\.halves=false"),
    "a truth on another grid": (
        lambda folder: train_truth(folder, 10),
        r"data\.truth=.*: 10 voxels at 2 A, but the run's maps have 8 at 2 A",
    ),
    "a truth that is no map": (lambda folder: ("data.truth=poses.pkl",), r"poses\.pkl: not a readable MRC map"),
    "no GPU": (lambda folder: ("train.device=cuda",), r"train\.device=cuda, but"),
}


def train_truth(folder, box):
    with mrcfile.new(folder / "truth.mrc") as handle:
        handle.set_data(np.ones((box,) * 3, np.float32))
        handle.voxel_size = 2.0
    return ("data.truth=truth.mrc",)


@pytest.mark.filterwarnings("ignore:Data array contains NaN:RuntimeWarning")
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_gets_one_clear_error_and_leaves_nothing(command, tmp_path, keys, name, monkeypatch):
    spoil, message = BAD_INPUTS[name]
    if name == "no GPU":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    others = spoil(tmp_path) or ()
    before = sorted(tmp_path.rglob("*"))
    found = error_of(command(*words_of(tmp_path, keys, *others), main=train.main))
    assert re.search(message, found), found
    assert sorted(tmp_path.rglob("*")) == before


def test_good_input_is_good(command, tmp_path, keys):
    """What the bad inputs above are made from."""
    with training_set.without_figures():
        code, output, errors = command(*words_of(tmp_path, keys), main=train.main)
    assert code == 0, errors
    assert "6" in output and (tmp_path / "run" / "summary.json").exists()


def test_nothing_at_all_is_asked_for_by_name(command):
    assert "data.particles is not set: name the file, for example data.particles=PATH" in error_of(command("train"))


def test_a_run_directory_that_is_something_else_is_left_alone(command, tmp_path, keys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "thesis.tex").write_text("years of work")
    message = error_of(command(*words_of(tmp_path, keys), main=train.main))
    assert message.startswith(f"run_dir: {run_dir} exists and is no run of cryosplat") and "choose another" in message
    assert [path.name for path in run_dir.iterdir()] == ["thesis.tex"]
    shutil.rmtree(run_dir)
    run_dir.write_text("a file")
    assert "exists and is no run of cryosplat" in error_of(command(*words_of(tmp_path, keys), main=train.main))
    inside = f"run_dir={run_dir / 'deeper'}"
    assert "is not a folder" in error_of(command(*words_of(tmp_path, keys, inside), main=train.main))
    assert run_dir.read_text() == "a file"


@pytest.mark.parametrize("inside", ["", "jobs"])
def test_an_empty_run_directory_will_do_or_one_with_the_files_of_jobs_alone(command, tmp_path, keys, inside):
    (tmp_path / "run" / inside).mkdir(parents=True)
    with training_set.without_figures():
        assert command(*words_of(tmp_path, keys), main=train.main)[0] == 0


def test_a_run_is_not_resumed_with_other_settings(command, stack, reference_run):
    words = training_set.settings(stack, reference_run, "train.lr=0.5", "data.box=24", "train.threads=2")
    message = error_of(command(*words, main=train.main))
    assert "holds a run with other settings; choose another run_dir" in message
    assert re.search(r"train\.lr: 0\.02 -> 0\.5", message) and "data.box: None -> 24" in message
    assert "threads" not in message  # which changes nothing


def test_a_used_run_directory_is_refused_if_resuming_is_not_wanted(command, stack, reference_run):
    words = training_set.settings(stack, reference_run, "resume=never")
    assert "holds a run; choose another, or let it go on with resume=auto" in error_of(command(*words, main=train.main))


@pytest.mark.parametrize("start", [["-m", "cryosplat.train"], ["-m", "cryosplat.cli", "train"]])
def test_a_process_ends_with_code_2_and_the_error_alone(tmp_path, keys, start):
    truncated(tmp_path)
    command = [sys.executable, *start, *words_of(tmp_path, keys)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert "truncated: the header promises 6 images" in error_of((ended.returncode, ended.stdout, ended.stderr))
    assert not (tmp_path / "run").exists()
