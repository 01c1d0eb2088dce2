"""The ``inspect`` command: what a file holds, whether a run could start from it, and the configuration for that."""

import argparse
import contextlib
import json
import os
import shlex
import textwrap
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cryosplat import inspection
from cryosplat.config import check_files, find_config, load_config, resolve_path
from cryosplat.directional import SIDE_VIEWS_EVENNESS
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.images import read_header
from cryosplat.imagesurvey import survey_images
from cryosplat.settings import INPUTS, NO_CTF, Config
from cryosplat.survey import COVERED_DEG, Survey, survey

PARTICLES = (".star", ".cs", ".txt", ".mrcs")
WIDTH, LABEL = 100, 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat inspect`` takes."""
    parser.description = (
        "Say what a file holds. Of particles (.star, .cs, .txt, .mrcs, or a run's .yaml): everything that a run would "
        "use, everything that is wrong with it and how to mend it, what it would need, and a configuration for it; "
        "nothing is reconstructed. Of a poses.pkl or ctf.pkl, a run directory, a mixture (.npz, .ply) or a map: what "
        "is in it. The exit status is 2 if no run could start from it as it is."
    )
    parser.add_argument("path", metavar="FILE")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for train, such as data.poses=poses.pkl")
    parser.add_argument("--write", metavar="YAML", help="write the suggested configuration there; replaces nothing")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def run(args: argparse.Namespace) -> int:
    """Do what ``cryosplat inspect`` is asked to do; 2 if there are particles that no run could start from.

    Raises:
        InputError: nothing there, nothing this program knows, or a configuration that is there already.
    """
    path = Path(args.path)
    if args.write and Path(args.write).exists():
        raise InputError(f"{args.write} exists already; choose another name for the configuration")
    if not is_particles(path, bool(args.settings)):
        rows = inspection.describe(path)
        print(
            json.dumps(dict(rows), indent=2) if args.json else "\n".join(f"{name:>28}  {value}" for name, value in rows)
        )
        return 0
    found, config = inspect_particles(path, args.settings)
    if args.write:
        with atomic_path(args.write) as temporary:
            temporary.write_text(config)
    if args.json:
        print(json.dumps({"usable": not found.problems, **report(found), "config": config}, indent=2))
    else:
        print("\n".join(lines(path, found, config, args.write)))
    return 2 if found.problems else 0


def is_particles(path: Path, configured: bool) -> bool:
    """Whether a run would take the file for its particles or its settings; a cubic .mrc only if settings come with it.

    Raises:
        InputError: there is nothing.
    """
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return True
    if not path.exists():
        raise InputError(f"{path}: nothing there")
    if suffix == ".mrc" and not configured:
        with contextlib.suppress(InputError):  # odd, or no stack in another way: said where it is read as a map
            header = read_header(path)
            return header.images != header.box
        return False
    return path.is_file() and (suffix in PARTICLES or suffix == ".mrc")


def inspect_particles(path: Path, settings: list[str]) -> tuple[Survey, str]:
    """A survey of the particles, and the suggested configuration as YAML."""
    if path.suffix.lower() in (".yaml", ".yml"):
        config, given = load_config(path, settings), OmegaConf.load(find_config(path))
    else:
        particles = f"data.particles={path.absolute()}"
        config, given = load_config(None, [particles, *settings]), OmegaConf.create({})
        OmegaConf.update(given, "data.particles", str(path.absolute()))
    found = survey(config)
    if found.listing is not None:
        if found.facts.get("poses", {}).get("from"):  # else that is known as a problem
            found.attempt(lambda: check_files(found.config))
        survey_images(found)
    for word in [*settings, *(f"{key}={value}" for key, value in found.added.items())]:
        key, _, value = word.partition("=")
        OmegaConf.update(given, key, _absolute(config, key, value))
    if "run_dir" not in given:
        OmegaConf.update(given, "run_dir", f"runs/{Path(config.data.particles).stem}")
    return found, OmegaConf.to_yaml(given)


def _absolute(config: Config, key: str, value: str) -> Any:
    """A setting's value as YAML has it; a path so that it holds wherever the configuration is used."""
    name = key.removeprefix("data.")
    if key.startswith("data.") and name in INPUTS and value not in ("", "null", NO_CTF):
        return ",".join(os.path.abspath(resolve_path(config, word.strip())) for word in value.split(","))
    return OmegaConf.create(f"value: {value}").value if not name.startswith("prefix") else value


