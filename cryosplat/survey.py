"""What a particle file is worth before anything is run: its table in figures, and everything that is wrong with it."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from scipy.spatial import cKDTree

from cryosplat.alignments import check_poses, has_poses, load_ctf, load_poses, table_ctf, table_poses
from cryosplat.config import resolve_path
from cryosplat.directional import directions_on_half_sphere, view_evenness, viewing_directions
from cryosplat.errors import InputError
from cryosplat.halves import assign_halves
from cryosplat.images import ImageReader
from cryosplat.listing import Listing
from cryosplat.opticsnotes import corrections
from cryosplat.particles import (
    ParticleTable,
    list_particles,
    open_images,
    read_particles,
    select_rows,
    stack_folders,
)
from cryosplat.settings import NO_CTF, Config
from cryosplat.stackpaths import find_setting, missing_stacks

Result = TypeVar("Result")

PROBED_DIRECTIONS = 2000
"""Directions over half of the sphere that are asked how far the nearest view is; some 3 degrees apart."""

COVERED_DEG = 10.0
"""A direction with a view within so many degrees counts as covered."""

MOST_VIEWS = 50_000
"""Views that gaps between them are sought among; more are thinned out evenly."""

OUTLYING = 5.0
"""Defocus farther from the median than so many times the distance of the quartiles is an outlier."""


@dataclass
class Survey:
    """What was found out.

    Attributes:
        config: the settings under which it was; those that were added to find files among them.
        facts: by section; plain values, None where something is not known.
        problems: what keeps a run from starting, each with how to mend it.
        notes: what else there is to say; what a run would log about its input.
        added: settings that are needed beside those given, by key.
        listing: the particle file, if it can be read.
        table: what a run would have of it, if one could start.
        images: the pixels, if all stacks are there.
    """

    config: Config
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    added: dict[str, str] = field(default_factory=dict)
    listing: Listing | None = None
    table: ParticleTable | None = None
    images: ImageReader | None = None

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        """What it returns; None, and a problem more, if the input is wrong."""
        try:
            return work()
        except InputError as error:
            self.problem(str(error))
            return None

    def problem(self, text: str) -> None:
        """Take one down, unless it is known."""
        if text not in self.problems:
            self.problems.append(text)


class _Notes(logging.Handler):
    def __init__(self, notes: list[str]):
        super().__init__(logging.WARNING)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self._notes:
            self._notes.append(record.getMessage())


@contextlib.contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Warnings of the package become notes and are not printed."""
    logger, handler = logging.getLogger("cryosplat"), _Notes(notes)
    before, propagated = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, propagated


def survey(config: Config) -> Survey:
    """Find out what can be known of a run's particles from tables and headers, whatever is wrong with them."""
    found = Survey(config)
    with _noting(found.notes):
        found.listing = found.attempt(lambda: list_particles(config.data, config.data_root))
        if found.listing is None:
            return found
        rows = found.attempt(lambda: select_rows(config.data, config.data_root, found.listing))
        if rows is None:
            return found
        found.facts["particles"] = {"listed": len(found.listing), "used": len(rows)}
        _stacks(found, rows)
        found.table = found.attempt(lambda: _read_table(found, config.maps.halves))
        if found.table is None and config.maps.halves:  # what is wrong may be of the halves alone
            with contextlib.suppress(InputError):
                found.table = _read_table(found, False)
        found.notes += [] if found.table is None else corrections(found.table.optics)
        _images(found, rows)
        _optics(found, rows)
        _poses(found, rows)
        _ctf(found, rows)
        _halves(found, rows)
        _rows(found, rows)
    return found


def _read_table(found: Survey, halves: bool) -> ParticleTable:
    config = found.config
    return read_particles(config.data, config.data_root, config.train.seed, halves, found.listing)


def _stacks(found: Survey, rows: np.ndarray) -> None:
    """Stacks that are missing, and the setting that finds them, with which the survey goes on."""
    listing, data, root = found.listing, found.config.data, found.config.data_root
    used = np.unique(listing.stack[rows])
    names = [listing.names[index] for index in used]
    found.facts["stacks"] = {"count": len(names), "missing": 0}
    folders = found.attempt(lambda: stack_folders(data, root))
    missing = (
        []
        if names == [str(listing.path)]
        else found.attempt(lambda: missing_stacks(listing.path, names, folders or [], data.prefix))
    )
    if missing:
        found.facts["stacks"]["missing"] = len(missing)
        setting = find_setting(missing, [listing.path.parent, *(folders or [])]) if data.prefix is None else None
        if setting is not None and setting[2] == len(missing):
            key, value, _ = setting
            found.problem(f"{listing.path}: its {len(missing)} missing stacks are found with {key}={value}")
            found.added[key] = value
            data = replace(data, **{key.removeprefix("data."): value})
            found.config = replace(found.config, data=data)
    if missing is not None:
        opened = found.attempt(lambda: open_images(listing, rows, stack_folders(data, root), data.prefix))
        found.images = None if opened is None else opened[0]


