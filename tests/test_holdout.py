"""Held-out images train nothing, and their likelihood is what the formula says, on any number of ranks."""

import csv
import shutil
from unittest import mock

import mrcfile
import numpy as np
import pytest
import torch
import training_set
from ranks import Job, run_jobs
from scipy.fft import rfft2
from scipy.spatial.transform import Rotation

from cryosplat.ctf import ctf_image
from cryosplat.errors import InputError
from cryosplat.halves import hold_out
from cryosplat.listing import Listing
from cryosplat.metrics import HOLDOUT_COLUMNS, append_holdout, read_metrics
from cryosplat.sampling import BatchPlan
from cryosplat.unpickle import read_pickle


def listing(tmp_path, slices, group=None):
    count = len(slices)
    return Listing(
        path=tmp_path / "particles.star",
        names=("stack.mrcs",),
        stack=np.zeros(count, dtype=np.int32),
        slices=np.asarray(slices, dtype=np.int64),
        group=np.full(count, -1) if group is None else np.asarray(group),
    )


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5])
def test_either_half_gives_its_share(tmp_path, fraction):
    half = (np.arange(3000) % 3 == 0).astype(np.int8)
    held_out = hold_out(listing(tmp_path, np.arange(3000)), np.arange(3000), half, fraction, seed=1)
    for h in (0, 1):
        assert held_out[half == h].mean() == pytest.approx(fraction, abs=0.001)


def test_rows_that_are_the_same_image_never_part_not_even_between_halves(tmp_path):
    slices = np.arange(900) // 3
    half = np.random.default_rng(0).integers(0, 2, 900).astype(np.int8)
    held_out = hold_out(listing(tmp_path, slices), np.arange(900), half, 0.1, seed=0)
    assert 60 <= held_out.sum() <= 90
    assert all(len(np.unique(held_out[slices == image])) == 1 for image in range(300))


def test_whole_micrographs_are_held_out_where_there_are_enough(tmp_path):
    group = np.arange(1000) // 10
    held_out = hold_out(listing(tmp_path, np.arange(1000), group), np.arange(1000), group % 2, 0.1, seed=0)
    assert held_out.sum() == 100
    assert all(len(np.unique(held_out[group == micrograph])) == 1 for micrograph in range(100))
    few = np.arange(1000) // 250  # a micrograph is more than a tenth
    held_out = hold_out(listing(tmp_path, np.arange(1000), few), np.arange(1000), few % 2, 0.1, seed=0)
    assert held_out.sum() == 100


def test_nothing_is_held_out_unless_asked_for_and_a_set_too_small_is_refused(tmp_path):
    small, half = listing(tmp_path, np.arange(3)), np.array([0, 0, 1])
    assert not hold_out(small, np.arange(3), half, 0.0, seed=0).any()
    with pytest.raises(InputError, match=r"data\.holdout=0\.02: half b has 1 particles"):
        hold_out(small, np.arange(3), half, 0.02, seed=0)


def test_held_out_particles_are_in_no_batch_and_shared_out_evenly():
    half = np.arange(1000) % 2
    held_out = np.random.default_rng(0).random(1000) < 0.2
    plan = BatchPlan(half, 32, 0, held_out)
    for epoch in (0, 3):
        assert sorted(np.concatenate(plan.epoch(epoch))) == np.flatnonzero(~held_out).tolist()
    assert plan.particles == (~held_out).sum()
    shares = np.bincount(plan.owner(4)[held_out], minlength=4)
    assert shares.max() - shares.min() <= 4


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


WORDS = ("data.holdout=0.1", "maps.every=1", "train.whiten=true", "model.cutoff=8")


@pytest.fixture(scope="module")
def run(stack, tmp_path_factory):
    return training_set.trained(stack, tmp_path_factory.mktemp("held_out") / "run", *WORDS)


@pytest.fixture(scope="module")
def held_out(run):
    return training_set.last_checkpoint(run)["held_out"].numpy()


