"""Runs that fit in the volume, from end to end: halves share nothing, ranks agree, what is wrong is refused."""

import json
import pickle

import numpy as np
import pytest
import ranks
import torch
import training_set
from ranks import Job
from training_set import fitted, last_checkpoint

from cryosplat import checkpoint, train
from cryosplat.descent import Descent
from cryosplat.ending import ending
from cryosplat.errors import InputError
from cryosplat.metrics import HOLDOUT_COLUMNS, read_metrics, read_volume_fit
from cryosplat.volumes import read_map

OWN_COUNT = "model.gaussians=null"
UNCHECKED = "data.check_signal=false"
"""The noise in half b is no signal, and would be refused."""

PRODUCTS = ("map", "mixture", "linear", "half_a", "half_b", "mixture_half_a", "mixture_half_b", "mask")


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def noisy_half_b(stack, tmp_path_factory):
    return training_set.noise_in_half_b(stack, tmp_path_factory.mktemp("noise") / "stack")


@pytest.fixture(scope="module")
def inverted(stack, tmp_path_factory):
    return training_set.altered(stack, tmp_path_factory.mktemp("inverted") / "stack", lambda images: -images)


@pytest.fixture(scope="module")
def shuffled(stack, tmp_path_factory):
    """The training set with the rows of its poses in another order."""
    folder = training_set.altered(stack, tmp_path_factory.mktemp("shuffled") / "stack", lambda images: images)
    rotations, translations = pickle.loads((folder / "poses.pkl").read_bytes())
    order = np.random.default_rng(0).permutation(len(rotations))
    (folder / "poses.pkl").write_bytes(pickle.dumps((rotations[order], translations[order])))
    return folder


@pytest.fixture(scope="module")
def run_dir(stack, tmp_path_factory):
    """Of the default recipe, every model with as many Gaussians as it asks for; to be read only."""
    return fitted(stack, tmp_path_factory.mktemp("default") / "run", OWN_COUNT)


@pytest.fixture(scope="module")
def jobs(stack, noisy_half_b, inverted, shuffled, tmp_path_factory):
    """Folder of all the runs on several ranks below, and by name what became of them."""
    folder = tmp_path_factory.mktemp("ranks")

    def job(name, *words, stack=stack, count=2):
        words = training_set.settings(stack, folder / name / "run", *words, of=training_set.VOLUME_SETTINGS)
        return Job("plain", count, str(folder / name), words)

    todo = {
        "two": job("two", OWN_COUNT),
        "four": job("four", OWN_COUNT, count=4),
        "idle": job("idle", "data.first=3", "data.check_sign=false", UNCHECKED, count=4),
        "noise": job("noise", OWN_COUNT, UNCHECKED, stack=noisy_half_b),
        "inverted": job("inverted", "data.invert=true", stack=inverted),
        "found": job("found", OWN_COUNT, stack=inverted),
        "shuffled": job("shuffled", stack=shuffled),
        "not finite": job("not finite", "volume.prior=1e38"),
    }
    return folder, dict(zip(todo, ranks.run_jobs(folder, list(todo.values())), strict=True))


def maps_of(folder, names=PRODUCTS):
    return {name: read_map(folder / f"{name}.mrc")[0] for name in names}


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_a_run_of_the_default_recipe_finds_the_molecule_and_says_what_it_did(run_dir):
    summary = summary_of(run_dir)
    assert {path.stem for path in run_dir.glob("*.mrc")} == set(PRODUCTS)
    assert summary["steps"] == summary["epochs"] == 0 and summary["images_per_second"] is None
    assert summary["volume_fit_seconds"] > 0 and summary["training_seconds"] == 0
    assert list(summary["gaussians_by_model"]) == ["full", "half_a", "half_b"]
    assert summary["gaussians"] == summary["gaussians_by_model"]["full"]
    state = last_checkpoint(run_dir)["trainer"]
    assert [len(mixture) for mixture in state["mixtures"]] == list(summary["gaussians_by_model"].values())
    assert len(np.load(run_dir / "gaussians.npz")["means"]) == summary["gaussians"]
    assert summary["fsc_truth_mean"] > 0.7
    gains = read_volume_fit(run_dir / "volume_fit.csv")
    assert list(gains) == ["step", "gain_full", "gain_half_a", "gain_half_b"]
    assert gains["step"].tolist() == list(range(120))
    for name, curve in gains.items():
        assert name == "step" or curve[-1] > curve[0] > 0, name
    said = ending(summary)
    assert "s of fitting in the volume" in said and "volume_fit.png" in said
    assert "of training" not in said and "loss.png" not in said
    of_halves = [f"{summary['gaussians_by_model'][name]:,}" for name in ("half_a", "half_b")]
    assert f"({of_halves[0]} and {of_halves[1]} in the halves)" in said


