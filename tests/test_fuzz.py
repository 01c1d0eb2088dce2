"""Damaged and hostile files: refused by name, or read as an independent reader reads them; nothing else ever happens.

By hand, for hours rather than seconds: ``CRYOSPLAT_FUZZ=many python -m pytest -q tests/test_fuzz.py``.
"""

import io
import linecache
import logging
import os
import pickle
import re
import struct
from collections import Counter

import mrcfile
import numpy as np
import pytest
import starfile
import tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacks import load, make_ctf, make_poses, write_dataset
from watching import little_memory, nothing_runs

from cryosplat.errors import InputError
from cryosplat.images import ImageReader, read_header
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
    pytest.mark.filterwarnings("ignore:invalid escape sequence"),  # Python's, of names in pickles, which are refused
    pytest.mark.filterwarnings("ignore:.*align should be passed"),
    pytest.mark.filterwarnings("ignore:Reading .*Python 2"),  # numpy's, of headers it can still make sense of
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
    with mrcfile.new(folder / "bytes.mrcs") as stack:  # other than float32, which cryodrgn does not read
        stack.set_data(np.zeros((6, 8, 8), np.int8))
    load(folder, particles="bytes.mrcs", poses="poses.pkl", ctf="ctf.pkl").read(np.arange(6))
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
def test_a_damaged_star_file_is_refused_by_name_or_is_read_by_its_grammar(folder, which, how):
    path = folder / "fuzz.star"
    path.write_bytes(damaged(star_texts(folder)[which], how))
    listing = attempt("fuzz.star", read_listing, path, [folder])
    if listing is None:
        return
    if re.search(r"[^\S \t\r\n]", path.read_text("utf-8-sig")):
        return  # white space of other alphabets: not defined by the grammar, and not the same in quotes
    names, rows = plainly(path)
    ours = [f"{number}@{listing.names[stack]}" for number, stack in zip(listing.slices + 1, listing.stack, strict=True)]
    theirs = [row[names.index("_rlnImageName")].partition("@") for row in rows]
    assert ours == [f"{int(number)}@{name}" for number, _, name in theirs]
    for name in set(listing.columns.values) & set(names) - OF_OPTICS:
        for value, row in zip(listing.columns.values[name], rows, strict=True):
            assert not np.isfinite(value) or float(row[names.index(name)]) == value, name
    other = by_starfile(path)
    # Of a file with odd line ends or an odd row it makes another number of rows, without a word.
    if other is not None and len(other) == len(rows) and not (other == "").any(axis=None):
        SEEN["fuzz.star", "judged by starfile too"] += 1
        named = [re.sub(r"""["']""", "", name) for name in other["rlnImageName"]]  # it keeps quotes inside a word
        assert named == ["".join(name) for name in theirs]


OF_OPTICS = {"_rlnImagePixelSize", "_rlnImageSize", "_rlnVoltage", "_rlnSphericalAberration", "_rlnAmplitudeContrast"}


def plainly(path):
    """Labels and rows of the table of particles, by no more than its grammar."""
    lines = [line for line in path.read_text("utf-8-sig").split("\n") if not line.lstrip().startswith("#")]
    text = "\n".join(lines)
    for block in re.split(r"(?m)^\s*data_\S*\s*?$", text):
        for loop in re.split(r"(?m)^\s*loop_\b.*$", block)[1:]:
            head, rest = re.match(r"((?:\s*_.*(?:\n|\Z))*)((?:.|\n)*)", loop).groups()
            names = [line.split()[0] for line in head.split("\n") if line.strip()]
            if "_rlnImageName" in names and rest.strip():
                return names, [words(line) for line in rest.split("\n") if line.strip()]
    raise AssertionError("no such table")


def words(line):
    found = re.findall(r"""(?:"[^"]*"|'[^']*'|\S)+""", line)
    return [re.sub(r"""["']""", "", word) for word in found]


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


# cryoSPARC's files, and others of numpy's format


@cases(700)
@given(how=changes, whole=st.booleans())
def test_a_damaged_cs_file_is_refused_by_name_or_is_the_table_that_numpy_reads(folder, how, whole):
    content, path = (folder / "good.cs").read_bytes(), folder / "fuzz.cs"
    end = len(content) if whole else 10 + struct.unpack_from("<H", content, 8)[0]  # only its header
    path.write_bytes(damaged(content[:end], how) + content[end:])
    listing = attempt("fuzz.cs", read_listing, path, [folder])
    if listing is None:
        return
    expected = np.load(path, allow_pickle=False)
    names = [name.decode("utf-8", "replace").removeprefix(">") for name in expected["blob/path"].tolist()]
    assert [listing.names[place] for place in listing.stack] == names
    np.testing.assert_array_equal(listing.slices, expected["blob/idx"].astype(np.int64))
    for name, values in listing.columns.values.items():
        np.testing.assert_array_equal(values, expected[name])


