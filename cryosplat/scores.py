"""particles.csv: what a run says of every particle, as a table on disk."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cryosplat.errors import InputError
from cryosplat.files import atomic_path

NUMBERS = ("residual", "scale", "correlation", "gain")
"""What is measured of every particle, in the order of ``Scores.values``."""

COLUMNS = ("row", "half", "held_out", *NUMBERS)
"""Of particles.csv."""

DIGITS = 6
"""Significant ones that are written."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Of the n particles of a run, in the order of its table.

    Attributes:
        rows: (n,) int64, row in the file that ``data.particles`` names, from 0.
        half: (n,) int64, 0 for half a and 1 for half b.
        held_out: (n,) bool.
        values: (n, 4) float64, ``NUMBERS``.
    """

    rows: np.ndarray
    half: np.ndarray
    held_out: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> np.ndarray:
        """One of ``COLUMNS`` (n,)."""
        if name in NUMBERS:
            return self.values[:, NUMBERS.index(name)]
        return {"row": self.rows, "half": self.half, "held_out": self.held_out}[name]


def write_scores(path: Path, scores: Scores, overwrite: bool = False) -> None:
    """Write particles.csv.

    Raises:
        InputError: it exists and ``overwrite`` is false, or cannot be written.
    """
    table = np.column_stack([scores.rows, scores.half, scores.held_out, scores.values])
    with atomic_path(path, overwrite=overwrite) as temporary:
        form = ["%d"] * 3 + [f"%.{DIGITS}g"] * len(NUMBERS)
        np.savetxt(temporary, table, fmt=form, delimiter=",", header=",".join(COLUMNS), comments="")


def read_scores(path: Path) -> Scores:
    """Read particles.csv.

    Raises:
        InputError: missing, damaged, or another table.
    """
    try:
        with open(path, newline="") as handle:
            names = next(csv.reader(handle), [])
            if tuple(names) != COLUMNS:
                raise InputError(f"{path}: the columns are {', '.join(names)[:200]}, expected {', '.join(COLUMNS)}")
            table = np.loadtxt(handle, delimiter=",", ndmin=2)
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file; a run that is complete has it, unless maps.particles was false"
        ) from error
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not readable as a run writes it ({str(error)[:200]})") from error
    if table.shape[1:] != (len(COLUMNS),) or not len(table):
        raise InputError(f"{path}: a table of the shape {table.shape}, expected {len(COLUMNS)} numbers a row")
    rows, half, held_out = table[:, :3].astype(np.int64).T
    return Scores(rows, half, held_out.astype(bool), table[:, 3:])
