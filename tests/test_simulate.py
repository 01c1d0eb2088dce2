"""The simulator against exact sums, its files against other programs' readers, and the phantom's looks as numbers."""

import argparse
import io
import json
import logging
import pickle
import subprocess
import sys

import mrcfile
import numpy as np
import pytest

from cryosplat import simulate as simulator
from cryosplat.atoms import Atoms, density, read_model, soft_mask
from cryosplat.conventions import euler_to_rotation
from cryosplat.errors import InputError
from cryosplat.phantom import protein_phantom
from cryosplat.simulate import SimulateOptions, simulate
from cryosplat.slices import FourierSlicer, project
from cryosplat.stackfiles import rotation_to_euler
from cryosplat.volumes import read_map, write_map

BOX, PIXEL_SIZE_A = 32, 2.5
FILES = ["ctf.pkl", "mask.mrc", "particles.mrcs", "particles.star", "poses.pkl", "simulation.json", "truth.mrc"]


def blobs(box, seed=0, reach=0.7):
    """An asymmetric map of sharp blobs that reach ``reach`` of the way to the edge of the box."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices((box,) * 3) - box // 2
    volume = np.zeros((box,) * 3)
    for centre in rng.uniform(-1, 1, (25, 3)):
        a, b, c = reach * box / 2 * centre / max(1, np.linalg.norm(centre))
        volume += rng.uniform(0.5, 1.5) * np.exp(-((x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2) / 2)
    return volume.astype(np.float32)


def exact_images(volume, rotations, shifts, ctf=None):
    """Images by a direct Fourier sum over all voxels, float64; nothing is interpolated."""
    box = len(volume)
    positions = np.arange(box) - box // 2
    ky, kx = np.meshgrid(np.fft.fftfreq(box) * box, np.fft.rfftfreq(box) * box, indexing="ij")
    inside = kx**2 + ky**2 <= (box / 2) ** 2
    images = np.zeros((len(rotations), box, box))
    for number, (rotation, shift) in enumerate(zip(rotations, shifts, strict=True)):
        k3 = np.stack([kx[inside], ky[inside]], 1) @ rotation[:2]
        x, y, z = np.exp(-2j * np.pi / box * k3.T[:, :, None] * positions)
        spectrum = np.zeros(kx.shape, complex)
        spectrum[inside] = np.einsum("zyk,kz,ky->k", volume.astype(complex) @ x.T, z, y, optimize=True)
        spectrum *= np.exp(2j * np.pi * (kx * shift[0] + ky * shift[1]))
        if ctf is not None:
            spectrum *= ctf[number]
        images[number] = np.fft.fftshift(np.fft.irfft2(spectrum, s=(box, box)))
    return images


def written_out_ctf(row, box, pixel_size_a):
    """RELION's formula in degrees and with an arc tangent, from a row of ctf.pkl."""
    _, _, u, v, angle, kilovolt, cs, contrast, shift = (float(value) for value in row)
    ky, kx = np.meshgrid(np.fft.fftfreq(box, pixel_size_a), np.fft.rfftfreq(box, pixel_size_a), indexing="ij")
    volt = kilovolt * 1e3
    wavelength = 12.2639 / np.sqrt(volt + 0.97845e-6 * volt**2)
    squared = kx**2 + ky**2
    defocus = (u + v + (u - v) * np.cos(2 * (np.arctan2(ky, kx) - np.radians(angle)))) / 2
    phase = np.pi * wavelength * squared * (defocus - cs * 1e7 * wavelength**2 * squared / 2) + np.radians(shift)
    return np.sin(phase + np.arctan(contrast / np.sqrt(1 - contrast**2)))


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def random_rotations(count, seed=0):
    return euler_to_rotation(*np.random.default_rng(seed).uniform(-180, 180, (3, count)))


@pytest.fixture(scope="module")
def map_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "blobs.mrc"
    write_map(path, blobs(BOX), PIXEL_SIZE_A)
    return str(path)


