"""Pickles are read without running anything in them, whoever wrote them."""

import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cryosplat.errors import InputError
from cryosplat.unpickle import read_integers, read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
WATCHED = ("exec", "compile", "import", "os.system", "os.exec", "subprocess.Popen", "socket.connect", "ctypes.dlopen")
EVENTS: list[str] = []
WATCHING = False


def _watch(event, _arguments):
    if WATCHING and event in WATCHED:
        EVENTS.append(event)


sys.addaudithook(_watch)


def read_watched(path):
    """Read the pickle; nothing that would run code may happen meanwhile."""
    global WATCHING
    EVENTS.clear()
    WATCHING = True
    try:
        return read_pickle(path)
    finally:
        WATCHING = False
        assert EVENTS == []


def write(path, data: bytes):
    path.write_bytes(data)
    return path


def poses(count=5):
    random = np.random.default_rng(0)
    return random.normal(size=(count, 3, 3)).astype(np.float32), random.normal(size=(count, 2))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_arrays_of_every_protocol_and_numpy_come_back_as_they_were(tmp_path, protocol, core):
    data = pickle.dumps(poses(), protocol=protocol)
    if protocol < 4:  # names are stored with their newline, so any length will do
        data = data.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core.encode() + b".")
    read = read_pickle(write(tmp_path / "poses.pkl", data))
    assert isinstance(read, tuple)
    for ours, theirs in zip(read, poses(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype and ours.flags.writeable and ours.flags.c_contiguous


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_layout_and_byte_order_comes_back_in_c_order_and_native(tmp_path, protocol):
    base = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    arrays = [
        base.T,
        base.transpose(1, 0, 2),
        base[:, ::2],
        base.astype(">f8"),
        np.asfortranarray(base),
        np.float16(base),
    ]
    read = read_pickle(write(tmp_path / "a.pkl", pickle.dumps(arrays, protocol=protocol)))
    for ours, theirs in zip(read, arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype.isnative and ours.flags.c_contiguous


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_are_read_from_lists_python_s_and_numpy_s(tmp_path, protocol):
    values = [3, 2**40, np.int64(7), np.float32(0.5), True, np.bool_(False), -1.25]
    assert read_pickle(write(tmp_path / "a.pkl", pickle.dumps(values, protocol=protocol))) == values


def test_real_pickles_of_numpy_1_and_2_are_read(shared):
    files = sorted((shared / "data").glob("**/*.pkl"))
    assert len(files) >= 6
    for path in files:
        ours, theirs = read_pickle(path), pickle.loads(path.read_bytes())
        pairs = zip(ours, theirs, strict=True) if isinstance(theirs, tuple) else [(ours, theirs)]
        assert all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in pairs)


class Attack:
    """Pickles to a call of anything."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    touch = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w').close()"
    array = np.zeros(3)
    return {
        "os.system": Attack(os.system, touch),
        "eval": Attack(eval, python),
        "exec": Attack(exec, python),
        "subprocess": Attack(subprocess.call, ["touch", str(marker)]),
        "open": Attack(open, str(marker), "w"),
        "numpy.load": Attack(np.load, str(marker), None, True),
        "numpy.save": Attack(np.save, str(marker), array),
        "numpy.memmap": Attack(np.memmap, str(marker), "u1", "w+", 0, (1,)),
        "getattr": Attack(getattr, array, "tofile"),
        "nested": (array, [array, (array, Attack(os.system, touch))]),
        "beside good arrays": (*poses(), Attack(os.system, touch)),
        "inside an object array": np.array([Attack(os.system, touch), 1], dtype=object),
        "inside a dict": {"rotations": Attack(os.system, touch)},
    }


@pytest.mark.parametrize("name", attacks("x"))
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, name, protocol):
    marker = tmp_path / "ran"
    path = write(tmp_path / "poses.pkl", pickle.dumps(attacks(marker)[name], protocol=protocol))
    with pytest.raises(InputError, match=r"poses\.pkl: refused, because .* Nothing in the file was run"):
        read_watched(path)
    assert not marker.exists()


def test_the_same_attack_runs_under_plain_pickle(tmp_path):
    """The control: without it the tests above could pass because the attacks are toothless."""
    for name, attack in attacks(tmp_path / "ran").items():
        if name in ("os.system", "eval", "numpy.save", "inside an object array"):
            pickle.loads(pickle.dumps(attack))
            assert (tmp_path / "ran").exists() or (tmp_path / "ran.npy").exists()
            for marker in tmp_path.iterdir():
                marker.unlink()


HAND_MADE = {
    "a dotted name below an allowed one": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.fill\x93.",
    "the array class called": b"cnumpy\nndarray\n(I9\ntR.",
    "attributes set on a function": b"cnumpy.core.multiarray\n_reconstruct\n(N}tb.",
    "state given to a function": b"cnumpy.core.multiarray\n_reconstruct\n(I1\ntb.",
    "another encoding": b"c_codecs\nencode\n(Vabc\nVzip\ntR.",
    "an object built from a class": b"(inumpy\nndarray\n.",
    "new objects": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "a persistent identifier": b"P12\n.",
    "an array of another class": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntVb\ntR.",
    "a record": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
    "text": pickle.dumps(np.array(["a", "b"])),
    "complex numbers": pickle.dumps(np.zeros(2, complex)),
    "an array of objects": pickle.dumps(np.array([1, "a"], dtype=object)),
    "a string": pickle.dumps("poses"),
    "lists of lists": pickle.dumps([[[1.0]]]),
    "a list that holds itself": b"\x80\x04]\x94h\x00a.",
    "only a dtype": pickle.dumps(np.dtype("f4")),
    "nothing": pickle.dumps(None),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_a_pickle_of_anything_else_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="refused"):
        read_watched(write(tmp_path / "a.pkl", HAND_MADE[name]))


DAMAGED = {
    "empty": b"",
    "text": b"hello world\n",
    "zeros": bytes(100),
    "cut short": pickle.dumps(poses())[:-40],
    "no bytes for the shape": pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"K\x04\x85"),
    # A plain unpickler would allocate 64 GiB for this index.
    "a huge memo index": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "a huge byte string": b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc.",
    "an array never filled": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntVb\ntR.",
    "a shape that wraps round": pickle.dumps(np.zeros((2, 2))).replace(
        b"K\x02K\x02\x86", b"K\x02\x8a\x08" + b"\x10" * 8 + b"\x86"
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pickle_is_an_input_error(tmp_path, name):
    with pytest.raises(InputError, match=r"a\.pkl"):
        read_watched(write(tmp_path / "a.pkl", DAMAGED[name]))


def test_a_missing_pickle_and_a_folder_are_input_errors(tmp_path):
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_watched(path)


ORIGINALS = [
    pickle.dumps(value, protocol=protocol) for protocol in PROTOCOLS for value in (poses(2), [1, 2.5, np.int32(3)])
]


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    original=st.sampled_from(ORIGINALS),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 600)),
)
def test_a_pickle_with_random_bytes_changed_is_read_or_refused_and_never_run(tmp_path, original, changes, cut):
    data = bytearray(original)
    for position, value in changes:
        data[position % len(data)] = value
    path = write(tmp_path / "fuzz.pkl", bytes(data[:cut]))
    try:
        value = read_watched(path)
    except InputError:
        value = None
    assert value is None or isinstance(value, np.ndarray | int | float | list | tuple)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.lists(
        st.sampled_from(
            [bytes([code]) for code in b"(.0Nb)R]ate\x85\x86\x94\x93}uoQ"]
            + [
                b"cnumpy\nndarray\n",
                b"cnumpy\ndtype\n",
                b"cnumpy.core.multiarray\n_reconstruct\n",
                b"c_codecs\nencode\n",
                b"cnumpy.core.numeric\n_frombuffer\n",
                b"cnumpy.core.multiarray\nscalar\n",
                b"K\x01",
                b"X\x02\0\0\0f4",
                b"C\x04abcd",
                b"h\x00",
            ]
        ),
        max_size=25,
    ).map(b"".join)
)
def test_a_program_of_allowed_operations_in_any_order_is_read_or_refused(tmp_path, data):
    try:
        read_watched(write(tmp_path / "fuzz.pkl", b"\x80\x04" + data + b"."))
    except InputError:
        pass


def test_integers_are_read_from_pkl_npy_and_txt(tmp_path):
    expected = [5, 0, 2**40]
    np.save(tmp_path / "a.npy", expected)
    (tmp_path / "a.txt").write_text("5\n0\n\n1099511627776\n")
    write(tmp_path / "a.pkl", pickle.dumps(np.array(expected, dtype=np.uint64)))
    write(tmp_path / "list.pkl", pickle.dumps([np.int64(value) for value in expected]))
    for name in ("a.npy", "a.txt", "a.pkl", "list.pkl"):
        read = read_integers(tmp_path / name)
        assert read.dtype == np.int64 and read.tolist() == expected


def bad_integer_files():
    def npy(value, **options):
        buffer = io.BytesIO()
        np.save(buffer, value, **options)
        return buffer.getvalue()

    archive = io.BytesIO()
    np.savez(archive, a=np.arange(3))
    return {
        "mask.npy": (npy(np.array([True, False])), "expected integers, found bool"),
        "float.npy": (npy(np.array([1.0])), "expected integers, found float64"),
        "two.npy": (npy(np.zeros((2, 2), int)), "found an array of shape"),
        "object.npy": (npy(np.array([1, None], dtype=object), allow_pickle=True), "not a readable file"),
        "cut.npy": (npy(np.arange(100))[:-9], "not a readable file"),
        "empty.npy": (b"", "not a readable file"),
        "header.npy": (npy(np.arange(9)).replace(b"(9,)", b"(9, "), "not a readable file"),
        "archive.npy": (archive.getvalue(), "archive"),
        "huge.pkl": (pickle.dumps([2**80]), "expected integers"),
        "arrays.pkl": (pickle.dumps([np.arange(2), np.arange(3)]), "tuple|list of arrays"),
        "words.txt": (b"1\n2\nthree\n", "line 3 is 'three'"),
        "bytes.txt": (b"\xff\xfe", "cannot be read as text"),
        "a.csv": (b"1", r"expected a \.pkl, \.npy or \.txt"),
    }


@pytest.mark.parametrize("name", bad_integer_files())
def test_a_file_of_anything_but_integers_is_an_input_error(tmp_path, name):
    data, message = bad_integer_files()[name]
    with pytest.raises(InputError, match=message):
        read_integers(write(tmp_path / name, data))
