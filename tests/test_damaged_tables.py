"""Damaged particle files are refused by name, or read; they never break the program."""

import logging

import numpy as np
import pytest
import tables
from stacks import load, write_dataset, write_star

from cryosplat.errors import InputError

CASES = 400
WORDS = (b"nan", b"inf", b"-1", b"1e400", b"0", b"9" * 20, b"\n", b" ", b"_", b"'", b"#", b"\xff")


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """With one to three bytes or words changed, put in or taken out."""
    damaged = bytearray(content)
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(len(damaged)))
        kind = random.integers(3)
        if kind == 0:
            damaged[place] = int(random.integers(256))
        elif kind == 1:
            damaged[place : place + 1] = WORDS[random.integers(len(WORDS))]
        else:
            del damaged[place : place + int(random.integers(1, 40))]
    return bytes(damaged)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["star30", "star31", "cs", "passthrough"])
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path, caplog, kind):
    caplog.set_level(logging.ERROR, logger="cryosplat")
    write_dataset(tmp_path)
    path, keys = tmp_path / f"p.{kind[:4] if kind.startswith('star') else 'cs'}", {}
    if kind == "star30":
        write_star(path, tables.NAMES, **tables.relion30())
    elif kind == "star31":
        tables.write_star31(path)
    else:
        tables.save_cs(path, tables.cs())
    keys["particles"] = path.name
    if kind == "passthrough":
        keys["passthrough"] = "passthrough.cs"
        path = tmp_path / "passthrough.cs"
        tables.save_cs(path, tables.cs())
    content, random, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(CASES):
        path.write_bytes(damaged(content, random))
        try:
            table = load(tmp_path, **keys)
        except InputError as error:
            refused += 1
            assert any(name in str(error) for name in ("p.star", "p.cs", "passthrough.cs", "particles.mrcs"))
        else:
            assert np.isfinite(table.rotations).all() and np.isfinite(table.shifts).all()
            assert table.ctf is None or np.isfinite(table.ctf).all()
    assert CASES // 10 < refused
