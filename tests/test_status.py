"""What a run directory is doing is told from its files, whoever is at it."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from cryosplat import cli
from cryosplat.errors import InputError
from cryosplat.runlock import NAME as LOCK
from cryosplat.runlock import Holder
from cryosplat.status import NAME, read_status


def run(folder, state="running", holder=None, **told):
    """A run directory in training, 120 of 600 steps done in two minutes."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    now = time.time()
    told = {
        "state": state,
        "stage": "training",
        "done": 120,
        "total": 600,
        "first": 0,
        "unit": "steps",
        "stage_began": now - 120,
        "updated": now,
        "facts": {"images_per_second": "812.5", "resolution": "4.60 A (linear half maps)"},
        "holder": dataclasses.asdict(holder or Holder.this_process()),
    } | told
    (folder / NAME).write_text(json.dumps(told))
    return folder


def elsewhere(job=""):
    return Holder("node7", 4321, "1", "another boot", "1", job, "", "", "token")


def test_a_run_in_training_is_shown_with_its_pace_and_who_is_at_it(tmp_path, capsys):
    folder = run(tmp_path / "run")
    (folder / "checkpoints" / "step_000000100.pt").touch()
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(Holder.this_process())))
    status = read_status(folder)
    assert status.state == "running" and status.progress == "120 of 600 steps"
    assert status.left_s == pytest.approx(480, abs=3)
    assert cli.main(["status", str(folder)]) == 0
    told = capsys.readouterr().out
    for row in (
        "training",
        "8 min in this stage",
        "812.5",
        "4.60 A (linear half maps)",
        "step_000000100.pt, 0 s ago",
        f"process {os.getpid()} on ",
    ):
        assert f"  {row}" in told


def test_a_process_that_is_gone_is_dead_and_has_no_time_to_go(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    holder = dataclasses.replace(Holder.this_process(), pid=int(gone.stdout), started="1")
    status = read_status(run(tmp_path / "run", holder=holder))
    assert status.state == "dead" and status.left_s is None


def test_one_of_another_machine_lives_as_long_as_it_gives_signs_of_life(tmp_path):
    folder = run(tmp_path / "run", holder=elsewhere("12"))
    assert read_status(folder).state == "running" and "job 12 of Slurm" in read_status(folder).holder
    old = time.time() - 3600
    os.utime(folder / NAME, (old, old))
    assert read_status(folder).state == "dead"
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(elsewhere("12"))))  # which has a beat of its own
    assert read_status(folder).state == "running"


@pytest.mark.parametrize("state", ["interrupted", "failed"])
def test_a_run_that_stopped_says_so_until_another_goes_on(tmp_path, state):
    folder = run(tmp_path / "run", state, message="asked to go by SIGTERM")
    status = read_status(folder)
    assert (status.state, status.message) == (state, "asked to go by SIGTERM")
    assert ("because", "asked to go by SIGTERM") in status.rows()
    (folder / LOCK).write_text(json.dumps(dataclasses.asdict(Holder.this_process())))
    assert read_status(folder).state == "running"


def test_several_runs_are_a_table_and_other_folders_are_left_out(tmp_path, capsys):
    run(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "summary.json").write_text('{"resolution_a": 4.5, "wall_seconds": 7200}')
    (tmp_path / "data").mkdir()
    assert cli.main(["status", *(str(tmp_path / name) for name in ("one", "two", "data"))]) == 0
    head, one, two = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "stage"]
    assert "running" in one and "120 of 600 steps" in one and "8 min" in one
    assert "complete" in two and "4.50 A" in two


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="no run of cryosplat"):
        read_status(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read_status(tmp_path / "none")
    assert cli.main(["status", str(tmp_path), str(tmp_path)]) == 2
    assert "no run of cryosplat among" in capsys.readouterr().err


def test_a_damaged_status_file_leaves_what_the_others_tell(tmp_path):
    folder = run(tmp_path / "run")
    (folder / NAME).write_text('{"state": "run')
    assert read_status(folder).state == "stopped"
    assert read_status(folder).stage == "begun; no checkpoint yet"


def test_asking_writes_nothing_and_needs_no_pytorch(tmp_path):
    folder = run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code = "import sys; from cryosplat import cli; cli.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "status", str(folder)], capture_output=True).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