# Halves


def check_that_only_half_b_changed(before, after):
    old, new = (last_checkpoint(folder)["trainer"] for folder in (before, after))
    assert torch.equal(old["mixtures"][1], new["mixtures"][1]) and old["unit"][1] == new["unit"][1]
    for model in (0, 2):
        same = old["mixtures"][model].shape == new["mixtures"][model].shape
        assert not (same and torch.equal(old["mixtures"][model], new["mixtures"][model]))
        assert old["unit"][model] != new["unit"][model]
    maps, others = maps_of(before), maps_of(after)
    for name in ("half_a", "mixture_half_a"):
        np.testing.assert_array_equal(maps[name], others[name], err_msg=name)
    for name in ("map", "mixture", "linear", "half_b", "mixture_half_b"):
        assert relative(others[name], maps[name]) > 0.3, name
    gains, other_gains = (read_volume_fit(folder / "volume_fit.csv") for folder in (before, after))
    np.testing.assert_array_equal(gains["gain_half_a"], other_gains["gain_half_a"])
    assert (gains["gain_half_b"] != other_gains["gain_half_b"]).any()
    counts, other_counts = (summary_of(folder)["gaussians_by_model"] for folder in (before, after))
    assert counts["half_a"] == other_counts["half_a"] and counts["half_b"] != other_counts["half_b"]


def test_half_a_is_bitwise_the_same_when_half_b_is_noise(run_dir, noisy_half_b, tmp_path):
    check_that_only_half_b_changed(run_dir, fitted(noisy_half_b, tmp_path / "run", OWN_COUNT, UNCHECKED))


def test_half_a_is_bitwise_the_same_when_half_b_is_noise_on_two_ranks(jobs):
    folder, outcomes = jobs
    for name in ("two", "noise"):
        assert outcomes[name].codes == [0, 0], outcomes[name].texts
    check_that_only_half_b_changed(folder / "two" / "run", folder / "noise" / "run")


@pytest.mark.parametrize("name", ["two", "four"])
def test_any_number_of_ranks_gives_the_maps_of_one(run_dir, jobs, name):
    """Sums over ranks are rounded otherwise, and a fit goes on from there. Of four ranks one has no model to fit.

    1e-6 measured in linear maps, 1e-5 in the others.
    """
    folder, outcomes = jobs
    assert set(outcomes[name].codes) == {0}, outcomes[name].texts
    found, expected = maps_of(folder / name / "run"), maps_of(run_dir)
    for each in ("half_a", "half_b", "linear"):
        assert relative(found[each], expected[each]) < 1e-5, each
    for each in ("map", "mixture", "mixture_half_a", "mixture_half_b"):
        assert relative(found[each], expected[each]) < 1e-3, each
    written, ranks_there = summary_of(folder / name / "run"), len(outcomes[name].codes)
    assert written["world_size"] == ranks_there
    assert all(
        json.loads((folder / name / f"summary{rank}.json").read_text()) == written for rank in range(ranks_there)
    )


def test_fewer_particles_than_ranks_are_fitted_all_the_same(jobs):
    folder, outcomes = jobs
    assert outcomes["idle"].codes == [0] * 4, outcomes["idle"].texts
    assert all(np.isfinite(volume).all() for volume in maps_of(folder / "idle" / "run").values())
    assert summary_of(folder / "idle" / "run")["particles"] == 3


def test_without_halves_one_mixture_is_fitted_to_all_images(stack, run_dir, tmp_path):
    """To the map of all images at once, not the mean of two halves': nearly the full mixture of a run with halves."""
    alone = fitted(stack, tmp_path / "run", OWN_COUNT, "maps.halves=false")
    assert {path.name for path in alone.glob("*.mrc")} == {"map.mrc"}
    summary = summary_of(alone)
    assert list(summary["gaussians_by_model"]) == ["full"] and summary["resolution_a"] is None
    assert summary["fsc_truth_mean"] > 0.7 and "in the halves" not in ending(summary)
    gains, expected = (read_volume_fit(folder / "volume_fit.csv") for folder in (alone, run_dir))
    assert list(gains) == ["step", "gain_full"]
    assert gains["gain_full"][-1] == pytest.approx(expected["gain_full"][-1], rel=1e-3)
    assert relative(read_map(alone / "map.mrc")[0], read_map(run_dir / "mixture.mrc")[0]) < 0.1


