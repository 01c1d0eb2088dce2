"""The ``postprocess`` command: a sharpened map from a run, a map or two half maps, with a record of what was done."""

import argparse
import csv
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cryosplat import __version__, figures
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, RESOLUTION_THRESHOLD_TRUTH
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.fsc import FscCurve, fsc, read_maps, resolution
from cryosplat.masks import check_mask
from cryosplat.sharpening import EDGE_SHELLS, Sharpened, check_resolution, sharpen
from cryosplat.volumes import write_map

FILES = ("postprocess.mrc", "guinier.png", "postprocess.json")
"""What is written; the record last, so that it stands for the rest."""

COLUMNS = {"calibrated_map": "truth", "corrected": "half-maps", "half_maps": "half-maps", "truth": "truth"}
"""Columns of fsc.csv that are known, and what they compare; the best first."""

FROM_RUN = ("calibrated_map", "corrected", "half_maps")
"""Columns taken from a run without being asked: not "truth", which only a simulation has."""

THRESHOLDS = {"half-maps": RESOLUTION_THRESHOLD_HALF_MAPS, "truth": RESOLUTION_THRESHOLD_TRUTH}

SENTENCES = {
    "half-maps": "sqrt(2 F / (1 + F)), F the FSC of the half maps",
    "truth": "the FSC to the truth itself",
    "none": "none",
}


@dataclass
class Inputs:
    """What is sharpened, and what is known of it.

    Attributes:
        maps: one map, or two half maps that are averaged.
        mask: the mask's file, or None.
        table: the FSC curve's file, or None.
        column: its column.
        resolution_a: as asked for or as a run's summary says, A; None: read from the curve.
        resolution_from: a sentence's end: where that is from.
    """

    maps: list[Path]
    mask: Path | None
    table: Path | None
    column: str | None
    resolution_a: float | None
    resolution_from: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Weighting:
    """The curve that weighs, what it compares ("half-maps", "truth" or "none"), and where it is from."""

    curve: FscCurve | None
    between: str
    origin: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat postprocess`` takes."""
    parser.description = (
        "Weight a map by its FSC, sharpen it by a B factor (A^2, negative sharpens) and low-pass it at its resolution. "
        f"Writes {', '.join(FILES)}; replaces nothing."
    )
    parser.add_argument(
        "run_dir", nargs="?", metavar="RUN", help="directory of a run: its map.mrc, fsc.csv and mask.mrc"
    )
    parser.add_argument("--map", metavar="MAP", help="map to sharpen, neither masked nor filtered")
    parser.add_argument("--half1", metavar="MAP", help="half map, to be averaged with --half2")
    parser.add_argument("--half2", metavar="MAP", help="the other half map")
    parser.add_argument("--mask", metavar="MAP", help="soft mask, 0 to 1, for the FSC of --half1 and --half2")
    parser.add_argument("--apply-mask", action="store_true", help="multiply the sharpened map with the mask")
    parser.add_argument(
        "--fsc", metavar="CSV", help="table of FSC curves, as fsc.csv of a run; default: of the half maps"
    )
    parser.add_argument(
        "--column", metavar="NAME", help=f"its column; in a run the first there is of {', '.join(FROM_RUN)}"
    )
    parser.add_argument(
        "--weighting", choices=tuple(SENTENCES), help="what that column compares; none: do not weight by the FSC"
    )
    parser.add_argument(
        "--resolution",
        type=float,
        metavar="A",
        help="default: the run's, else where the FSC crosses 0.143 (0.5: truth)",
    )
    parser.add_argument(
        "--bfactor", type=float, metavar="B", help="A^2, negative sharpens; default: from a Guinier fit"
    )
    parser.add_argument(
        "--fit-from", type=float, default=10.0, metavar="A", help="lowest resolution fitted; default: 10"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to write")


def run(args: argparse.Namespace) -> None:
    """Do what ``cryosplat postprocess`` is asked to do.

    Raises:
        InputError: contradictory or missing arguments, unreadable files, different grids, no such column, too few
            shells to fit, a resolution beyond Nyquist, or output files that exist.
    """
    folder = Path(args.output)
    _check_arguments(args, folder)
    inputs = _inputs(args)
    read = [*inputs.maps, *([inputs.mask] if inputs.mask else [])]
    volumes, pixel_size_a = read_maps(read)
    mask = volumes.pop() if inputs.mask else None
    if mask is not None:
        check_mask(mask, str(inputs.mask))
    weighting = _weighting(args, inputs, volumes, pixel_size_a, mask)
    _settle_resolution(inputs, weighting, pixel_size_a)
    volume = volumes[0] if len(volumes) == 1 else 0.5 * (volumes[0] + volumes[1])
    result = sharpen(
        volume, pixel_size_a, inputs.resolution_a, weighting.curve if weighting.between != "none" else None,
        weighting.between, args.bfactor, args.fit_from,
    )  # fmt: skip
    record = _record(args, inputs, weighting, result)
    sharpened = result.volume if not args.apply_mask else result.volume * mask
    _write(folder, sharpened, result, record)
    _report(inputs, weighting, result, args, folder)


def _check_arguments(args: argparse.Namespace, folder: Path) -> None:
    halves = [args.half1, args.half2]
    given = [bool(args.run_dir), bool(args.map), any(halves)]
    if sum(given) != 1 or (any(halves) and not all(halves)):
        raise InputError("expected one of: a run directory, --map, or --half1 with --half2")
    if args.bfactor is not None and not math.isfinite(args.bfactor):
        raise InputError(f"--bfactor {args.bfactor}: expected a number in A^2, such as -100")
    if not (args.fit_from > 0 and math.isfinite(args.fit_from)):
        raise InputError(f"--fit-from {args.fit_from:g}: expected a resolution in A, such as 10")
    if args.map and not args.fsc and args.weighting != "none":
        raise InputError("--map has no FSC by itself: give --fsc, or --weighting none with --resolution")
    if args.column and not args.fsc and not args.run_dir:
        raise InputError(f"--column {args.column}: of which table? Give it with --fsc")
    for name in FILES:
        if (folder / name).exists():
            raise InputError(f"{folder / name} exists already; choose another folder or remove it first")


def _inputs(args: argparse.Namespace) -> Inputs:
    """Files by the arguments; a run's own where it has them and no other is named."""
    maps = [Path(path) for path in (args.map, args.half1, args.half2) if path]
    mask, table = (Path(path) if path else None for path in (args.mask, args.fsc))
    inputs = Inputs(maps, mask, table, args.column, args.resolution, "as asked for")
    if args.run_dir:
        _add_run(inputs, Path(args.run_dir), args.apply_mask)
    if args.apply_mask and inputs.mask is None:
        raise InputError("--apply-mask: there is no mask; give one with --mask")
    if inputs.table and not inputs.column:
        names = ", ".join(_known(inputs.table))
        raise InputError(f"{inputs.table}: which curve? Name it with --column; there are {names}")
    return inputs


