"""Gaussians in files of other programs lie where the map has its density, and are as wide as it says."""

import re

import gemmi
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from test_outputs import BOX, PIXEL_SIZE_A, mixture

from cryosplat import atoms, chimerax, cli
from cryosplat.errors import InputError
from cryosplat.gaussianfiles import export_mixture
from cryosplat.gaussians import mixture_to_map
from cryosplat.outputs import read_mixture, write_mixture_npz


def gaussians(box=BOX, count=20):
    """A mixture that the box holds, none of it narrower than a pixel."""
    found = mixture(count)
    found["means"] = np.clip(found["means"], -18, 18)
    found["scales"] = np.clip(found["scales"], 3.2, 5.0)
    return found | {"box": box, "pixel_size_a": PIXEL_SIZE_A}


def map_of(found):
    tensors = {name: torch.from_numpy(found[name]) for name in ("means", "scales", "quaternions", "amplitudes")}
    return mixture_to_map(tensors, found["box"], PIXEL_SIZE_A).numpy()


def atoms_of(path):
    return [atom for chain in gemmi.read_structure(str(path))[0] for residue in chain for atom in residue]


def map_of_atoms(path, box):
    """Sum of the pseudo-atoms' normal densities on a map whose first voxel is at 0, 0, 0, as other programs see it."""
    grid = np.stack(np.meshgrid(*[np.arange(box) * PIXEL_SIZE_A] * 3, indexing="ij"), -1)  # x, y, z
    total = np.zeros((box,) * 3)
    for atom in atoms_of(path):
        u = np.array(atom.aniso.as_mat33().tolist())
        offset = grid - np.array(atom.pos.tolist())
        exponent = np.einsum("xyzi,ij,xyzj->xyz", offset, np.linalg.inv(u), offset)
        total += atom.occ * np.exp(-exponent / 2) / np.sqrt((2 * np.pi) ** 3 * np.linalg.det(u))
    return total.transpose(2, 1, 0)


@pytest.mark.parametrize("box", [24, 25])
@pytest.mark.parametrize(("suffix", "error"), [(".cif", 1e-4), (".pdb", 2e-2)])
def test_pseudo_atoms_make_the_map_voxel_by_voxel(tmp_path, box, suffix, error):
    """Two decimals of an occupancy are all that a .pdb has."""
    found = gaussians(box)
    export_mixture(tmp_path / f"out{suffix}", found)
    expected, made = map_of(found), map_of_atoms(tmp_path / f"out{suffix}", box)
    made *= np.abs(found["amplitudes"]).max() * PIXEL_SIZE_A  # occupancies are over the largest amplitude
    assert np.linalg.norm(made - expected) < error * np.linalg.norm(expected)


def test_a_b_factor_is_that_of_the_width_and_an_occupancy_the_share_of_the_largest_amplitude(tmp_path):
    found = gaussians()
    export_mixture(tmp_path / "out.cif", found)
    written = atoms_of(tmp_path / "out.cif")
    b_factors = 8 * np.pi**2 * (found["scales"].astype(float) ** 2).mean(1)
    np.testing.assert_allclose([atom.b_iso for atom in written], b_factors, rtol=1e-4)
    shares = found["amplitudes"] / np.abs(found["amplitudes"]).max()
    np.testing.assert_allclose([atom.occ for atom in written], shares, atol=1e-5)
    rotation = Rotation.from_quat(found["quaternions"][0, [1, 2, 3, 0]]).as_matrix()
    u = rotation @ np.diag(found["scales"][0].astype(float) ** 2) @ rotation.T
    np.testing.assert_allclose(written[0].aniso.as_mat33().tolist(), u, rtol=1e-4, atol=1e-3)


def test_more_residues_than_a_chain_numbers_go_to_the_next(tmp_path):
    found = gaussians(count=10_005)
    export_mixture(tmp_path / "out.pdb", found)
    chains = {chain.name: len(chain) for chain in gemmi.read_structure(str(tmp_path / "out.pdb"))[0]}
    assert chains == {"A": 9_999, "B": 6}
    names = [atoms._chain_name(number) for number in range(5000)]
    assert len(set(names)) == 5000 and names[62] == "AA"


def test_what_a_pdb_file_has_no_room_for_is_refused_or_said(tmp_path, monkeypatch, caplog):
    found = gaussians()
    monkeypatch.setattr(atoms, "PDB_ATOMS", 19)
    with pytest.raises(InputError, match=r"20 pseudo-atoms, and a PDB file numbers 19; write a \.cif"):
        export_mixture(tmp_path / "out.pdb", found)
    monkeypatch.undo()
    far = found | {"means": np.where(np.arange(20)[:, None] == 3, 12_000, found["means"]).astype(np.float32)}
    with pytest.raises(InputError, match=r"coordinates beyond -999\.999 to 9999\.999 A.*\.cif"):
        export_mixture(tmp_path / "out.pdb", far)
    assert not list(tmp_path.iterdir())
    export_mixture(tmp_path / "out.cif", far)
    wide = found | {"scales": np.where(np.arange(20)[:, None] == 3, 9.0, found["scales"]).astype(np.float32)}
    with caplog.at_level("WARNING", "cryosplat"):
        export_mixture(tmp_path / "out.pdb", wide)
    written = atoms_of(tmp_path / "out.pdb")
    assert max(atom.b_iso for atom in written) == pytest.approx(999.99)
    assert np.trace(written[3].aniso.as_mat33().tolist()) == pytest.approx(3 * 81, rel=1e-4)
    assert "of 20 B factors are above 999.99 A^2" in caplog.text


