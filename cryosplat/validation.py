"""``cryosplat validate``: train null runs beside a run, and say in one page what the run's numbers are worth."""

import argparse
import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cryosplat
from cryosplat import figures, verdicts
from cryosplat.config import input_paths, load_config, resolve_path
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.fsc import fsc, read_maps
from cryosplat.records import Record, read_record
from cryosplat.settings import Config
from cryosplat.symmetry import point_group
from cryosplat.verdicts import Check
from cryosplat.volumes import read_map

logger = logging.getLogger(__name__)

TESTS = ("phases", "noise", "holdout", "seeds")

HOLDOUT, HOLDOUT_IMAGES, LARGEST_HOLDOUT = 0.05, 100, 0.2
"""Fraction held out in the run of that name: too few to change the map, but of small sets enough for 100 images, which
give an error of some percent, and no more than a fifth."""

NULL_FSC = 0.8
"""Phases are random from where half maps still agree this well, so that most of what is claimed lies beyond."""

LARGEST_NULL_SHELL = 0.75
"""Of Nyquist: some shells must be left to judge."""

SEEDS_APART = 1000
"""Added to ``train.seed`` for the first of the other seeds; they are then unlike those that people choose."""

FAILED = 1
"""Exit code of a run that failed a test."""


def validate(
    run_dir: str | os.PathLike,
    tests: Sequence[str] = TESTS,
    seeds: int = 3,
    processes: int = 1,
    epochs: int | None = None,
    null_shell_a: float | None = None,
) -> list[Check]:
    """Train what the tests need under RUN/validation/, judge, and write verdict.md, verdict.json and verdict.png there.

    Each test is an ordinary run with one setting changed, and resumes as one: the same call goes on where it stands.

    Args:
        run_dir: of a complete run with half maps.
        tests: of ``TESTS``.
        seeds: how many other seeds.
        processes: of each training; more than one under torchrun.
        epochs: of each training; none: the run's own.
        null_shell_a: A, from which on phases are random; none: chosen by ``choose_null_shell``.

    Raises:
        InputError: no such run, a test unknown, or a training that failed.
    """
    folder = Path(run_dir).expanduser().resolve()
    run, config = _read_run(folder)
    base = _base(folder, config)
    error = verdicts.noise_error(run.box, _mask(config, base), len(point_group(config.model.symmetry)))
    unknown = [test for test in tests if test not in TESTS]
    if unknown or not tests:
        raise InputError(f"--tests {','.join(unknown)}: expected some of {','.join(TESTS)}")
    job = _Job(folder, config, base, processes, epochs)
    checks, records = [], []
    if "phases" in tests:
        shell_a = null_shell_a or choose_null_shell(run)
        records.append(job.run("phases", "data.null=phases", f"data.null_shell_a={shell_a!r}"))
        checks.append(verdicts.judge_phases(run, records[-1], shell_a, error))
    if "noise" in tests:
        records.append(job.run("noise", "data.null=noise"))
        checks.append(verdicts.judge_noise(run, records[-1], error))
    if "holdout" in tests:
        few = min(max(HOLDOUT, HOLDOUT_IMAGES / run.summary["particles"]), LARGEST_HOLDOUT)
        fraction = config.data.holdout or round(few, 3)
        judged = run if config.data.holdout else job.run("holdout", f"data.holdout={fraction}", "maps.every=1")
        records.append(judged)
        checks.append(verdicts.judge_holdout(judged, fraction))
    if "seeds" in tests:
        first = (config.train.seed + SEEDS_APART) % 2**31
        others = [job.run(f"seed_{seed}", f"train.seed={seed}") for seed in range(first, first + seeds)]
        records += others
        checks.append(verdicts.judge_seeds(run, others, [_between(run, other) for other in others]))
    counts = [record.summary["images_in_both_halves"] for record in (run, *records)
              if "images_in_both_halves" in record.summary]  # fmt: skip
    checks.append(verdicts.judge_halves(counts))
    _write(job.folder, folder, checks)
    return checks


def _read_run(folder: Path) -> tuple[Record, Config]:
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no run of cryosplat (it has no config.yaml)")
    if not (folder / "summary.json").is_file():
        raise InputError(f"{folder}: the run is not complete; let it go on to its end first")
    config = load_config(folder / "config.yaml")
    if not config.maps.halves:
        raise InputError(f"{folder}: the run has no half maps (maps.halves=false), and nulls are judged by them")
    if config.data.null != "none":
        raise InputError(
            f"{folder}: is a null run itself (data.null={config.data.null}); validate the run of the images"
        )
    return read_record(folder), config


