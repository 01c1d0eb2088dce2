"""The ``cryosplat export`` command: a run's particles back to RELION and cryoSPARC, with what the run says of each."""

import argparse
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosplat import stackfiles
from cryosplat.config import load_config, resolve_path
from cryosplat.errors import InputError
from cryosplat.files import atomic_path, sha256_of
from cryosplat.particles import read_particles
from cryosplat.scores import NUMBERS, Scores, read_scores
from cryosplat.settings import Config
from cryosplat.tablecopies import copy_cs, copy_star
from cryosplat.unpickle import read_integers

CHOSEN_BY = (*NUMBERS, "half", "held_out")
"""Columns of particles.csv that particles can be chosen by."""


def star_label(name: str) -> str:
    """The column of a star file that has one of ``scores.NUMBERS``; RELION keeps, and does not use, what it does not
    know."""
    return f"_rlnCryosplat{name.capitalize()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat export`` takes."""
    parser.description = (
        "Copy the particle file of a complete run, with the run's residual, scale, correlation and gain of every "
        "particle as columns more; all of the particles or some. All other columns stay as they are, to the last "
        "digit. Or write which rows they are, for data.indices."
    )
    parser.add_argument("run_dir", metavar="RUN", help="directory of a complete run")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="the copy: .star or .cs, as the run's particle file is (.star, if that is a stack or a list of them); or "
        "row numbers, .pkl, .npy or .txt. Replaces nothing",
    )
    parser.add_argument("--best", type=int, metavar="N", help="only the N particles with the highest --by")
    parser.add_argument("--by", default="gain", choices=NUMBERS, help="with --best; default: gain")
    comparison = {"action": "append", "default": [], "metavar": "COLUMN=VALUE"}
    parser.add_argument("--above", **comparison, help="only particles with at least this; may be given several times")
    parser.add_argument("--below", **comparison, help="only particles with at most this; may be given several times")
    parser.add_argument("--indices", metavar="FILE", help="only these rows of the particle file (.pkl, .npy or .txt)")


@dataclass(frozen=True, eq=False)
class _Complete:
    """A complete run: its settings, its particle file, and what it says of the particles."""

    folder: Path
    config: Config
    particles: Path
    scores: Scores


def run(args: argparse.Namespace) -> None:
    """Do what ``cryosplat export`` is asked to do.

    Raises:
        InputError: no complete run, its particle file is gone or has changed, a selection of nothing, another kind of
            file, or one that exists.
    """
    complete, output = _read_run(Path(args.run_dir)), Path(args.output)
    write = _writer(complete.particles, output)
    if output.exists():
        raise InputError(f"{output} exists already; choose another name or remove it first")
    chosen = _choose(complete, args)
    write(complete, chosen, output)
    in_a, in_b = np.bincount(complete.scores.half[chosen], minlength=2)
    count = f"{len(chosen):,} of the run's {len(complete.scores):,} particles"
    print(f"{output}: {count}, {in_a:,} of half a and {in_b:,} of half b")


