"""What clusters do to a run, by a real Slurm: each ends with the map of a run that was left alone, and no step lost."""

import csv
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import launching
import pytest
from training_set import SETTINGS, trained, training_set

EVERY_S = 3
LOOK_EVERY = 5
TRAINING = (*SETTINGS, "train.epochs=5", f"train.log_every={LOOK_EVERY}", f"checkpoint.every_minutes={EVERY_S / 60}")
STEPS, STEPS_AN_EPOCH = 5 * 19, 19
"""Image by image, a second of it where nothing slows it down."""

STEP_S = 0.15
ON_TWO_NODES = ("--nodes", "2", "--tasks-per-node", "1", "--cpus-per-task", "1")


def slow_place(folder: Path, tmp_path_factory, step_s: float = STEP_S) -> Path:
    """A folder to submit from, with a package whose steps take long until ``hurry``."""
    folder.mkdir()
    place = launching.make_place(folder, tmp_path_factory, stand_in=False)
    trainer = place / "cryosplat" / "trainer.py"
    begin = "        self.optimiser.set_rate(rate)\n"
    text = trainer.read_text()
    assert text.count(begin) == 1
    slow = f"time.sleep({step_s} * (not __import__('os').path.exists({str(place / 'hurry')!r})))"
    trainer.write_text(text.replace(begin, f"{begin}        {slow}\n"))
    return place


@pytest.fixture
def place(tmp_path, tmp_path_factory) -> Path:
    return slow_place(tmp_path / "place", tmp_path_factory)


def hurry(place: Path) -> None:
    """From now on steps take no longer than they must."""
    (place / "hurry").touch()


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory) -> float:
    """Mean FSC to the truth of the run that nothing happens to, on one process."""
    run = trained(training_set(tmp_path_factory), tmp_path_factory.mktemp("alone") / "run", of=TRAINING)
    return json.loads((run / "summary.json").read_text())["fsc_truth_mean"]


def submit(cluster, place: Path) -> str:
    done = launching.launch(
        place, "submit.py", "--config", "mine.yaml", *ON_TWO_NODES, *TRAINING, environment=cluster.environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"job (\d+) submitted", done.stdout)[1]


def rows(place: Path) -> list[dict[str, str]]:
    path = place / "runs/mine/metrics.csv"
    if not path.exists():
        return []
    with open(path) as handle:
        return list(csv.DictReader(handle))


def log(place: Path) -> str:
    """What rank 0 has said in all jobs, and the batch scripts."""
    return "".join(path.read_text() for path in sorted(place.glob("runs/mine/jobs/*/*_0_log.out")))


def wait_for_step(cluster, place: Path, step: int) -> dict[str, str]:
    """The last row of metrics.csv once it is of this step or a later one."""
    cluster.until(lambda: bool(rows(place)) and int(rows(place)[-1]["step"]) >= step, f"step {step}", 60)
    return rows(place)[-1]


def resumed_after(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"resumed after step (\d+) of", text)]


def check_the_end(place: Path, left_alone: float) -> None:
    summary = json.loads((place / "runs/mine/summary.json").read_text())
    assert summary["fsc_truth_mean"] == pytest.approx(left_alone, abs=0.01) and left_alone > 0.7
    wanted = {*range(LOOK_EVERY, STEPS + 1, LOOK_EVERY), *range(STEPS_AN_EPOCH, STEPS + 1, STEPS_AN_EPOCH)}
    assert [int(row["step"]) for row in rows(place)] == sorted(wanted)
    assert not (place / "runs/mine/lock.json").exists()


def check_little_was_lost(before: list[dict[str, str]], place: Path) -> None:
    """Of the work that was seen to be done, no more than a checkpoint's interval."""
    (step,) = set(resumed_after(log(place)))
    saved = max((float(row["seconds"]) for row in before if int(row["step"]) <= step), default=0.0)
    assert float(before[-1]["seconds"]) - saved < EVERY_S + 2


def test_preempted_by_a_partition_of_higher_priority(slurm, place, left_alone):
    job = submit(slurm, place)
    seen = wait_for_step(slurm, place, 30)
    other = slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm.wait(other, states=("RUNNING", "COMPLETED"))
    hurry(place)
    assert slurm.wait(job) == "COMPLETED", log(place)
    assert "interrupted: asked to go by SIGUSR2, saved after step" in log(place)
    assert resumed_after(log(place))[0] >= int(seen["step"])
    check_the_end(place, left_alone)


