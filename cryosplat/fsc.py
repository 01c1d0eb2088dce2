"""Fourier shell correlation (FSC): shells, curves, the resolution they cross, and masks for them."""

import argparse
import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import scipy.fft

from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, RESOLUTION_THRESHOLD_TRUTH, shell_to_angstrom
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.images import logging_untouched
from cryosplat.volumes import read_map

logger = logging.getLogger(__name__)

PIXEL_SIZE_TOLERANCE = 1e-3
"""Relative difference of A/px up to which two maps are on one grid: headers are rounded."""

MASK_RANGE_SLACK = 1e-4
"""How far a mask may leave 0 to 1: resampled masks overshoot a little."""

MASK_MINIMUM_FRACTION = 1e-3
"""Fraction of the box a mask must keep; with less, the FSC says what the mask's shape is and no more."""


@dataclasses.dataclass(frozen=True, eq=False)
class FscCurve:
    """An FSC between two maps.

    Attributes:
        fsc: (box // 2 + 1,) float64, one value for each of the shells 0 .. box // 2. Shell 0 is the mean
            density; it is kept for completeness and takes part in nothing.
        box: size of the maps in voxels.
        pixel_size_a: A/px of the maps.
    """

    fsc: np.ndarray
    box: int
    pixel_size_a: float

    @property
    def shells(self) -> np.ndarray:
        """Shell numbers 0 .. box // 2, in Fourier voxels."""
        return np.arange(len(self.fsc))

    @property
    def frequency(self) -> np.ndarray:
        """Spatial frequency of every shell, 1/A."""
        return self.shells / (self.box * self.pixel_size_a)


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Where an FSC curve first falls below a threshold.

    Attributes:
        angstrom: the resolution; the last shell's if the curve never falls below the threshold.
        limited_by_nyquist: the curve never falls below the threshold, so the resolution is at least this good.
    """

    angstrom: float
    limited_by_nyquist: bool

    def __str__(self) -> str:
        """The number with its unit, and a word if Nyquist limits it."""
        return f"{self.angstrom:.2f} A" + (" (Nyquist)" if self.limited_by_nyquist else "")


def shell_index(box: int) -> np.ndarray:
    """Shell of every voxel of a half-spectrum: its distance from the origin in Fourier voxels, rounded.

    Returns:
        int32 (box, box, box // 2 + 1) on the grid of ``scipy.fft.rfftn``. Corners lie beyond shell box // 2.

    >>> shell_index(4)[0, 0], shell_index(4)[1, 1]
    (array([0, 1, 2], dtype=int32), array([1, 2, 2], dtype=int32))
    """
    full = np.fft.fftfreq(box, 1 / box)
    half = np.fft.rfftfreq(box, 1 / box)
    return np.rint(np.sqrt(full[:, None, None] ** 2 + full[:, None] ** 2 + half**2)).astype(np.int32)


def fsc(map1: np.ndarray, map2: np.ndarray, pixel_size_a: float, mask: np.ndarray | None = None) -> FscCurve:
    """Fourier shell correlation of two maps on one grid.

    FSC(k) = Re sum F1 conj(F2) / sqrt(sum |F1|^2 sum |F2|^2) over the voxels of shell k (Harauz & van Heel, Optik
    1986), on the full sphere: a voxel of the half-spectrum counts for its Friedel mate too. Free of scale, not of
    sign: a map of the wrong contrast has a negative FSC. A shell that is empty in a map has FSC 0. Runs in float64;
    ``scipy.fft.set_workers`` sets the threads.

    Args:
        map1, map2: (D, D, D), [z, y, x].
        pixel_size_a: A/px of both.
        mask: (D, D, D), 0 to 1, multiplied with both maps.

    Raises:
        InputError: different boxes, not cubic, non-finite voxels, or a mask that ``check_mask`` refuses.
    """
    _check_maps({"the first map": map1, "the second map": map2} | ({} if mask is None else {"the mask": mask}))
    if mask is not None:
        check_mask(mask)
    if np.array_equal(map1, map2):
        logger.warning("the two maps are identical, so their FSC is 1 everywhere and says nothing about resolution")
    spectra = []
    for volume in (map1, map2):
        volume = np.asarray(volume, dtype=np.float64)
        spectra.append(scipy.fft.rfftn(volume if mask is None else volume * np.asarray(mask, dtype=np.float64)))
    cross, power1, power2 = _shell_sums(*spectra)
    denominator = np.sqrt(power1 * power2)
    values = np.divide(cross, denominator, out=np.zeros_like(cross), where=denominator > 0)
    return FscCurve(values, len(map1), float(pixel_size_a))


def _shell_sums(spectrum1: np.ndarray, spectrum2: np.ndarray) -> np.ndarray:
    """Sums over shells 0 .. D // 2 of Re F1 conj(F2), |F1|^2, |F2|^2 of half-spectra: (3, D // 2 + 1)."""
    box = len(spectrum1)
    shells = shell_index(box)
    mates = np.full(shells.shape[2], 2.0)
    mates[0] = 1.0
    if box % 2 == 0:
        mates[-1] = 1.0
    sums = np.zeros((3, box // 2 + 1))
    bins = int(shells.max()) + 1
    for plane, a, b in zip(shells, spectrum1, spectrum2, strict=True):  # plane by plane, to need no large temporaries
        products = (a.real * b.real + a.imag * b.imag, a.real**2 + a.imag**2, b.real**2 + b.imag**2)
        for total, product in zip(sums, products, strict=True):
            total += np.bincount(plane.ravel(), (product * mates).ravel(), bins)[: len(total)]
    return sums


def resolution(curve: FscCurve, threshold: float) -> Resolution:
    """Where a curve first falls below ``threshold``, linear in spatial frequency between shells; shell 0 is left out.

    A curve that is below it in shell 1 already has the box as its resolution.

    >>> resolution(FscCurve(np.array([1.0, 1.0, 0.6, 0.4, 0.3]), box=8, pixel_size_a=1.0), 0.5)
    Resolution(angstrom=3.2, limited_by_nyquist=False)
    """
    values = curve.fsc
    below = np.flatnonzero(values[1:] < threshold) + 1
    if len(below) == 0:
        return Resolution(shell_to_angstrom(len(values) - 1, curve.box, curve.pixel_size_a), True)
    first = int(below[0])
    shell = 1.0
    if first > 1:
        shell = first - 1 + float((values[first - 1] - threshold) / (values[first - 1] - values[first]))
    return Resolution(shell_to_angstrom(shell, curve.box, curve.pixel_size_a), False)


def mean_fsc(curve: FscCurve) -> float:
    """Mean FSC over the shells 1 .. box // 2.

    >>> mean_fsc(FscCurve(np.array([1.0, 0.9, 0.5]), box=4, pixel_size_a=1.0))
    0.7
    """
    return float(curve.fsc[1:].mean())


def soft_mask_from_map(volume: np.ndarray, pixel_size_a: float) -> np.ndarray:
    """A soft mask around the density of a map, by cryoDRGN: thresholded at half of the 99.99th percentile, dilated
    by 25 A, with a cosine edge of 15 A.

    Args:
        volume: (D, D, D), density positive.
        pixel_size_a: its A/px.

    Returns:
        (D, D, D) float32, 0 to 1.

    Raises:
        InputError: the map has no positive density, or cryodrgn is not installed.
    """
    try:
        with logging_untouched():
            from cryodrgn.masking import cosine_dilation_mask  # heavy, and needed for masks alone
    except ImportError as error:
        raise InputError(f"making a mask needs cryodrgn, which does not import here ({error}); give a mask") from error
    if not np.percentile(volume, 99.99) > 0:
        raise InputError("cannot make a mask: the map has no positive density (is its contrast inverted?)")
    return cosine_dilation_mask(volume, apix=pixel_size_a, verbose=False).astype(np.float32)


def check_mask(mask: np.ndarray, name: str = "the mask") -> None:
    """Refuse a mask that leaves 0 to 1 (slack 1e-4) or keeps less than 0.1 % of the box.

    Raises:
        InputError: saying which, with the values found.
    """
    low, high = float(mask.min()), float(mask.max())
    if low < -MASK_RANGE_SLACK or high > 1 + MASK_RANGE_SLACK:
        raise InputError(f"{name}: expected values from 0 to 1, found {low:.4g} to {high:.4g}; rescale the mask")
    kept = float(np.mean(mask, dtype=np.float64))
    if kept < MASK_MINIMUM_FRACTION:
        raise InputError(
            f"{name}: keeps {100 * kept:.3g} % of the box; an FSC needs at least {100 * MASK_MINIMUM_FRACTION:g} %"
        )


def _check_maps(maps: Mapping[str, np.ndarray]) -> None:
    """Refuse volumes (by name) that are not finite cubes of one box."""
    first, box = next((name, volume.shape) for name, volume in maps.items())
    for name, volume in maps.items():
        if volume.ndim != 3 or len(set(volume.shape)) != 1:
            raise InputError(f"{name}: expected a cubic map, found shape {volume.shape}")
        if volume.shape != box:
            raise InputError(f"{name} has a box of {len(volume)} px, {first} one of {box[0]} px; resample one of them")
        if not np.isfinite(volume).all():
            raise InputError(f"{name}: {int((~np.isfinite(volume)).sum())} non-finite voxels")


def read_maps(paths: Iterable[str | os.PathLike]) -> tuple[list[np.ndarray], float]:
    """Read maps that must lie on one grid.

    Returns:
        The maps, each float32 (D, D, D), and the A/px of the first.

    Raises:
        InputError: an unreadable map, or one whose box or A/px (relative 1e-3) differs from the first's.
    """
    paths = list(paths)
    maps, pixel_sizes = zip(*(read_map(path) for path in paths), strict=True)
    for path, volume, pixel_size in zip(paths, maps, pixel_sizes, strict=True):
        if volume.shape != maps[0].shape:
            raise InputError(
                f"{path} has a box of {len(volume)} px, {paths[0]} one of {len(maps[0])} px; resample one of them"
            )
        if abs(pixel_size - pixel_sizes[0]) > PIXEL_SIZE_TOLERANCE * pixel_sizes[0]:
            raise InputError(
                f"{path} has {pixel_size:.5g} A/px, {paths[0]} has {pixel_sizes[0]:.5g}; "
                "resample one of them, or correct its header"
            )
    return list(maps), pixel_sizes[0]


def write_csv(path: str | os.PathLike, curves: Mapping[str, FscCurve], overwrite: bool = False) -> None:
    """Write curves of one grid side by side, atomically: shell, resolution_a, frequency_inv_a, then one column each.

    Shell 0 has no resolution and is left out.
    """
    first = next(iter(curves.values()))
    columns = [curve.fsc for curve in curves.values()]
    lines = [",".join(["shell", "resolution_a", "frequency_inv_a", *curves])]
    for shell in first.shells[1:]:
        angstrom = shell_to_angstrom(shell, first.box, first.pixel_size_a)
        values = [f"{column[shell]:.6f}" for column in columns]
        lines.append(",".join([str(shell), f"{angstrom:.4f}", f"{1 / angstrom:.6f}", *values]))
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat fsc`` takes."""
    parser.description = "Fourier shell correlation of two maps, and the resolution at which it crosses 0.5 and 0.143."
    parser.add_argument("map1", metavar="a.mrc", help="first map, or half map a")
    parser.add_argument("map2", metavar="b.mrc", help="second map, on the same grid")
    parser.add_argument(
        "--mask", metavar="MASK", help="soft mask, 0 to 1, multiplied with both maps; 'auto' makes one from their sum"
    )
    parser.add_argument(
        "--threshold", type=float, action="append", default=[], metavar="T", help="also print the resolution at FSC = T"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="write fsc.csv and fsc.png there; replaces nothing")


def run(args: argparse.Namespace) -> None:
    """Do what ``cryosplat fsc`` is asked to do.

    Raises:
        InputError: unreadable maps, different grids, an unusable mask or threshold, existing output files.
    """
    thresholds = sorted({RESOLUTION_THRESHOLD_TRUTH, RESOLUTION_THRESHOLD_HALF_MAPS, *args.threshold}, reverse=True)
    for threshold in thresholds:
        if not 0 < threshold < 1:
            raise InputError(f"--threshold {threshold:g}: expected a number between 0 and 1, such as 0.143")
    outputs = [Path(args.output) / name for name in ("fsc.csv", "fsc.png")] if args.output else []
    for path in outputs:
        if path.exists():
            raise InputError(f"{path} exists already; choose another folder or remove it first")
    from_file = [args.mask] if args.mask not in (None, "auto") else []
    (map1, map2, *mask), pixel_size = read_maps([args.map1, args.map2, *from_file])
    if from_file:
        check_mask(mask[0], args.mask)
    elif args.mask == "auto":
        mask = [soft_mask_from_map(map1 + map2, pixel_size)]
    curve = fsc(map1, map2, pixel_size, *mask)
    _report(curve, args, thresholds)
    if outputs:
        _write(curve, thresholds, *outputs)


def _report(curve: FscCurve, args: argparse.Namespace, thresholds: list[float]) -> None:
    mask = f"mask {args.mask}" if args.mask else "no mask"
    print(f"{args.map1} against {args.map2}: box {curve.box} px, {curve.pixel_size_a:.4g} A/px, {mask}")
    for threshold in thresholds:
        print(f"  resolution at FSC {threshold:<5g}  {resolution(curve, threshold)}")
    print(f"  mean FSC                 {mean_fsc(curve):.4f}")
    if len(curve.fsc) > 1 and curve.fsc[1] < -0.5:
        print("  negative at low resolution: one of the maps has inverted contrast")


def _write(curve: FscCurve, thresholds: list[float], csv: Path, png: Path) -> None:
    from cryosplat import figures  # matplotlib, only where a figure is wanted; and figures.py needs this module

    try:
        csv.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {csv.parent}: {error.strerror}") from error
    write_csv(csv, {"fsc": curve})
    figures.save(figures.fsc_figure({"fsc": curve}, thresholds), png)
    print(f"  written: {csv}, {png}")
