"""The ``cryosplat fsc`` command: half maps of anyone in, resolutions, curves and warnings out."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cryosplat import masks
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, RESOLUTION_THRESHOLD_TRUTH
from cryosplat.directional import viewing_directions
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, fsc, mean_fsc, read_maps, resolution, write_csv, write_xml
from cryosplat.fscsuite import THRESHOLDS, FscSuite, fsc_suite
from cryosplat.localresolution import default_window_a, local_resolution
from cryosplat.volumes import write_map


@dataclass(frozen=True, eq=False)
class _Maps:
    """What was read: two maps and a mask (or None to make one, or "none"), (D, D, D); A/px; how to call the mask."""

    first: np.ndarray
    second: np.ndarray
    mask: np.ndarray | str | None
    pixel_size_a: float
    mask_name: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat fsc`` takes."""
    parser.description = (
        "Resolution of two half maps of any program: FSC without mask, under masks and corrected for the mask, with "
        "errors, by direction, and what is odd about it. Or, with --reference, FSC of a map to a reference."
    )
    parser.add_argument("map1", metavar="a.mrc", help="half map a, unmasked and unfiltered (or the map)")
    parser.add_argument("map2", metavar="b.mrc", help="half map b (or the reference), on the same grid")
    parser.add_argument(
        "--mask", metavar="MASK", help="a soft mask, 0 to 1; 'auto', one made from the maps' sum; or 'none'. "
        "Default: auto for half maps, none with --reference",
    )  # fmt: skip
    parser.add_argument("--reference", action="store_true", help="b.mrc is noise-free: one curve, read at 0.5")
    parser.add_argument(
        "--threshold", type=float, action="append", default=[], metavar="T", help="also print the resolution at FSC = T"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random phases; default 0")
    parser.add_argument("--local-resolution", action="store_true", help="write local_resolution.mrc, too (needs -o)")
    parser.add_argument("--local-window", type=float, metavar="A", help="diameter of its ball; default 7 x resolution")
    parser.add_argument("--poses", metavar="FILE", help=".pkl, .star, .cs: draw the viewing directions, too (needs -o)")
    parser.add_argument(
        "-o", "--output", metavar="FOLDER", help="write curves, figures and mask there; replaces nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Do what ``cryosplat fsc`` is asked to do.

    Raises:
        InputError: unreadable maps, different grids, an unusable mask or threshold, existing output files.
    """
    _check(args)
    maps = _read(args)
    print(f"{args.map1} against {args.map2}: box {len(maps.first)} px, {maps.pixel_size_a:.4g} A/px, {maps.mask_name}")
    if args.reference:
        writers = _compare(args, maps)
    else:
        writers = _halves(args, maps)
    if args.output:
        _write(Path(args.output), writers)


def _check(args: argparse.Namespace) -> None:
    for threshold in args.threshold:
        if not 0 < threshold < 1:
            raise InputError(f"--threshold {threshold:g}: expected a number between 0 and 1, such as 0.143")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: expected 0 or more")
    if args.local_window is not None and not args.local_resolution:
        raise InputError("--local-window is of --local-resolution; give that, too")
    if (args.local_resolution or args.poses) and not args.output:
        raise InputError("--local-resolution and --poses write files: give a folder for them with -o")
    if args.reference and (args.local_resolution or args.poses):
        raise InputError("--local-resolution and --poses are for half maps; leave them out, or leave out --reference")
    if args.output:
        for name in _outputs(args):
            if (Path(args.output) / name).exists():
                raise InputError(f"{Path(args.output) / name} exists already; choose another folder or remove it first")


def _outputs(args: argparse.Namespace) -> list[str]:
    """Files that will be written, so that none is in the way when the work is done."""
    if args.reference:
        return ["fsc.csv", "fsc.png", "fsc.xml"]
    asked = {"local_resolution.mrc": args.local_resolution, "viewing_directions.png": args.poses}
    asked["mask.mrc"] = args.mask != "none"
    return ["fsc.csv", "fsc.png", "fsc.xml", "directional.png", *(name for name, wanted in asked.items() if wanted)]


def _read(args: argparse.Namespace) -> _Maps:
    name = args.mask or ("none" if args.reference else "auto")
    from_file = [] if name in ("auto", "none") else [name]
    (first, second, *mask), pixel_size = read_maps([args.map1, args.map2, *from_file])
    if mask:
        masks.check_mask(mask[0], name, warn=lambda _: None)  # the file is named here; what follows warns
    called = {"auto": "mask made from their sum", "none": "no mask"}.get(name, f"mask {name}")
    return _Maps(first, second, mask[0] if mask else None if name == "auto" else "none", pixel_size, called)


def _compare(args: argparse.Namespace, maps: _Maps) -> dict[str, Callable[[Path], None]]:
    """A map against a reference."""
    mask = masks.mask_from_map(maps.first + maps.second, maps.pixel_size_a) if maps.mask is None else maps.mask
    curve = fsc(maps.first, maps.second, maps.pixel_size_a, None if isinstance(mask, str) else mask)
    thresholds = sorted({RESOLUTION_THRESHOLD_TRUTH, *args.threshold}, reverse=True)
    for threshold in thresholds:
        print(f"  resolution at FSC {threshold:<5g}  {resolution(curve, threshold)}")
    print(f"  mean FSC                 {mean_fsc(curve):.4f}")
    if len(curve.fsc) > 1 and curve.fsc[1] < -0.5:
        print("  warning: the FSC is negative at low resolution: one of the maps has inverted contrast")
    return _curve_writers({"fsc": curve}, "fsc", thresholds)


def _halves(args: argparse.Namespace, maps: _Maps) -> dict[str, Callable[[Path], None]]:
    """A pair of half maps."""
    suite = fsc_suite(maps.first, maps.second, maps.pixel_size_a, maps.mask, args.seed)
    thresholds = sorted({*THRESHOLDS, *args.threshold}, reverse=True)
    _report(suite, thresholds)
    if not args.output:
        return {}
    from cryosplat import figures, fscfigures  # matplotlib, only where a figure is wanted

    writers = _curve_writers(suite.curves, suite.final, [level for level in thresholds if level != 0.5])
    writers["directional.png"] = partial(figures.save, fscfigures.directional_figure(suite.directional))
    if suite.mask is not None:
        writers["mask.mrc"] = partial(write_map, volume=suite.mask, pixel_size_a=maps.pixel_size_a)
    if args.poses:
        from cryosplat.alignments import read_rotations  # configuration and readers, for these alone

        views = viewing_directions(read_rotations(Path(args.poses)))
        writers["viewing_directions.png"] = partial(figures.save, fscfigures.viewing_figure(views))
    if args.local_resolution:
        local = _local(args, maps, suite)
        writers["local_resolution.mrc"] = partial(write_map, volume=local, pixel_size_a=maps.pixel_size_a)
    return writers


def _report(suite: FscSuite, thresholds: list[float]) -> None:
    print("  curve             " + "".join(f"{f'FSC {threshold:g}':<18}" for threshold in thresholds).rstrip())
    for name, curve in suite.curves.items():
        if name == "phase_randomised":
            continue
        cells = "".join(f"{resolution(curve, threshold)!s:<18}" for threshold in thresholds)
        print(f"  {name:<18}{cells}".rstrip())
    final = suite.curves[suite.final]
    print(f"  mean FSC          {mean_fsc(final):.4f} ({suite.final})")
    if suite.mask is not None:
        print(f"  mask              keeps {100 * suite.mask.mean():.3g} % of the box")
    if suite.randomised_beyond_a is not None:
        print(f"  phases randomised beyond {suite.randomised_beyond_a:.2f} A (shell {suite.randomisation_shell})")
    directional = suite.directional
    worst, best = (directional.resolutions[number] for number in (directional.worst, directional.best))
    print(
        f"  anisotropy        {suite.anisotropy:.2f} (worst over best direction, cones of "
        f"{directional.half_angle_deg:g} degrees: {worst} to {best} at {RESOLUTION_THRESHOLD_HALF_MAPS:g})"
    )
    for warning in suite.warnings:
        print(f"  warning: {warning}")


def _curve_writers(
    curves: dict[str, FscCurve], final: str, thresholds: list[float]
) -> dict[str, Callable[[Path], None]]:
    from cryosplat import figures  # matplotlib, only where a figure is wanted

    title = f"cryosplat {final} FSC"
    return {
        "fsc.csv": partial(write_csv, curves=curves, errors=True),
        "fsc.png": partial(figures.save, figures.fsc_figure(curves, thresholds)),
        "fsc.xml": partial(write_xml, curve=curves[final], title=title),
    }


def _local(args: argparse.Namespace, maps: _Maps, suite: FscSuite) -> np.ndarray:
    """Local resolution within the suite's mask, and a line about it."""
    overall = resolution(suite.curves[suite.final], RESOLUTION_THRESHOLD_HALF_MAPS).angstrom
    window_a = args.local_window or default_window_a(overall, len(maps.first), maps.pixel_size_a)
    local = local_resolution(maps.first, maps.second, maps.pixel_size_a, window_a, mask=suite.mask)
    inside = local if suite.mask is None else local[suite.mask > 0.5]
    low, middle, high = np.percentile(inside, [5, 50, 95])
    print(
        f"  local resolution  {low:.2f} to {high:.2f} A, median {middle:.2f} A (balls of {window_a:.3g} A, FSC 0.143)"
    )
    return local


def _write(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    for name, write in writers.items():
        write(path=folder / name)
    print(f"  written to {folder}: {', '.join(writers)}")