def _images(found: Survey, rows: np.ndarray) -> None:
    listing, table = found.listing, found.table
    facts = {"box": None, "box_from": None, "pixel_size_a": None, "pixel_size_from": None}
    boxes = None if listing.box is None else np.unique(listing.box[rows])
    if found.images is not None:
        facts |= {"box": found.images.box, "box_from": "the stacks"}
    if table is not None:
        facts |= {"pixel_size_a": table.pixel_size_a, "pixel_size_from": _pixel_size_source(found)}
    elif found.images is None and boxes is not None and len(boxes) == 1:
        facts |= {"box": int(boxes[0]), "box_from": listing.path.name}
    if table is None and listing.pixel_size_a is not None:
        sizes = np.unique(listing.pixel_size_a[rows].round(6))
        if len(sizes) == 1 and sizes[0] > 0:
            facts |= {"pixel_size_a": float(sizes[0]), "pixel_size_from": listing.path.name}
    found.facts["images"] = facts


def _pixel_size_source(found: Survey) -> str:
    data, listing, size = found.config.data, found.listing, found.table.pixel_size_a
    if data.ctf and data.ctf != NO_CTF:
        return "data.ctf"
    if data.pixel_size is not None:
        return "data.pixel_size"
    sizes = listing.pixel_size_a
    known = sizes is not None and bool(np.isfinite(sizes).all()) and float(sizes[0]) > 0
    same = known and abs(float(sizes[0]) / size - 1) < 1e-3
    if same:
        return listing.path.name
    return f"{listing.path.name}, rescaled to the stacks' box" if known else "the headers of the stacks"


def _optics(found: Survey, rows: np.ndarray) -> None:
    """Optics groups and the microscope's constants, one entry a group; what of them a run corrects, in sentences.

    What it does not model becomes a note, as the table is read.
    """
    columns = found.listing.columns
    if columns is None:
        return
    if found.table is not None:
        found.facts["aberrations"] = corrections(found.table.optics)
    star = found.listing.path.suffix.lower() == ".star"
    names = {
        "kv": "_rlnVoltage" if star else "ctf/accel_kv",
        "cs_mm": "_rlnSphericalAberration" if star else "ctf/cs_mm",
        "contrast": "_rlnAmplitudeContrast" if star else "ctf/amp_contrast",
    }
    values = {key: columns.values[name][rows] for key, name in names.items() if name in columns}
    if found.listing.pixel_size_a is not None:
        values["pixel_size_a"] = found.listing.pixel_size_a[rows]
    group = np.zeros(len(rows)) if columns.group is None else columns.group[rows]
    found.facts["optics"] = []
    for number, first, count in zip(*np.unique(group, return_index=True, return_counts=True), strict=True):
        entry = {"group": None if columns.group is None else int(number), "particles": int(count)}
        entry["name"] = columns.group_names.get(float(number))
        entry |= {key: _plain(of_rows[first]) for key, of_rows in values.items() if of_rows.ndim == 1}
        found.facts["optics"].append(entry)


def _poses(found: Survey, rows: np.ndarray) -> None:
    config, listing, images = found.config, found.listing, found.facts["images"]
    named = config.data.poses
    found.facts["poses"] = facts = {"from": None}
    if not named and not has_poses(listing):
        if not any("no poses" in problem for problem in found.problems):
            found.problem(
                f"{listing.path}: it has no poses: name cryoDRGN's poses.pkl in data.poses, or take the file of a 3D "
                "refinement"
            )
        return
    facts["from"] = named or listing.path.name
    box, size = images["box"], images["pixel_size_a"]
    if found.table is not None:
        rotations, shifts = found.table.rotations, found.table.shifts
    else:
        read = found.attempt(lambda: _read_poses(found, rows, box or 1, size or 1.0))
        if read is None:
            return
        rotations, shifts = read
    if box and size:
        lengths = np.hypot(*shifts.T) * box * size
        facts["shifts_a"] = {"median": float(np.median(lengths)), "largest": float(lengths.max())}
    facts |= view_facts(rotations)


