"""The fields of cryoSPARC's .cs files: passthrough files merged by uid, and which alignment of several is meant."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cryosplat.errors import InputError
from cryosplat.unpickle import read_npy

_LOG = logging.getLogger("cryosplat")

ALIGNMENT = "alignments3D"
_PARTS = ("pose", "shift", "psize_A", "split")


def read_fields(path: Path, passthroughs: Sequence[Path] = ()) -> tuple[dict[str, np.ndarray], dict[str, Path]]:
    """The columns of a .cs file, and of the same particles (by uid) those that only the passthrough files have.

    A column that several of these have is that of the first. Where there is one alignment by class and none of all,
    it is taken under the name of ``alignments3D``.

    Returns:
        Columns (N, ...) by name, and the file each comes from.

    Raises:
        InputError: a file is no table, files do not belong together, or several classes have alignments.
    """
    fields = _table(path, "particle .cs file")
    sources = dict.fromkeys(fields, path)
    for passthrough in passthroughs:
        more = _matching(path, fields, passthrough)
        sources |= dict.fromkeys(more, passthrough)
        fields |= more
    return _with_one_alignment(path, fields, sources)


def passthrough_hint(path: Path) -> str:
    """What to try where a .cs file lacks columns: the passthrough files beside it, if there are any."""
    beside = [file for file in sorted(path.parent.glob("*passthrough*.cs")) if file != path]
    found = f"data.passthrough={','.join(map(str, beside))}" if beside else "its job's passthrough file"
    return f"; what a .cs file lacks is often in {found} (data.passthrough names further files, merged by uid)"


def _table(path: Path, what: str) -> dict[str, np.ndarray]:
    table = read_npy(path)
    if table.ndim != 1 or not table.dtype.names:
        raise InputError(f"{path}: not a {what}: it has no blob/path and blob/idx, nor any other column")
    return {name: table[name] for name in table.dtype.names}


def _matching(path: Path, fields: dict[str, np.ndarray], passthrough: Path) -> dict[str, np.ndarray]:
    """Columns that only ``passthrough`` has, row for row of ``fields``."""
    others = _table(passthrough, "passthrough .cs file")
    for file, columns in ((path, fields), (passthrough, others)):
        if "uid" not in columns or columns["uid"].dtype.kind not in "iu" or columns["uid"].ndim != 1:
            raise InputError(
                f"{file}: no column uid of whole numbers, by which data.particles and data.passthrough are merged"
            )
    order = np.argsort(others["uid"], kind="stable")
    known = others["uid"][order]
    if (known[1:] == known[:-1]).any():
        row = order[1:][known[1:] == known[:-1]][0]
        raise InputError(f"{passthrough}: row {row} repeats the uid {others['uid'][row]}; export the file again")
    place = np.minimum(np.searchsorted(known, fields["uid"]), max(len(known) - 1, 0))
    lacking = np.flatnonzero(known[place] != fields["uid"]) if len(known) else np.arange(len(fields["uid"]))
    if len(lacking):
        raise InputError(
            f"{passthrough}: it lacks {len(lacking)} of the {len(fields['uid'])} particles of {path}, the first in row "
            f"{lacking[0]} (uid {fields['uid'][lacking[0]]}); give the passthrough file of the same job"
        )
    return {name: values[order[place]] for name, values in others.items() if name not in fields}


_CLASS_POSE = re.compile(r"alignments(_class|_class3D|3D)_(\d+|multi)/pose")
"""Column of the poses of one class, or of all in one; others that look like one are not taken for it."""


def _with_one_alignment(
    path: Path, fields: dict[str, np.ndarray], sources: dict[str, Path]
) -> tuple[dict[str, np.ndarray], dict[str, Path]]:
    """The same, the alignment of the one class that has one taken for that of all.

    Ab-initio reconstruction and heterogeneous refinement write alignments_class_0, alignments_class_1 and so on (in
    older versions alignments_class3D_0, alignments3D_0), and alignments3D_multi, which has every class's in one column.
    """
    if f"{ALIGNMENT}/pose" in fields:
        return fields, sources
    groups = {name.removesuffix("/pose") for name in fields if _CLASS_POSE.fullmatch(name)}
    single = sorted(group for group in groups if fields[f"{group}/pose"].shape[1:] == (3,))
    several = sorted(group for group in groups if fields[f"{group}/pose"].ndim == 3)
    if len(single) == 1 and not several:
        _LOG.info("%s: poses are those of %s, the only class with any", path, single[0])
        for part in _PARTS:
            old, new = f"{single[0]}/{part}", f"{ALIGNMENT}/{part}"
            if old in fields and new not in fields:
                fields[new], sources[new] = fields[old], sources[old]
    elif single or several:
        raise InputError(
            f"{path}: poses in {len(single) + len(several)} columns, those of several classes "
            f"({', '.join(single + several)}), and none in {ALIGNMENT}: which one is meant it does not say. Name the "
            f"particles of one class as its job writes them (each class has a file of its own), best after a "
            f"refinement of that class, which writes {ALIGNMENT}"
        )
    return fields, sources
