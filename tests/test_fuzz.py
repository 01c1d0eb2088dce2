"""Damaged and hostile files: refused by name, or read as an independent reader reads them; nothing else ever happens.

By hand, for hours rather than seconds: ``CRYOSPLAT_FUZZ=many python -m pytest -q tests/test_fuzz.py``.
"""

import ast
import io
import linecache
import logging
import os
import pickle
import pickletools
import struct
from collections import Counter

import mrcfile
import numpy as np
import pytest
import starfile
import tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacks import load, make_ctf, make_images, make_poses, write_dataset, write_stack
from watching import little_memory, nothing_runs

from cryosplat.errors import InputError
from cryosplat.images import read_header
from cryosplat.listing import read_listing
from cryosplat.unpickle import read_integers, read_npy, read_pickle

MANY = os.environ.get("CRYOSPLAT_FUZZ") == "many"
TIMES = 30 if MANY else 1
MOST_MIB = 300
"""What the process may grow by over all cases of a test; a bomb would take gigabytes."""

pytestmark = [
    pytest.mark.filterwarnings("error"),  # a number that overflows or is cut off without a word
    pytest.mark.filterwarnings("ignore::RuntimeWarning:mrcfile"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

SEEN: Counter = Counter()
"""How many files of each test were read and how many refused."""


def cases(count):
    """A test of so many cases, the same ones every time; of others if there are to be many."""
    return settings(
        max_examples=count * TIMES,
        deadline=5000,
        derandomize=not MANY,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    if MANY:
        print("\n" + "\n".join(f"{name}: {count}" for name, count in sorted(SEEN.items())))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_dataset(folder)
    tables.save_cs(folder / "good.cs", tables.cs())
    logging.getLogger("cryosplat").setLevel(logging.ERROR)
    # What is read for the first time has modules imported, which must not be mistaken for files that run something.
    tables.write_star31(folder / "good.star")
    for name in ("particles.mrcs", "good.star", "good.cs"):
        load(folder, particles=name, poses="poses.pkl", ctf="ctf.pkl").read(np.arange(6))
    return folder


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("cryosplat").setLevel(logging.ERROR)


def attempt(name, read, *words):
    """What ``read(*words)`` gives, or None if it refuses the file called ``name``, by that name."""
    try:
        with nothing_runs():
            found = read(*words)
    except InputError as error:
        assert name in str(error), f"does not name the file: {error}"
        assert "\n" not in str(error).strip(), "more than one line"
        SEEN[name, "refused"] += 1
        return None
    SEEN[name, "read"] += 1
    return found


ODD = [b"nan", b"-inf", b"1e400", b"0", b"-1", b"9" * 30, b"1_0", "１".encode(), b"1e5", b"0x10", b"1,5", b"None", b"*"]
ODD += [
    b"\n",
    b"\r\n",
    b"\r",
    b"\t",
    b" ",
    b"_",
    b"'",
    b'"',
    b"#",
    b"\xff",
    b"\0",
    b"\x1c",
    b"\xc2\xa0",
    b"loop_",
    b"data_",
]
ODD += [b"data_x\n", b"loop_\n", b"\n\n", b"_rlnImageName\n", b"@", b"1@particles.mrcs", b"\xef\xbb\xbf"]

changes = st.lists(
    st.tuples(
        st.integers(0, 1 << 20), st.sampled_from("change insert replace cut double".split()), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def damaged(content, how):
    """Bytes changed, words put in or in the place of others, pieces cut out or doubled."""
    content = bytearray(content)
    for place, kind, value in how:
        place %= len(content) + 1
        if kind == "change" and place < len(content):
            content[place] = value
        elif kind == "insert":
            content[place:place] = ODD[value % len(ODD)]
        elif kind == "replace":
            begin = place
            while begin and content[begin - 1 : begin].strip():
                begin -= 1
            end = place
            while end < len(content) and content[end : end + 1].strip():
                end += 1
            content[begin:end] = ODD[value % len(ODD)]
        elif kind == "cut":
            del content[place : place + 1 + value % 60]
        else:
            content[place:place] = content[place : place + 1 + value]
    return bytes(content)


# Star files


def star_texts(folder):
    tables.write_star31(folder / "original.star", RandomSubset=[1, 2, 1, 2, 2, 1])
    new = (folder / "original.star").read_bytes()
    from stacks import write_star

    names = [f"film {row // 2}.mrc" for row in range(6)]
    write_star(folder / "original.star", tables.NAMES, MicrographName=[f'"{n}"' for n in names], **tables.relion30())
    old = (folder / "original.star").read_bytes()
    return [new, old, new.replace(b"\n", b"\r\n"), old.replace(b" ", b"\t")]


@cases(900)
@given(which=st.integers(0, 3), how=changes)
def test_a_damaged_star_file_is_refused_by_name_or_is_the_table_that_starfile_reads(folder, which, how):
    path = folder / "fuzz.star"
    path.write_bytes(damaged(star_texts(folder)[which], how))
    listing = attempt("fuzz.star", read_listing, path, [folder])
    if listing is None:
        return
    expected = by_starfile(path)
    SEEN["fuzz.star", "judged" if expected is not None else "not read by starfile"] += 1
    if expected is None:
        return
    assert len(expected) == len(listing)
    names = [
        f"{number}@{listing.names[stack]}" for number, stack in zip(listing.slices + 1, listing.stack, strict=True)
    ]
    theirs = [name.partition("@") for name in expected["rlnImageName"]]
    assert names == [f"{int(number)}@{name}" for number, _, name in theirs]
    for name in set(listing.columns.values) & {f"_{name}" for name in expected.columns} - OF_OPTICS:
        ours = listing.columns.values[name]
        for row, word in enumerate(expected[name[1:]]):
            if np.isfinite(ours[row]):
                assert float(word) == ours[row], name


OF_OPTICS = {"_rlnImagePixelSize", "_rlnImageSize", "_rlnVoltage", "_rlnSphericalAberration", "_rlnAmplitudeContrast"}


def by_starfile(path):
    """The table of particles by another program, as text; None if that cannot read the file."""
    linecache.clearcache()  # starfile reads through it, and it takes files of one size and second for the same
    try:
        found = starfile.read(path, always_dict=True, parse_as_string=ALL_COLUMNS)
    except Exception:
        return None
    tables = [table for table in found.values() if hasattr(table, "columns") and "rlnImageName" in table.columns]
    return tables[0] if len(tables) == 1 else None


ALL_COLUMNS = [f"rln{name}" for name in (*tables.relion30(), *tables.origins_a(), "ImageName", "MicrographName")]
ALL_COLUMNS += ["rlnOpticsGroup", "rlnRandomSubset"]