def test_what_is_held_out_changes_nothing_in_the_maps(stack, run, held_out, tmp_path):
    def replace(images):
        images[held_out] = 50 * np.random.default_rng(0).standard_normal(images[held_out].shape) + 7
        return images

    other = training_set.trained(training_set.altered(stack, tmp_path / "other", replace), tmp_path / "run", *WORDS)
    assert held_out.sum() == 30
    names = {path.name for path in run.glob("*.mrc")}
    assert {"map.mrc", "half_a.mrc", "half_b.mrc", "linear.mrc", "mixture.mrc", "mixture_half_a.mrc"} <= names
    for name in names:
        np.testing.assert_array_equal(mrcfile.read(run / name), mrcfile.read(other / name), err_msg=name)
    assert (run / "holdout.csv").read_bytes() != (other / "holdout.csv").read_bytes()


def projection(mixture, rotation, shift, box):
    """The image of half b's Gaussians as docs/physics.md has it, without a cut-off; lengths in pixels."""
    size = float(mixture["pixel_size_a"])
    means, scales = mixture["half_b_means"] / size, mixture["half_b_scales"] / size
    turns = Rotation.from_quat(mixture["half_b_quaternions"][:, [1, 2, 3, 0]]).as_matrix()
    rows = (rotation @ turns)[:, :2] * scales[:, None]
    covariances = rows @ rows.transpose(0, 2, 1)
    y, x = np.indices((box, box))
    image = np.zeros((box, box))
    amplitudes = mixture["half_b_amplitudes"] / size**2
    for centre, covariance, amplitude in zip((means @ rotation.T)[:, :2], covariances, amplitudes, strict=True):
        d = np.stack([x, y], -1) - (centre + box // 2 - shift * box)
        exponent = np.einsum("yxi,ij,yxj->yx", d, np.linalg.inv(covariance), d)
        image += amplitude * np.exp(-exponent / 2) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))
    return image