def report(found: Survey) -> dict[str, Any]:
    """All of a survey, for programs."""
    return {"facts": found.facts, "problems": found.problems, "notes": found.notes}


def lines(path: Path, found: Survey, config: str, written: str | None) -> list[str]:
    """What is printed, at most WIDTH columns wide."""
    text = [line for label, words in rows(found) for line in _wrapped(label, words)]
    for title, sentences in (("notes", found.notes), ("problems", found.problems)):
        if sentences:
            text += ["", f"{title}:"]
            for number, sentence in enumerate(sentences, start=1):
                text += _wrap(sentence, f"{number:>3}. ", "     ")
    if found.listing is None:
        return text
    text += ["", "suggested configuration" + (f", written to {written}:" if written else ":")]
    text += [f"  {line}" for line in config.rstrip().splitlines()]
    name = shlex.quote(written or "my.yaml")
    if not found.problems:
        text += ["", f"usable: cryosplat train --config {name}"]
    elif found.added and len(found.problems) == len(found.added):
        text += ["", f"usable with what is added there: cryosplat train --config {name}"]
    else:
        text += ["", "not usable as it is: see the problems"]
    return text


def _wrap(text: str, first: str, others: str) -> list[str]:
    """Paths stay whole, even those longer than a line, so that they can be copied."""
    keep = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=others, **keep)


def _wrapped(label: str, words: str) -> list[str]:
    indent = " " * (LABEL + 1)
    wrapped = _wrap(words, indent, indent)
    first, *others = wrapped or [indent]
    return [f"{label:<{LABEL}} {first[len(indent) :]}", *others]


def rows(found: Survey) -> list[tuple[str, str]]:
    """Label and words of everything that is known."""
    facts, written = found.facts, []
    for section, words in _WORDS.items():
        if facts.get(section):
            said = words(facts[section])
            written += [(_LABELS.get(section, section) if not number else "", line) for number, line in enumerate(said)]
    return written


def _particles(facts: dict) -> list[str]:
    used = "" if facts["used"] == facts["listed"] else f", {facts['used']:,} of them used"
    return [f"{facts['listed']:,}{used}"]


def _images(facts: dict) -> list[str]:
    box = "box not known" if facts["box"] is None else f"{facts['box']} px (from {facts['box_from']})"
    if facts["pixel_size_a"] is None:
        return [f"{box}, A/px not known"]
    across = f", {facts['box'] * facts['pixel_size_a']:.1f} A across" if facts["box"] else ""
    return [f"{box}, {facts['pixel_size_a']:.5g} A/px (from {facts['pixel_size_from']}){across}"]


def _optics(facts: list[dict]) -> list[str]:
    units = {
        "kv": "{:g} kV",
        "cs_mm": "Cs {:g} mm",
        "contrast": "amplitude contrast {:.3g}",
        "pixel_size_a": "{:.5g} A/px",
    }
    said = []
    for group in facts:
        values = [form.format(group[key]) for key, form in units.items() if group.get(key) is not None]
        name = "" if group["group"] is None else f"group {group['group']} {group['name'] or ''}".rstrip() + ": "
        count = f"; {group['particles']:,} particles" if len(facts) > 1 else ""
        said.append(f"{name}{', '.join(values) or 'nothing said'}{count}")
    most = 12
    return said if len(said) <= most else [*said[:most], f"and {len(said) - most} more groups"]


