"""What a run has logged, on disk: metrics.csv, holdout.csv and TensorBoard's event files, read, and cut back on
resuming."""

import os
from collections.abc import Iterator, Mapping, Sequence
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
    "waiting",
    "cpu_max_rss_gib",
    "gpu_max_reserved_gib",
    "seconds",
)
"""Columns of metrics.csv; "seconds" is wall time in training over all resumed parts. What there is none of is empty."""

HOLDOUT_BANDS = 4
"""Equal parts of the frequencies up to Nyquist, each with its own gain."""

HOLDOUT_COLUMNS = (
    "step",
    "epoch",
    "images",
    *(
        f"{name}_{what}"
        for name in ("gain", "trained")
        for what in (
            "full",
            "full_error",
            "half_a",
            "half_b",
            *(f"band_{number}" for number in range(1, HOLDOUT_BANDS + 1)),
        )
    ),
)
"""Columns of holdout.csv: gains in log likelihood over an empty map, nats an image, of held-out and trained images."""


OVERFITTED = 0.25
"""Share of their best gain that held-out images must have lost in a fit before that is called overfitting. Up to 4 % is
usual for a mixture of all images, and 16 % for one of a half: their map is best in FSC, which asks for no damping of
shells that are mostly noise, well after it is best in likelihood, which does (benchmarks/quality.md)."""


def read_metrics(path: str | os.PathLike, columns: Sequence[str] = COLUMNS) -> dict[str, np.ndarray]:
    """Columns of a metrics.csv (or of another such file) by name, float64, one value a row, NaN where there is none.

    A last line that a killed run left without its end is not read.

    Raises:
        InputError: no such file, other columns, or a line that is not one.
    """
    rows = _complete_rows(Path(path), columns)
    values = [[float(field) if field else np.nan for field in row] for row in rows]
    return dict(zip(columns, np.array(values).reshape(-1, len(columns)).T, strict=True))


def cut_metrics(path: Path, last_step: int) -> float:
    """Leave in a metrics.csv, which need not exist, its header and the rows up to ``last_step``.

    Returns:
        The seconds of the last row left, 0 if there is none.
    """
    rows = [row for row in _complete_rows(path, COLUMNS) if float(row[0]) <= last_step] if path.exists() else []
    with atomic_path(path) as temporary:
        temporary.write_text("".join(",".join(row) + "\n" for row in [COLUMNS, *rows]))
    return float(rows[-1][COLUMNS.index("seconds")] or 0) if rows else 0.0


def append_holdout(path: Path, row: Mapping[str, float]) -> None:
    """Put a row into a holdout.csv, made if it is not there. Rows of its step or later ones are of a course that was
    given up, and go."""
    rows = _complete_rows(path, HOLDOUT_COLUMNS) if path.exists() else []
    kept = [fields for fields in rows if float(fields[0]) < row["step"]]
    new = ["" if row.get(column) is None else f"{row[column]:.7g}" for column in HOLDOUT_COLUMNS]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(",".join(fields) + "\n" for fields in [HOLDOUT_COLUMNS, *kept, new]))


def write_volume_fit(path: Path, columns: Mapping[str, Sequence[float]]) -> None:
    """Write a volume_fit.csv: a row a step, counted from 0, of curves of one length, "gain_<model>" by name."""
    rows = [",".join(["step", *columns])]
    rows += [
        ",".join([str(step), *(f"{v:.9g}" for v in row)])
        for step, row in enumerate(zip(*columns.values(), strict=True))
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(rows) + "\n")


def read_volume_fit(path: Path) -> dict[str, np.ndarray] | None:
    """Columns of a volume_fit.csv by name; None if there is none: nothing was fitted in the volume."""
    if not path.exists():
        return None
    columns = path.read_text().split("\n", 1)[0].split(",")
    return read_metrics(path, columns)


def _complete_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Rows of a file of such columns below its header. What follows the last line's end is torn and is left out."""
    try:
        lines = path.read_text(errors="replace").split("\n")[:-1]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if lines and lines[0] != ",".join(columns):
        raise InputError(f"{path}: expected the columns {','.join(columns)}, found {lines[0][:200]}; move it away")
    rows = [line.split(",") for line in lines[1:]]
    for number, row in enumerate(rows, 2):
        try:
            numbers = [float(field) for field in row if field]
        except ValueError:
            numbers = []
        if len(row) != len(columns) or not numbers or not row[0]:
            found = lines[number - 1][:200]
            raise InputError(f"{path}, line {number}: expected {len(columns)} numbers, found {found!r}")
    return rows


_OF_EVALUATIONS = ("resolution/", "fsc/", "map/", "particles/", "holdout/", "gaussians/", "memory/rank_")
"""How tags begin that are logged when maps are evaluated, and not with a step."""


def cut_events(folder: Path, last_step: int, evaluated: bool = True) -> None:
    """Take the events after ``last_step``, and a torn last record, out of the event files of a folder.

    Also those of the evaluation after ``last_step``, if it is not ``evaluated`` for good but is going to be again.

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
                event = Event.FromString(record[12:-4])
            except DecodeError:
                break
            of_evaluation = any(value.tag.startswith(_OF_EVALUATIONS) for value in event.summary.value)
            if event.step < last_step or (event.step == last_step and (evaluated or not of_evaluation)):
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