def run_script(cluster, place: Path, script: str, *options: str, **environment: str) -> str:
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(place)}
    options = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--output=log", *options)
    words = [*options, f"slurm/{script}", "--config", "mine.yaml", *TRAINING]
    return cluster.sbatch(*words, cwd=place, env=cluster.environment | environment)


def saved_after(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"asked to go by \w+, saved after step (\d+) of", text)]


def check_the_script(place: Path, left_alone: float, seen: int) -> None:
    """What was saved was gone on with, and it was no less than what had been seen."""
    text = (place / "log").read_text()
    assert saved_after(text) and saved_after(text) == resumed_after(text) and saved_after(text)[0] >= seen
    check_the_end(place, left_alone)


def test_the_plain_scripts_hit_by_the_time_limit_and_warned(slurm, place, left_alone, tmp_path, tmp_path_factory):
    """Slurm looks at limits every half minute, so that the warning comes 10 to 40 s after the start. Meanwhile the
    script for torchrun is warned as ``--signal=B:USR2`` would."""
    limited = slow_place(tmp_path / "limited", tmp_path_factory, step_s=0.5)
    long_job = run_script(slurm, limited, "train.sbatch", "--time=1", "--signal=USR2@20")
    job = run_script(slurm, place, "torchrun.sbatch", RANKS="1")
    seen = int(wait_for_step(slurm, place, 20)["step"])
    slurm.ask("scancel", "--batch", "--signal=USR2", job)
    slurm.until(lambda: slurm.state(job) != "RUNNING", "the job to be queued again", 60)
    hurry(place)
    assert slurm.wait(job) == "COMPLETED", (place / "log").read_text()
    check_the_script(place, left_alone, seen)
    slurm.until(lambda: bool(saved_after((limited / "log").read_text())), "the time limit's warning", 60)
    hurry(limited)
    assert slurm.wait(long_job) == "COMPLETED", (limited / "log").read_text()
    check_the_script(limited, left_alone, 0)


def test_queued_again_by_hand_and_cancelled(slurm, place, left_alone):
    job = submit(slurm, place)
    seen = [int(wait_for_step(slurm, place, 20)["step"])]
    slurm.ask("scontrol", "requeue", job)
    slurm.until(lambda: len(resumed_after(log(place))) == 1, "the job to go on", 60)
    seen.append(int(wait_for_step(slurm, place, seen[0] + 15)["step"]))
    slurm.ask("scancel", job)
    assert slurm.wait(job) == "CANCELLED"
    slurm.until(lambda: len(saved_after(log(place))) == 2, "the run to say that it has saved", 20)
    hurry(place)
    assert slurm.wait(submit(slurm, place)) == "COMPLETED", log(place)
    assert slurm.state(job) == "CANCELLED"  # and not queued again
    assert saved_after(log(place)) == resumed_after(log(place))
    assert all(saved >= step for saved, step in zip(saved_after(log(place)), seen, strict=True))
    check_the_end(place, left_alone)


def test_a_rank_killed(slurm, place, left_alone):
    job = submit(slurm, place)
    wait_for_step(slurm, place, 50)
    rank_0 = int(re.search(r"rank 0 of 2 \(submitit\): host \S+, pid (\d+)", log(place))[1])
    os.kill(rank_0, signal.SIGKILL)
    before = rows(place)
    hurry(place)
    assert slurm.wait(job) == "FAILED", log(place)
    assert slurm.wait(submit(slurm, place)) == "COMPLETED", log(place)
    check_little_was_lost(before, place)
    check_the_end(place, left_alone)


def test_a_node_crashed(slurm, place, left_alone):
    job = submit(slurm, place)
    wait_for_step(slurm, place, 50)
    slurm.crash_node(2)
    time.sleep(0.5)  # what rank 0 was at
    before = rows(place)
    hurry(place)
    slurm.until(lambda: slurm.state(job) == "PENDING", "the job to be queued again", 60)
    slurm.start_node(2)
    assert slurm.wait(job) == "COMPLETED", log(place)
    check_little_was_lost(before, place)
    check_the_end(place, left_alone)