def _poses(facts: dict) -> list[str]:
    if facts["from"] is None:
        return ["none"]
    said = [f"in {facts['from']}"]
    if "shifts_a" in facts:
        shifts = facts["shifts_a"]
        said[0] += f"; shifts {shifts['median']:.2f} A (median), {shifts['largest']:.2f} A (largest)"
    if "covered" in facts:
        note = " (1: even; below 0.81, that of side views alone, a map is uneven, unless symmetry adds views)"
        said.append(
            f"{facts['covered']:.0%} of all directions have a view within {COVERED_DEG:g} degrees; the farthest is "
            f"{facts['largest_gap_deg']:.0f} degrees from any view; evenness {facts['evenness']:.2f}"
            + (note if facts["evenness"] < SIDE_VIEWS_EVENNESS else "")
        )
    return said


def _ctf(facts: dict) -> list[str]:
    if facts["from"] is None:
        return ["none: the images are taken as without a CTF"]
    defocus, astigmatism = facts["defocus_a"], facts["astigmatism_a"]
    said = [
        f"in {facts['from']}; defocus {defocus['least'] / 1e4:.2f} to {defocus['largest'] / 1e4:.2f} um, median "
        f"{defocus['median'] / 1e4:.2f}; astigmatism {astigmatism['median']:.0f} A (median), "
        f"{astigmatism['largest']:.0f} A (largest)"
    ]
    if facts["defocus_outliers"]:
        said.append(f"{facts['defocus_outliers']:,} far from the others, the first in row {facts['first_outlier']}")
    if facts["overfocus"]:
        said.append(f"{facts['overfocus']:,} are overfocused (negative): is the sign that of underfocus?")
    shift = facts["phase_shift_deg"]
    said.append(
        "no phase shift" if shift is None else f"phase shift {shift['least']:.0f} to {shift['largest']:.0f} degrees"
    )
    return said


def _halves(facts: dict) -> list[str]:
    return [f"{facts['a']:,} and {facts['b']:,}. {facts['words']}"]


def _micrographs(facts: dict) -> list[str]:
    each = facts["particles"]
    return [f"{facts['count']:,}, of {each['least']:g} to {each['largest']:g} particles, median {each['median']:g}"]


def _stacks(facts: dict) -> list[str]:
    missing = f"{facts['missing']:,} not where the file says" if facts["missing"] else "all there"
    return [f"{facts['count']:,}, {missing}"]


def _duplicates(facts: dict) -> list[str]:
    repeated = facts["rows"]
    return [f"{repeated:,} rows are an image that another row is too" if repeated else "no image is in two rows"]


def _sample(facts: dict) -> list[str]:
    said = f"{facts['images']:,} images: {facts['not_finite']} not finite, {facts['constant']} constant"
    if facts["background_mean"] is None:
        return [said]
    level = "normalised" if facts["normalised"] else "not normalised, which does not matter"
    said += (
        f"; background {facts['background_mean']:.3g} +- {facts['background_deviation']:.3g} ({level}), "
        f"{facts['odd']} far from that"
    )
    return [said]


def _sign(facts: dict) -> list[str]:
    return [facts["words"]]


def _memory(facts: dict) -> list[str]:
    return [
        f"images {facts['images_gib']:.2g} GiB, divided among processes; beside them {facts['work_gib']:.2g} GiB in "
        f"the first process; all of it on one GPU {facts['gpu_gib']:.2g} GiB (by formula)"
    ]


def _time(facts: dict) -> list[str]:
    return [
        f"{_duration(facts['pass_seconds'])} for the pass over all images by one process on this machine's CPU "
        f"(from {facts['images_probed']} images, so roughly; divided among processes); then the fit in the "
        "volume, which does not grow with their number"
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_LABELS = {"ctf": "CTF", "duplicates": "copies"}

_WORDS = {
    "particles": _particles,
    "images": _images,
    "stacks": _stacks,
    "optics": _optics,
    "poses": _poses,
    "ctf": _ctf,
    "aberrations": list,
    "halves": _halves,
    "micrographs": _micrographs,
    "duplicates": _duplicates,
    "sample": _sample,
    "sign": _sign,
    "memory": _memory,
    "time": _time,
}
"""Sections in their order, and what puts each into words, a line or more."""
