"""Complete runs as they lie on disk, read for comparison with others."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryosplat.conventions import shell_to_angstrom
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve


@dataclass(frozen=True, eq=False)
class Record:
    """A complete run as it lies on disk: its summary, and its FSC curves by column of fsc.csv."""

    folder: Path
    summary: dict[str, Any]
    curves: dict[str, FscCurve]

    @property
    def box(self) -> int:
        return self.summary["box"]

    @property
    def pixel_size_a(self) -> float:
        return self.summary["pixel_size_a"]

    @property
    def claim(self) -> tuple[str, float] | None:
        """The resolution the run claims, A, and its name, "calibrated"; "naive" of a run that was not calibrated."""
        name, key = ("calibrated", "resolution_a") if self.calibrated else ("naive", "resolution_naive_a")
        value = self.summary.get(key)
        return None if value is None else (name, float(value))

    @property
    def calibrated(self) -> bool:
        return "calibrated_map" in self.curves

    def shell(self, angstrom: float) -> float:
        """The shell of a resolution, not rounded."""
        return self.box * self.pixel_size_a / angstrom

    def angstrom(self, shell: float) -> float:
        return shell_to_angstrom(shell, self.box, self.pixel_size_a)


def read_record(folder: Path, curves_needed: bool = True) -> Record:
    """Read summary.json and fsc.csv of a complete run; a value that is empty or no number is NaN.

    Args:
        folder: the run directory.
        curves_needed: whether there must be curves, which a run with neither half maps nor a truth has none of.

    Raises:
        InputError: the run is not complete, or its files are not a run's.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
        box, pixel_size_a = int(summary["box"]), float(summary["pixel_size_a"])
        if not curves_needed and not (folder / "fsc.csv").exists():
            return Record(folder, summary, {})
        with open(folder / "fsc.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name not in ("shell", "resolution_a", "frequency_inv_a")]
        columns = {name: [float(row[name] or "nan") for row in rows] for name in names}
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; only a complete run with half maps can be judged") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{folder}: summary.json or fsc.csv is not as a run writes it ({error!r})") from error
    curves = {
        name: FscCurve(np.array([1.0, *values]), box, pixel_size_a)
        for name, values in columns.items()
        if not name.endswith("_error")
    }
    return Record(folder, summary, curves)
