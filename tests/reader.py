"""A reader of the documents: their blocks and tables, and a desk where their commands are followed."""

import argparse
import contextlib
import importlib
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import empiar
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryosplat import cli, figures, train
from cryosplat.images import logging_untouched
from cryosplat.unpickle import read_pickle

ROOT = Path(__file__).resolve().parents[1]

SMALLER = {
    "--nproc-per-node 4": "--nproc-per-node 2",
    "postprocess runs/": "postprocess --fit-from 100 runs/",  # of 8 A/px
    "--box 128 --pixel-size 2 --images 5000": "--box 32 --pixel-size 8 --images 20",
    "data.box=64": "data.box=24",
    "downsample": "downsample -D 24",
    "-D 256": "",
}
"""What is changed in commands, so that a test can wait for them."""

PAPER_SETS = ("10028.yaml", "10049.yaml", "10076.yaml", "10180.yaml")
"""Configurations of the paper's data sets, of which there are stand-ins of 32 px."""

STAND_IN = "simulate --box 32 --pixel-size 8 --images 64 --seed 1 --out standin".split()
SMALL_RUN = "model.scale=0.03 model.scale_min=0.02 train.threads=1 data.check_signal=false".split()
"""Settings of every training command here; Gaussians at least as wide as 0.6 px, so that their sums are right. The few
images of the stand-in do not show a molecule."""

LOOKED_INTO = {"run_dir=runs/two"}
"""Settings of runs that tests look into, beside those of configurations as they stand."""

KNOWN = "data.truth={folder}/standin/truth.mrc data.mask={folder}/standin/mask.mrc"
"""And of those on the stand-in's own grid."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page."""
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(text)) for language, text in found]