def _read_poses(found: Survey, rows: np.ndarray, box: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    config, known = found.config, found.facts["images"]["box"] is not None
    if config.data.poses:
        path = resolve_path(config, config.data.poses)
        rotations, shifts = load_poses(path)
        if len(rotations) != len(found.listing):
            raise InputError(f"{path}: {len(rotations)} poses for the {len(found.listing)} images")
        rotations, shifts = rotations[rows], shifts[rows]
    else:
        path = found.listing.path
        rotations, shifts = table_poses(found.listing, rows, box, size)
    # Of a box that is not known shifts cannot be judged.
    return check_poses(path, rotations, shifts if known or config.data.poses else np.zeros_like(shifts), rows)


def view_facts(rotations: np.ndarray) -> dict[str, float]:
    """How rotations (N, 3, 3) cover the sphere, a view and its opposite counting as one.

    Returns:
        ``covered``, the share of directions with a view within COVERED_DEG; ``largest_gap_deg``, from the direction
        that is farthest from any view to the nearest one; ``evenness``, as ``directional.view_evenness`` gives it.
    """
    views = viewing_directions(rotations)
    views = views[:: -(-len(views) // MOST_VIEWS)]
    # Copies of the same view, as symmetry expansion has them, would make the tree deep.
    tree = cKDTree(np.unique(np.concatenate([views, -views]).round(4), axis=0))
    chord = tree.query(directions_on_half_sphere(PROBED_DIRECTIONS))[0]
    gaps = np.degrees(2 * np.arcsin(np.minimum(chord / 2, 1)))
    return {
        "covered": float((gaps <= COVERED_DEG).mean()),
        "largest_gap_deg": float(gaps.max()),
        "evenness": view_evenness(rotations),
    }


def _ctf(found: Survey, rows: np.ndarray) -> None:
    config, listing = found.config, found.listing
    facts = found.facts["ctf"] = {"from": None}
    if config.data.ctf == NO_CTF:
        return
    if found.table is not None:
        ctf = found.table.ctf
    elif config.data.ctf:
        columns = found.attempt(lambda: load_ctf(resolve_path(config, config.data.ctf)))
        ctf = None if columns is None or len(columns) != len(listing) else np.radians(columns[rows, 2:])
        if ctf is not None:
            ctf[:, [0, 1, 3, 4, 5]] = columns[rows][:, [2, 3, 5, 6, 7]]
    else:
        ctf = found.attempt(lambda: table_ctf(listing, rows))
    if ctf is None:
        return
    facts["from"] = config.data.ctf or listing.path.name
    facts |= ctf_facts(ctf)


def ctf_facts(ctf: np.ndarray) -> dict[str, Any]:
    """Ranges of CTF parameters (N, 7), as ``ParticleTable.ctf`` has them: A and degrees."""
    defocus, astigmatism = ctf[:, :2].mean(1), np.abs(ctf[:, 0] - ctf[:, 1])
    low, median, high = np.quantile(defocus, (0.25, 0.5, 0.75))
    outside = np.abs(defocus - median) > OUTLYING * max(high - low, 1.0)
    shift = np.degrees(ctf[:, 6])
    return {
        "defocus_a": _range(defocus),
        "defocus_outliers": int(outside.sum()),
        "first_outlier": int(np.flatnonzero(outside)[0]) if outside.any() else None,
        "overfocus": int((defocus < 0).sum()),
        "astigmatism_a": _range(astigmatism),
        "phase_shift_deg": _range(shift) if shift.any() else None,
    }


def _halves(found: Survey, rows: np.ndarray) -> None:
    table, config = found.table, found.config
    if table is not None:
        half, kind, words = table.half, table.half_from, table.half_origin
    else:
        named = config.data.halves and resolve_path(config, config.data.halves)
        poses = config.data.poses and resolve_path(config, config.data.poses)
        read = found.attempt(
            lambda: assign_halves(
                found.listing, rows, named or None, config.train.seed, config.maps.halves, poses or None
            )
        )
        if read is None:
            return
        half, kind, words = read
    a, b = np.bincount(half, minlength=2).tolist()
    found.facts["halves"] = {"from": kind, "a": a, "b": b, "words": words}


def _rows(found: Survey, rows: np.ndarray) -> None:
    """Micrographs, and rows that are the same image."""
    listing = found.listing
    group = listing.group[rows]
    if (group >= 0).any():
        counts = np.bincount(group[group >= 0])
        counts = counts[counts > 0]
        found.facts["micrographs"] = {"count": len(counts), "particles": _range(counts)}
    image = listing.stack[rows].astype(np.int64) * (int(listing.slices.max()) + 1) + listing.slices[rows]
    found.facts["duplicates"] = {"rows": len(rows) - len(np.unique(image))}


def _range(values: np.ndarray) -> dict[str, float]:
    return {"least": float(values.min()), "median": float(np.median(values)), "largest": float(values.max())}


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