def _add_run(inputs: Inputs, folder: Path, with_mask: bool) -> None:
    """Take from a run's directory what was not named."""
    inputs.maps = [folder / "map.mrc"]
    if not inputs.maps[0].is_file():
        raise InputError(f"{folder}: no complete run of cryosplat (it has no map.mrc)")
    if with_mask and inputs.mask is None and (folder / "mask.mrc").is_file():
        inputs.mask = folder / "mask.mrc"
    if inputs.table is None and (folder / "fsc.csv").is_file():
        inputs.table = folder / "fsc.csv"
        columns = _known(inputs.table)
        inputs.column = inputs.column or next((name for name in FROM_RUN if name in columns), None)
        if inputs.column == "half_maps":
            inputs.notes.append("the run has no calibrated curve of map.mrc; half_maps may say more than map.mrc holds")
    summary = folder / "summary.json"
    if inputs.resolution_a is None and summary.is_file():
        inputs.resolution_a = _resolution_of(summary)
        inputs.resolution_from = f"resolution_a of {summary}"


def _resolution_of(summary: Path) -> float | None:
    try:
        value = json.loads(summary.read_text()).get("resolution_a")
        return None if value is None else float(value)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{summary}: not the summary of a run ({error}); give --resolution") from error


def _weighting(
    args: argparse.Namespace, inputs: Inputs, volumes: list[np.ndarray], pixel_size_a: float, mask: np.ndarray | None
) -> Weighting:
    """The FSC curve: from the table, else of the two half maps under the mask."""
    if inputs.table:
        curve = read_curve(inputs.table, inputs.column, len(volumes[0]), pixel_size_a)
        between = args.weighting or COLUMNS.get(inputs.column)
        if between is None:
            raise InputError(
                f"{inputs.table}: column {inputs.column} can be any curve; say what it compares with --weighting "
                "half-maps or --weighting truth"
            )
        return Weighting(curve, between, f"{inputs.column} of {inputs.table}")
    if len(volumes) == 2:
        if args.weighting == "truth":
            raise InputError("--weighting truth: the FSC of --half1 and --half2 is between half maps; leave it out")
        origin = f"FSC of the two half maps, {f'under {inputs.mask}' if inputs.mask else 'without a mask'}"
        return Weighting(fsc(*volumes, pixel_size_a, mask), args.weighting or "half-maps", origin)
    if args.weighting != "none":
        raise InputError(f"{args.run_dir}: the run has no fsc.csv; give --fsc, or --weighting none with --resolution")
    return Weighting(None, "none", "no curve")


def _settle_resolution(inputs: Inputs, weighting: Weighting, pixel_size_a: float) -> None:
    """As asked for, as the run says, or from the curve; never beyond Nyquist."""
    if inputs.resolution_a is None:
        if weighting.curve is None:
            raise InputError("without an FSC curve the resolution is not known; give it with --resolution")
        between = COLUMNS.get(inputs.column, "half-maps") if weighting.between == "none" else weighting.between
        found = resolution(weighting.curve, THRESHOLDS[between])
        inputs.resolution_a = found.angstrom
        inputs.resolution_from = f"FSC = {THRESHOLDS[between]:g}, {weighting.origin}"
        if found.limited_by_nyquist:
            inputs.resolution_from += ": never below it, so Nyquist"
    check_resolution(inputs.resolution_a, pixel_size_a)


