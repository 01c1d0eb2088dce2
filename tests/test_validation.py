"""``cryosplat validate`` passes an honest run and fails an overfitted one and one whose halves share images."""

import json
import os
import subprocess
import sys

import pytest
import torch
import training_set
from reader import ROOT

from cryosplat import cli, train, validation
from cryosplat.config import load_config
from cryosplat.simulate import SimulateOptions, simulate
from cryosplat.volumes import write_map

HONEST = ("model.gaussians=300", "model.scale=0.02", "model.scale_min=0.016", "train.epochs=6", "data.truth=null")
OVERFITTED = ("model.gaussians=1000", "train.epochs=25", "data.truth=null")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "molecule.mrc"
    write_map(path, training_set.true_map(), training_set.PIXEL_SIZE_A)
    return path


@pytest.fixture
def here(monkeypatch):
    """Trainings of ``validate`` run in this process, one thread, without figures of their own; the list fills with
    what each was told."""
    told = []

    def in_process(config, words, base, processes):
        told.append(words)
        threads = torch.get_num_threads()
        with training_set.without_figures(), monkeypatch.context() as context:
            context.chdir(base)
            train.train(load_config(config, words))
        torch.set_num_threads(threads)
        return 0

    monkeypatch.setattr(validation, "_train", in_process)
    return told


def stack_of(source, folder, images, snr):
    simulate(SimulateOptions(out=str(folder), map=str(source), images=images, snr=snr, seed=1))
    return folder


def verdict(run_dir):
    return json.loads((run_dir / "validation/verdict.json").read_text())


@pytest.fixture(scope="module")
def honest_stack(source, tmp_path_factory):
    return stack_of(source, tmp_path_factory.mktemp("honest") / "stack", 600, 0.05)


@pytest.fixture(scope="module")
def honest(honest_stack, tmp_path_factory):
    return training_set.trained(honest_stack, tmp_path_factory.mktemp("honest") / "run", *HONEST)


def test_an_honest_run_passes_every_test(honest, here, capsys):
    assert cli.main(["validate", str(honest), "--seeds", "1"]) == 0
    found = verdict(honest)
    assert found["verdict"] == "PASS"
    assert {name: test["verdict"] for name, test in found["tests"].items()} == dict.fromkeys(
        ("phases", "noise", "holdout", "seeds", "halves"), "PASS"
    )
    page = (honest / "validation/verdict.md").read_text()
    assert page.startswith("# Validation of run: PASS") and "An honest result" in page
    assert (honest / "validation/verdict.png").is_file()
    assert "PASS; written" in capsys.readouterr().out
    # The same command again has nothing to train, and a mixture learns little from noise.
    pages = [path.stat().st_mtime_ns for path in sorted(honest.glob("validation/*/map.mrc"))]
    assert cli.main(["validate", str(honest), "--seeds", "1"]) == 0
    assert [path.stat().st_mtime_ns for path in sorted(honest.glob("validation/*/map.mrc"))] == pages
    assert len(pages) == 4 and len(here) == 8


def test_an_overfitted_run_is_caught_by_images_it_has_not_seen(source, here, tmp_path):
    stack = stack_of(source, tmp_path / "stack", 120, 0.03)
    run_dir = training_set.trained(stack, tmp_path / "run", *OVERFITTED)
    assert cli.main(["validate", str(run_dir), "--tests", "holdout"]) == 1
    found = verdict(run_dir)["tests"]["holdout"]
    assert found["verdict"] == "FAIL"
    assert found["numbers"]["half_a"]["trained"] > found["numbers"]["half_a"]["held_out"]


def test_halves_that_share_images_under_other_names_are_caught(honest_stack, here, tmp_path):
    stack, copies = training_set.leaked(honest_stack, tmp_path / "stack")
    run_dir = training_set.trained(stack, tmp_path / "run", *HONEST)
    assert json.loads((run_dir / "summary.json").read_text())["images_in_both_halves"] == copies
    assert cli.main(["validate", str(run_dir), "--tests", "noise"]) == 1
    found = verdict(run_dir)["tests"]
    assert found["halves"]["verdict"] == "FAIL" and found["halves"]["numbers"]["images_in_both_halves"] == copies
    # The noise of shared images is shared, and linear half maps show it.
    numbers = found["noise"]["numbers"]
    assert found["noise"]["verdict"] == "FAIL"
    assert numbers["linear_mean_fsc"] > 5 * numbers["linear_standard_error"]


def test_from_the_command_line_anywhere_with_processes_of_its_own(honest_stack, monkeypatch, tmp_path):
    """The run was made in another folder, with relative paths."""
    made_in = tmp_path / "project"
    made_in.mkdir()
    (made_in / "data").symlink_to(honest_stack)
    with monkeypatch.context() as context:
        context.chdir(made_in)
        training_set.trained("data", "runs/one", *HONEST, "train.epochs=1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cryosplat.cli"]
    options = "--tests noise --processes 2".split()
    run_dir = os.path.relpath(made_in / "runs/one", tmp_path)
    judged = subprocess.run(
        [*command, "validate", run_dir, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert judged.returncode == (verdict(made_in / "runs/one")["verdict"] == "FAIL"), judged.stderr
    assert json.loads((made_in / "runs/one/validation/noise/summary.json").read_text())["world_size"] == 2
    assert set(verdict(made_in / "runs/one")["tests"]) == {"noise", "halves"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tests", "phase"], "--tests phase: expected some of phases,noise,holdout,seeds"),
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(honest, capsys, words, message):
    assert cli.main(["validate", str(honest), *words]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_complete_run_with_halves_is_refused(honest, tmp_path, capsys):
    assert cli.main(["validate", str(tmp_path)]) == 2
    assert "no run of cryosplat" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((honest / "config.yaml").read_text())
    assert cli.main(["validate", str(tmp_path)]) == 2
    assert "the run is not complete" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text("{}")
    for words, message in (
        ("maps: {halves: false}", "no half maps"),
        ("data: {'null': noise}", "is a null run itself"),
    ):
        (tmp_path / "config.yaml").write_text(words + "\n")
        assert cli.main(["validate", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_a_training_that_fails_is_named(honest, monkeypatch, capsys):
    monkeypatch.setattr(validation, "_train", lambda *_: 2)
    assert cli.main(["validate", str(honest), "--tests", "noise", "--epochs", "2"]) == 2
    assert "validation/noise ended with exit code 2" in capsys.readouterr().err
