"""Runs that are asked to go, killed or left waiting: what they say, what they leave, and that they end as if alone."""

import csv
import json
import os
import signal
import threading

import numpy as np
import pytest
import ranks
import torch
import training_set
from ranks import Job

from cryosplat import interruption, train
from cryosplat.cli import GO_ON_LATER
from cryosplat.distributed import World
from cryosplat.errors import InputError
from cryosplat.monitor import Monitor
from cryosplat.runlock import NAME as LOCK
from cryosplat.volumes import read_map

ASKED_AT, STOPPED_AT, FIT_ASKED_AT = 25, 30, 40
SAVE_OFTEN = "checkpoint.every_minutes=1e-9"
SAVE_SELDOM = "checkpoint.every_minutes=1000"
DEATHS, EPOCHS = 20, 24
LAST_DEATHS = [-700, -900, -1100, -1300, -1500]
"""More than so many times FEW steps; and ms of the last lives, which come to the end and die over maps and figures."""

WORLD = World(0, 1, 0, 1, torch.device("cpu"), "none", "single", 1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    return training_set.reference_run(tmp_path_factory)


@pytest.fixture(scope="module")
def jobs(stack, tmp_path_factory):
    """Folder of all the runs below, and by name what became of them; names of one run have its name in front."""
    folder = tmp_path_factory.mktemp("ranks")

    def job(name, program, count, *words, argument=0, of=training_set.SETTINGS):
        words = training_set.settings(stack, folder / name.partition(",")[0] / "run", *words, of=of)
        return Job(program, count, str(folder / name), words, argument)

    fit = {"of": training_set.VOLUME_SETTINGS}
    moments = np.random.default_rng(4).integers(50, 1600, DEATHS).tolist() + LAST_DEATHS
    many = f"train.epochs={EPOCHS}"
    todo = {
        "one": job("one", "asked", 1, SAVE_SELDOM, argument=ASKED_AT),
        "one, on": job("one, on", "plain", 1, SAVE_SELDOM),
        "two": job("two", "asked", 2, SAVE_SELDOM, argument=ASKED_AT),
        "two, on": job("two, on", "plain", 3, SAVE_SELDOM),
        "fit": job("fit", "plain", 2, **fit),
        "asked in fit": job("asked in fit", "asked_in_fit", 2, argument=FIT_ASKED_AT, **fit),
        "asked in fit, on": job("asked in fit, on", "plain", 2, **fit),
        "reading": job("reading", "asked_while", 2, argument=0, **fit),
        "evaluating": job("evaluating", "asked_while", 2, argument=1, **fit),
        "evaluating, on": job("evaluating, on", "plain", 2, **fit),
        "stopped": job("stopped", "stopped", 3, SAVE_OFTEN, "distributed.timeout_minutes=0.05", argument=STOPPED_AT),
        "stopped, on": job("stopped, on", "plain", 1, SAVE_OFTEN),
        "many": job("many", "plain", 1, many),
        **{f"died, {n}": job(f"died, {n}", "mortal", 1, many, SAVE_OFTEN, argument=ms) for n, ms in enumerate(moments)},
        "died, on": job("died, on", "plain", 1, many, SAVE_OFTEN),
    }
    return folder, dict(zip(todo, ranks.run_jobs(folder, list(todo.values())), strict=True))


def rows(run_dir):
    """Of metrics.csv, without the columns that tell time and memory."""
    with open(run_dir / "metrics.csv") as handle:
        found = list(csv.DictReader(handle))
    return [{key: row[key] for key in row if key.startswith(("step", "epoch", "loss", "learning"))} for row in found]


def points(run_dir, tag="loss/full"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(run_dir / "tensorboard")).Reload().Scalars(tag)]


def check_alike(run_dir, expected):
    """Bit by bit the run that nothing happened to, and nothing left lying about."""
    found, wanted = (training_set.last_checkpoint(each)["trainer"]["mixtures"] for each in (run_dir, expected))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    np.testing.assert_array_equal(read_map(run_dir / "map.mrc")[0], read_map(expected / "map.mrc")[0])
    assert rows(run_dir) == rows(expected)
    assert points(run_dir) == points(expected)
    left = {path.name for path in run_dir.rglob("*")}
    assert LOCK not in left and not [name for name in left if name.startswith(("fit_", "."))]


# Asked to go