@pytest.fixture(scope="module")
def phantom():
    return protein_phantom(0)


@pytest.fixture(scope="module")
def stack(map_path, tmp_path_factory):
    """A noise-free stack with everything on: astigmatic CTF, phase shift, pixel shifts."""
    folder = tmp_path_factory.mktemp("stack") / "out"
    simulate(SimulateOptions(out=str(folder), map=map_path, images=40, snr=np.inf, astigmatism=3000, phase_shift=40))
    return folder


def load(folder):
    poses = pickle.loads((folder / "poses.pkl").read_bytes())
    return mrcfile.read(folder / "particles.mrcs"), *poses, json.loads((folder / "simulation.json").read_text())


# Images


@pytest.mark.parametrize("box", [31, 32])
@pytest.mark.parametrize("reach", [0.6, 1.0])
def test_slices_equal_an_exact_sum_to_one_thousandth(box, reach):
    volume, rotations = blobs(box, reach=reach), random_rotations(6)
    found = project(FourierSlicer(volume), rotations, np.zeros((6, 2)), None, 1.0)
    assert found.dtype == np.float32
    assert relative_error(found, exact_images(volume, rotations, np.zeros((6, 2)))) < 1e-3


def test_the_view_along_z_is_the_sum_over_z():
    volume = blobs(BOX, reach=0.5)
    found = project(FourierSlicer(volume), np.eye(3)[None], np.zeros((1, 2)), None, 1.0)[0]
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(BOX), np.fft.fftfreq(BOX)))
    expected = np.fft.ifft2(np.fft.fft2(volume.sum(0)) * (radius <= 0.5)).real
    assert relative_error(found, expected) < 1e-3


def test_a_blob_is_seen_where_the_conventions_say():
    box, place = 48, np.array([9.0, -5.0, 7.0])
    z, y, x = np.indices((box,) * 3) - box // 2
    volume = np.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2) / 4.0)
    rotations, shifts = random_rotations(8, seed=3), np.random.default_rng(3).uniform(-0.08, 0.08, (8, 2))
    images = project(FourierSlicer(volume), rotations, shifts, None, 1.0)
    rows, columns = np.indices((box, box))
    seen = np.array([[(image * columns).sum(), (image * rows).sum()] / image.sum() for image in images])
    np.testing.assert_allclose(seen, (rotations @ place)[:, :2] + box // 2 - shifts * box, atol=0.02)


def test_a_mirrored_map_gives_other_images():
    volume, rotations = blobs(BOX), random_rotations(4)
    images = [project(FourierSlicer(v), rotations, np.zeros((4, 2)), None, 1.0) for v in (volume, volume[::-1].copy())]
    assert relative_error(images[1], images[0]) > 0.3


def test_the_stack_is_scale_times_ctf_times_projection(stack):
    images, rotations, shifts, summary = load(stack)
    volume, pixel_size_a = read_map(stack / "truth.mrc")
    rows = pickle.loads((stack / "ctf.pkl").read_bytes())
    assert rows.shape == (40, 9) and (rows[:, 0] == BOX).all() and np.allclose(rows[:, 1], PIXEL_SIZE_A)
    assert np.ptp(rows[:, 2] - rows[:, 3]) > 500 and np.allclose(rows[:, 8], 40)
    ctf = [written_out_ctf(row, BOX, pixel_size_a) for row in rows]
    expected = summary["truth_scale"] * exact_images(volume, rotations.astype(float), shifts, ctf)
    assert relative_error(images, expected) < 2e-3
    assert np.isclose(images.reshape(40, -1).var(1).mean(), 1, rtol=1e-4)


def test_noise_has_unit_variance_and_the_snr_asked_for(map_path, stack, tmp_path):
    for snr in (0.5, 0.02):
        options = SimulateOptions(str(tmp_path / str(snr)), map=map_path, images=400, snr=snr)
        simulate(options)
        simulate(SimulateOptions(str(tmp_path / f"{snr}-clean"), map=map_path, images=400, snr=np.inf))
        noisy, _, _, summary = load(tmp_path / str(snr))
        clean, _, _, summary_of_clean = load(tmp_path / f"{snr}-clean")
        clean = clean * (summary["truth_scale"] / summary_of_clean["truth_scale"])
        noise = noisy - clean
        assert abs(noise.var() - 1) < 0.01 and abs(noise.mean()) < 0.01
        assert abs(clean.reshape(400, -1).var(1).mean() / noise.var() / snr - 1) < 0.02
        spectrum = (np.abs(np.fft.rfft2(noise)) ** 2).mean(0)[1:, 1:-1] / BOX**2
        assert abs(spectrum[:4, :4].mean() - spectrum[-16:, 8:].mean()) < 0.1


def test_coloured_noise_has_the_spectrum_of_the_file(map_path, tmp_path):
    radial = np.linspace(9.0, 1.0, 40).astype(np.float32)
    (tmp_path / "noise.pkl").write_bytes(pickle.dumps(radial))
    # A signal of a millionth of the noise leaves the noise alone.
    options = SimulateOptions(str(tmp_path / "out"), map=map_path, images=400, snr=1e-6)
    options.noise_spectrum = str(tmp_path / "noise.pkl")
    simulate(options)
    noise = load(tmp_path / "out")[0]
    assert abs(noise.var() - 1) < 0.01
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(0) / BOX**2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(BOX), np.fft.fftfreq(BOX)))
    expected = np.interp(radius / 0.5 * 39, np.arange(40), radial)
    assert relative_error(power, expected / expected.mean()) < 0.08