def test_gains_are_those_of_the_formula(stack, run, held_out):
    """From pixels, poses, CTF and Gaussians on disk, in NumPy."""
    box, half, images = training_set.BOX, training_set.halves(stack), mrcfile.read(stack / "particles.mrcs")
    y, x = np.indices((box, box)) - box // 2
    corners = y**2 + x**2 > (box // 2) ** 2
    deviation = images[:, corners].std(1, ddof=1)
    flat = (images - images[:, corners].mean(1)[:, None, None]) / deviation[:, None, None]
    ky, kx = np.fft.fftfreq(box) * box, np.fft.rfftfreq(box) * box
    shells = np.rint(np.hypot(ky[:, None], kx)).astype(int)
    mates = np.where(np.arange(box // 2 + 1) % (box // 2) == 0, 1, 2)
    rotations, shifts = read_pickle(stack / "poses.pkl")
    columns = read_pickle(stack / "ctf.pkl")[:, 2:].astype(np.float64)
    columns[:, [2, 6]] = np.radians(columns[:, [2, 6]])
    mixture, gain = np.load(run / "gaussians.npz"), 0.0
    for i in np.flatnonzero(held_out):
        mine = (half == half[i]) & ~held_out
        power = (np.abs(rfft2(flat[mine] * corners, norm="ortho")) ** 2).mean(0) / corners.mean()
        radial = np.bincount(shells.ravel(), power.ravel()) / np.bincount(shells.ravel())
        radial[:2] = radial[2]
        data = rfft2(flat[i], norm="ortho") * deviation[i] / np.sqrt((deviation[mine] ** 2).mean())
        model = rfft2(projection(mixture, rotations[i], shifts[i], box), norm="ortho")
        model = model * ctf_image(torch.from_numpy(columns[i : i + 1]), box, training_set.PIXEL_SIZE_A)[0].numpy()
        terms = mates * (np.abs(data) ** 2 - np.abs(model - data) ** 2) / radial[shells] / 2
        gain += terms[(shells > 0) & (shells <= box // 2)].sum() / held_out.sum()
    found = read_metrics(run / "holdout.csv", HOLDOUT_COLUMNS)
    assert found["images"][-1] == held_out.sum()
    assert found["gain_half_b"][-1] == pytest.approx(gain, rel=1e-3)


def test_bands_add_up_and_trained_images_gain_more(run):
    found = read_metrics(run / "holdout.csv", HOLDOUT_COLUMNS)
    assert found["epoch"].tolist() == [1, 2, 3]
    for name in ("gain", "trained"):
        bands = sum(found[f"{name}_band_{number}"] for number in (1, 2, 3, 4))
        np.testing.assert_allclose(bands, found[f"{name}_full"], rtol=1e-5)
        assert (np.diff(found[f"{name}_full"]) > 0).all()


NOISE = ("data.null=noise", "data.null_seed=3")


@pytest.fixture(scope="module")
def jobs(stack, tmp_path_factory):
    """Folder of the run on two ranks, and of one that was killed and went on; with images held out and with noise."""
    folder = tmp_path_factory.mktemp("jobs")
    todo = []
    for name, words in (("held out", WORDS), ("noise", NOISE)):
        for program, ranks in (("plain", 2), ("killed", 1)):
            place = folder / f"{name} {program}"
            todo.append(Job(program, ranks, str(place), training_set.settings(stack, place / "run", *words), 25))
    codes = [outcome.codes for outcome in run_jobs(folder, todo)]
    assert codes[::2] == [[0, 0], [0, 0]] and [0] not in codes
    for name, words in (("held out", WORDS), ("noise", NOISE)):
        training_set.trained(stack, folder / f"{name} killed" / "run", *words)
    return folder


def test_ranks_and_resumption_change_nothing(run, jobs):
    again = jobs / "held out killed/run/holdout.csv"
    assert again.read_bytes() == (run / "holdout.csv").read_bytes()
    one, two = (read_metrics(path, HOLDOUT_COLUMNS) for path in (again, jobs / "held out plain/run/holdout.csv"))
    for name in HOLDOUT_COLUMNS:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_null_run_is_a_run_like_any_other(stack, run, jobs, tmp_path):
    """It resumes, ranks change nothing; its grey scale is that of the images, or it would learn too little."""
    noise = training_set.trained(stack, tmp_path / "noise", *NOISE)
    maps = [mrcfile.read(folder / "map.mrc") for folder in (noise, jobs / "noise killed/run", jobs / "noise plain/run")]
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_allclose(maps[0], maps[2], atol=1e-3 * maps[0].std())
    units = [training_set.last_checkpoint(folder)["trainer"]["unit"] for folder in (noise, run)]
    torch.testing.assert_close(*units, rtol=0.1, atol=0)
    assert np.corrcoef(maps[0].ravel(), mrcfile.read(run / "map.mrc").ravel())[0, 1] < 0.7


def test_tensorboard_has_the_columns(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    table = read_metrics(run / "holdout.csv", HOLDOUT_COLUMNS)
    for name in HOLDOUT_COLUMNS[3:]:
        points = events.Scalars(f"holdout/{name}")
        assert [point.step for point in points] == table["step"].tolist()
        np.testing.assert_allclose([point.value for point in points], table[name], rtol=1e-5)


def test_a_run_is_not_resumed_with_other_images_held_out(stack, jobs, tmp_path):
    shutil.copytree(jobs / "held out killed/run", tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    with (
        mock.patch("cryosplat.particles.hold_out", lambda *words: np.roll(hold_out(*words), 2)),
        pytest.raises(InputError, match="other images are held out than when the run began"),
    ):
        training_set.trained(stack, tmp_path / "run", *WORDS)


def test_a_row_of_a_course_that_was_given_up_goes(tmp_path):
    for step in (10, 20, 30, 20):
        append_holdout(tmp_path / "holdout.csv", {"step": step, "epoch": 1, "gain_full": step / 7})
    with open(tmp_path / "holdout.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["10", "20"]