def test_a_run_that_is_asked_to_go_saves_at_that_step_and_ends_as_if_it_had_not_been(jobs, reference_run):
    folder, outcomes = jobs
    assert outcomes["one"].codes == [GO_ON_LATER] == [75]
    last = outcomes["one"].texts[0].splitlines()[-1]
    assert last.startswith("interrupted: asked to go by SIGTERM, saved after step ")
    assert "Traceback" not in outcomes["one"].texts[0]
    (step,) = (int(word) for word in last.split("step ")[1].split()[:1])
    assert ASKED_AT < step <= 28  # at the next look, or before it if steps are slow
    assert outcomes["one, on"].codes == [0], outcomes["one, on"].texts
    assert f"resumed after step {step} of 57" in outcomes["one, on"].texts[0]
    check_alike(folder / "one" / "run", reference_run)


def test_all_ranks_go_when_one_of_them_is_asked_to(jobs, reference_run):
    folder, outcomes = jobs
    assert outcomes["two"].codes == [75, 75], outcomes["two"].texts
    text = "".join(outcomes["two"].texts)
    assert text.count("interrupted:") == 1 and "Traceback" not in text and "stops, because" not in text
    assert "asked to go through another rank, saved after step" in outcomes["two"].texts[0]
    assert outcomes["two, on"].codes == [0, 0, 0], outcomes["two, on"].texts
    found, expected = rows(folder / "two" / "run"), rows(reference_run)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours["loss_full"]) == pytest.approx(float(theirs["loss_full"]), rel=1e-5)
    assert [step for step, _ in points(folder / "two" / "run")] == [int(row["step"]) for row in expected]


def test_a_fit_that_is_asked_to_go_is_kept_and_gone_on_with(jobs):
    """Two ranks fit three models. The second rank is asked in its fit of half a; the first hears of it in its own."""
    folder, outcomes = jobs
    assert outcomes["asked in fit"].codes == [75, 75], outcomes["asked in fit"].texts
    text = outcomes["asked in fit"].texts[0]
    assert "interrupted: asked to go through another rank, the fits in the volume are kept as they stand" in text
    on = outcomes["asked in fit, on"]
    assert on.codes == [0, 0], on.texts
    assert "full: its fit in the volume goes on after step" in on.texts[0]
    run, expected = folder / "asked in fit" / "run", folder / "fit" / "run"
    for name in ("map", "mixture_half_a", "mixture_half_b"):
        np.testing.assert_array_equal(read_map(run / f"{name}.mrc")[0], read_map(expected / f"{name}.mrc")[0])
    assert (run / "volume_fit.csv").read_bytes() == (expected / "volume_fit.csv").read_bytes()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000000000.pt"]


@pytest.mark.parametrize("name", ["reading", "evaluating"])
def test_a_rank_that_works_by_itself_goes_at_once_and_the_others_notice(jobs, name):
    folder, outcomes = jobs
    assert outcomes[name].codes == [75, 2], outcomes[name].texts
    text = "".join(outcomes[name].texts)
    assert "Traceback" not in text and "rank 1 stops, because another rank has ended" in text
    said = {"reading": "nothing is to be saved yet", "evaluating": "saved after step 0 of 0"}[name]
    assert f"interrupted: asked to go by SIGUSR2, {said}" in text
    if name == "reading":
        assert not (folder / name / "run").exists()
        return
    assert outcomes["evaluating, on"].codes == [0, 0], outcomes["evaluating, on"].texts
    run, expected = folder / name / "run", folder / "fit" / "run"
    np.testing.assert_array_equal(read_map(run / "map.mrc")[0], read_map(expected / "map.mrc")[0])
    assert (run / "volume_fit.csv").read_bytes() == (expected / "volume_fit.csv").read_bytes()


def test_kept_fits_of_other_particles_are_not_gone_on_with(stack, tmp_path, monkeypatch, caplog):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "__init__", die)
        with pytest.raises(Killed):
            training_set.fitted(stack, tmp_path / "run")
    kept = sorted((tmp_path / "run" / "checkpoints").glob("fit_*.pt"))
    assert len(kept) == 3
    kept[0].write_bytes(b"PK")
    state = torch.load(kept[1], weights_only=True)
    torch.save(state | {"state": state["state"] | {"key": "another"}}, kept[1])
    training_set.fitted(stack, tmp_path / "run")
    said = [message for message in caplog.messages if "this fit begins anew" in message]
    assert len(said) == 2 and "damaged" in said[0] and "other particles or halves" in said[1]
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_refused_fit_leaves_no_run_that_its_mended_settings_would_differ_from(stack, tmp_path):
    with pytest.raises(InputError, match="did not stay finite"):
        training_set.fitted(stack, tmp_path / "run", "volume.prior=1e38")
    assert not (tmp_path / "run").exists()