def choose_null_shell(run: Record) -> float:
    """Where to begin with random phases, A: the first shell at which half maps fall below 0.8, at most 3/4 of Nyquist.

    The linear half maps, where there are any: those of mixtures may agree for ever.
    """
    curve = run.curves.get("linear_half_maps", run.curves["half_maps"])
    below = np.flatnonzero(~(curve.fsc[1:] >= NULL_FSC)) + 1
    last = math.floor(LARGEST_NULL_SHELL * (run.box // 2))
    return run.angstrom(min(max(int(below[0]) if len(below) else last, 2), last))


def _base(folder: Path, config: Config) -> Path:
    """The folder that a run's relative paths start from: where it was started, if its own path tells, else this one."""
    own = Path(config.run_dir).expanduser()
    if not own.is_absolute() and folder.parts[-len(own.parts) :] == own.parts:
        base = folder
        for _ in own.parts:
            base = base.parent
    else:
        base = Path.cwd()
    for name, path in input_paths(config):
        if not (base / path).exists():
            raise InputError(
                f"data.{name}: there is no {base / path}; start validate in the folder in which {folder} was trained"
            )
    return base


def _mask(config: Config, base: Path) -> np.ndarray | None:
    """The mask under which the run's FSCs were taken."""
    return read_map(base / resolve_path(config, config.data.mask))[0] if config.data.mask else None


@dataclasses.dataclass(frozen=True)
class _Job:
    """What all trainings of a validation have in common."""

    run_dir: Path
    config: Config
    base: Path
    processes: int
    epochs: int | None

    @property
    def folder(self) -> Path:
        return self.run_dir / "validation"

    def run(self, name: str, *changed: str) -> Record:
        """Train a run like the one that is judged but for the settings ``changed``, or go on with it; read it."""
        folder = self.folder / name
        words = ["resume=auto", "maps.every=1000000", *changed, f"run_dir={folder}"]
        words += [] if self.epochs is None else [f"train.epochs={self.epochs}"]
        if not (folder / "summary.json").is_file():
            logger.info("validate: training %s (%s)", folder, ", ".join(changed))
        code = _train(self.run_dir / "config.yaml", words, self.base, self.processes)
        if code != 0:
            raise InputError(
                f"validate: the training of {folder} ended with exit code {code}; its messages are above and in its "
                f"run.log. Mend it and start the same command again: it goes on. With other options than before, "
                f"remove {folder} first"
            )
        return read_record(folder)


def _train(config: Path, words: list[str], base: Path, processes: int) -> int:
    """The training program in processes of its own, one or as many as torchrun starts."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    # The package that runs here, wherever it was imported from.
    here = str(Path(cryosplat.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, environment.get("PYTHONPATH")]))
    command = [*launcher, "cryosplat.train", "--config", str(config), *words]
    return subprocess.run(command, cwd=base, env=environment, stdout=subprocess.DEVNULL).returncode


def _between(run: Record, other: Record):
    """FSC of the full maps of two runs."""
    (one, two), pixel_size_a = read_maps([run.folder / "map.mrc", other.folder / "map.mrc"])
    return fsc(one, two, pixel_size_a)


def overall(checks: Sequence[Check]) -> str:
    """FAIL if one test failed, PASS if none did and one passed, else INCONCLUSIVE."""
    found = {check.verdict for check in checks}
    return next(verdict for verdict in (verdicts.FAIL, verdicts.PASS, verdicts.INCONCLUSIVE) if verdict in found)


def _write(folder: Path, run_dir: Path, checks: Sequence[Check]) -> None:
    """verdict.md, verdict.json and verdict.png, in place of those of an earlier call."""
    report = {
        "run_dir": str(run_dir),
        "verdict": overall(checks),
        "tests": {
            check.name: {"verdict": check.verdict, "found": check.found, "numbers": check.numbers} for check in checks
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "verdict.json") as temporary:
        temporary.write_text(json.dumps(_plain(report), indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    panels = [panel for check in checks for panel in check.panels]
    if panels:
        figures.save(figures.panels_figure(panels), folder / "verdict.png", overwrite=True)
    with atomic_path(folder / "verdict.md") as temporary:
        temporary.write_text(_page(run_dir, checks, bool(panels)))


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(run_dir: Path, checks: Sequence[Check], drawn: bool) -> str:
    lines = [f"# Validation of {run_dir.name}: {overall(checks)}", "", f"Run: `{run_dir}`", ""]
    lines += ["| test | verdict |", "|---|---|", *(f"| {check.name} | {check.verdict} |" for check in checks), ""]
    for check in checks:
        lines += [f"## {check.name}: {check.verdict}", "", check.done, "", f"*An honest result:* {check.honest}", ""]
        lines += [*(f"- {sentence}" for sentence in check.found), ""]
    lines += ["![curves](verdict.png)", ""] if drawn else []
    lines.append(
        "These tests are about the reconstruction. Poses come from elsewhere: if they were fitted to noise, or halves "
        "shared a reference while they were refined, no test here can see it."
    )
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat validate`` takes."""
    parser.description = (
        "Train null runs beside a complete run (in RUN/validation/) and write a verdict on its numbers. The same "
        "command goes on where it was interrupted. Exit code 1 if a test fails."
    )
    parser.add_argument("run_dir", metavar="RUN", help="directory of a complete run with half maps")
    parser.add_argument("--tests", default=",".join(TESTS), metavar="A,B", help="some of %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="other seeds to train, %(default)s")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each training, %(default)s")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each training; default: those of the run")
    parser.add_argument(
        "--null-shell",
        type=float,
        metavar="A",
        help="resolution from which on phases are random; default: from the FSC",
    )


def run(args: argparse.Namespace) -> int:
    """Validate as the command line says, print the page; the exit code."""
    for name, value in (("--seeds", args.seeds), ("--processes", args.processes), ("--epochs", args.epochs)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: expected 1 or more")
    tests = [test for test in args.tests.split(",") if test]
    checks = validate(args.run_dir, tests, args.seeds, args.processes, args.epochs, args.null_shell)
    folder = Path(args.run_dir) / "validation"
    for check in checks:
        print(f"{check.name:>10}  {check.verdict}")
        print("".join(f"{'':>12}{sentence}\n" for sentence in check.found), end="")
    print(f"{'':>10}  {overall(checks)}; written: {folder / 'verdict.md'}, verdict.json, verdict.png")
    return FAILED if overall(checks) == verdicts.FAIL else 0