def test_memory_stays_bounded_because_images_are_made_in_blocks(map_path, tmp_path, monkeypatch):
    simulate(SimulateOptions(str(tmp_path / "whole"), map=map_path, images=50))
    monkeypatch.setattr(simulator, "PIXELS_AT_ONCE", 7 * BOX**2)
    sizes = []
    monkeypatch.setattr(simulator, "project", lambda *a: sizes.append(len(a[1])) or project(*a))
    simulate(SimulateOptions(str(tmp_path / "blocks"), map=map_path, images=50))
    assert max(sizes) == 7 and sum(sizes) == 50
    whole, blocks = (load(tmp_path / name)[0] for name in ("whole", "blocks"))
    np.testing.assert_allclose(whole, blocks, atol=1e-5)


# Poses and CTF parameters


def test_uniform_orientations_cover_the_sphere_and_preferred_ones_do_not(map_path, tmp_path):
    def views(kind):
        options = SimulateOptions(str(tmp_path / kind), map=map_path, images=3000, orientations=kind)
        return simulator._poses(options, BOX)[0]

    uniform, preferred = views("uniform"), views("preferred")
    # All nine elements of uniform rotations have mean 0 and variance 1/3.
    assert np.abs(uniform.mean(0)).max() < 0.05 and np.abs((uniform**2).mean(0) - 1 / 3).max() < 0.03
    near = preferred[:, 2, 2] > np.cos(np.radians(40))
    assert 0.88 < near.mean() < 0.96 and preferred[:, 2, 2].min() < -0.8
    tilt = np.degrees(np.arccos(preferred[near, 2, 2]))
    # A cap of 13 degrees r.m.s. on each of two axes.
    assert 16 < np.sqrt((tilt**2).mean()) < 20


def test_euler_angles_give_their_rotation_back_also_at_the_poles():
    tilts = np.array([0.0, 180.0, 1e-4, 179.999, 90.0, 33.0])
    rotations = np.concatenate([euler_to_rotation(np.full(6, 50.0), tilts, np.full(6, -170.0)), random_rotations(50)])
    np.testing.assert_allclose(euler_to_rotation(*rotation_to_euler(rotations).T), rotations, atol=1e-9)


