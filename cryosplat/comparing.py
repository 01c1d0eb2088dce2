"""The ``compare`` command: complete runs side by side, in numbers, settings and curves."""

import argparse
import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import yaml

from cryosplat.conventions import RESOLUTION_THRESHOLD_TRUTH
from cryosplat.errors import InputError
from cryosplat.figures import PAPER_DPI
from cryosplat.files import atomic_path
from cryosplat.fsc import PIXEL_SIZE_TOLERANCE, FscCurve, fsc, mean_fsc, resolution
from cryosplat.fscfigures import comparison_figure
from cryosplat.records import Record, read_record
from cryosplat.status import duration
from cryosplat.volumes import read_map

SUFFIXES = (".png", ".html", ".csv")

PANELS = {
    "calibrated_map": "delivered map to the truth, calibrated",
    "linear_half_maps": "linear half maps",
    "half_maps": "half maps of mixtures (naive)",
    "truth": "delivered map to the known truth",
}
"""Columns of fsc.csv that are laid over each other, and their titles; a panel needs one run that has it."""

BETWEEN = "delivered maps of two runs"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs side by side.

    Attributes:
        names: of the runs, short.
        records: of the runs.
        rows: name of a number and its value in every run.
        settings: full key of a setting that differs, and its value in every run.
        between: FSC of the delivered maps by pair of runs; in words why there is none.
    """

    names: list[str]
    records: list[Record]
    rows: list[tuple[str, list[str]]]
    settings: list[tuple[str, list[str]]]
    between: dict[tuple[int, int], FscCurve | str]

    @property
    def panels(self) -> dict[str, dict[str, FscCurve]]:
        """Curves by run, by title of the panel that they are drawn in."""
        found = {}
        for column, title in PANELS.items():
            curves = {
                name: record.curves[column]
                for name, record in zip(self.names, self.records, strict=True)
                if column in record.curves
            }
            found |= {title: curves} if curves else {}
        pairs = {
            f"{self.names[a]} × {self.names[b]}": curve
            for (a, b), curve in self.between.items()
            if isinstance(curve, FscCurve)
        }
        return found | ({BETWEEN: pairs} if pairs else {})

    def pairs(self) -> list[str]:
        """What the delivered maps of every two runs have in common, a line a pair."""
        lines = []
        for (a, b), curve in self.between.items():
            said = curve
            if isinstance(curve, FscCurve):
                said = f"FSC 0.5 at {resolution(curve, RESOLUTION_THRESHOLD_TRUTH)}, mean FSC {mean_fsc(curve):.3f}"
            lines.append(f"{self.names[a]} × {self.names[b]}: {said}")
        return lines


def compare(folders: Sequence[Path]) -> Comparison:
    """Read complete runs and set them side by side.

    Raises:
        InputError: fewer than two, or one is not a complete run.
    """
    if len(folders) < 2:
        raise InputError("expected two run directories or more to compare")
    records = [read_record(folder, curves_needed=False) for folder in folders]
    between = {(a, b): _between(records[a], records[b]) for a, b in combinations(range(len(records)), 2)}
    return Comparison(_short(folders), records, _rows(records), _settings(folders), between)


def _short(folders: Sequence[Path]) -> list[str]:
    """The last part of every path, or all of it where that does not tell them apart."""
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def _rows(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    said = {
        "particles": lambda s: f"{s['particles']:,}",
        "Gaussians": lambda s: f"{s['gaussians']:,}",
        "box": lambda s: f"{s['box']} px at {s['pixel_size_a']:.4g} A",
        "resolution, calibrated": lambda s: _angstrom(s, "resolution"),
        "naive": lambda s: _angstrom(s, "resolution_naive"),
        "linear half maps": lambda s: _angstrom(s, "resolution_linear"),
        "to the truth, FSC 0.5": lambda s: _angstrom(s, "resolution_truth"),
        "to the truth, mean FSC": lambda s: "-" if (v := s.get("fsc_truth_mean")) is None else f"{v:.4f}",
        "mask": lambda s: s.get("mask_origin") or "-",
        "time": lambda s: "-" if (v := s.get("wall_seconds")) is None else duration(v),
        "memory, all processes": lambda s: "-" if (v := s.get("peak_memory_gib")) is None else f"{v:.2f} GiB",
        "memory of a GPU": lambda s: f"{v:.2f} GiB" if (v := s.get("peak_gpu_memory_gib")) else "-",
        "processes": lambda s: str(s.get("world_size", "-")),
    }
    rows = [(name, [write(record.summary) for record in records]) for name, write in said.items()]
    return [(name, values) for name, values in rows if set(values) != {"-"}]


def _angstrom(summary: Mapping[str, Any], name: str) -> str:
    value, error = summary.get(f"{name}_a"), summary.get(f"{name}_error_a")
    if value is None:
        return "-"
    limit = " (Nyquist)" if summary.get(f"{name}_at_nyquist") else ""
    limit = " or better" if summary.get(f"{name}_at_limit_of_data") else limit
    return f"{value:.2f} A" + (f" +- {error:.2f}" if error else "") + limit


def _settings(folders: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs; an earlier version's may have others than this one's."""
    flat = [_flatten(_read_yaml(folder / "config.yaml")) for folder in folders]
    keys = list(dict.fromkeys(key for one in flat for key in one if key != "run_dir"))
    rows = [(key, [_word(one[key]) if key in one else "(unknown)" for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected settings, 'key: value' by line")
    return found


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _word(value: Any) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _between(one: Record, other: Record) -> FscCurve | str:
    """FSC of two delivered maps under the union of their masks, on the coarser grid; or why there is none.

    Grids of one field of view are cut to the coarser one in Fourier space. Fields that differ would need maps
    interpolated, whose FSC would say as much of that as of the runs.
    """
    fields = [record.box * record.pixel_size_a for record in (one, other)]
    if abs(fields[0] / fields[1] - 1) > PIXEL_SIZE_TOLERANCE:
        return f"not comparable: the boxes are {fields[0]:.1f} A and {fields[1]:.1f} A wide; data.box keeps the width"
    coarse = min((one, other), key=lambda record: record.box)
    maps = [_cropped(read_map(record.folder / "map.mrc")[0], coarse.box) for record in (one, other)]
    masks = [_mask(record, coarse.box) for record in (one, other)]
    mask = None if any(one is None for one in masks) else np.maximum(*masks)
    return fsc(*maps, coarse.pixel_size_a, mask)


def _mask(record: Record, box: int) -> np.ndarray | None:
    path = record.folder / "mask.mrc"
    return np.clip(_cropped(read_map(path)[0], box), 0, 1) if path.is_file() else None


def _cropped(volume: np.ndarray, box: int) -> np.ndarray:
    """A map (D, D, D) on a coarser grid of the same field of view, its origin still at voxel ``box // 2``."""
    size = len(volume)
    if size == box:
        return volume
    # The origin to voxel 0 and back: it is at another fraction of the field where a box is odd.
    spectrum = scipy.fft.rfftn(scipy.fft.ifftshift(volume))
    keep = np.fft.fftfreq(box, 1 / box).round().astype(int) % size
    spectrum = spectrum[np.ix_(keep, keep, np.arange(box // 2 + 1))]
    return scipy.fft.fftshift(scipy.fft.irfftn(spectrum, s=(box,) * 3)) * (box / size) ** 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat compare`` takes."""
    parser.description = (
        "Set complete runs side by side: resolution, cost, settings that differ, and the FSC between their delivered "
        "maps. A resolution is that under the run's own mask."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, two or more")
    help_ = (
        "also write: a figure of all curves (.png), a page (.html), or the curves (.csv); may be given several times"
    )
    parser.add_argument("-o", "--output", action="append", default=[], metavar="FILE", help=help_)


def run(args: argparse.Namespace) -> None:
    """Print the comparison, and write what was asked for.

    Raises:
        InputError: see ``compare``; an unknown suffix, or a file that exists.
    """
    outputs = [Path(name) for name in args.output]
    for path in outputs:
        if path.suffix not in SUFFIXES:
            raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}")
        if path.exists():
            raise InputError(f"{path} exists already; choose another name or remove it first")
    found = compare([Path(name) for name in args.runs])
    print(_text(found))
    writers = {".png": _png, ".html": lambda found: _page(found).encode(), ".csv": lambda found: _csv(found).encode()}
    for path in outputs:
        with atomic_path(path, overwrite=False) as temporary:
            temporary.write_bytes(writers[path.suffix](found))


def _text(found: Comparison) -> str:
    lines = _columns([("", found.names), *found.rows])
    if found.settings:
        lines += ["", "settings that differ", *_columns(found.settings)]
    return "\n".join([*lines, "", BETWEEN, *(f"  {line}" for line in found.pairs())])


def _columns(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
    table = [[name, *values] for name, values in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].rjust(widths[0]), *(c.ljust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in table
    ]


def _png(found: Comparison) -> bytes:
    buffer = io.BytesIO()
    comparison_figure(found.panels).savefig(buffer, format="png", dpi=PAPER_DPI)
    return buffer.getvalue()


def _csv(found: Comparison) -> str:
    """A row a shell of every curve: grids may differ."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("curve", "run", "shell", "frequency_inv_a", "fsc"))
    for title, curves in found.panels.items():
        for name, curve in curves.items():
            for shell, frequency, value in zip(curve.shells, curve.frequency, curve.fsc, strict=True):
                if shell and np.isfinite(value):
                    writer.writerow((title, name, shell, f"{frequency:.6f}", f"{value:.6f}"))
    return buffer.getvalue()


def _page(found: Comparison) -> str:
    """One HTML file that needs no other."""

    def table(heading: str, rows: Sequence[tuple[str, list[str]]]) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *found.names))
        body = "".join(
            f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{html.escape(v)}</td>" for v in values) + "</tr>"
            for name, values in rows
        )
        return f"<h2>{heading}</h2><table><tr>{head}</tr>{body}</table>"

    style = (
        "body{font:15px/1.4 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}table{border-collapse:"
        "collapse}td,th{padding:.25em .8em;text-align:left;border-bottom:1px solid #ddd;font-weight:normal}th:first-"
        "child{color:#666}img{max-width:100%}"
    )
    parts = [table("In numbers", found.rows)]
    if found.settings:
        parts.append(table("Settings that differ", found.settings))
    parts.append(f"<h2>{BETWEEN.capitalize()}</h2>" + "".join(f"<p>{html.escape(line)}</p>" for line in found.pairs()))
    image = base64.b64encode(_png(found)).decode()
    parts.append(f'<h2>Curves</h2><img alt="FSC curves of the runs" src="data:image/png;base64,{image}">')
    title = html.escape(" and ".join(found.names))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"</head><body><h1>{title}</h1>{''.join(parts)}</body></html>\n"
    )
