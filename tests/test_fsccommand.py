"""``cryosplat fsc`` prints what it writes, for half maps and for a map against a reference."""

import argparse
import pickle
import xml.etree.ElementTree as ElementTree

import mrcfile
import numpy as np
import pytest
from halfmaps import halves, molecule

from cryosplat import fsccommand
from cryosplat.conventions import euler_to_rotation
from cryosplat.errors import InputError
from cryosplat.fsc import fsc, mean_fsc, read_maps, resolution
from cryosplat.fscsuite import fsc_suite
from cryosplat.masks import mask_from_map, spherical_mask
from cryosplat.volumes import write_map

BOX, PIXEL_SIZE_A = 32, 4.0


def command(*words):
    parser = argparse.ArgumentParser()
    fsccommand.add_arguments(parser)
    fsccommand.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def folder(tmp_path):
    truth = molecule(BOX)
    for name, half in zip(("a.mrc", "b.mrc"), halves(truth, 1.0), strict=True):
        write_map(tmp_path / name, half, PIXEL_SIZE_A)
    write_map(tmp_path / "truth.mrc", truth, PIXEL_SIZE_A)
    write_map(tmp_path / "mask.mrc", spherical_mask(BOX, 10, 5), PIXEL_SIZE_A)
    rotations = euler_to_rotation(*np.random.default_rng(0).uniform(-180, 180, (3, 40)))
    (tmp_path / "poses.pkl").write_bytes(pickle.dumps((rotations, np.zeros((40, 2)))))
    return tmp_path


@pytest.fixture
def pair(folder):
    return read_maps([folder / "a.mrc", folder / "b.mrc"])[0]