def test_given_poses_and_ctf_rows_are_used_in_order(map_path, tmp_path):
    rng = np.random.default_rng(0)
    rotations, shifts = random_rotations(30).astype(np.float32), rng.normal(0, 0.02, (30, 2)).astype(np.float32)
    rows = np.zeros((30, 9), np.float32)
    rows[:, :2], rows[:, 2:4], rows[:, 5:8] = (256, 1.1), rng.uniform(1e4, 2e4, (30, 1)), (200, 1.4, 0.07)
    rows[15:, 5] = 300
    for name, value in (("poses", (rotations, shifts)), ("ctf", rows)):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(value))
    options = SimulateOptions(str(tmp_path / "out"), map=map_path, poses=str(tmp_path / "poses.pkl"))
    options.ctf, options.keep_order = str(tmp_path / "ctf.pkl"), True
    simulate(options)
    _, found_rotations, found_shifts, summary = load(tmp_path / "out")
    assert summary["images"] == 30
    np.testing.assert_array_equal(found_rotations, rotations)
    np.testing.assert_array_equal(found_shifts, shifts)
    written = pickle.loads((tmp_path / "out" / "ctf.pkl").read_bytes())
    # Box and A/px become those of the simulated stack; the rest stays.
    assert np.allclose(written[:, :2], (BOX, PIXEL_SIZE_A)) and np.allclose(written[:, 2:], rows[:, 2:], rtol=1e-6)
    options.out, options.keep_order, options.images, options.shift = str(tmp_path / "drawn"), False, 20, 0.0
    simulate(options)
    drawn = pickle.loads((tmp_path / "drawn" / "ctf.pkl").read_bytes())
    assert len(drawn) == 20 and not np.allclose(drawn[:, 2], rows[:20, 2]) and np.isin(drawn[:, 2], rows[:, 2]).all()
    assert (load(tmp_path / "drawn")[2] == 0).all()


# Files


def test_everything_is_written_and_valid(stack):
    assert sorted(path.name for path in stack.iterdir()) == FILES
    for name in ("particles.mrcs", "truth.mrc", "mask.mrc"):
        assert mrcfile.validate(stack / name, print_file=io.StringIO())
    with mrcfile.open(stack / "particles.mrcs") as handle:
        assert handle.is_image_stack() and handle.data.shape == (40, BOX, BOX)
        assert handle.voxel_size.x == handle.voxel_size.y == PIXEL_SIZE_A
    mask = read_map(stack / "mask.mrc")[0]
    assert mask.min() == 0 and mask.max() == 1


def test_starfile_reads_the_poses_that_are_in_the_pickle(stack):
    starfile = pytest.importorskip("starfile")
    tables = starfile.read(stack / "particles.star")
    optics, particles = tables["optics"], tables["particles"]
    _, rotations, shifts, _ = load(stack)
    angles = [particles["rlnAngle" + name].to_numpy() for name in ("Rot", "Tilt", "Psi")]
    np.testing.assert_allclose(euler_to_rotation(*angles), rotations, atol=1e-6)
    origins = particles[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()
    np.testing.assert_allclose(origins / (BOX * PIXEL_SIZE_A), shifts, atol=1e-6)
    assert float(optics["rlnImagePixelSize"].iloc[0]) == PIXEL_SIZE_A and int(optics["rlnImageSize"].iloc[0]) == BOX
    assert particles["rlnImageName"].iloc[1] == "000002@particles.mrcs"
    assert sorted(particles["rlnRandomSubset"].value_counts()) == [20, 20]
    # RELION would take the tables for old ones without it.
    assert (stack / "particles.star").read_text().count("# version 30001") == 2


def test_cryodrgn_parses_the_star_file_into_the_same_pickles(stack, tmp_path):
    pytest.importorskip("cryodrgn")
    from cryodrgn.commands import parse_ctf_star, parse_pose_star

    for command, name in ((parse_pose_star, "poses.pkl"), (parse_ctf_star, "ctf.pkl")):
        parser = argparse.ArgumentParser()
        command.add_args(parser)
        command.main(parser.parse_args([str(stack / "particles.star"), "-o", str(tmp_path / name)]))
    logging.getLogger().setLevel(logging.WARNING)
    theirs, ours = (pickle.loads((folder / "poses.pkl").read_bytes()) for folder in (tmp_path, stack))
    np.testing.assert_allclose(theirs[0], ours[0], atol=1e-4)
    np.testing.assert_allclose(theirs[1], ours[1], atol=1e-4)
    theirs, ours = (pickle.loads((folder / "ctf.pkl").read_bytes()) for folder in (tmp_path, stack))
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)


