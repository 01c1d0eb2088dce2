"""The lock of a run directory: refused to a second job, taken over from a dead one, given back at the end."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time

import pytest

from cryosplat import runlock
from cryosplat.errors import InputError
from cryosplat.runlock import NAME, Holder, RunLock

HERE = Holder.this_process()
ELSEWHERE = dataclasses.replace(HERE, host="elsewhere", boot="another", job="", restarts="", cluster="", token="theirs")


def held_by(folder, holder: Holder, age_s: float = 0.0):
    path = folder / NAME
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_lock_says_who_holds_it_and_is_gone_when_it_is_given_back(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.acquire()
    assert names(tmp_path) == [NAME]
    said = json.loads((tmp_path / NAME).read_text())
    assert (said["host"], said["pid"]) == (HERE.host, os.getpid())
    lock.require()
    lock.release()
    assert names(tmp_path) == []
    lock.release()


def test_a_second_one_of_a_living_process_is_refused_with_who_it_is(tmp_path):
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(InputError, match=f"in use by process {os.getpid()} on {HERE.host}.*choose another run_dir"):
        RunLock(tmp_path).acquire()
    # However old its last sign of life: it may be stopped, and go on.
    os.utime(tmp_path / NAME, (0, 0))
    with pytest.raises(InputError, match="in use by"):
        RunLock(tmp_path).acquire()
    first.release()


def test_of_a_process_that_was_killed_it_is_taken_over(tmp_path, caplog):
    program = f"""
import os
from cryosplat.runlock import Path, RunLock
RunLock(Path({str(tmp_path)!r})).acquire()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert names(tmp_path) == [NAME]
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "taking over from process" in caplog.text and "that process has ended" in caplog.text
    lock.release()
    assert names(tmp_path) == []


def test_another_process_of_the_same_number_does_not_keep_it(tmp_path, caplog):
    held_by(tmp_path, dataclasses.replace(HERE, started="1", token="old"))
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "that process has ended" in caplog.text
    lock.release()


def test_of_another_machine_it_is_held_while_there_are_signs_of_life(tmp_path, caplog):
    held_by(tmp_path, ELSEWHERE, age_s=runlock.STALE_S - 60)
    with pytest.raises(InputError, match="in use by process .* on elsewhere, whose last sign of life is 1[12]. s old"):
        RunLock(tmp_path).acquire()
    held_by(tmp_path, ELSEWHERE, age_s=runlock.STALE_S + 60)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "no sign of life for 24" in caplog.text
    lock.release()


@pytest.mark.parametrize(
    ("answer", "taken"), [("RUNNING", False), ("COMPLETING", False), ("PENDING", True), ("FAILED", True), ("", True)]
)
def test_slurm_is_asked_for_the_job_that_holds_it(tmp_path, monkeypatch, caplog, answer, taken):
    monkeypatch.setattr(runlock, "_slurm_state", lambda job: answer if job == "17" else None)
    held_by(tmp_path, dataclasses.replace(ELSEWHERE, job="17"))
    lock = RunLock(tmp_path)
    if taken:
        lock.acquire()
        assert f"that job is {answer.lower() or 'unknown to Slurm'}" in caplog.text
        lock.release()
    else:
        with pytest.raises(InputError, match="in use by process .* on elsewhere, job 17 of Slurm"):
            lock.acquire()


def test_a_job_that_was_queued_again_takes_over_from_itself(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    held_by(tmp_path, dataclasses.replace(ELSEWHERE, job="17", restarts=""))
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "before it was queued again" in caplog.text
    lock.release()


def test_an_unreadable_lock_is_one_until_it_is_old(tmp_path):
    (tmp_path / NAME).write_text("{")
    with pytest.raises(InputError, match="in use by"):
        RunLock(tmp_path).acquire()
    os.utime(tmp_path / NAME, (0, 0))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_new_holder_found_in_place_of_the_dead_one_gets_its_lock_back(tmp_path, monkeypatch):
    """Two take over at a time: the slower has judged the dead holder and finds the faster one's lock."""
    held_by(tmp_path, ELSEWHERE, age_s=1000)
    judge = runlock.why_dead

    def slow_judge(found, mine, age):
        reason = judge(found, mine, age)
        if found is not None and found.token == "theirs":
            held_by(tmp_path, dataclasses.replace(ELSEWHERE, token="faster"))
        return reason

    monkeypatch.setattr(runlock, "why_dead", slow_judge)
    with pytest.raises(InputError, match="in use by"):
        RunLock(tmp_path).acquire()
    assert json.loads((tmp_path / NAME).read_text())["token"] == "faster"
    assert names(tmp_path) == [NAME]


def test_a_holder_that_slept_too_long_finds_out(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    held_by(tmp_path, ELSEWHERE)
    with pytest.raises(InputError, match="process .* on elsewhere has taken over this run"):
        lock.require()
    lock.release()
    assert names(tmp_path) == [NAME]


def test_a_living_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(runlock, "BEAT_S", 0.02)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / NAME, (0, 0))
    end = time.monotonic() + 10
    while (tmp_path / NAME).stat().st_mtime == 0 and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / NAME).stat().st_mtime > time.time() - 60
    lock.release()


def test_a_folder_that_cannot_be_written_to_is_said_so(tmp_path):
    with pytest.raises(InputError, match="cannot write .*lock.json: No such file or directory"):
        RunLock(tmp_path / "nowhere").acquire()


def test_where_files_cannot_have_two_names_it_is_a_copy(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(runlock.os, "link", refused)
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(InputError, match="in use by process"):
        RunLock(tmp_path).acquire()
    assert names(tmp_path) == [NAME]
    lock.release()
    assert names(tmp_path) == []