@pytest.fixture
def run_dir(tmp_path):
    mixtures = {name: mixture(seed=seed) for seed, name in enumerate(("full", "half_a", "half_b"))}
    (tmp_path / "run").mkdir()
    write_mixture_npz(tmp_path / "run" / "gaussians.npz", mixtures, BOX, PIXEL_SIZE_A)
    return tmp_path / "run"


@pytest.mark.parametrize("suffix", [".npz", ".ply"])
def test_a_half_comes_out_alone_and_is_read_back(run_dir, tmp_path, suffix):
    out = tmp_path / f"half{suffix}"
    assert cli.main(["gaussians", str(run_dir), "-o", str(out), "--model", "half_b"]) == 0
    found, expected = read_mixture(out), mixture(seed=2)
    for field, array in expected.items():
        np.testing.assert_array_equal(found[field], array)
    assert found["box"] == BOX and found["pixel_size_a"] == PIXEL_SIZE_A


def test_the_command_refuses_other_formats_and_never_overwrites(run_dir, tmp_path, capsys):
    assert cli.main(["gaussians", str(run_dir), "-o", str(tmp_path / "out.xyz")]) == 2
    assert "expected a file ending in .pdb, .cif, .ply, .npz" in capsys.readouterr().err
    (tmp_path / "out.cif").write_text("mine")
    assert cli.main(["gaussians", str(run_dir), "-o", str(tmp_path / "out.cif")]) == 2
    assert (tmp_path / "out.cif").read_text() == "mine"
    np.savez(tmp_path / "other.npz", **mixture())
    assert cli.main(["gaussians", str(tmp_path / "other.npz"), "-o", str(tmp_path / "other.cif")]) == 2
    assert "does not say its box" in capsys.readouterr().err


# For ChimeraX


def ball(box, radius_px, inside, noise, seed=0):
    z, y, x = np.indices((box,) * 3) - box // 2
    smooth = 1 / (1 + np.exp((np.sqrt(x * x + y * y + z * z) - radius_px) / 0.7))
    return (inside * smooth + noise * np.random.default_rng(seed).standard_normal((box,) * 3)).astype(np.float32)


def test_a_level_is_the_molecules_surface_where_noise_is_low_and_above_the_noise_where_it_is_not():
    mask = ball(32, 12, 1.0, 0.0)
    clean = chimerax.level(ball(32, 8, 2.0, 0.001), 2.0, mask)
    assert 0.8 < clean < 1.2
    noisy = chimerax.level(ball(32, 8, 0.1, 1.0), 2.0, mask)
    assert noisy == pytest.approx(4.0, rel=0.05)
    assert chimerax.level(ball(32, 8, 2.0, 0.001), 2.0, None) == pytest.approx(clean, rel=0.05)


def view(folder, names, count=33):
    maps = {name: ball(24, 6, 1.0, 0.01, seed) for seed, name in enumerate(names)}
    chimerax.write_view(folder / "view.cxc", maps, 2.0, mixture(count), "gaussians.cif")
    return [line for line in (folder / "view.cxc").read_text().splitlines() if not line.startswith("#")]


def test_the_script_opens_files_beside_it_and_speaks_of_models_that_it_opened(tmp_path):
    lines = view(tmp_path, ("map", "half_a", "half_b", "mixture", "mask"))
    opened = dict(reversed(line.split()[1::2]) for line in lines if line.startswith("open "))
    assert opened == {
        "1": "map.mrc", "2": "half_a.mrc", "3": "half_b.mrc", "4": "mixture.mrc", "5": "gaussians.cif",
    }  # fmt: skip
    spoken_of = {number for line in lines for group in re.findall(r"#([\d,]+) ", line) for number in group.split(",")}
    assert spoken_of == set(opened) and "hide #2,3,4 models" in lines
    levels = [float(re.search(r"level (\S+) ", line).group(1)) for line in lines if " level " in line]
    assert len(levels) == 4 and all(0.3 < found < 0.7 for found in levels)


def test_a_run_without_halves_has_its_map_and_gaussians_alone(tmp_path):
    lines = view(tmp_path, ("map",))
    assert [line for line in lines if line.startswith(("open", "hide"))] == [
        "open map.mrc id 1",
        "open gaussians.cif id 2",
    ]
