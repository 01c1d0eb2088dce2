"""report.html: a run on one page that needs no server and no network; and the ``report`` command."""

import argparse
import base64
import datetime
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from cryosplat import __version__, findings
from cryosplat.config import config_differences, load_config
from cryosplat.ending import angstrom
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.metrics import read_volume_fit
from cryosplat.runfiles import files_of
from cryosplat.runlock import NAME as LOCK
from cryosplat.settings import Config

NAME, TEMPLATE = "report.html", "report.html.j2"

PICTURES = (
    "fsc.png",
    "fsc_half_maps.png",
    "sections.png",
    "projections.png",
    "viewing_directions.png",
    "directional.png",
    "volume_fit.png",
    "loss.png",
    "holdout.png",
)
"""Figures of a run directory that the page shows, as far as they are there."""

_PASSING = (NAME, LOCK, "status.json")
"""What is not listed: the page itself, and what is there while a run goes on."""

LAST_TENTH = 0.1
"""Part of the steps of a fit whose rise tells whether it has levelled off."""


def write_report(
    folder: Path,
    summary: Mapping[str, Any],
    pictures: Mapping[str, bytes] | None = None,
    on_the_way: str | None = None,
    path: Path | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a run as one HTML file, its figures in it.

    Args:
        folder: the run directory.
        summary: what summary.json says or is going to say.
        pictures: PNG files by the name of the file they stand for; none: those in the folder.
        on_the_way: how far a run is that is not complete, in words.
        path: of the page; none: report.html in the folder.
        overwrite: replace a page that is there.

    Raises:
        InputError: a file of the run is damaged, the page exists and ``overwrite`` is false, or it cannot be written.
    """
    path = folder / NAME if path is None else path
    page = _render(context(folder, summary, pictures, on_the_way))
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def context(
    folder: Path, summary: Mapping[str, Any], pictures: Mapping[str, bytes] | None = None, on_the_way: str | None = None
) -> dict[str, Any]:
    """What the template is filled with; arguments as of ``write_report``."""
    config = load_config(folder / "config.yaml")
    found = findings.as_records(findings.find(summary, folder, config.data.null))
    if pictures is None:
        pictures = {name: (folder / name).read_bytes() for name in PICTURES if (folder / name).is_file()}
    return {
        "folder": folder.resolve(),
        "summary": summary,
        "on_the_way": on_the_way,
        "problems": [each for each in found if each["level"] == findings.PROBLEM],
        "remarks": [each for each in found if each["level"] == findings.REMARK],
        "resolutions": _resolutions(summary),
        "pictures": {name: _inline(picture) for name, picture in pictures.items()},
        "rise": _rise(folder),
        "verdict": _verdict(folder),
        "settings": _changed(config),
        "all_settings": OmegaConf.to_yaml(OmegaConf.structured(config)),
        "again": _again(folder, summary),
        "files": [(name, _size(size), meaning) for name, size, meaning in files_of(folder) if name not in _PASSING],
        "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "version": __version__,
    }


def _render(values: Mapping[str, Any]) -> str:
    import jinja2  # here, because only the first rank of a run needs it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cryosplat", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(values)


def _resolutions(summary: Mapping[str, Any]) -> dict[str, dict[str, str] | None]:
    """Resolutions by the stem of their keys in summary.json, with their limits in words, and the number alone; None of
    those that there are not."""
    found: dict[str, dict[str, str] | None] = dict.fromkeys(
        ("resolution", "resolution_naive", "resolution_linear", "resolution_truth")
    )
    for name in found:
        if summary.get(f"{name}_a") is not None:
            words = angstrom(summary, name).replace(" A", " Å").replace("+-", "±")
            error = summary.get(f"{name}_error_a")
            number = f"{summary[f'{name}_a']:.2f}" + (f" ± {error:.2f}" if error else "")
            found[name] = {"words": words, "number": f"{number} Å"}
    return found


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _rise(folder: Path) -> float | None:
    """Share of the whole rise of the likelihood that came in the last tenth of the fit in the volume."""
    fit = read_volume_fit(folder / "volume_fit.csv")
    if fit is None or len(fit["gain_full"]) < 2 / LAST_TENTH:
        return None
    gain = fit["gain_full"]
    whole = gain.max() - gain[0]
    return (
        float((gain[-1] - gain[-1 - round(LAST_TENTH * len(gain))]) / whole) if np.isfinite(whole) and whole else None
    )


def _verdict(folder: Path) -> dict[str, Any] | None:
    """What ``cryosplat validate`` wrote; None if it was not run."""
    path = folder / "validation" / "verdict.json"
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not as cryosplat validate writes it ({error})") from error


def _changed(config: Config) -> list[str]:
    """Settings that differ from the defaults of the run's recipe."""
    return config_differences(load_config(None, [f"recipe={config.recipe}"]), config)


def _again(folder: Path, summary: Mapping[str, Any]) -> str:
    """The command that makes such a run again, from the folder that it was started in."""
    words = ["--config", str(folder / "config.yaml"), f"run_dir={folder}_again"]
    size = summary.get("world_size", 1)
    if size == 1:
        return shlex.join(["cryosplat", "train", *words])
    launcher = ["torchrun", "--standalone", "--nproc-per-node", str(size)]
    return shlex.join([*launcher, "-m", "cryosplat.train", *words])


def _size(size: int) -> str:
    """Bytes as people say them.

    >>> _size(999), _size(3_539_968)
    ('999 B', '3.5 MB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat report`` takes."""
    parser.description = (
        "Write a complete run as one HTML page that needs no server and no network. A run writes it by itself, at its "
        "end and at every evaluation; this writes it anew, for example after cryosplat validate."
    )
    parser.add_argument("run_dir", metavar="RUN", help="directory of a complete run")
    parser.add_argument("-o", "--output", metavar="FILE", help="page to write; default: RUN/report.html")


def run(args: argparse.Namespace) -> None:
    """Write the page of a run, and say where it is and what it warns of.

    Raises:
        InputError: no run, one that is not complete, or an output that exists.
    """
    folder = Path(args.run_dir).expanduser()
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no run of cryosplat (it has no config.yaml)")
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError as error:
        there = f"; {folder / NAME} is of its last evaluation" if (folder / NAME).exists() else ""
        raise InputError(f"{folder}: the run is not complete; let it go on to its end first{there}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'summary.json'}: not as a run writes it ({error})") from error
    own = args.output is None
    path = write_report(folder, summary, path=None if own else Path(args.output), overwrite=own)
    for each in findings.find(summary, folder, load_config(folder / "config.yaml").data.null):
        print(f"{each.words.level}: {each.words.title}")
    print(path)
