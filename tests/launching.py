"""A folder to submit from, for the tests of the launcher: a stack, and the package with a stand-in for training."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from training_set import training_set

ROOT = Path(__file__).resolve().parents[1]

TRAINING = """
import json
import logging
import os
import time
from pathlib import Path

import torch

from cryosplat import distributed
from cryosplat.errors import InputError

def train(config):
    with distributed.join(config) as world:
        ranks = distributed.sum_over_ranks(torch.ones(1), world).item()
        logging.getLogger("cryosplat").info("training, %s", os.environ.get("SAID_BY_THE_SITE"))
        if config.train.seed == 13:
            raise InputError("row 13 is unlucky")
        if config.train.seed == 14 and world.rank == 1:
            raise RuntimeError("rank 1 broke")
        if config.train.seed == 15:
            if world.rank == 1:
                os.kill(os.getpid(), 9)
            time.sleep(100)
        if config.train.seed == 16 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(100)
        summary = {"ranks": ranks, "launcher": world.launcher, "epochs": config.train.epochs, "resolution_a": 4.5}
        if world.is_main:
            folder = Path(config.run_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").touch()
            (folder / "summary.json").write_text(json.dumps(summary))
        return summary

def ending(summary):
    return f"{summary['ranks']:.0f} ranks by {summary['launcher']}, {summary['epochs']} epochs"
"""
"""Stands in for cryosplat.train where what is tested is how it is started. Seeds stand for what goes wrong."""

MINE = """
data: {particles: stack/particles.star, poses: stack/poses.pkl, ctf: stack/ctf.pkl, truth: stack/truth.mrc}
train: {device: cpu}
run_dir: runs/mine
"""


def make_place(folder: Path, tmp_path_factory, stand_in: bool = True) -> Path:
    """A folder with mine.yaml, the stack it names, configs/, launch/, slurm/ and the package."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("cryosplat", "configs", "launch", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    if stand_in:
        (folder / "cryosplat" / "train.py").write_text(TRAINING)
    (folder / "stack").symlink_to(training_set(tmp_path_factory))
    (folder / "mine.yaml").write_text(MINE)
    return folder


def launch(place: Path, script: str, *words: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run ``launch/SCRIPT`` in that folder, to its end."""
    return subprocess.run(
        [sys.executable, place / "launch" / script, *words],
        cwd=place,
        env=environment | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def without_launchers() -> dict[str, str]:
    """This process's environment without what a launcher has left in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SUBMITIT", "RANK"))}
