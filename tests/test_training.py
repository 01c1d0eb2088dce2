"""Training as a whole: alike on any number of ranks, interrupted or not; halves share nothing; errors stop all."""

import csv
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import ranks
import torch
import training_set
from ranks import Job

from cryosplat import train
from cryosplat.errors import InputError
from cryosplat.sampling import BatchPlan
from cryosplat.volumes import read_map

SAVE_OFTEN = "checkpoint.every_minutes=1e-9"
STEPS, STEPS_AN_EPOCH, POISONED_STEP, LOOK_EVERY = 57, 19, 9, 7
KILLED_AT, KILLED_AGAIN_AT = 25, 45
"""Both in the middle of an epoch; the last checkpoints before them too, at steps 21 and 42 or, if steps were slow, a
little later."""

UNCHECKED = "data.check_signal=false"
"""Of halves one of which is noise, the linear maps agree on nothing."""

FEW = ("data.check_signal=false", "data.first=3", "train.batch=2", "data.check_sign=false")
"""Fewer particles than ranks, so that some have none in a batch and one has none at all."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    return training_set.reference_run(tmp_path_factory)


@pytest.fixture(scope="module")
def noisy_half_b(stack, tmp_path_factory):
    return training_set.noise_in_half_b(stack, tmp_path_factory.mktemp("noise") / "stack")


@pytest.fixture(scope="module")
def small_disks(tmp_path_factory):
    """Two folders on file systems of some kilobytes; none without the right to mount."""
    folders = []
    for kilobytes in (32, 312) if os.geteuid() == 0 else ():
        folder = tmp_path_factory.mktemp("disk")
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode == 0:
            folders.append(folder)
    yield folders
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def jobs(stack, noisy_half_b, small_disks, tmp_path_factory):
    """Folder of all the runs on several ranks below, and by name what became of them."""
    folder = tmp_path_factory.mktemp("ranks")
    flipped = training_set.altered(stack, folder / "flipped_stack", lambda images: -images)

    def job(name, program, count, *words, stack=stack, argument=0):
        run_dir = folder / name.partition(",")[0] / "run"
        return Job(program, count, str(folder / name), training_set.settings(stack, run_dir, *words), argument)

    todo = {
        "one": job("one", "recorded", 1),
        "three": job("three", "recorded", 3),
        "four": job("four", "recorded", 4),
        "micro": job("micro", "counted", 2, "train.micro_batch=3"),
        "micro apart": job("micro apart", "counted", 3, "train.micro_batch=3", argument=1),
        "noise": job("noise", "plain", 2, UNCHECKED, stack=noisy_half_b),
        "poisoned one": job("poisoned one", "poisoned", 1, argument=POISONED_STEP),
        "poisoned three": job("poisoned three", "poisoned", 3, argument=POISONED_STEP),
        "killed": job("killed", "killed", 1, SAVE_OFTEN, argument=KILLED_AT),
        "moved": job("moved", "killed", 2, SAVE_OFTEN, argument=KILLED_AT),
        "moved, to one": job("moved, to one", "killed", 1, SAVE_OFTEN, argument=KILLED_AGAIN_AT),
        "moved, to four": job("moved, to four", "plain", 4, SAVE_OFTEN),
        "flipped": job("flipped", "plain", 2, "data.invert=true", stack=flipped),
        "idle": job("idle", "plain", 4, *FEW),
    }
    for count, disk in zip((2, 1), small_disks, strict=False):
        todo[f"full {count}"] = job(f"full {count}", "plain", count, f"run_dir={disk / 'run'}")
    return folder, dict(zip(todo, ranks.run_jobs(folder, list(todo.values())), strict=True))


@pytest.fixture(scope="module")
def torchrun(stack, tmp_path_factory):
    """Folder of a run on two ranks as a user starts it, and its output."""
    folder = tmp_path_factory.mktemp("torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ranks.__file__]
    words = training_set.settings(stack, folder / "run")
    ended = subprocess.run(
        [*command, "recorded", str(folder), "0", *words],
        env=ranks.environment(), capture_output=True, text=True, timeout=ranks.TIMEOUT_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return folder, ended


def records(folder, count):
    return [torch.load(folder / f"record{rank}.pt", weights_only=True) for rank in range(count)]


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def mixtures(run_dir):
    """Parameters (M, G, 11) at the end of a run."""
    return torch.stack(training_set.last_checkpoint(run_dir)["trainer"]["mixtures"])


def numbers(run_dir):
    """Rows of metrics.csv without the columns that tell time and memory."""
    with open(run_dir / "metrics.csv") as handle:
        rows = list(csv.DictReader(handle))
    return [{name: row[name] for name in row if name.startswith(("step", "epoch", "loss", "learning"))} for row in rows]


# Any number of ranks


@pytest.mark.parametrize("count", [2, 3, 4])
def test_gradients_and_losses_are_those_of_one_process(jobs, torchrun, count):
    expected = records(jobs[0] / "one", 1)[0]
    found = records(torchrun[0] if count == 2 else jobs[0] / {3: "three", 4: "four"}[count], count)
    for ours, theirs in zip(found[0]["gradients"][0], expected["gradients"][0], strict=True):
        assert relative(ours, theirs) < 1e-5
    # Rotations change nothing at the round start, so the first step says nothing of them.
    for column in range(11):
        ours, theirs = (record["gradients"][2][..., column] for record in (found[0], expected))
        assert theirs.norm() > 0 and relative(ours, theirs) < 1e-5
    for ours, theirs in zip(found[0]["losses"][:3], expected["losses"][:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert all(torch.equal(of_rank["gradients"][2], found[0]["gradients"][2]) for of_rank in found)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_mixtures_in_the_end_are_those_of_one_process(jobs, torchrun, count):
    run_dir = (torchrun[0] if count == 2 else jobs[0] / {3: "three", 4: "four"}[count]) / "run"
    assert relative(mixtures(run_dir), mixtures(jobs[0] / "one" / "run")) < 1e-4


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_ranks_together_see_the_batches_of_the_plan(stack, jobs, torchrun, count):
    found = records(torchrun[0] if count == 2 else jobs[0] / {1: "one", 3: "three", 4: "four"}[count], count)
    plan = BatchPlan(training_set.halves(stack), batch=16, seed=0)
    assert plan.batches == STEPS_AN_EPOCH
    for epoch in range(3):
        for step, ids in enumerate(plan.epoch(epoch), start=epoch * STEPS_AN_EPOCH):
            seen = torch.cat([of_rank["ids"][step] for of_rank in found])
            assert sorted(seen.tolist()) == sorted(ids.tolist())


@pytest.mark.parametrize("name, count", [("micro", 2), ("micro apart", 3)])
def test_micro_batches_of_ranks_are_shared_once_a_step_and_end_as_one_process_does(jobs, name, count):
    assert jobs[1][name].codes == [0] * count, jobs[1][name].texts
    for rank in range(count):
        assert int((jobs[0] / name / f"shared{rank}.txt").read_text()) == STEPS
    assert relative(mixtures(jobs[0] / name / "run"), mixtures(jobs[0] / "one" / "run")) < 1e-4


def test_ranks_without_any_particle_change_nothing(stack, jobs, tmp_path):
    assert jobs[1]["idle"].codes == [0] * 4, jobs[1]["idle"].texts
    run_dir = training_set.trained(stack, tmp_path / "run", *FEW)
    assert relative(mixtures(jobs[0] / "idle" / "run"), mixtures(run_dir)) < 1e-4


def test_a_half_that_most_batches_lack_is_trained_on_those_that_have_it(stack, tmp_path):
    half = np.zeros(training_set.IMAGES, dtype=np.int64)
    half[[5, 100, 200]] = 1
    np.save(tmp_path / "halves.npy", half)
    run_dir = training_set.trained(stack, tmp_path / "run", f"data.halves={tmp_path / 'halves.npy'}")
    counts = [int(half[ids].sum()) for ids in BatchPlan(half, batch=16, seed=0).epoch(0)]
    assert sorted(counts) == [0] * (STEPS_AN_EPOCH - 3) + [1] * 3
    state = training_set.last_checkpoint(run_dir)["trainer"]
    assert [int(state["optimiser"]["state"][model]["step"]) for model in range(3)] == [STEPS, STEPS, 9]
    assert all(mixture.isfinite().all() for mixture in state["mixtures"]) and (state["unit"] > 1e-3).all()


def test_a_run_says_how_many_ranks_it_had(torchrun):
    folder, ended = torchrun
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["particles"] == training_set.IMAGES
    assert summary["cpu_seconds"] > 0 and summary["peak_memory_gib"] > 0
    assert ended.stdout.count("naive resolution") == 1 and "Traceback" not in ended.stderr


def test_every_rank_is_given_what_the_summary_says(jobs):
    folder = jobs[0] / "noise"
    written = json.loads((folder / "run" / "summary.json").read_text())
    assert "anisotropy" in written
    for rank in (0, 1):
        assert json.loads((folder / f"summary{rank}.json").read_text()) == written


# Halves


@pytest.mark.parametrize("words", [(), ("train.whiten=true", "model.amplitudes=signed")])
def test_half_a_is_bitwise_the_same_when_half_b_is_noise(stack, noisy_half_b, reference_run, tmp_path, words):
    before = training_set.trained(stack, tmp_path / "before", *words) if words else reference_run
    after = training_set.trained(noisy_half_b, tmp_path / "after", *words, UNCHECKED)
    check_that_only_half_b_changed(before, after)


def test_half_a_is_bitwise_the_same_when_half_b_is_noise_on_two_ranks(torchrun, jobs):
    assert jobs[1]["noise"].codes == [0, 0], jobs[1]["noise"].texts
    check_that_only_half_b_changed(torchrun[0] / "run", jobs[0] / "noise" / "run")


def check_that_only_half_b_changed(before, after):
    states = [training_set.last_checkpoint(run_dir)["trainer"] for run_dir in (before, after)]
    (full, half_a, half_b), (new_full, new_half_a, new_half_b) = (state["mixtures"] for state in states)
    assert torch.equal(half_a, new_half_a)
    assert not torch.equal(half_b, new_half_b) and not torch.equal(full, new_full)
    assert states[0]["unit"][1] == states[1]["unit"][1] and states[0]["unit"][2] != states[1]["unit"][2]
    same, other = ("half_a", "mixture_half_a"), ("map", "mixture", "linear", "half_b", "mixture_half_b")
    old, new = ({name: read_map(run_dir / f"{name}.mrc")[0] for name in same + other} for run_dir in (before, after))
    for name in same:
        np.testing.assert_array_equal(old[name], new[name], err_msg=name)
    for name in other:
        assert np.linalg.norm(new[name] - old[name]) > 0.5 * np.linalg.norm(old[name]), name
    losses = [[row["loss_half_a"] for row in numbers(run_dir)] for run_dir in (before, after)]
    assert losses[0] == losses[1]


def test_the_full_map_does_not_depend_on_whether_halves_are_trained(stack, reference_run, tmp_path):
    run_dir = training_set.trained(stack, tmp_path / "run", "maps.halves=false")
    assert {path.name for path in run_dir.glob("*.mrc")} == {"map.mrc"}
    assert torch.equal(mixtures(run_dir)[0], mixtures(reference_run)[0])
    # Without halves nothing is known of the noise, and the mixture's map is what is delivered.
    np.testing.assert_array_equal(read_map(run_dir / "map.mrc")[0], read_map(reference_run / "mixture.mrc")[0])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["resolution_a"] is summary["resolution_naive_a"] is None and summary["fsc_truth_mean"] > 0.7


def test_halves_do_not_start_alike(jobs):
    start = records(jobs[0] / "one", 1)[0]["theta"][0]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (start[a, :, :3] - start[b, :, :3]).abs().min() > 0


# Interrupted


def test_a_killed_run_goes_on_to_bitwise_the_same_end(stack, jobs, reference_run):
    folder, outcomes = jobs
    assert outcomes["killed"].codes == [-signal.SIGKILL]
    run_dir = folder / "killed" / "run"
    progress = training_set.last_checkpoint(run_dir)["trainer"]["progress"]
    assert progress["epoch"] == 1 and 21 <= progress["step"] <= KILLED_AT
    assert not (run_dir / "summary.json").exists()
    training_set.trained(stack, run_dir, SAVE_OFTEN)
    ended, expected = (training_set.last_checkpoint(each)["trainer"] for each in (run_dir, reference_run))
    for ours, theirs in zip(ended["mixtures"], expected["mixtures"], strict=True):
        assert torch.equal(ours, theirs)
    assert ended["progress"] == expected["progress"] and torch.equal(ended["unit"], expected["unit"])
    for key, moments in expected["optimiser"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(ended["optimiser"]["state"][key][name], value)
    names = {path.name for path in reference_run.glob("*.mrc")}
    assert {path.name for path in run_dir.glob("*.mrc")} == names and "mixture_half_b.mrc" in names
    for name in names:
        np.testing.assert_array_equal(read_map(run_dir / name)[0], read_map(reference_run / name)[0])
    assert (run_dir / "fsc.csv").read_text() == (reference_run / "fsc.csv").read_text()
    assert numbers(run_dir) == numbers(reference_run)


def test_a_run_that_moves_from_two_ranks_to_one_to_four_ends_alike(jobs, reference_run):
    folder, outcomes = jobs
    assert outcomes["moved"].codes == [-signal.SIGKILL] * 2
    assert outcomes["moved, to one"].codes == [-signal.SIGKILL]
    assert outcomes["moved, to four"].codes == [0] * 4, outcomes["moved, to four"].texts
    run_dir = folder / "moved" / "run"
    assert relative(mixtures(run_dir), mixtures(reference_run)) < 1e-4
    found, expected = numbers(run_dir), numbers(reference_run)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours["loss_full"]) == pytest.approx(float(theirs["loss_full"]), rel=1e-5)
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 4


def test_what_a_killed_run_has_logged_is_continuous(jobs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(jobs[0] / "moved" / "run" / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("loss/full")]
    assert steps == [int(row["step"]) for row in numbers(jobs[0] / "moved" / "run")]


def test_a_run_that_only_lacks_its_products_writes_them_again(stack, tmp_path):
    run_dir = training_set.trained(stack, tmp_path / "run", "train.epochs=1")
    before = {name: (run_dir / name).read_bytes() for name in ("fsc.csv", "gaussians.ply", "metrics.csv")}
    for name in ("summary.json", "fsc.csv", "gaussians.ply"):
        (run_dir / name).unlink()
    training_set.trained(stack, run_dir, "train.epochs=1")
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == STEPS_AN_EPOCH


def test_a_run_without_a_checkpoint_starts_anew(stack, reference_run, tmp_path, jobs):
    """As a run is that is killed in its first minutes."""
    run_dir = training_set.trained(stack, tmp_path / "run", "train.epochs=1")
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    (run_dir / "summary.json").unlink()
    first = mixtures_of_map(run_dir)
    training_set.trained(stack, run_dir, "train.epochs=1")
    np.testing.assert_array_equal(mixtures_of_map(run_dir), first)
    assert [int(row["step"]) for row in numbers(run_dir)] == [7, 14, 19]


def mixtures_of_map(run_dir):
    return np.load(run_dir / "gaussians.npz")["means"]


def test_a_complete_run_is_left_alone(stack, reference_run):
    before = {path: path.stat().st_mtime_ns for path in reference_run.rglob("*")}
    summary = train.train(training_set.config(stack, reference_run))
    assert summary == json.loads((reference_run / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in reference_run.rglob("*")} == before


def test_a_run_is_not_resumed_with_particles_moved_between_halves(stack, jobs, tmp_path):
    moved = training_set.altered(stack, tmp_path / "stack", lambda images: images)
    run_dir = training_set.trained(stack, tmp_path / "run", "train.epochs=1", f"data_root={moved}")
    (run_dir / "summary.json").unlink()
    star = moved / "particles.star"
    lines = star.read_text().splitlines()
    row = next(place for place, line in enumerate(lines) if "particles.mrcs" in line)
    column = next(int(line.split("#")[1]) - 1 for line in lines if line.startswith("_rlnRandomSubset"))
    fields = lines[row].split()
    fields[column] = str(3 - int(fields[column]))
    lines[row] = " ".join(fields)
    star.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="moved from one half to the other since the run began.*another run_dir"):
        training_set.trained(stack, run_dir, "train.epochs=1", f"data_root={moved}")


# What goes wrong


@pytest.mark.parametrize("name", ["poisoned one", "poisoned three"])
def test_a_non_finite_particle_stops_all_ranks_before_any_parameter_changes(jobs, name):
    folder, outcomes = jobs
    count = len(outcomes[name].codes)
    assert outcomes[name].codes == [2] * count
    text = "".join(outcomes[name].texts)
    particle = (folder / name / "particle.txt").read_text()
    assert f"error: the loss became non-finite at step {POISONED_STEP}, particle {particle}. " in text
    assert text.count("error:") == 1 and "Traceback" not in text
    clean = records(folder / {1: "one", 3: "three"}[count], count)[0]["theta"][POISONED_STEP]
    for rank in range(count):
        left = torch.load(folder / name / f"theta{rank}.pt", weights_only=True)
        assert left.isfinite().all()
        if count == 1:
            assert torch.equal(left, clean)
        assert relative(left, clean) < 1e-5
    logged = numbers(folder / name / "run")
    assert [int(row["step"]) for row in logged] == [LOOK_EVERY]
    assert not (folder / name / "run" / "checkpoints").exists()


def test_ranks_that_stop_take_down_what_would_make_them_hang_first(jobs):
    """Freed after the process group, DistributedDataParallel sometimes never came back from its destructor."""
    for rank in range(3):
        assert (jobs[0] / "poisoned three" / f"freed{rank}.txt").read_text() == "[True]"


def test_a_sign_that_is_set_and_clearly_wrong_is_refused_once_by_two_ranks(jobs):
    folder, outcomes = jobs
    assert outcomes["flipped"].codes == [2, 2]
    text = "".join(outcomes["flipped"].texts)
    assert text.count("error: the images look inverted") == text.count("error:") == 1 and "Traceback" not in text
    assert not (folder / "flipped" / "run").exists()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_particle_that_overflows_is_named(stack, tmp_path):
    def change(images):
        images[40, 16, 16] = 1e30
        return images

    folder = training_set.altered(stack, tmp_path / "stack", change)
    with pytest.raises(InputError, match=r"particles\.mrcs, image 40 .*too large for half precision"):
        training_set.trained(folder, tmp_path / "run")
    with pytest.raises(InputError, match=r"particles\.mrcs, image 40 .*not finite at the random start"):
        training_set.trained(folder, tmp_path / "run", "data.precision=single")
    assert not (tmp_path / "run").exists()


def test_settings_that_were_refused_do_not_stand_in_the_way_of_the_mended_ones(stack, tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*nothing\.pkl"):
        training_set.trained(stack, tmp_path / "run", "data.poses=nothing.pkl")
    with pytest.raises(InputError, match="the images look inverted"):
        training_set.trained(stack, tmp_path / "run", "data.invert=false")
    training_set.trained(stack, tmp_path / "run", "train.epochs=1")
    assert (tmp_path / "run" / "map.mrc").exists()


def whole(run_dir):
    """All files of a run directory, after a look that none of them is a part of one."""
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not [path.name for path in files if path.name.startswith(".")]
    for path in files:
        if path.suffix == ".mrc":
            read_map(path)
        if path.suffix == ".pt":
            torch.load(path, weights_only=True)
    return {path.name for path in files}


def test_a_disk_that_fills_up_stops_all_ranks_with_one_error(stack, jobs, small_disks, reference_run):
    if len(small_disks) < 2:
        pytest.skip("needs the right to mount a small tmpfs")
    for count, disk, file in ((2, small_disks[0], "step_000000019.pt"), (1, small_disks[1], "mixture.mrc")):
        outcome = jobs[1][f"full {count}"]
        assert outcome.codes == [2] * count
        text = "".join(outcome.texts)
        assert text.count("error:") == 1 and "Traceback" not in text
        (line,) = (line for line in text.splitlines() if line.startswith("error:"))
        assert line.startswith(f"error: cannot write {disk}/run/") and line.endswith("No space left on device")
        assert file in line
    assert "error" not in jobs[1]["full 2"].texts[1]
    left, products = (whole(disk / "run") for disk in small_disks)
    assert not any(name.endswith(".pt") for name in left)
    assert "step_000000057.pt" in products and "summary.json" not in products
    # And when there is room, the same command goes on from the checkpoint that was saved before.
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disks[1])], check=True)
    run_dir = training_set.trained(stack, small_disks[1] / "run")
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == STEPS
    assert numbers(run_dir) == numbers(reference_run)
