"""Runs of particles with a point group: as good as of K times the images, where RELION has it, and not unnoticed."""

import json
import shutil

import mrcfile
import numpy as np
import pytest
import ranks
import torch
import training_set
from ranks import Job
from test_symmetry import relion
from training_set import BOX, PIXEL_SIZE_A, fitted, trained

from cryosplat import stackfiles
from cryosplat.cli import main
from cryosplat.errors import InputError
from cryosplat.fsc import fsc
from cryosplat.gaussians import mixture_to_map
from cryosplat.linearmaps import without_ball
from cryosplat.masks import spherical_mask
from cryosplat.outputs import read_mixture
from cryosplat.particles import read_particles
from cryosplat.simulate import SimulateOptions, simulate
from cryosplat.symmetry import point_group
from cryosplat.volumes import read_map, write_map

FEW = {"C7": 60, "D7": 30, "T": 35, "O": 60, "I": 60}
"""Images of a run with the symmetry. One without it has about K times as many, at most ``MANY``: in so small a box all
copies of an image under O or I lie close to each other, and say less than K images do."""

MANY = 420
OWN = ("data.poses=null", "data.ctf=null", "data.check_signal=false", "model.gaussians=null", "data.check_sign=false")
"""Poses and CTF of the star file, and nothing refused: what matters here is what comes of it."""