def commands(text: str) -> list[str]:
    """The commands of a bash block, one each, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.join(words) if "=" not in words[0] else " ".join(words) for words in map(_words, lines) if words]


def _words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def table(page: Path, heading: str) -> list[list[str]]:
    """Cells of the rows of all tables below a heading, up to the next heading of its level; without header rows."""
    level = re.escape(heading.split()[0])
    pattern = rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)"
    section = re.search(pattern, page.read_text(), re.MULTILINE | re.DOTALL).group(1)
    rows = [line.strip("| ") for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.split(" | ")] for row in rows]
    rule = [index for index, row in enumerate(rows) if set(row) <= set("-| ")]
    return [row for index, row in enumerate(cells) if index not in rule and index + 1 not in rule]


def names(page: Path, heading: str) -> set[str]:
    """What stands in backticks in the first column of the tables below a heading."""
    return {name for row in table(page, heading) for name in re.findall(r"`([^`]+)`", row[0])}


@dataclass
class Desk:
    """A folder in which a reader has done what the pages say, from the first to the last.

    Attributes:
        status: exit status by command.
        parsed: what each cryodrgn command wrote.
    """

    folder: Path
    status: dict[str, int] = field(default_factory=dict)
    parsed: dict[str, object] = field(default_factory=dict)
    torchrun_tried: bool = False

    def follow(self, page: Path, left_out: Container[str]) -> None:
        """Do what the blocks of a page say, but for the commands ``left_out``."""
        for language, text in blocks(page):
            if language == "yaml":
                name = re.match(r"# (\S+)\n", text).group(1)
                (self.folder / name).write_text(text)
            elif language == "python":
                exec(compile(text, str(page), "exec"), {})
            elif language == "bash":
                for command in commands(text):
                    if command not in left_out:
                        status = self.run(command)
                        self.status[command] = self.status.get(command, 0) or status

    def run(self, command: str) -> int:
        for large, small in SMALLER.items():
            command = command.replace(large, small)
        words = shlex.split(command)
        if words[:2] == ["cryosplat", "train"]:
            return self.train(words[2:], self.small(words))
        if words[:2] == ["cryosplat", "inspect"] and Path(words[2]).name in PAPER_SETS:
            return cli.main([*words[1:], "data.box=24"])
        if words[0] == "cryosplat":
            return cli.main(words[1:])
        if "cryosplat.train" in words and words[0] == "torchrun" and not self.torchrun_tried:
            self.torchrun_tried = True  # once for real: starting processes takes long
            words += self.small(words)
            return subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if "cryosplat.train" in words and words[0] in ("torchrun", "python"):
            return self.train(words[words.index("cryosplat.train") + 1 :], self.small(words))
        if words[:2] == ["python", "launch/submit.py"]:
            return self.submit(words[2:])
        if words[0] == "python" and words[1].endswith(".py"):
            return run_script(*words[1:])
        if words[0] in ("git", "wget", "mv"):
            return self.fetch(words)
        assert words[0] == "cryodrgn", f"neither listed with a reason in LISTED nor known how to run: {command}"
        written = run_cryodrgn(*words[1:])
        if written.suffix == ".pkl":
            self.parsed[command] = read_pickle(written)
        return 0

    def train(self, words: list[str], more: list[str]) -> int:
        """Train in this process; without drawing, where no test looks at the run."""
        if LOOKED_INTO.intersection(words) or not any(word.startswith("run_dir=") for word in words):
            return train.main([*words, *more])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figures, "rasterise", lambda *_: np.zeros((8, 8, 3), np.uint8))
            patch.setattr(figures, "save", lambda figure, path, *_, **__: Path(path).touch())
            return train.main([*words, *more])

    def small(self, words: list[str]) -> list[str]:
        """What is added to a training command."""
        on_stand_in_of_paper = not set(PAPER_SETS).isdisjoint(words)
        cropped = any(word.startswith("data.box=") for word in words)
        added = [] if cropped or not on_stand_in_of_paper else ["data.box=24"]
        if not cropped and not on_stand_in_of_paper:
            added += KNOWN.format(folder=self.folder).split()
        if any(word.startswith("run_dir=") for word in words) and not LOOKED_INTO.intersection(words):
            added += ["maps.every=5"] if "recipe=images" in words else ["volume.steps=10"]
        return SMALL_RUN + added

    def submit(self, words: list[str]) -> int:
        """Check a job as it stands, without submitting it; if it is to be submitted, do its work here, once."""
        small = self.small(words)
        status = run_script("launch/submit.py", *words, *small, *([] if "--dry-run" in words else ["--dry-run"]))
        if status or {"--dry-run", "--array", "--follow", "--slurm"}.intersection(words):
            return status
        settings = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)?=", word)]
        config = words[words.index("--config") + 1]
        return self.train(["--config", config, *settings], small)

    def fetch(self, words: list[str]) -> int:
        """Lay a stand-in out where a download would leave it; move files."""
        stack, repository = self.folder / "standin", self.folder / "cryodrgn_empiar"
        if words[0] == "mv":
            return subprocess.run(words).returncode
        if words[0] == "git":
            empiar.clone_repository(stack, self.folder / Path(words[-1]).name, write_cs)
        else:
            number = re.search(r"/world_availability/(\d+)/data/$", words[-1]).group(1)
            assert words[words.index("-P") + 1] == repository.name and "--cut-dirs=2" in words
            empiar.fetch_entry(number, stack, repository)
        return 0


def run_script(script: str, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.syspath_prepend(Path(script).resolve().parent)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            return ended.code or 0
    return 0


def run_cryodrgn(name: str, *arguments: str) -> Path:
    """A command of cryodrgn, in this process; returns the file that it was to write."""
    with logging_untouched():
        module = importlib.import_module(f"cryodrgn.commands.{name}")
    parser = argparse.ArgumentParser()
    module.add_args(parser)
    module.main(parser.parse_args(arguments))
    return Path(arguments[arguments.index("-o") + 1])


def lay_out(folder: Path) -> None:
    """What a reader has before beginning: a stack of particles, and the checkout's folders."""
    for name in ("launch", "configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    assert cli.main(STAND_IN) == 0
    for name in ("particles.star", "particles.mrcs"):
        shutil.copy(folder / "standin" / name, folder)
    lay_out_project(folder / "project", folder / "standin")
    shutil.copy(folder / "standin/truth.mrc", folder / "consensus.mrc")
    write_cs(folder / "particles.cs", folder / "standin")
    sbatch = folder / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\n[ "$1" = --test-only ]\n')  # takes any job, and submits none
    sbatch.chmod(0o755)


def lay_out_project(project: Path, stack: Path) -> None:
    """A RELION project with the stack's particles: names of images are relative to its folder."""
    for name in ("Refine3D/job012", "Extract/job007"):
        (project / name).mkdir(parents=True)
    shutil.copy(stack / "particles.mrcs", project / "Extract/job007")
    rows = (stack / "particles.star").read_text().replace("@particles.mrcs", "@Extract/job007/particles.mrcs")
    (project / "Refine3D/job012/run_data.star").write_text(rows)


def write_cs(path: Path, stack: Path) -> None:
    """The stack's particles as cryoSPARC lists them."""
    (rotations, shifts), ctf = read_pickle(stack / "poses.pkl"), read_pickle(stack / "ctf.pkl")
    columns = {
        "blob/path": np.full(len(ctf), b">particles.mrcs"),
        "blob/idx": np.arange(len(ctf), dtype=np.uint32),
        "blob/shape": np.full((len(ctf), 2), 32, dtype=np.uint32),
        "blob/psize_A": ctf[:, 1],
        "alignments3D/pose": Rotation.from_matrix(rotations.transpose(0, 2, 1)).as_rotvec().astype(np.float32),
        "alignments3D/shift": shifts * 32,
        "alignments3D/split": np.arange(len(ctf), dtype=np.uint32) % 2,
        "ctf/df1_A": ctf[:, 2],
        "ctf/df2_A": ctf[:, 3],
        "ctf/df_angle_rad": np.radians(ctf[:, 4]),
        "ctf/accel_kv": ctf[:, 5],
        "ctf/cs_mm": ctf[:, 6],
        "ctf/amp_contrast": ctf[:, 7],
        "ctf/phase_shift_rad": np.radians(ctf[:, 8]),
    }
    cs = np.zeros(len(ctf), [(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        cs[name] = values
    with open(path, "wb") as handle:
        np.save(handle, cs)


@contextlib.contextmanager
def program_state_kept() -> Iterator[None]:
    """Commands run in this process set logging, threads and modules up for a process of their own."""
    logger, threads, modules = logging.getLogger("cryosplat"), torch.get_num_threads(), set(sys.modules)
    before = logger.handlers, logger.level, logger.propagate
    try:
        yield
    finally:
        logger.handlers, logger.level, logger.propagate = before
        torch.set_num_threads(threads)
        launcher = {path.stem for path in (ROOT / "launch").glob("*.py")}
        for name in launcher & (set(sys.modules) - modules):
            del sys.modules[name]