def test_it_prints_every_curve_with_its_errors_and_writes_all_that_is_asked_for(folder, pair, capsys):
    out = folder / "out" / "here"
    command(
        folder / "a.mrc", folder / "b.mrc", "-o", out, "--threshold", "0.3", "--local-resolution",
        "--poses", folder / "poses.pkl",
    )  # fmt: skip
    printed = capsys.readouterr().out
    suite = fsc_suite(*pair, PIXEL_SIZE_A)
    for name in ("unmasked", "sphere", "loose", "tight", "corrected"):
        line = next(line for line in printed.splitlines() if line.split()[0] == name)
        for threshold in (0.5, 0.3, 0.143):
            assert str(resolution(suite.curves[name], threshold)) in line
    assert "+-" in line and f"{mean_fsc(suite.curves['corrected']):.4f}" in printed
    assert f"anisotropy        {suite.anisotropy:.2f}" in printed
    assert f"beyond {suite.randomised_beyond_a:.2f} A" in printed
    files = {"fsc.csv", "fsc.png", "fsc.xml", "mask.mrc", "directional.png", "viewing_directions.png"}
    assert {path.name for path in out.iterdir()} == files | {"local_resolution.mrc"}
    table = np.genfromtxt(out / "fsc.csv", delimiter=",", names=True)
    assert table.dtype.names[:3] == ("shell", "resolution_a", "frequency_inv_a")
    assert set(table.dtype.names[3:]) == {f"{name}{tail}" for name in suite.curves for tail in ("", "_error")}
    np.testing.assert_array_equal(table["shell"], np.arange(1, BOX // 2 + 1))
    for name, curve in suite.curves.items():
        np.testing.assert_allclose(table[name], curve.fsc[1:], atol=1e-6)
        np.testing.assert_allclose(table[f"{name}_error"], curve.error[1:], atol=1e-6)
    deposited = [float(element.text) for element in ElementTree.parse(out / "fsc.xml").getroot().iter("y")]
    np.testing.assert_allclose(deposited, suite.curves["corrected"].fsc[1:], atol=1e-6)
    np.testing.assert_allclose(mrcfile.read(out / "mask.mrc"), mask_from_map(pair[0] + pair[1], PIXEL_SIZE_A))
    with mrcfile.open(out / "local_resolution.mrc") as handle:
        assert handle.data.min() >= 2 * PIXEL_SIZE_A and handle.voxel_size.x == pytest.approx(PIXEL_SIZE_A)
    assert (out / "directional.png").read_bytes().startswith(b"\x89PNG")


def test_a_mask_of_ones_own_is_used(folder, pair, capsys):
    command(folder / "a.mrc", folder / "b.mrc", "--mask", folder / "mask.mrc", "-o", folder / "out")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "masked")
    mask = read_maps([folder / "mask.mrc"])[0][0]
    assert f"{resolution(fsc(*pair, PIXEL_SIZE_A, mask), 0.143).angstrom:.2f}" in line
    np.testing.assert_array_equal(mrcfile.read(folder / "out" / "mask.mrc"), mask)


def test_without_a_mask_the_unmasked_curve_is_the_result(folder, capsys):
    command(folder / "a.mrc", folder / "b.mrc", "--mask", "none", "-o", folder / "out", "--local-resolution")
    printed = capsys.readouterr().out
    assert "(unmasked)" in printed and "corrected" not in printed
    assert not (folder / "out" / "mask.mrc").exists()


@pytest.mark.parametrize("mask", [None, "mask.mrc", "auto"])
def test_against_a_reference_there_is_one_curve_read_at_one_half(folder, capsys, mask):
    words = [] if mask is None else ["--mask", mask if mask == "auto" else folder / mask]
    command(folder / "a.mrc", folder / "truth.mrc", "--reference", *words, "-o", folder / "out")
    printed = capsys.readouterr().out
    first, truth = read_maps([folder / "a.mrc", folder / "truth.mrc"])[0]
    made = {None: lambda: None, "auto": lambda: mask_from_map(first + truth, PIXEL_SIZE_A)}
    volume = made.get(mask, lambda: read_maps([folder / "mask.mrc"])[0][0])()
    curve = fsc(first, truth, PIXEL_SIZE_A, volume)
    assert f"FSC 0.5    {resolution(curve, 0.5)}" in printed and "0.143" not in printed
    assert {path.name for path in (folder / "out").iterdir()} == {"fsc.csv", "fsc.png", "fsc.xml"}
    table = np.genfromtxt(folder / "out" / "fsc.csv", delimiter=",", names=True)
    assert table.dtype.names == ("shell", "resolution_a", "frequency_inv_a", "fsc")
    np.testing.assert_allclose(table["fsc"], curve.fsc[1:], atol=1e-6)


@pytest.mark.parametrize("words", [[], ["--reference"]])
def test_it_says_that_a_map_is_inverted(folder, pair, capsys, words):
    write_map(folder / "inverted.mrc", -pair[0], PIXEL_SIZE_A)
    command(folder / "inverted.mrc", folder / "b.mrc", "--mask", "none", *words)
    assert "warning: the FSC is negative at low resolution: one of the maps has inverted contrast" in (
        capsys.readouterr().out
    )


def test_it_replaces_nothing_and_writes_nothing_then(folder):
    (folder / "fsc.png").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"fsc\.png exists already"):
        command(folder / "a.mrc", folder / "b.mrc", "-o", folder)
    assert (folder / "fsc.png").read_bytes() == b"mine" and not (folder / "fsc.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "b.mrc"], r"b\.mrc: expected values from 0 to 1"),
        (["--threshold", "1.43"], r"--threshold 1\.43"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--local-window", "60"], "give that, too"),
        (["--local-resolution"], "give a folder for them with -o"),
        (["--poses", "poses.pkl"], "give a folder for them with -o"),
        (["--reference", "--poses", "poses.pkl", "-o", "out"], "are for half maps"),
        (["--local-resolution", "--local-window", "9", "-o", "out"], "a window of 9 A"),
        (["--poses", "a.mrc", "-o", "out"], r"a\.mrc"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(folder, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=message):
        command("a.mrc", "b.mrc", *words)
    assert not (folder / "out").exists()


def test_maps_of_another_grid_are_refused(folder, pair):
    write_map(folder / "other.mrc", pair[0], 4.1)
    with pytest.raises(InputError, match=r"other\.mrc has 4\.1 A/px, .*a\.mrc has 4"):
        command(folder / "a.mrc", folder / "other.mrc")