def _read_run(folder: Path) -> _Complete:
    """Read what a run has left, and make sure that its particle file is still that of the run."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        particles, digest = Path(summary["particle_file"]), summary["particle_file_sha256"]
    except FileNotFoundError as error:
        raise InputError(f"{folder / 'summary.json'}: no such file; only of a complete run can be exported") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'summary.json'}: not as a run writes it ({error!r})") from error
    if not particles.is_file():
        raise InputError(f"{particles}: the particle file of the run {folder} is not there any more; put it back")
    if sha256_of(particles) != digest:
        raise InputError(
            f"{particles}: the file has changed since the run {folder}; its rows may be other particles now. Put the "
            "old one back, or run again"
        )
    return _Complete(folder, load_config(folder / "config.yaml"), particles, read_scores(folder / "particles.csv"))


def _writer(particles: Path, output: Path) -> Callable[[_Complete, np.ndarray, Path], None]:
    """What writes the file asked for."""
    kind, asked = particles.suffix.lower(), output.suffix.lower()
    if asked in (".pkl", ".npy", ".txt"):
        return _write_rows
    expected = kind if kind in (".star", ".cs") else ".star"
    if asked != expected:
        raise InputError(
            f"{output}: the particles of the run are in {particles.name}, so name a {expected} file (or .pkl, .npy or "
            ".txt, for the row numbers alone)"
        )
    return {".star": _write_star, ".cs": _write_cs}.get(kind, _write_new_star)


def _choose(complete: _Complete, args: argparse.Namespace) -> np.ndarray:
    """Places (m,) in the scores of the particles asked for, by row."""
    scores = complete.scores
    keep = np.ones(len(scores), dtype=bool)
    for option, words, passes in (("--above", args.above, np.greater_equal), ("--below", args.below, np.less_equal)):
        for word in words:
            name, value = _comparison(option, word)
            keep &= passes(scores.column(name), value)
    if args.indices is not None:
        rows = read_integers(args.indices)
        unknown = np.flatnonzero(~np.isin(rows, scores.rows))
        if len(unknown):
            raise InputError(
                f"{args.indices}: entry {unknown[0]} is row {rows[unknown[0]]}, which is none of the run's "
                f"{len(scores)} particles"
            )
        keep &= np.isin(scores.rows, rows)
    if args.best is not None:
        if args.best < 1:
            raise InputError(f"--best {args.best}: expected at least 1 particle")
        left = np.flatnonzero(keep)
        order = np.argsort(-scores.column(args.by)[left], kind="stable")
        keep = np.isin(np.arange(len(scores)), left[order[: args.best]])
    chosen = np.flatnonzero(keep)
    if not len(chosen):
        raise InputError(f"none of the run's {len(scores)} particles is left by this selection; nothing is written")
    return chosen[np.argsort(scores.rows[chosen], kind="stable")]


def _comparison(option: str, word: str) -> tuple[str, float]:
    name, equals, text = word.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not equals or name not in CHOSEN_BY or not np.isfinite(value):
        raise InputError(f"{option} {word}: expected COLUMN=NUMBER, COLUMN one of {', '.join(CHOSEN_BY)}")
    return name, value


def _write_rows(complete: _Complete, chosen: np.ndarray, output: Path) -> None:
    """Row numbers, as ``data.indices`` takes them."""
    rows = complete.scores.rows[chosen]
    with atomic_path(output, overwrite=False) as temporary, open(temporary, "wb") as handle:
        if output.suffix.lower() == ".pkl":
            pickle.dump(rows, handle, protocol=4)
        elif output.suffix.lower() == ".npy":
            np.save(handle, rows)
        else:
            handle.write("".join(f"{row}\n" for row in rows).encode())


def _write_star(complete: _Complete, chosen: np.ndarray, output: Path) -> None:
    scores = complete.scores
    columns = {star_label(name): scores.column(name)[chosen] for name in NUMBERS}
    copy_star(complete.particles, output, scores.rows[chosen], columns)


def _write_cs(complete: _Complete, chosen: np.ndarray, output: Path) -> None:
    scores = complete.scores
    columns = {f"cryosplat/{name}": scores.column(name)[chosen] for name in NUMBERS}
    copy_cs(complete.particles, output, scores.rows[chosen], columns)


def _write_new_star(complete: _Complete, chosen: np.ndarray, output: Path) -> None:
    """A star file of a stack with pickles: poses, CTF and halves as the run had them."""
    config, scores = complete.config, complete.scores
    if resolve_path(config, config.data.particles).absolute() != complete.particles:
        raise InputError(
            f"{complete.folder}: the paths of its settings are relative (data_root: {config.data_root}); start "
            "cryosplat export in the folder that the run was started in"
        )
    table = read_particles(config.data, config.data_root, config.train.seed, config.maps.halves)
    if not np.array_equal(table.rows, scores.rows):
        raise InputError(f"{complete.folder}: data.indices selects other rows than when the run was made; put it back")
    images = table.images
    stacks = [str(path.absolute()) for path in images.paths]
    names = [stackfiles.image_names(stacks[images.stack[i]], [int(images.slices[i])])[0] for i in chosen]
    ctf = None if table.ctf is None else table.ctf[chosen]
    poses = table.rotations[chosen], table.shifts[chosen]
    columns = {star_label(name): scores.column(name)[chosen] for name in NUMBERS}
    with atomic_path(output, overwrite=False) as temporary:
        stackfiles.write_star(temporary, names, *poses, ctf, table.half[chosen], table.box, table.pixel_size_a)
        copy_star(temporary, temporary, np.arange(len(chosen)), columns, overwrite=True)