def test_particles_of_two_microscopes_get_two_optics_groups(tmp_path):
    starfile = pytest.importorskip("starfile")
    from cryosplat.stackfiles import image_names, write_star

    rows = np.tile([15000.0, 14000.0, 0.3, 300.0, 2.7, 0.1, 0.0], (6, 1))
    rows[[1, 4], 3] = 200.0
    path = tmp_path / "two.star"
    write_star(
        path, image_names("s.mrcs", range(6)), random_rotations(6), np.zeros((6, 2)), rows, np.zeros(6), BOX, 1.0
    )
    tables = starfile.read(path)
    voltage = tables["optics"].set_index("rlnOpticsGroup")["rlnVoltage"]
    assert voltage.loc[tables["particles"]["rlnOpticsGroup"]].tolist() == [300, 200, 300, 300, 200, 300]


def test_without_ctf_images_are_plain_projections(map_path, tmp_path):
    simulate(SimulateOptions(str(tmp_path / "out"), map=map_path, images=6, snr=np.inf, no_ctf=True))
    images, rotations, shifts, summary = load(tmp_path / "out")
    assert not (tmp_path / "out" / "ctf.pkl").exists()
    assert "Defocus" not in (tmp_path / "out" / "particles.star").read_text()
    expected = summary["truth_scale"] * exact_images(read_map(map_path)[0], rotations.astype(float), shifts)
    assert relative_error(images, expected) < 1e-3


def test_the_seed_fixes_every_pixel_and_the_snr_leaves_poses_alone(map_path, tmp_path):
    def contents(name, **changes):
        simulate(SimulateOptions(str(tmp_path / name), map=map_path, images=12, **changes))
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.suffix != ".mrc"}

    first, again = contents("first"), contents("again")
    first.pop("simulation.json"), again.pop("simulation.json")  # it names the output folder
    assert first == again and len(first) == 4
    other_snr, other_seed = contents("snr", snr=0.3), contents("seed", seed=1)
    for name in ("poses.pkl", "ctf.pkl", "particles.star"):
        assert other_snr[name] == first[name] and other_seed[name] != first[name]