def test_the_handlers_are_there_for_the_training_and_no_longer(stack, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(train, "evaluate", lambda *_: found.append(signal.getsignal(signal.SIGUSR2)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training_set.trained(stack, tmp_path / "run", "train.epochs=1")
    assert found[0].__name__ == "note"
    assert signal.getsignal(signal.SIGUSR2) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_in_another_thread_signals_mean_what_they_did():
    found = []

    def watch():
        with interruption.watch(WORLD) as watched:
            found.append((signal.getsignal(signal.SIGTERM), watched.is_asked(), watched.anybody()))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert found == [(signal.SIG_DFL, False, False)]


def test_agreements_are_a_second_apart_whatever_a_step_takes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: clock[0])
    watched = interruption.Watch(WORLD)
    watched.begin_at(100)
    met, step = [], 100
    while step < 2000:
        step += 1
        clock[0] += 0.01 if step < 1500 else 0.3
        if watched.is_due(step):
            assert watched.agree(step, save=step == 101) == (False, step == 101)
            met.append((step, clock[0]))
    assert met[0][0] == 101
    apart = [(step, later - earlier) for (_, earlier), (step, later) in zip(met, met[1:], strict=False)]
    assert all(0.9 < seconds < 1.1 for step, seconds in apart if step < 1500)
    assert all(seconds < 1.3 for step, seconds in apart if step > 1700)
    watched.note(signal.SIGUSR2)
    assert watched.agree(step, save=False) == (True, False) and watched.anybody() and watched.is_asked()
    assert watched.asked_by == "SIGUSR2"


# Killed, or waited for in vain


def test_a_run_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(jobs):
    folder, outcomes = jobs
    codes = [outcomes[f"died, {n}"].codes for n in range(DEATHS + len(LAST_DEATHS))]
    assert codes[:DEATHS] == [[-signal.SIGKILL]] * DEATHS
    assert all(code in ([-signal.SIGKILL], [0]) for code in codes[DEATHS:]), codes  # the last may find it complete
    assert outcomes["died, on"].codes == [0], outcomes["died, on"].texts
    check_alike(folder / "died" / "run", folder / "many" / "run")


def test_ranks_that_wait_for_one_that_hangs_say_so_and_end(jobs, reference_run):
    folder, outcomes = jobs
    assert outcomes["stopped"].codes[2] == -signal.SIGKILL
    assert outcomes["stopped"].codes[:2] == [2, 2], outcomes["stopped"].texts
    for rank, text in enumerate(outcomes["stopped"].texts[:2]):
        # The one that hears of it from a rank that has given up need not wait itself.
        assert "Traceback" not in text and (f"rank {rank} of 3" in text or f"rank {rank} stops, because" in text)
    text = "".join(outcomes["stopped"].texts)
    assert "has waited 0.05 minutes in vain for another rank (step 31 of 57)" in text
    assert outcomes["stopped, on"].codes == [0], outcomes["stopped, on"].texts
    assert [row["step"] for row in rows(folder / "stopped" / "run")] == [row["step"] for row in rows(reference_run)]


# Two jobs at a time


def test_a_second_job_is_refused_while_the_first_is_at_it(stack, tmp_path, monkeypatch):
    refused = []

    def meanwhile(*_):
        with pytest.raises(InputError) as error:
            train.train(training_set.config(stack, tmp_path / "run", "train.epochs=1"))
        refused.append(str(error.value))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "evaluate", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        training_set.trained(stack, tmp_path / "run", "train.epochs=1")
    assert f"run_dir: {tmp_path / 'run'} is in use by process {os.getpid()} on " in refused[0]
    assert not (tmp_path / "run" / LOCK).exists()
    monkeypatch.undo()
    training_set.trained(stack, tmp_path / "run", "train.epochs=1")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 19


def test_of_two_jobs_that_begin_a_run_at_a_time_one_is_refused(stack, tmp_path, monkeypatch):
    """Both have found an unused folder; the other is quicker to begin there."""
    begin = train.begin_run

    def late(config, run, lock):
        run.folder.mkdir(exist_ok=True)
        (run.folder / "config.yaml").write_text("")
        begin(config, run, lock)

    monkeypatch.setattr(train, "begin_run", late)
    with pytest.raises(InputError, match="another job has begun a run in .* meanwhile"):
        training_set.trained(stack, tmp_path / "run", "train.epochs=1")
    assert (tmp_path / "run" / "config.yaml").read_text() == "" and not (tmp_path / "run" / LOCK).exists()