def _known(table: Path) -> list[str]:
    """Names of the curves in a table."""
    others = ("shell", "resolution_a", "frequency_inv_a")
    return [name for name in _rows(table)[0] if name not in others and not name.endswith("_error")]


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with open(table, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table}: not a readable table of FSC curves ({error})") from error
    if not rows or not {"shell", "resolution_a"} <= set(rows[0]):
        raise InputError(
            f"{table}: expected the columns shell and resolution_a and a row for each shell, as in fsc.csv"
        )
    return rows


def read_curve(table: Path, column: str, box: int, pixel_size_a: float) -> FscCurve:
    """A curve of a table as runs and ``cryosplat fsc`` write it; where it says nothing, 0.

    Args:
        box, pixel_size_a: the grid it must be of.

    Raises:
        InputError: unreadable, no such column, another grid, or no numbers.
    """
    rows = _rows(table)
    if column not in rows[0]:
        raise InputError(f"{table}: no column {column}; there are {', '.join(_known(table))}")
    try:
        shells = [int(row["shell"]) for row in rows]
        side_a = shells[-1] * float(rows[-1]["resolution_a"])
        values = np.array([float(row[column] or 0) for row in rows])
    except (TypeError, ValueError) as error:
        raise InputError(f"{table}: column {column}: expected numbers ({error})") from error
    if shells != list(range(1, box // 2 + 1)) or abs(side_a / (box * pixel_size_a) - 1) > 1e-3:
        raise InputError(
            f"{table}: {len(shells)} shells of a box of {side_a:.5g} A, but the map has {box // 2} of "
            f"{box * pixel_size_a:.5g} A; the curve must be of the map's own grid"
        )
    return FscCurve(np.concatenate([[1.0], np.nan_to_num(values, posinf=0.0, neginf=0.0)]), box, pixel_size_a)


def _record(args: argparse.Namespace, inputs: Inputs, weighting: Weighting, result: Sharpened) -> dict[str, Any]:
    """What postprocess.json says."""
    files = {"map": inputs.maps, "mask": [inputs.mask], "fsc": [inputs.table]}
    if len(inputs.maps) == 2:
        files = {"half1": inputs.maps[:1], "half2": inputs.maps[1:]} | files | {"map": [None]}
    used = {role: paths[0] for role, paths in files.items() if paths[0] is not None}
    return {
        "program": f"cryosplat {__version__}",
        "inputs": {role: {"path": str(path), "sha256": _sha256(path)} for role, path in used.items()},
        "box": len(result.volume),
        "pixel_size_a": result.pixel_size_a,
        "b_factor_a2": result.b_factor_a2,
        "b_factor_from": "given" if result.fit is None else "Guinier fit",
        "fit": None if result.fit is None else dataclasses.asdict(result.fit),
        "weighting": weighting.between,
        "weights": SENTENCES[weighting.between],
        "fsc_from": weighting.origin,
        "resolution_a": result.resolution_a,
        "resolution_from": inputs.resolution_from,
        "low_pass_edge_shells": EDGE_SHELLS,
        "mask_applied": bool(args.apply_mask),
        "notes": inputs.notes,
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _write(folder: Path, volume: np.ndarray, result: Sharpened, record: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    label = f"cryosplat postprocess: B {result.b_factor_a2:.5g} A^2, low-pass {result.resolution_a:.4g} A"
    label += ", FSC-weighted" if record["weighting"] != "none" else ""
    label += ", masked" if record["mask_applied"] else ""
    write_map(folder / FILES[0], volume, result.pixel_size_a, label=label)
    figures.save(figures.guinier_figure(result), folder / FILES[1])
    with atomic_path(folder / FILES[2], overwrite=False) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def _report(inputs: Inputs, weighting: Weighting, result: Sharpened, args: argparse.Namespace, folder: Path) -> None:
    print(f"{' and '.join(map(str, inputs.maps))}")
    print(f"  resolution   {inputs.resolution_a:.2f} A: {inputs.resolution_from}")
    print(f"  weights      {SENTENCES[weighting.between]}: {weighting.origin}")
    fit = result.fit
    how = "given" if fit is None else (
        f"fitted from {fit.from_a:.2f} to {fit.to_a:.2f} A, {fit.shells} shells, R^2 {fit.r_squared:.3f}"
    )  # fmt: skip
    print(f"  B            {result.b_factor_a2:.1f} A^2, {'sharpens' if result.b_factor_a2 < 0 else 'blurs'}: {how}")
    print(f"  mask         {inputs.mask if args.apply_mask else 'not applied'}")
    for note in inputs.notes:
        print(f"  note: {note}")
    print(f"  written: {', '.join(str(folder / name) for name in FILES)}")