LITERALS = st.recursive(
    st.sampled_from(["'<f4'", "'|O'", "'|V0'", "'|S0'", "'<U1'", "True", "0", "-1", "1e9", "9" * 25, "10**9", "''"])
    | st.sampled_from(["'blob/path'", "'blob/idx'", "'descr'", "'shape'", "(6,)", "(10000000000000,)", "(2**62, 8)"])
    | st.sampled_from(["(" * 300, "-" * 5000, "[" * 50, "'a", "__import__('os').system('true')"]),
    lambda inner: st.lists(inner, max_size=3).flatmap(
        lambda parts: st.sampled_from([f"({','.join(parts)},)", f"[{','.join(parts)}]"])
    ),
    max_leaves=8,
)


@cases(500)
@given(
    descr=LITERALS | st.sampled_from(["[('blob/path','|S9'),('blob/idx','<u4')]", "'|O'", "[('a','|O')]", "'|V0'"]),
    shape=LITERALS | st.sampled_from(["(6,)", "(10**12,)", "(1000000000000,)", "(2305843009213693952,)", "(-1,)"]),
    body=st.sampled_from([b"", b"x" * 78, pickle.dumps([1, 2, 3])]),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0), (4, 0)]),
)
def test_whatever_a_header_of_numpy_s_format_promises_the_file_must_hold(folder, descr, shape, body, version):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    path = folder / "fuzz.npy"
    path.write_bytes(b"\x93NUMPY" + bytes(version) + size + header + body)
    with little_memory(MOST_MIB):
        found = attempt("fuzz.npy", read_npy, path)
    assert found is None or found.nbytes <= len(body) and not found.dtype.hasobject


# Image stacks

HEADER_WORDS = [0, 1, 2, 8, 6, -1, -(2**31), 2**31 - 1, 2**30, 65536, 12, 17, 1024, 4096, 0x7FC00000, 0x11110000]


@cases(500)
@given(
    words=st.lists(
        st.tuples(st.sampled_from([0, 4, 8, 12, 28, 32, 36, 40, 92, 92, 208, 212]), st.sampled_from(HEADER_WORDS)),
        min_size=1,
        max_size=4,
    ),
    how=st.just([]) | changes,
)
def test_a_damaged_stack_is_refused_by_name_or_has_the_pixels_its_header_says(folder, words, how):
    content, path = bytearray((folder / "particles.mrcs").read_bytes()), folder / "fuzz.mrcs"
    for place, word in words:
        struct.pack_into("<i", content, place, word)
    content = damaged(content[:1024], how) + content[1024:]
    path.write_bytes(content)

    def read():
        header = read_header(path)
        every = np.arange(header.images)
        return header, ImageReader((path,), header.box, 0 * every, every, every, path).read(every)

    with little_memory(MOST_MIB):
        found = attempt("fuzz.mrcs", read)
    if found is None:
        return
    nx, ny, nz, mode = struct.unpack_from("<4i", content)
    extended = struct.unpack_from("<i", content, 92)[0]
    kind = {0: "i1", 1: "<i2", 2: "<f4", 6: "<u2", 12: "<f2", 17: "i1"}[mode]
    pixels = np.frombuffer(content, kind, nx * ny * nz, 1024 + extended).reshape(nz, ny, nx)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(found[1], pixels.astype(np.float32))
    try:
        with mrcfile.open(path, permissive=True) as other:
            data = np.asarray(other.data)
    except (ValueError, TypeError):
        data = None
    if data is not None and data.size == pixels.size and mode != 17:
        np.testing.assert_array_equal(data.reshape(pixels.shape), pixels)
        SEEN["fuzz.mrcs", "judged by mrcfile too"] += 1


# Pickles


PICKLES = [
    pickle.dumps(value, protocol=protocol)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    for value in (make_poses(3), make_ctf(2), [1, 2.5, np.int32(3)])
]


class Plainly(pickle.Unpickler):
    """Python's own, with numpy's own functions and no others."""

    def find_class(self, module, name):
        assert module.startswith(("numpy", "_codecs"))
        return super().find_class(module, name)


