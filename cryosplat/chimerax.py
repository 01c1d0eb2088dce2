"""view.cxc of a run directory: commands for ChimeraX that open its maps and Gaussians, at levels that show something.

Syntax of ChimeraX 1.x, from its documentation: a .cxc file is run in its own folder, so that names without a folder
suffice and the run directory may be moved.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cryosplat.atoms import surface_level
from cryosplat.files import atomic_path

NAME = "view.cxc"

SOLVENT_DEVIATIONS = 4.0
"""Standard deviations of the solvent, outside the mask, below which no level lies. On the demo of ``make demo``, where
they decide, the level encloses 45,300 A^3 of the delivered map; ``surface_level`` of the truth encloses 47,800 A^3."""

MOST_ELLIPSOIDS = 5_000
"""Gaussians up to which each is an ellipsoid; more are spheres, which ChimeraX draws hundreds of thousands of."""

COLOURS = {"map": "#7fa7d1", "half_a": "#e69f00", "half_b": "#009e73", "mixture": "#cc79a7"}


def level(volume: np.ndarray, pixel_size_a: float, mask: np.ndarray | None) -> float:
    """Where to contour a map: at the molecule's surface, or 4 standard deviations of the solvent if that is higher.

    Args:
        volume: (D, D, D).
        pixel_size_a: A/px.
        mask: (D, D, D), 0 in the solvent; None: there is none to look at.
    """
    if mask is None or not (mask < 0.01).any():
        return surface_level(volume, pixel_size_a)
    solvent = volume[mask < 0.01]
    floor = float(solvent.mean() + SOLVENT_DEVIATIONS * solvent.std())
    return max(surface_level(np.where(mask > 0.5, volume, 0), pixel_size_a), floor)


def write_view(
    path: str | Path,
    maps: Mapping[str, np.ndarray],
    pixel_size_a: float,
    mixture: Mapping[str, Any],
    gaussians: str,
    overwrite: bool = False,
) -> None:
    """Write view.cxc.

    Args:
        path: of it, in the run directory.
        maps: (D, D, D) by name of their file without suffix; of them those that are looked at are shown.
        pixel_size_a: A/px.
        mixture: the full model's, for the size of its spheres.
        gaussians: file of the pseudo-atoms, beside it.
        overwrite: replace a file that is there.

    Raises:
        InputError: it exists and ``overwrite`` is false, or cannot be written.
    """
    names = [name for name in COLOURS if name in maps]
    lines = [
        "# Maps and Gaussians of this run. In ChimeraX: File > Open, or 'open view.cxc'; best in a new session, as",
        "# models are numbered from 1. Paths are relative: the folder may be moved.",
        "# Levels: the surface of the molecule (half the density typical inside it) or, if that is higher,",
        f"# {SOLVENT_DEVIATIONS:g} standard deviations of the solvent outside mask.mrc.",
    ]
    mask = maps.get("mask")
    for number, name in enumerate(names, 1):
        found = level(maps[name], pixel_size_a, mask)
        lines.append(f"open {name}.mrc id {number}")
        lines.append(f"volume #{number} style surface step 1 level {found:.5g} color {COLOURS[name]}")
    atoms = len(names) + 1
    radius = 0.5 * float(np.median(mixture["scales"]))
    lines += [
        "# The Gaussians, as pseudo-atoms: colours by width (B factor), narrow blue, wide red.",
        f"open {gaussians} id {atoms}",
        f"show #{atoms} atoms",
        f"style #{atoms} sphere",
        f"size #{atoms} atomRadius {radius:.3g}",
        f"color byattribute bfactor #{atoms} palette blue:white:red",
    ]
    if len(mixture["scales"]) <= MOST_ELLIPSOIDS:
        lines += ["# As ellipsoids of one standard deviation:", f"#   aniso #{atoms}"]
    lines += ["transparency #1 50 target s"]
    if hidden := [number for number, name in enumerate(names, 1) if name != "map"]:
        lines.append(f"hide #{','.join(map(str, hidden))} models")
    if "half_a" in names:
        first = names.index("half_a") + 1
        lines.append("# Half maps are unfiltered: noise hides the molecule, until they are smoothed, as by")
        lines.append(f"#   volume gaussian #{first} sDev 2")
    lines += ["set bgColor white", "lighting soft", "view"]
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
