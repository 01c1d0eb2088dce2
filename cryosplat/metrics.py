"""What a run has logged, on disk: metrics.csv and TensorBoard's event files, read, and cut back on resuming."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cryosplat.errors import InputError
from cryosplat.files import atomic_path

COLUMNS = (
    "step",
    "epoch",
    "loss_full",
    "loss_half_a",
    "loss_half_b",
    "learning_rate",
    "images_per_second",
    "cpu_max_rss_gib",
    "gpu_max_reserved_gib",
    "seconds",
)
"""Columns of metrics.csv; "seconds" is wall time in training over all resumed parts. What there is none of is empty."""


def read_metrics(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Columns of a metrics.csv by name, float64, one value a logged step, NaN where there is none.

    A last line that a killed run left without its end is not read.

    Raises:
        InputError: no such file, other columns, or a line that is not one.
    """
    rows = _complete_rows(Path(path))
    values = [[float(field) if field else np.nan for field in row] for row in rows]
    return dict(zip(COLUMNS, np.array(values).reshape(-1, len(COLUMNS)).T, strict=True))


def cut_metrics(path: Path, last_step: int) -> float:
    """Leave in a metrics.csv, which need not exist, its header and the rows up to ``last_step``.

    Returns:
        The seconds of the last row left, 0 if there is none.
    """
    rows = [row for row in _complete_rows(path) if float(row[0]) <= last_step] if path.exists() else []
    with atomic_path(path) as temporary:
        temporary.write_text("".join(",".join(row) + "\n" for row in [COLUMNS, *rows]))
    return float(rows[-1][COLUMNS.index("seconds")] or 0) if rows else 0.0


def _complete_rows(path: Path) -> list[list[str]]:
    """Rows of a metrics.csv below its header. What follows the last line's end is a torn line and is left out."""
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if lines and lines[0] != ",".join(COLUMNS):
        raise InputError(f"{path}: expected the columns {','.join(COLUMNS)}, found {lines[0][:200]}; move it away")
    rows = [line.split(",") for line in lines[1:]]
    for number, row in enumerate(rows, 2):
        try:
            numbers = [float(field) for field in row if field]
        except ValueError:
            numbers = []
        if len(row) != len(COLUMNS) or not numbers or not row[0]:
            found = lines[number - 1][:200]
            raise InputError(f"{path}, line {number}: expected {len(COLUMNS)} numbers, found {found!r}")
    return rows


def cut_events(folder: Path, last_step: int) -> None:
    """Take the events after ``last_step``, and a torn last record, out of the event files of a folder.

    TensorBoard has a message for this (SessionLog.START), but its default loader does not know it and shows the
    points of a tag until that tag goes back in steps by itself.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event  # slow to import, and only rank 0 comes here

    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        kept = []
        for record in _records(content):
            try:
                step = Event.FromString(record[12:-4]).step
            except DecodeError:
                break
            if step <= last_step:
                kept.append(record)
        if sum(map(len, kept)) < len(content):
            with atomic_path(path) as temporary:
                temporary.write_bytes(b"".join(kept))


def _records(content: bytes) -> Iterator[bytes]:
    """Whole records of an event file (TFRecord): length (8 bytes), its CRC (4), that many bytes, their CRC (4)."""
    start = 0
    while length := int.from_bytes(content[start : start + 8], "little"):
        end = start + 16 + length
        if end > len(content):
            return
        yield content[start:end]
        start = end