@cases(900)
@given(which=st.integers(0, len(PICKLES) - 1), how=changes)
def test_a_damaged_pickle_is_refused_by_name_or_is_what_pickle_reads(folder, which, how):
    path = folder / "fuzz.pkl"
    path.write_bytes(damaged(PICKLES[which], how))
    with little_memory(MOST_MIB):
        found = attempt("fuzz.pkl", read_pickle, path)
    if found is None:
        return
    try:
        expected = Plainly(io.BytesIO(path.read_bytes())).load()
    except Exception:
        return  # numpy minds damage of no consequence: in reserved fields, in the type of an array yet to be filled
    SEEN["fuzz.pkl", "judged"] += 1
    parts = [found, expected] if not isinstance(found, list | tuple) else [*found, *expected]
    for ours, theirs in zip(parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def bombs():
    array = pickle.dumps(np.zeros(1 << 16), protocol=4)
    body, end = array[2:-1], b"."
    text = "a" * (1 << 16)
    encoded = (
        b"c_codecs\nencode\nq\x00X" + struct.pack("<I", len(text)) + text.encode() + b"q\x01X\x06\0\0\0latin1q\x02"
    )
    again = b"h\x00h\x01h\x02\x86R"
    axes = b"(" + (b"\x8a\x08" + b"\xff" * 7 + b"\x7f") * 100_000 + b"t"
    name = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    number = b"cnumpy\ndtype\n(X\x02\0\0\0f8K\x00K\x01tR"
    return {
        "one array a hundred thousand times": b"\x80\x04](" + body + b"q\xff" + b"h\xff" * 100_000 + b"e" + end,
        "its text encoded a hundred thousand times": b"\x80\x02" + encoded + b"(" + again * 100_000 + b"l" + end,
        "a shape of a hundred thousand axes": b"\x80\x02" + name + b"(K\x01" + axes + number + b"\x89C\x00tb" + end,
        "an impossible size": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x" + end,
        "tuples in tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + end,
    }


@pytest.mark.parametrize("name", bombs())
def test_a_small_pickle_takes_neither_much_memory_nor_much_time(folder, name):
    path = folder / "fuzz.pkl"
    path.write_bytes(bombs()[name])
    with little_memory(MOST_MIB):
        assert attempt("fuzz.pkl", read_pickle, path) is None


# Lists of rows, and of stacks


@cases(300)
@given(parts=st.lists(st.sampled_from([b"0\n", b"5\n", b"12", b"-3\n", *ODD]), max_size=8))
def test_a_damaged_list_of_rows_is_refused_by_name_or_is_a_list_of_digits(folder, parts):
    path = folder / "fuzz.txt"
    path.write_bytes(b"".join(parts))
    found = attempt("fuzz.txt", read_integers, path)
    if found is not None:
        assert found.tolist() == [int(word) for word in path.read_text().split()]
        assert re.fullmatch(r"[-0-9\s]*", path.read_text())


@cases(200)
@given(how=changes)
def test_a_damaged_list_of_stacks_is_refused_by_name_or_lists_their_images(folder, how):
    path = folder / "fuzz.txt"
    path.write_bytes(damaged(b"particles.mrcs\nparticles.mrcs\n", how))
    found = attempt("fuzz.txt", read_listing, path, [folder])
    assert found is None or found.slices.tolist() == list(range(6)) * (len(found) // 6)


# Whole data sets


@cases(300)
@given(kind=st.sampled_from(["star", "cs", "mrcs", "poses.pkl", "ctf.pkl"]), how=changes)
def test_a_data_set_of_which_one_file_is_damaged_is_refused_or_has_no_impossible_number(folder, kind, how):
    keys = {"particles": "good.star"} if kind == "star" else {"particles": "good.cs"} if kind == "cs" else {}
    keys = keys or {"particles": "particles.mrcs", "poses": "poses.pkl", "ctf": "ctf.pkl"}
    option = {"star": "particles", "cs": "particles", "mrcs": "particles"}.get(kind, kind.removesuffix(".pkl"))
    name = f"damaged.{kind}"
    (folder / name).write_bytes(damaged((folder / keys[option]).read_bytes(), how))
    table = attempt("", lambda: load(folder, **keys | {option: name}))
    if table is not None:
        for values in (table.rotations, table.shifts, *([] if table.ctf is None else [table.ctf])):
            assert np.isfinite(values).all()
        assert 0.01 <= table.pixel_size_a <= 1000 and set(table.half) <= {0, 1}