def symmetric_map(name: str) -> np.ndarray:
    """Blobs anywhere within 40 A of the axes and all their copies, on the grid of ``training_set``; no mirror plane."""
    group, rng = point_group(name), np.random.default_rng(5)
    directions = rng.standard_normal((max(2, 60 // len(group)), 3))
    radii = 40 * rng.uniform(0.02, 1, len(directions)) ** 0.5
    blobs = directions / np.linalg.norm(directions, axis=1)[:, None] * radii[:, None]
    z, y, x = (np.indices((BOX,) * 3) - BOX // 2) * PIXEL_SIZE_A
    grid, volume = np.stack([x, y, z], -1), np.zeros((BOX,) * 3)
    for turn in group:
        for blob in blobs @ turn.T:
            volume += np.exp(-((grid - blob) ** 2).sum(-1) / (2 * training_set.BLOB_SIGMA_A**2))
    return volume.astype(np.float32)


@pytest.fixture(scope="module")
def stack_of(tmp_path_factory):
    """Makes the set of a group once."""
    made = {}

    def stack(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            write_map(folder / "molecule.mrc", symmetric_map(name), PIXEL_SIZE_A)
            made[name] = folder / "stack"
            options = {"map": str(folder / "molecule.mrc"), "images": MANY, "snr": 0.1, "seed": 1}
            simulate(SimulateOptions(out=str(made[name]), **options))
        return made[name]

    return stack


@pytest.fixture(scope="module")
def c7(stack_of, tmp_path_factory):
    """A run of C7, to be read only."""
    words = ("model.symmetry=C7", f"data.first={FEW['C7']}")
    return fitted(stack_of("C7"), tmp_path_factory.mktemp("c7") / "run", *OWN, *words)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def volume(folder, name):
    return read_map(folder / f"{name}.mrc")[0]


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", FEW)
def test_a_run_with_symmetry_is_as_good_as_one_without_of_many_more_images(stack_of, tmp_path, name):
    few = FEW[name]
    runs = {}
    for symmetry, count in ((name, few), ("C1", few), ("C1", min(MANY, few * len(point_group(name))))):
        words = (f"model.symmetry={symmetry}", f"data.first={count}")
        runs[symmetry, count] = summary_of(fitted(stack_of(name), tmp_path / f"{symmetry}_{count}", *OWN, *words))
    with_it, too_few, enough = runs.values()
    for score in ("fsc_truth_mean", "fsc_mixture_truth_mean", "fsc_linear_truth_mean"):
        assert with_it[score] > enough[score] - 0.04, score
        assert with_it[score] > too_few[score] + 0.04, score
    assert with_it["symmetry"] == name.replace("I", "I2") and too_few["symmetry"] == "C1"
    assert with_it["gaussians"] % len(point_group(name)) == 0
    assert not [text for text in with_it["warnings"] if "contradict" in text]


def test_a_run_from_one_unit_is_that_of_the_expanded_set(stack_of, c7, tmp_path):
    """Every image entered seven times, under the views R S: the same linear maps, and mixtures within their noise."""
    source, few, group = stack_of("C7"), FEW["C7"], point_group("C7")
    table = read_particles(
        training_set.config(source, tmp_path, *OWN, f"data.first={few}", of=training_set.VOLUME_SETTINGS).data,
        source,
        0,
        True,
    )
    folder = tmp_path / "stack"
    folder.mkdir()
    shutil.copy(source / "truth.mrc", folder)
    with mrcfile.open(source / "particles.mrcs") as given, mrcfile.new(folder / "expanded.mrcs") as file:
        file.set_data(np.repeat(given.data[:few], 7, axis=0))
        file.set_image_stack()
        file.voxel_size = PIXEL_SIZE_A
    rotations = (table.rotations[:, None] @ group).reshape(-1, 3, 3)
    shifts, half = np.repeat(table.shifts, 7, 0), np.repeat(table.half, 7)
    names = stackfiles.image_names("expanded.mrcs", range(len(rotations)))
    poses_and_ctf = rotations, shifts, np.repeat(table.ctf, 7, 0), half
    stackfiles.write_star(folder / "expanded.star", names, *poses_and_ctf, BOX, PIXEL_SIZE_A)
    expanded = fitted(folder, tmp_path / "run", *OWN, "data.particles=expanded.star")
    sphere = spherical_mask(BOX)
    for name in ("half_a", "half_b"):
        assert relative(volume(expanded, name) * sphere, volume(c7, name) * sphere) < 0.01
    scores = [summary_of(folder)["fsc_mixture_truth_mean"] for folder in (c7, expanded)]
    assert abs(scores[0] - scores[1]) < 0.05
    assert fsc(volume(c7, "mixture"), volume(expanded, "mixture"), PIXEL_SIZE_A, sphere).fsc[1:8].min() > 0.9


@pytest.mark.parametrize("name", ["C7", "D7", "T", "I"])
def test_the_map_lies_as_that_of_relion_and_a_wrong_axis_does_not(stack_of, tmp_path, name):
    source, found = stack_of(name), {}
    wrong = {"C7": "C6", "D7": "D6", "T": "O", "I": "I1"}[name]
    for symmetry in (name, wrong):
        words = (f"data_root={source}", "data.particles=particles.star", "--no-halves", "--sym", symmetry)
        assert main(["backproject", *words, "-o", str(tmp_path / symmetry)]) == 0
        found[symmetry] = volume(tmp_path / symmetry, "unregularised")
    words = ("--i", "particles.star", "--o", tmp_path / "relion.mrc", "--sym", name, "--ctf", "--angpix", PIXEL_SIZE_A)
    relion("relion_reconstruct", *words, cwd=source)
    theirs, sphere = read_map(tmp_path / "relion.mrc")[0], spherical_mask(BOX)
    right = fsc(found[name], theirs, PIXEL_SIZE_A, sphere).fsc
    assert right[1:9].min() > 0.95
    balls = [without_ball(one.astype(np.float32)) for one in (found[wrong], theirs)]
    assert fsc(*balls, PIXEL_SIZE_A, sphere).fsc[3:9].mean() < 0.85


def test_the_delivered_maps_have_the_symmetry(stack_of, tmp_path):
    """Of D4, turned by quarters, voxels to voxels; without the first planes, which have no partner."""
    run = fitted(stack_of("D4"), tmp_path / "run", *OWN, "model.symmetry=D4", "data.first=100")
    inner, sphere = slice(1, None), spherical_mask(BOX)[1:, 1:, 1:]
    largest = {"mixture": 1e-4, "mixture_half_a": 1e-4, "map": 0.03, "half_a": 0.05, "half_b": 0.05, "linear": 0.03}
    for name, allowed in largest.items():
        found = volume(run, name)[inner, inner, inner]
        for turned in (np.rot90(found, axes=(1, 2)), np.rot90(found, 2, axes=(0, 1))):
            assert relative(turned * sphere, found * sphere) < allowed, name
    plain = fitted(stack_of("D4"), tmp_path / "plain", *OWN, "data.first=100")
    found = volume(plain, "half_a")[inner, inner, inner]
    assert relative(np.rot90(found, axes=(1, 2)) * sphere, found * sphere) > 0.3


def test_files_of_gaussians_hold_the_whole_and_say_what_the_unit_is(c7):
    summary, arrays = summary_of(c7), np.load(c7 / "gaussians.npz")
    assert str(arrays["symmetry"]) == "C7" and np.array_equal(arrays["operators"], point_group("C7"))
    for model, prefix in (("full", ""), ("half_a", "half_a_"), ("half_b", "half_b_")):
        unit, means = int(arrays[f"{prefix}asymmetric_unit"]), arrays[f"{prefix}means"]
        assert len(means) == 7 * unit == summary["gaussians_by_model"][model]
        for turn, copy in zip(arrays["operators"], np.split(means, 7), strict=True):
            np.testing.assert_allclose(copy, means[:unit] @ turn.T, atol=1e-3)
    for file in ("gaussians.npz", "gaussians.ply"):
        mixture = read_mixture(c7 / file)
        names = ("means", "scales", "quaternions", "amplitudes")
        tensors = {key: torch.from_numpy(mixture[key]) for key in names}
        drawn = mixture_to_map(tensors, BOX, PIXEL_SIZE_A).numpy()
        assert relative(drawn, volume(c7, "mixture")) < 1e-4
    header = (c7 / "gaussians.ply").read_bytes()[:3000]
    assert b"comment symmetry C7\n" in header and f"asymmetric_unit {summary['gaussians'] // 7}\n".encode() in header


def test_training_image_by_image_knows_the_symmetry(stack_of, tmp_path):
    words = ("data.poses=null", "data.ctf=null", "data.check_sign=false", "data.check_signal=false", "data.first=60")
    runs, longer = {}, ("train.epochs=10",)
    for symmetry in ("C1", "D7"):
        run = trained(
            stack_of("D7"), tmp_path / symmetry, *words, f"model.symmetry={symmetry}", "model.gaussians=1120", *longer
        )
        runs[symmetry] = summary_of(run)
    assert runs["D7"]["gaussians"] == runs["C1"]["gaussians"] == 1120
    assert runs["D7"]["fsc_mixture_truth_mean"] > runs["C1"]["fsc_mixture_truth_mean"] + 0.05


def test_a_run_goes_on_with_its_own_symmetry_alone(stack_of, c7):
    words = ("data.first=60",)
    before = (c7 / "summary.json").read_bytes()
    fitted(stack_of("C7"), c7, *OWN, "model.symmetry=c07", *words)  # the same by another name
    for other in ("C1", "D7"):
        with pytest.raises(InputError, match=rf"model\.symmetry: 'C7' -> '{other}'"):
            fitted(stack_of("C7"), c7, *OWN, f"model.symmetry={other}", *words)
    assert (c7 / "summary.json").read_bytes() == before


def test_two_ranks_give_the_maps_of_one(stack_of, c7, tmp_path):
    words = (*OWN, "model.symmetry=C7", f"data.first={FEW['C7']}")
    words = training_set.settings(stack_of("C7"), tmp_path / "run", *words, of=training_set.VOLUME_SETTINGS)
    (outcome,) = ranks.run_jobs(tmp_path, [Job("plain", 2, str(tmp_path / "two"), words)])
    assert outcome.codes == [0, 0], outcome.texts
    for name in ("half_a", "half_b"):
        assert relative(volume(tmp_path / "run", name), volume(c7, name)) < 1e-4
    for name in ("map", "mixture"):
        assert fsc(volume(tmp_path / "run", name), volume(c7, name), PIXEL_SIZE_A).fsc[1:10].min() > 0.98
    shares = [summary_of(folder)["symmetric_share"] for folder in (tmp_path / "run", c7)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)


# What the images say of the group


@pytest.mark.parametrize(
    ("particle", "said", "least", "most"),
    [("C7", "C7", 0.9, 1.1), ("D7", "C7", 0.9, 1.1), ("O", "T", 0, 0.6), ("C7", "D7", 0.3, 0.7), ("I", "I", 0.9, 1.1)],
)
def test_a_symmetry_is_asked_of_the_images(stack_of, tmp_path, caplog, particle, said, least, most):
    """T of RELION has a three-fold along z, where O has a four-fold: a group in it all the same, elsewhere."""
    run = fitted(stack_of(particle), tmp_path / "run", *OWN, f"model.symmetry={said}", "volume.steps=2")
    summary = summary_of(run)
    assert least < summary["symmetric_share"] < most
    warned = [text for text in summary["warnings"] if f"contradict symmetry {said}" in text]
    assert bool(warned) == (most < 0.9) == ("contradict symmetry" in caplog.text)


def test_an_asymmetric_particle_called_c2_is_not_passed_over(tmp_path_factory, tmp_path, caplog, capsys):
    stack = training_set.training_set(tmp_path_factory)
    summary = summary_of(fitted(stack, tmp_path / "run", "model.symmetry=C2"))
    assert 0.3 < summary["symmetric_share"] < 0.7
    assert "the images contradict symmetry C2: only" in caplog.text
    (warning,) = [text for text in summary["warnings"] if "contradict" in text]
    assert "about 50 % of one that has nothing of it" in warning and "docs/physics.md#symmetry" in warning
    caplog.clear()
    words = (f"data_root={stack}", "data.particles=particles.star", "model.symmetry=C2", "-o", str(tmp_path / "linear"))
    assert main(["backproject", *words]) == 0
    assert "the images contradict symmetry C2" in caplog.text + capsys.readouterr().err


def test_nothing_is_said_of_images_that_agree_on_too_little(stack_of, tmp_path):
    words = ("model.symmetry=I", "data.first=4", "volume.steps=2")
    assert summary_of(fitted(stack_of("I"), tmp_path / "run", *OWN, *words))["symmetric_share"] is None


def test_an_unknown_group_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"model\.symmetry = X3: expected C<n> or D<n> .*T, O, I, I1, I2, I3"):
        training_set.config("stack", "run", "model.symmetry=X3")
