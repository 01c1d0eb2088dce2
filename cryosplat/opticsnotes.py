"""In plain words: what of a particle file's optics is corrected, what is not modelled, and the resolution that limits.

The rule: an error of the phase of pi/4 in any direction (``TOLERATED_PHASE``), whatever else limits the resolution.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cryosplat.aberrations import (
    Aberrations,
    even_phase,
    limit_a,
    odd_phase,
    term,
    wavelength_a,
)
from cryosplat.columns import Columns
from cryosplat.listing import Listing
from cryosplat.optics import AS_RECORDED, FLIPPED, MULTIPLIED, Optics

PARTICLE_OF_BOX = 2 / 3
"""Diameter of the particle over the length of the box, as boxes are usually chosen."""


def optics_notes(
    listing: Listing,
    rows: np.ndarray,
    box: int,
    pixel_size_a: float,
    ctf: np.ndarray | None,
    optics: Optics | None,
) -> list[str]:
    """Sentences on the optics of the particles ``rows`` (n,): first what is corrected, then what is not modelled.

    Args:
        box: px of the stored images.
        pixel_size_a: A/px of the map.
        ctf: (n, 7), or None.
        optics: as ``read_optics`` gives it.
    """
    return corrections(optics) + warnings(listing, rows, box, pixel_size_a, ctf)


def corrections(optics: Optics | None) -> list[str]:
    """What is corrected, a sentence each."""
    if optics is None:
        return []
    found = [*_odd_notes(optics), *_even_notes(optics), *_magnification_notes(optics)]
    for value, words in ((FLIPPED, "were phase-flipped: flipped back"), (MULTIPLIED, "were multiplied by their CTF")):
        count = int((optics.recorded == value).sum())
        if count:
            undone = ": divided by it where it is not near zero" if value == MULTIPLIED else ""
            found.append(f"{count} of {len(optics.recorded)} images {words}{undone}")
    if 0 < int((optics.recorded == AS_RECORDED).sum()) < len(optics.recorded):
        found.append("only some of the images say that their CTF was applied: each is treated as it says")
    return found


def _worst(optics: Optics, measure: Callable[[Aberrations], float]) -> tuple[int, float, str]:
    """How many groups have any of it, the largest, and which group that is."""
    values = np.array([measure(group) for group in optics.groups])
    worst = int(np.argmax(values))
    return int((values > 0).sum()), float(values[worst]), optics.labels[worst]


def _where(count: int, label: str) -> str:
    return f"in {label}" if count == 1 else f"in {count} groups, most in {label}"


def _left_in(optics: Optics, phase: Callable[[Aberrations], Callable]) -> str:
    limits = [limit_a(phase(group), optics.pixel_size_a) for group in optics.groups]
    finest = max((limit for limit in limits if limit is not None), default=None)
    return (
        "left in, this would not be seen at this A/px"
        if finest is None
        else f"left in, this would limit to about {finest:.1f} A"
    )


def _odd_notes(optics: Optics) -> list[str]:
    found = []
    count, tilt, label = _worst(optics, lambda group: float(np.hypot(*group.tilt_mrad)))
    if count:
        alone = _left_in(optics, lambda group: lambda x, y: odd_phase(replace(group, odd=()), x, y))
        found.append(f"beam tilt, {tilt:.2g} mrad {_where(count, label)}, is corrected; {alone}")
    count, order, label = _worst(optics, lambda group: _highest(group.odd, True))
    if count:
        alone = _left_in(optics, lambda group: lambda x, y: odd_phase(replace(group, tilt_mrad=(0, 0)), x, y))
        found.append(f"odd aberrations to order {order:.0f} {_where(count, label)} are corrected; {alone}")
    return found


def _even_notes(optics: Optics) -> list[str]:
    count, order, label = _worst(optics, lambda group: _highest(group.even, False) + 1 if any(group.even) else 0)
    if not count:
        return []
    alone = _left_in(optics, lambda group: lambda x, y: even_phase(group, x, y))
    return [f"even aberrations to order {order - 1:.0f} {_where(count, label)} are in the CTF; {alone}"]


def _highest(coefficients: tuple[float, ...], odd: bool) -> int:
    return max((term(index, odd)[0] for index, value in enumerate(coefficients) if value), default=0)


def _magnification_notes(optics: Optics) -> list[str]:
    found = []
    stretches = np.linalg.svd(np.array([group.magnification for group in optics.groups]), compute_uv=False)
    uneven = dict(zip(optics.groups, stretches.max(1) / stretches.min(1) - 1, strict=True))
    count, most, label = _worst(optics, lambda group: float(uneven[group]) if uneven[group] > 1e-5 else 0.0)
    if count:
        found.append(f"uneven magnification, {most:.2%} {_where(count, label)}, is in the projection and the CTF")
    scaled = dict(zip(optics.groups, np.abs(np.sqrt(stretches.prod(1)) - 1), strict=True))
    count, most, label = _worst(optics, lambda group: float(scaled[group]) if scaled[group] > 1e-5 else 0.0)
    if count:
        found.append(
            f"another scale than the map's {optics.pixel_size_a:g} A/px, by {most:.2%} {_where(count, label)}, is in "
            "the projection and the CTF"
        )
    return found


def warnings(listing: Listing, rows: np.ndarray, box: int, pixel_size_a: float, ctf: np.ndarray | None) -> list[str]:
    """What is not modelled and limits the resolution to less than Nyquist, a sentence each."""
    if ctf is None:
        return []
    length = wavelength_a(float(ctf[:, 3].min()))
    found = [] if listing.columns is None else _cs_warnings(listing.columns, rows, box, pixel_size_a, length)
    thickness = PARTICLE_OF_BOX * box * pixel_size_a
    limit = ewald_limit_a(length, thickness)
    if limit > 2 * pixel_size_a:
        found.append(
            f"the curvature of the Ewald sphere is not modelled: limits a particle {thickness:.0f} A thick (2/3 of the "
            f"box) to about {limit:.1f} A"
        )
    return found


def ewald_limit_a(length_a: float, thickness_a: float) -> float:
    """Resolution, A, at which the border of a particle is out of phase with its middle by pi/2, for want of the
    curvature: pi lambda (t/2) s^2 (DeRosier, Ultramicroscopy 81 (2000) 83). Most of it is out by less.

    >>> round(ewald_limit_a(0.0197, 300.0), 2)
    2.43
    """
    return float(np.sqrt(length_a * thickness_a))


def _cs_warnings(columns: Columns, rows: np.ndarray, box: int, pixel_size_a: float, length: float) -> list[str]:
    """cryoSPARC's higher aberrations: lengths a in A, of phases of 2 pi a lambda^(n-1) s^n. Their signs are not
    documented, and a wrong one would double the error, so they are not applied."""
    found, half = [], PARTICLE_OF_BOX * box * pixel_size_a / 2
    for name, order, what in (
        ("ctf/tilt_A", 3, "beam tilt"),
        ("ctf/trefoil_A", 3, "trefoil"),
        ("ctf/tetra_A", 4, "tetrafoil and secondary astigmatism"),
        ("ctf/shift_A", 1, "the images' shift"),
    ):
        largest = _largest(columns, name, rows)
        limit = _limit(2 * np.pi * largest * length ** (order - 1), order, pixel_size_a)
        if limit is not None:
            tilt = f", {largest:.3g} A," if order != 1 else f" of {largest:.3g} A"
            found.append(f"{name}: {what}{tilt} is not modelled: limits the resolution to about {limit:.1f} A")
    stretch = _largest(columns, "ctf/anisomag", rows)
    limit = _limit(2 * np.pi * stretch * half, 1, pixel_size_a)
    if limit is not None:
        found.append(
            f"ctf/anisomag: uneven magnification, {stretch:.2%}, is not modelled: limits the resolution to about "
            f"{limit:.1f} A at the particle's border"
        )
    return found


def _largest(columns: Columns, name: str, rows: np.ndarray) -> float:
    """Largest norm of a column's rows; 0 where it is not there or is no numbers, for it is not used."""
    if name not in columns or columns.values[name].ndim != 2 or columns.values[name].dtype.kind not in "iuf":
        return 0.0
    values = columns.values[name][rows].astype(np.float64)
    return float(np.nan_to_num(np.linalg.norm(values, axis=1), posinf=0.0).max())


def _limit(factor: float, order: int, pixel_size_a: float) -> float | None:
    """Resolution at which ``factor`` s^order is the phase that is tolerated; None beyond Nyquist."""
    return limit_a(lambda x, y: factor * np.hypot(x, y) ** order, pixel_size_a)
