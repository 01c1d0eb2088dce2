"""One command submits a run: to Slurm where there is one, else to this machine."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cryosplat.config import Config, load_config
from cryosplat.errors import InputError

ROOT = Path(__file__).resolve().parents[1]

TRAINING = """
import logging
import torch
from cryosplat import distributed
from cryosplat.errors import InputError

def train(config):
    with distributed.join(config) as world:
        ranks = distributed.sum_over_ranks(torch.ones(1), world).item()
        logging.getLogger("cryosplat").info("training")
        if config.train.seed == 13:
            raise InputError("row 13 is unlucky")
        if config.train.seed == 14 and world.rank == 1:
            raise RuntimeError("rank 1 broke")
        return {"ranks": ranks, "launcher": world.launcher, "epochs": config.train.epochs}

def ending(summary):
    return f"{summary['ranks']:.0f} ranks by {summary['launcher']}, {summary['epochs']} epochs"
"""
"""Stands in for cryosplat.train: what is tested here is how it is started."""

SBATCH = """#!/bin/bash
[ -z "$FAIL" ] || { echo "sbatch: error: invalid partition specified: $FAIL" >&2; exit 1; }
cp "${@: -1}" script.sh
echo "Submitted batch job 7"
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a configuration and its files, and the package with another cryosplat.train."""
    shutil.copytree(ROOT / "cryosplat", tmp_path / "cryosplat", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "cryosplat" / "train.py").write_text(TRAINING)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "mine.yaml").write_text(
        "data: {particles: stack.mrcs, poses: poses.pkl}\ntrain: {device: cpu}\nrun_dir: runs/mine\n"
    )
    for name in ("stack.mrcs", "poses.pkl"):
        (tmp_path / name).touch()
    return tmp_path


def submit(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    left = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SUBMITIT", "RANK"))}
    command = [sys.executable, ROOT / "launch" / "submit.py", *words]
    return subprocess.run(
        command,
        cwd=place,
        env={**left, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def with_slurm(place: Path) -> str:
    """A PATH on which sbatch is a script that keeps what it is given."""
    (place / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (place / "bin" / name).write_text(SBATCH)
        (place / "bin" / name).chmod(0o755)
    return f"{place / 'bin'}:{os.environ['PATH']}"


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import job
    import submit

    return submit, job


def test_a_local_job_is_followed_to_its_end(place):
    done = submit(place, "--config", "mine.yaml", "train.epochs=3", "--cluster", "local", "--tasks-per-node", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks by submitit, 3 epochs" in done.stdout and "training" in done.stdout
    assert f"run directory: {place / 'runs' / 'mine'}\n" in done.stdout
    assert "tensorboard --logdir runs/mine" in done.stdout
    log = next(line.split("log: ")[1] for line in done.stdout.splitlines() if "log: " in line)
    assert "2 ranks by submitit" in Path(log).read_text()
    # The run directory is the trainer's to make.
    assert not (place / "runs" / "mine").exists()


def test_what_the_user_can_mend_is_said_without_a_traceback_and_fails_the_job(place):
    done = submit(place, "--config", "mine.yaml", "--cluster", "local", "train.seed=13")
    assert done.returncode == 1
    assert "error: row 13 is unlucky" in done.stdout and "failed on rank 0" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_rank_that_breaks_fails_the_job_and_is_named(place):
    done = submit(place, "--config", "mine.yaml", "--cluster", "local", "--tasks-per-node", "2", "train.seed=14")
    assert done.returncode == 1 and "failed on rank 1" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "mine.yaml", "train.epoch=3"], "did you mean train.epochs?"),
        (["--config", "mine.yaml", "train.epochs=-1"], "0 or more"),
        (["--config", "mine.yaml", "data.ctf=ctf.pkl"], "data.ctf: there is no file ctf.pkl"),
        (["--config", "demo.yaml"], "there is no file runs/demo-data/particles.star"),
        (["--config", "other.yaml"], "no configuration file other.yaml"),
        (["--config", "mine.yaml", "--cluster", "local", "--nodes", "2"], "--nodes 2: a local job has one node"),
        (["--config", "mine.yaml", "--cluster", "local", "--time", "soon"], "--time soon: expected minutes"),
        (["--config", "mine.yaml", "--cluster", "slurm"], "there is no sbatch on PATH"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(place, words, message):
    done = submit(place, *words, PATH="")  # where no sbatch is
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (place / "runs").exists()


def test_a_dry_run_says_what_would_be_asked_for_and_submits_nothing(place):
    done = submit(place, "--config", "mine.yaml", "--dry-run", "--tasks-per-node", "3", "--cluster", "local")
    assert done.returncode == 0 and "tasks_per_node 3" in done.stdout and "nothing was submitted" in done.stdout
    assert not (place / "runs").exists()


def test_where_there_is_sbatch_the_job_goes_to_slurm_and_the_command_returns(place):
    options = "--nodes 2 --gpus-per-node 4 --cpus-per-task 6 --mem 64 --time 1-2:30:00 --partition gpu".split()
    words = ["--config", "mine.yaml", *options, "--slurm", "account=lab", "train.epochs=3"]
    done = submit(place, *words, PATH=with_slurm(place), FAIL="")
    assert done.returncode == 0, done.stderr
    assert "job 7 submitted" in done.stdout and f"{place}/runs/mine-jobs/7/7_0_log.out" in done.stdout
    script = (place / "script.sh").read_text()
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=6", "mem=64GB", "time=1590"):
        assert f"#SBATCH --{line}\n" in script
    for line in ("partition=gpu", "account=lab", "job-name=cryosplat-mine", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in script
    assert "--kill-on-bad-exit=1" in script


def test_what_is_not_asked_for_is_left_out_of_the_request(place):
    done = submit(place, "--config", "mine.yaml", PATH=with_slurm(place), FAIL="")
    assert done.returncode == 0, done.stderr
    script = (place / "script.sh").read_text()
    for option in ("mem", "gpus-per-node", "gres", "partition", "cpus-per-task"):
        assert f"#SBATCH --{option}" not in script


def test_a_refusal_by_slurm_is_passed_on(place):
    done = submit(place, "--config", "mine.yaml", PATH=with_slurm(place), FAIL="nope")
    assert done.returncode == 2 and "error: the job was not accepted: " in done.stderr
    assert "invalid partition specified: nope" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30:00", 90), ("90:00", 90), ("10:30", 11), ("2-12", 3600), ("1-0:01", 1441), ("0-0:0:1", 1)],
)
def test_slurms_ways_to_write_a_time_are_understood(launch, text, minutes):
    assert launch[0].minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-"])
def test_other_times_are_refused(launch, text):
    with pytest.raises(InputError, match="--time"):
        launch[0].minutes(text)


def test_an_interrupted_job_goes_on_even_if_it_was_to_be_a_new_run(launch):
    config = load_config(None, ["resume=never", "train.seed=4"])
    again = launch[1].TrainingJob(config).checkpoint()
    assert again.function == launch[1].TrainingJob(dataclasses.replace(config, resume="auto"))


def test_a_job_is_read_where_the_launch_folder_is_not(launch, tmp_path):
    import cloudpickle

    cloudpickle.register_pickle_by_value(launch[1])
    try:
        (tmp_path / "job.pkl").write_bytes(cloudpickle.dumps(launch[1].TrainingJob(Config(run_dir="there"))))
    finally:
        cloudpickle.unregister_pickle_by_value(launch[1])
    code = "import pickle; print(pickle.load(open('job.pkl', 'rb')).config.run_dir)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "there\n", done.stderr


@pytest.mark.parametrize("name", ["train.sbatch", "torchrun.sbatch"])
def test_the_plain_scripts_are_bash_and_start_the_training(name):
    script = ROOT / "slurm" / name
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert 'srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1' in script.read_text()
    assert '-m cryosplat.train "$@"' in script.read_text()
