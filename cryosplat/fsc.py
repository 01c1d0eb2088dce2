"""Fourier shell correlation (FSC): shells, curves, the resolution they cross, and their files."""

import dataclasses
import logging
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping

import numpy as np
import scipy.fft

from cryosplat.conventions import shell_to_angstrom
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.masks import check_mask
from cryosplat.volumes import read_map

logger = logging.getLogger(__name__)

PIXEL_SIZE_TOLERANCE = 1e-3
"""Relative difference of A/px up to which two maps are on one grid: headers are rounded."""

SLOPE_SHELLS = 2
"""Shells on either side of a crossing that its slope is taken from: that of two alone would be mostly noise."""


@dataclasses.dataclass(frozen=True, eq=False)
class FscCurve:
    """An FSC between two maps.

    Attributes:
        fsc: (box // 2 + 1,) float64, one value for each of the shells 0 .. box // 2. Shell 0 is the mean
            density; it is kept for completeness and takes part in nothing.
        box: size of the maps in voxels.
        pixel_size_a: A/px of the maps.
        error: (box // 2 + 1,) standard error of every shell (see ``uncertainty``); None where it was not asked for.

    A calibrated curve is NaN beyond the last shell that the data say anything of.
    """

    fsc: np.ndarray
    box: int
    pixel_size_a: float
    error: np.ndarray | None = None

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
        error_a: standard error of ``angstrom``, if the curve has errors and crosses.
        limited_by_data: the curve ends (NaN) before it falls below the threshold, so the resolution is at least this
            good, and how good the data do not say.
    """

    angstrom: float
    limited_by_nyquist: bool
    error_a: float | None = None
    limited_by_data: bool = False

    def __str__(self) -> str:
        """The number with its unit and its error, and a word if Nyquist limits it."""
        error = "" if self.error_a is None else f" +- {self.error_a:.2f}"
        limit = " (Nyquist)" if self.limited_by_nyquist else " or better (the data end there)"
        limited = self.limited_by_nyquist or self.limited_by_data
        return f"{self.angstrom:.2f}{error} A" + (limit if limited else "")


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
    check_maps({"the first map": map1, "the second map": map2} | ({} if mask is None else {"the mask": mask}))
    if mask is not None:
        check_mask(mask)
    if np.array_equal(map1, map2):
        logger.warning("the two maps are identical, so their FSC is 1 everywhere and says nothing about resolution")
    sums = shell_sums(masked_spectrum(map1, mask), masked_spectrum(map2, mask))
    return FscCurve(correlation(sums), len(map1), float(pixel_size_a))


def masked_spectrum(volume: np.ndarray, mask: np.ndarray | None = None, dtype: type = np.float64) -> np.ndarray:
    """Half-spectrum of a map times a mask: ``scipy.fft.rfftn``, not normalised, phases from the first voxel.

    Args:
        volume: (D, D, D).
        mask: (D, D, D), or None for none.
        dtype: float64, or float32 for half the time and memory and 7 digits.

    Returns:
        complex (D, D, D // 2 + 1) of that precision.
    """
    volume = np.asarray(volume, dtype=dtype)
    return scipy.fft.rfftn(volume if mask is None else volume * np.asarray(mask, dtype=dtype))


def shell_sums(spectrum1: np.ndarray, spectrum2: np.ndarray) -> np.ndarray:
    """Sums over shells 0 .. D // 2 of Re F1 conj(F2), |F1|^2, |F2|^2 of two half-spectra.

    On the full sphere: a voxel of a half-spectrum counts for its Friedel mate too.

    Args:
        spectrum1, spectrum2: complex (D, D, D // 2 + 1), as ``masked_spectrum`` gives them.

    Returns:
        float64 (3, D // 2 + 1).
    """
    box = len(spectrum1)
    last = box // 2
    mates = friedel_mates(box).astype(spectrum1.real.dtype)
    full = np.rint(np.fft.fftfreq(box, 1 / box)).astype(np.int64) ** 2
    plane = full[:, None] + np.arange(last + 1) ** 2  # squared distances within a plane
    # Squared distances are whole numbers, so shells are looked up, not computed; all corners go to one bin more.
    lookup = np.minimum(np.rint(np.sqrt(np.arange(3 * last**2 + 1))).astype(np.intp), last + 1)
    sums = np.zeros((3, last + 2))
    for square, a, b in zip(full, spectrum1, spectrum2, strict=True):  # plane by plane: what is at work stays in cache
        bins = lookup[plane + square].ravel()
        products = (a.real * b.real + a.imag * b.imag, a.real**2 + a.imag**2, b.real**2 + b.imag**2)
        for total, product in zip(sums, products, strict=True):
            total += np.bincount(bins, (product * mates).ravel(), last + 2)
    return sums[:, :-1]


def friedel_mates(box: int) -> np.ndarray:
    """How many voxels of the full spectrum each column of a half-spectrum stands for: float64 (box // 2 + 1,).

    >>> friedel_mates(6), friedel_mates(5)
    (array([1., 2., 2., 1.]), array([1., 2., 2.]))
    """
    mates = np.full(box // 2 + 1, 2.0)
    mates[0] = 1.0
    if box % 2 == 0:
        mates[-1] = 1.0
    return mates


def correlation(sums: np.ndarray) -> np.ndarray:
    """FSC from the sums of ``shell_sums``, (3, ...) to (...); 0 where a map is empty."""
    cross, power1, power2 = sums
    denominator = np.sqrt(power1 * power2)
    return np.divide(cross, denominator, out=np.zeros_like(cross), where=denominator > 0)


def resolution(curve: FscCurve, threshold: float) -> Resolution:
    """Where a curve first falls below ``threshold``, linear in spatial frequency between shells; shell 0 is left out.

    A curve that is below it in shell 1 already has the box as its resolution. If the curve has errors, so has the
    resolution: that of the curve at the crossing divided by its slope there.

    >>> resolution(FscCurve(np.array([1.0, 1.0, 0.6, 0.4, 0.3]), box=8, pixel_size_a=1.0), 0.5).angstrom
    3.2
    """
    values = curve.fsc
    below = np.flatnonzero(values[1:] < threshold) + 1
    if len(below) == 0:
        last = int(np.flatnonzero(np.isfinite(values))[-1])
        at_nyquist = last == len(values) - 1
        angstrom = shell_to_angstrom(max(last, 1), curve.box, curve.pixel_size_a)
        return Resolution(angstrom, at_nyquist, limited_by_data=not at_nyquist)
    first = int(below[0])
    shell = 1.0
    if first > 1:
        shell = first - 1 + float((values[first - 1] - threshold) / (values[first - 1] - values[first]))
    angstrom = shell_to_angstrom(shell, curve.box, curve.pixel_size_a)
    if curve.error is None or first == 1:
        return Resolution(angstrom, False)
    return Resolution(angstrom, False, angstrom / shell * _crossing_error(curve, first, shell))


def _crossing_error(curve: FscCurve, first: int, shell: float) -> float:
    """Standard error in shells of a crossing at ``shell``, between ``first`` - 1 and ``first``.

    The slope is a straight line's through ``SLOPE_SHELLS`` shells on either side, but never less steep than the error
    over as many shells: a flat curve does not tell where it crosses.
    """
    around = slice(max(1, first - SLOPE_SHELLS), first + SLOPE_SHELLS)
    slope = np.polyfit(curve.shells[around], curve.fsc[around], 1)[0]
    error = float(np.mean(curve.error[first - 1 : first + 1]))
    if not np.isfinite(slope):  # the curve ends close by
        slope = curve.fsc[first] - curve.fsc[first - 1]
    return error / max(-slope, error / SLOPE_SHELLS**2)


def mean_fsc(curve: FscCurve) -> float:
    """Mean FSC over the shells 1 .. box // 2, or to where a calibrated curve ends; NaN if it says nothing.

    >>> mean_fsc(FscCurve(np.array([1.0, 0.9, 0.5]), box=4, pixel_size_a=1.0))
    0.7
    """
    known = curve.fsc[1:][np.isfinite(curve.fsc[1:])]
    return float(known.mean()) if len(known) else float("nan")


def check_maps(maps: Mapping[str, np.ndarray]) -> None:
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


def write_csv(
    path: str | os.PathLike, curves: Mapping[str, FscCurve], overwrite: bool = False, errors: bool = False
) -> None:
    """Write curves of one grid side by side, atomically: shell, resolution_a, frequency_inv_a, then one column each.

    With ``errors``, every curve that has them is followed by its standard errors, "<name>_error". Shell 0 has no
    resolution and is left out.
    """
    first = next(iter(curves.values()))
    columns = {}
    for name, curve in curves.items():
        columns[name] = curve.fsc
        if errors and curve.error is not None:
            columns[f"{name}_error"] = curve.error
    lines = [",".join(["shell", "resolution_a", "frequency_inv_a", *columns])]
    for shell in first.shells[1:]:
        angstrom = shell_to_angstrom(shell, first.box, first.pixel_size_a)
        values = [f"{column[shell]:.6f}" for column in columns.values()]
        lines.append(",".join([str(shell), f"{angstrom:.4f}", f"{1 / angstrom:.6f}", *values]))
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def write_xml(path: str | os.PathLike, curve: FscCurve, title: str, overwrite: bool = False) -> None:
    """Write a curve as EMDB takes it on deposition (its schema emdb_fsc.xsd), atomically.

    The root ``fsc`` has the attributes ``title``, ``xaxis`` and ``yaxis``; in it is one ``coordinate`` a shell, from 1,
    with ``x``, the spatial frequency in 1/A, and ``y``, the FSC.
    """
    root = ElementTree.Element("fsc", title=title, xaxis="Resolution (A-1)", yaxis="Correlation Coefficient")
    for frequency, value in zip(curve.frequency[1:], curve.fsc[1:], strict=True):
        coordinate = ElementTree.SubElement(root, "coordinate")
        ElementTree.SubElement(coordinate, "x").text = f"{frequency:.6f}"
        ElementTree.SubElement(coordinate, "y").text = f"{value:.6f}"
    ElementTree.indent(root)
    with atomic_path(path, overwrite=overwrite) as temporary:
        ElementTree.ElementTree(root).write(temporary, encoding="UTF-8", xml_declaration=True)