def test_a_folder_in_use_is_refused_and_left_alone(map_path, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").write_text("data")
    with pytest.raises(InputError, match="not an empty folder"):
        simulate(SimulateOptions(str(tmp_path / "used"), map=map_path, images=2))
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    simulate(SimulateOptions(str(tmp_path / "empty"), map=map_path, images=2))
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == FILES


def test_a_failure_leaves_nothing_behind(map_path, tmp_path, monkeypatch):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    for name in ("stack_header", "write_poses"):
        with monkeypatch.context() as patch:
            patch.setattr(simulator.stackfiles, name, full_disk)
            with pytest.raises(InputError, match="No space left on device"):
                simulate(SimulateOptions(str(tmp_path / "out"), map=map_path, images=3))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr": 0.0}, "must be positive"),
        ({"images": 0}, "at least 1"),
        ({"seed": -1}, "negative"),
        ({"box": 33, "map": None}, "even"),
        ({"box": 48}, "own box"),
        ({"model": "x.pdb"}, "choose one source"),
        ({"map": "missing.mrc"}, "no such map"),
        ({"map": None, "model": "missing.pdb"}, "no such model"),
        ({"map": None, "box": 16}, "use a box of at least"),
        ({"poses": "missing.pkl"}, "missing.pkl"),
        ({"keep_order": True}, "--poses and --ctf"),
        ({"no_ctf": True, "ctf": "x.pkl"}, "choose one"),
        ({"shift": 9.0}, "too large"),
        ({"defocus_min": 30000.0}, "maximum"),
        ({"orientations": "sideways"}, "uniform or preferred"),
        ({"solvent": 2.0}, "between 0 and 1"),
    ],
)
def test_impossible_requests_are_named(map_path, tmp_path, changes, message, request):
    if changes == {"map": None, "box": 16}:
        phantom = request.getfixturevalue("phantom")
        request.getfixturevalue("monkeypatch").setattr(simulator, "protein_phantom", lambda seed: phantom)
    options = SimulateOptions(**({"out": str(tmp_path / "out"), "map": map_path, "images": 3} | changes))
    with pytest.raises(InputError, match=message):
        simulate(options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("poses", np.zeros((4, 3))),
        ("poses", (np.tile(np.eye(3), (4, 1, 1)), np.zeros((5, 2)))),
        ("poses", (np.tile(np.diag([1.0, 1, -1]), (4, 1, 1)), np.zeros((4, 2)))),
        ("ctf", np.zeros((4, 8))),
        ("ctf", np.zeros((4, 9))),
        ("noise_spectrum", np.zeros(10)),
        ("noise_spectrum", np.array([1.0, -1.0])),
        ("noise_spectrum", np.ones((3, 3))),
    ],
)
def test_files_of_the_wrong_content_are_named(map_path, tmp_path, option, value):
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps(value))
    options = SimulateOptions(str(tmp_path / "out"), map=map_path)
    setattr(options, option, str(path))
    with pytest.raises(InputError, match="bad.pkl"):
        simulate(options)
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_line_has_the_defaults_of_the_options(map_path, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    simulator.add_arguments(parser)
    given = vars(parser.parse_args(["--out", "somewhere"]))
    assert SimulateOptions(**given) == SimulateOptions("somewhere")
    arguments = parser.parse_args(["--out", str(tmp_path / "o"), "--map", map_path, "--images", "3", "--snr", "inf"])
    simulator.run(arguments)
    assert "3 images of 32 px at 2.5 A/px" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "made-up protein" in capsys.readouterr().out


# Atoms and the phantom


def torsion(points):
    """Torsion in degrees of the last four points of every window, (N - 3,), of a chain (N, 3)."""
    bonds = np.diff(points, axis=0)
    normals = np.cross(bonds[:-1], bonds[1:])
    middle = bonds[1:-1] / np.linalg.norm(bonds[1:-1], axis=1, keepdims=True)
    sine = (np.cross(normals[:-1], normals[1:]) * middle).sum(1)
    return np.degrees(np.arctan2(sine, (normals[:-1] * normals[1:]).sum(1)))


def chains(atoms):
    """CA positions of every chain; a residue number is left out between chains."""
    alpha = atoms.names == "CA"
    numbers = atoms.residues[alpha]
    return np.split(atoms.positions_a[alpha], np.flatnonzero(np.diff(numbers) != 1) + 1)


def test_the_phantom_has_right_handed_helices_and_extended_strands(phantom):
    angles = np.concatenate([torsion(chain) for chain in chains(phantom)])
    # Consecutive CA atoms of a right-handed alpha helix turn by +50 degrees, of a left-handed one by -50.
    assert (np.abs(angles - 50) < 8).mean() > 0.35
    assert (np.abs(angles + 50) < 8).mean() < 0.04
    assert (np.abs(np.abs(angles) - 180) < 40).mean() > 0.15


def test_the_phantom_is_made_of_l_residues(phantom):
    for residue in np.unique(phantom.residues):
        own = phantom.residues == residue
        named = dict(zip(phantom.names[own], phantom.positions_a[own], strict=True))
        if "CB" in named:
            n, carbonyl, beta = (named[name] - named["CA"] for name in ("N", "C", "CB"))
            assert np.cross(carbonyl, beta) @ n > 0


@pytest.mark.parametrize("seed", [0, 5])
def test_the_phantom_is_compact_asymmetric_and_without_clashes(phantom, seed):
    atoms = phantom if seed == 0 else protein_phantom(seed)
    assert 3000 < len(atoms) < 6000
    # 4,000 heavy atoms of a globular protein have a radius of gyration of 25 A; these four subunits touch.
    assert 40 < atoms.radius_a < 55 and np.sqrt((atoms.positions_a**2).sum(1).mean()) < 32
    alpha = np.concatenate(chains(atoms))
    distance = np.linalg.norm(alpha[:, None] - alpha, axis=-1)
    assert distance[~np.eye(len(alpha), dtype=bool)].min() > 3.4
    for chain in chains(atoms):
        assert np.abs(np.linalg.norm(np.diff(chain, axis=0), axis=1) - 3.8).max() < 0.15
    moments = np.linalg.eigvalsh(np.cov(atoms.positions_a.T))
    assert moments[2] > 1.1 * moments[1] > 1.2 * moments[0]
    third_moment = (atoms.positions_a @ np.linalg.eigh(np.cov(atoms.positions_a.T))[1]) ** 3
    assert np.abs(third_moment.mean(0)).max() > 0.1 * moments[1] ** 1.5


def test_phantoms_of_one_seed_are_equal_and_of_two_are_not(phantom):
    again, other = protein_phantom(0), protein_phantom(7)
    np.testing.assert_array_equal(phantom.positions_a, again.positions_a)
    assert len(other) != len(phantom) or not np.allclose(other.positions_a, phantom.positions_a)


def test_density_holds_the_electrons_at_the_right_place(phantom):
    volume = density(phantom, 56, 2.5)
    assert volume.dtype == np.float32 and volume.shape == (56, 56, 56)
    z, y, x = np.indices(volume.shape) - 28
    mass = volume.sum()
    assert np.abs([(axis * volume).sum() / mass for axis in (x, y, z)]).max() < 0.2
    inside = soft_mask(volume, 2.5) > 0.99
    # Nearly all of it lies within the mask, which is a small part of the box.
    assert volume[inside].sum() > 0.97 * mass and inside.mean() < 0.25
    spectrum = np.abs(np.fft.fftn(volume))
    frequency = np.fft.fftfreq(56) * 56
    radius = np.sqrt(frequency[:, None, None] ** 2 + frequency[:, None] ** 2 + frequency**2)
    assert spectrum[radius > 28.01].max() < 1e-5 * spectrum.max()


def test_density_does_not_depend_on_the_fine_grid_or_the_blur():
    """One carbon against the analytic Gaussians of its electron scattering factor."""
    gemmi = pytest.importorskip("gemmi")
    for b_factor, pixel_size_a in ((60.0, 2.0), (5.0, 2.0), (5.0, 0.8)):
        carbon = Atoms(np.zeros((1, 3)), np.array(["C"]), np.array([b_factor]), np.array(["CA"]), np.array([1]))
        spectrum = np.fft.fftn(np.fft.ifftshift(density(carbon, 16, pixel_size_a))).real * pixel_size_a**3
        frequency = np.fft.fftfreq(16, pixel_size_a)
        squared = (frequency[:, None, None] ** 2 + frequency[:, None] ** 2 + frequency**2).reshape(-1)
        form = gemmi.Element("C").c4322
        coefficients = zip(form.a, form.b, strict=True)
        expected = sum(a * np.exp(-(b + b_factor) / 4 * squared) for a, b in coefficients)
        inside = squared < (0.49 / pixel_size_a) ** 2
        assert np.abs(spectrum.reshape(-1) - expected)[inside].max() < 5e-3 * expected.max()


def test_solvent_takes_density_from_the_inside_of_the_molecule(phantom):
    vacuum, wet = density(phantom, 56, 2.5), density(phantom, 56, 2.5, solvent=0.65)
    assert 0.25 < wet.sum() / vacuum.sum() < 0.5
    removed, mask = vacuum - wet, soft_mask(vacuum, 2.5)
    # Outside there is nothing but the ringing of the cut at Nyquist.
    assert np.abs(removed[mask < 0.01]).max() < 0.05 * removed.max()
    assert removed[mask > 0.99].sum() > 0.95 * removed.sum()


def test_the_default_source_is_the_phantom_in_a_box_with_room_round_it(phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(simulator, "protein_phantom", lambda seed: phantom)
    summary = simulate(SimulateOptions(str(tmp_path / "out"), images=3, pixel_size=4.0))
    assert summary["box"] == 40 and summary["pixel_size_a"] == 4.0
    truth, pixel_size_a = read_map(tmp_path / "out" / "truth.mrc")
    assert pixel_size_a == 4.0
    np.testing.assert_array_equal(truth, density(phantom, 40, 4.0, solvent=SimulateOptions("x").solvent))


def test_a_molecule_larger_than_the_box_is_refused_with_the_box_it_needs(phantom):
    with pytest.raises(InputError, match="use a box of at least (\\d+) px") as failure:
        density(phantom, 32, 2.5)
    needed = int(str(failure.value).split("at least ")[1].split()[0])
    density(phantom, needed, 2.5)
    with pytest.raises(InputError):
        density(phantom, needed - 2, 2.5)


PDB = """\
ATOM      1  N   ALA A   1      11.104   6.134  -6.504  1.00 10.00           N
ATOM      2  CA AALA A   1      11.639   6.071  -5.147  0.60 20.00           C
ATOM      3  CA BALA A   1      11.700   6.100  -5.200  0.40 25.00           C
ATOM      4  H   ALA A   1      11.000   7.000  -6.900  1.00 10.00           H
ATOM      5  N   GLY B   1      14.000   7.000  -5.000  1.00 30.00           N
HETATM    6  O   HOH A 101      20.000  20.000  20.000  1.00 30.00           O
HETATM    7 ZN    ZN A 102      12.000   8.000  -5.000  1.00 40.00          ZN
END
"""


def test_a_model_is_read_without_waters_hydrogens_and_alternatives(tmp_path):
    (tmp_path / "small.pdb").write_text(PDB)
    atoms = read_model(tmp_path / "small.pdb")
    assert sorted(atoms.elements) == ["C", "N", "N", "Zn"]
    assert sorted(atoms.b_factors_a2) == [10, 20, 30, 40] and len(np.unique(atoms.residues)) == 3
    assert (read_model(tmp_path / "small.pdb", 55.0).b_factors_a2 == 55).all()


def test_models_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "none.pdb").write_text("END\n")
    (tmp_path / "water.pdb").write_text("\n".join(line for line in PDB.splitlines() if "HOH" in line) + "\n")
    (tmp_path / "broken.cif").write_text("data_x\nloop_\n_atom_site.id\n")
    lines = [line[:60] + "  0.00" + line[66:] for line in PDB.splitlines()]
    (tmp_path / "flat.pdb").write_text("\n".join(lines) + "\n")
    expected = (("none.pdb", "no atoms"), ("water.pdb", "no atoms"), ("broken.cif", "broken"), ("flat.pdb", "B factor"))
    for name, message in expected:
        with pytest.raises(InputError, match=message):
            read_model(tmp_path / name)


def test_a_real_model_gives_the_map_of_the_benchmark(shared, tmp_path):
    model = shared / "data" / "models" / "3j9i.pdb"
    script = shared / "bench" / "make_truth.py"
    options = ["--box", "64", "--apix", "4.1", "--b", "60", "--solvent", "0"]
    subprocess.run([sys.executable, script, model, tmp_path / "t.mrc", *options], check=True, capture_output=True)
    ours = density(read_model(model, 60.0), 64, 4.1)
    assert relative_error(ours, read_map(tmp_path / "t.mrc")[0]) < 1e-4