# Interrupted


class Killed(BaseException):
    """Caught by nothing on the way."""


def die(*_args, **_words):
    raise Killed


def test_a_run_that_was_killed_after_its_fit_ends_alike_without_another_fit(stack, run_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", die)
        with pytest.raises(Killed):
            fitted(stack, tmp_path / "run", OWN_COUNT)
    saved = last_checkpoint(tmp_path / "run")
    assert saved["trainer"]["progress"]["step"] == 0 and saved["seconds"]["fit"] > 0
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(train, "fit_all", die)
    fitted(stack, tmp_path / "run", OWN_COUNT)
    for name, volume in maps_of(tmp_path / "run").items():
        np.testing.assert_array_equal(volume, read_map(run_dir / f"{name}.mrc")[0], err_msg=name)
    for name in ("fsc.csv", "gaussians.ply", "volume_fit.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (run_dir / name).read_bytes()
    summary = summary_of(tmp_path / "run")
    assert summary["volume_fit_seconds"] == saved["seconds"]["fit"]
    assert summary["gaussians_by_model"] == summary_of(run_dir)["gaussians_by_model"]


def test_a_run_that_was_killed_before_its_first_checkpoint_goes_on_with_its_fits(stack, run_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", die)
        with pytest.raises(Killed):
            fitted(stack, tmp_path / "run", OWN_COUNT)
    kept = {path.name for path in (tmp_path / "run").glob("checkpoints/*.pt")}
    assert kept == {"fit_full.pt", "fit_half_a.pt", "fit_half_b.pt"}
    monkeypatch.setattr(Descent, "step", die)
    fitted(stack, tmp_path / "run", OWN_COUNT)
    assert [path.name for path in (tmp_path / "run").glob("checkpoints/*.pt")] == ["step_000000000.pt"]
    np.testing.assert_array_equal(read_map(tmp_path / "run" / "map.mrc")[0], read_map(run_dir / "map.mrc")[0])


def test_images_can_train_what_was_fitted(stack, run_dir, tmp_path):
    trained = fitted(stack, tmp_path / "run", OWN_COUNT, "train.epochs=1")
    summary = summary_of(trained)
    assert summary["steps"] == 5 and summary["training_seconds"] > 0 and summary["volume_fit_seconds"] > 0
    assert (trained / "volume_fit.csv").read_bytes() == (run_dir / "volume_fit.csv").read_bytes()
    found, before = maps_of(trained), maps_of(run_dir)
    assert 1e-4 < relative(found["mixture"], before["mixture"]) < 0.3
    np.testing.assert_array_equal(found["half_a"], before["half_a"])
    assert summary["fsc_truth_mean"] > 0.7


def test_a_random_start_finds_the_molecule_too(stack, tmp_path):
    found = fitted(stack, tmp_path / "run", "recipe=random", "model.gaussians=300")
    assert summary_of(found)["gaussians_by_model"] == {"full": 300, "half_a": 300, "half_b": 300}
    assert summary_of(found)["fsc_truth_mean"] > 0.7


# Held-out images


@pytest.fixture(scope="module")
def half_held_out(stack, tmp_path_factory):
    return fitted(stack, tmp_path_factory.mktemp("held_out") / "run", "data.holdout=0.5")


def test_the_gain_of_a_fit_is_that_of_the_images_one_by_one(half_held_out):
    """As many are held out as are fitted to, so that all of these are judged by themselves: projected, with their CTF.

    Frequency zero, 1.1 to 1.5 % of the gain, is not judged.
    """
    judged = read_metrics(half_held_out / "holdout.csv", HOLDOUT_COLUMNS)
    fit = read_volume_fit(half_held_out / "volume_fit.csv")
    assert judged["step"].tolist() == [0]
    state = last_checkpoint(half_held_out)
    fitted_to = ~state["held_out"].numpy()
    counts = [fitted_to.sum(), *(int((fitted_to & (state["half"].numpy() == h)).sum()) for h in (0, 1))]
    for name, count in zip(("full", "half_a", "half_b"), counts, strict=True):
        assert fit[f"gain_{name}"][-1] == pytest.approx(count * judged[f"trained_{name}"][0], rel=0.025), name
        # Those held out are watched under every model, by the same form.
        of_others = (~fitted_to).sum() * judged[f"gain_{name}"][0]
        assert fit[f"gain_{name}_held_out"][-1] == pytest.approx(of_others, rel=0.025), name
    # Others are explained as well: nothing was overfitted.
    assert judged["gain_full"][0] == pytest.approx(judged["trained_full"][0], rel=0.15)


def test_nothing_is_fitted_to_held_out_images(stack, half_held_out, tmp_path):
    held_out = last_checkpoint(half_held_out)["held_out"].numpy()

    def change(images):
        images[held_out] = 50 * np.random.default_rng(0).standard_normal(images[held_out].shape) + 7
        return images

    folder = training_set.altered(stack, tmp_path / "stack", change)
    found = fitted(folder, tmp_path / "run", "data.holdout=0.5")
    for name, volume in maps_of(half_held_out).items():
        np.testing.assert_array_equal(read_map(found / f"{name}.mrc")[0], volume, err_msg=name)


# What there is nothing in, and what is wrong


@pytest.mark.parametrize(
    ("words", "finest_a"),
    [(("data.null=noise",), 30), (("data.null=phases", "data.null_shell_a=20"), 12)],
    ids=["noise", "phases"],
)
def test_nothing_is_found_where_there_is_nothing(stack, tmp_path, words, finest_a):
    """Phases are random from shell 6.4 on; smoothing over shells lets the resolution come to 13.8 A, shell 9.3."""
    found = fitted(stack, tmp_path / "run", *words)
    assert all(np.isfinite(volume).all() for volume in maps_of(found).values())
    resolution = summary_of(found)["resolution_a"]
    assert resolution is None or resolution > finest_a


def test_poses_of_other_rows_are_refused_unless_told_not_to_look(shuffled, jobs, tmp_path):
    with pytest.raises(InputError, match=r"linear half maps agree .*data\.poses.*data\.check_signal=false"):
        fitted(shuffled, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    summary = summary_of(fitted(shuffled, tmp_path / "run", UNCHECKED))
    assert summary["fsc_truth_mean"] < 0.5
    check_one_error(jobs, "shuffled", "the linear half maps agree")


def test_a_sign_that_is_set_and_clearly_wrong_is_refused_unless_told_not_to_look(inverted, jobs, tmp_path):
    for words in (("data.invert=true",), ("data.invert=true", "maps.halves=false")):
        with pytest.raises(InputError, match=r"the images look inverted: .*data\.invert=false; data\.check_sign=false"):
            fitted(inverted, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
    fitted(inverted, tmp_path / "run", "data.invert=true", "data.check_sign=false")
    summary = summary_of(tmp_path / "run")
    assert summary["invert"] is True and summary["sign_certainty"] < -6 and summary["fsc_truth_mean"] < 0
    check_one_error(jobs, "inverted", "the images look inverted")


@pytest.mark.parametrize("ranks_of_it", ["one", "two"])
def test_a_flipped_stack_gives_the_same_maps(run_dir, inverted, jobs, tmp_path, ranks_of_it):
    """To the bit where nothing but the sign differs."""
    if ranks_of_it == "one":
        found, expected = fitted(inverted, tmp_path / "run", OWN_COUNT), run_dir
    else:
        found, expected = (jobs[0] / name / "run" for name in ("found", "two"))
    for name, volume in maps_of(expected).items():
        np.testing.assert_array_equal(maps_of(found)[name], volume)
    assert summary_of(found)["invert"] is False and summary_of(found)["sign_certainty"] < -6
    assert summary_of(expected)["invert"] is True
    assert "the particles are dark on white" in (found / "run.log").read_text()


def test_fits_that_do_not_stay_finite_stop_all_ranks(jobs):
    """Each rank says it of its own model."""
    folder, outcomes = jobs
    assert outcomes["not finite"].codes == [2, 2], outcomes["not finite"].texts
    for text, model in zip(outcomes["not finite"].texts, ("full", "half_a"), strict=True):
        assert (
            f"error: {model}: its fit in the volume did not stay finite; lower volume.step_px (0.06) or volume.prior"
            in text
        )
        assert "Traceback" not in text
    assert not (folder / "not finite" / "run").exists()


def check_one_error(jobs, name, expected):
    folder, outcomes = jobs
    assert outcomes[name].codes == [2, 2], outcomes[name].texts
    text = "".join(outcomes[name].texts)
    assert text.count("error:") == 1 and expected in text and "Traceback" not in text
    assert not (folder / name / "run").exists()
