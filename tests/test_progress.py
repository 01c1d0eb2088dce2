"""What a run is at is told to a terminal, to logs and to status.json, and never stops a run."""

import fcntl
import json
import logging
import os
import struct
import sys
import termios
import time

import pytest

from cryosplat import cli, progress
from cryosplat.errors import InputError, Interrupted
from cryosplat.status import NAME, read_status


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def told(folder):
    return json.loads((folder / NAME).read_text())


def begun(folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").touch()
    return folder


def run_of(clock, total, seconds):
    """A stage of ``total`` steps that take ``seconds`` each."""
    progress.stage("training", total, "steps")
    for step in range(1, total + 1):
        clock[0] += seconds
        progress.at(step, "loss 0.5")


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "cryosplat.progress"]


def test_without_a_terminal_progress_is_a_line_now_and_then(clock, caplog):
    with caplog.at_level(logging.INFO), progress.shown(None):
        progress.know(resolution="4.6 A (linear half maps)")
        run_of(clock, 100, 1.0)
        progress.stage("evaluating")
    assert lines(caplog) == [
        "training: steps 30 of 100, loss 0.5, resolution so far 4.6 A (linear half maps), 70 s to go",
        "training: steps 60 of 100, loss 0.5, resolution so far 4.6 A (linear half maps), 40 s to go",
        "training: steps 90 of 100, loss 0.5, resolution so far 4.6 A (linear half maps), 10 s to go",
        "training: 100 steps in 100 s",
    ]


def test_a_stage_of_six_hours_is_not_a_thousand_lines(clock, caplog):
    with caplog.at_level(logging.INFO), progress.shown(None):
        run_of(clock, 2160, 10.0)
    assert 40 < len(lines(caplog)) < 60
    assert not any(mark in line for line in lines(caplog) for mark in "\r\x1b")


def test_a_stage_that_goes_on_counts_only_what_it_did_itself(clock, caplog):
    with caplog.at_level(logging.INFO), progress.shown(None):
        progress.stage("training", 100, "steps", first=80)
        clock[0] += 40
        progress.at(90)
    assert lines(caplog)[0].endswith("steps 90 of 100, 40 s to go")


def test_nobody_hears_other_ranks_and_other_commands(tmp_path, caplog, clock):
    with caplog.at_level(logging.INFO), progress.shown(tmp_path / "run", listens=False):
        run_of(clock, 100, 1.0)
        progress.know(resolution="4 A")
    run_of(clock, 100, 1.0)
    assert not lines(caplog) and not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_on_a_terminal_progress_is_one_line_and_messages_stand_above_it(tmp_path, monkeypatch):
    reader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    package, in_file = logging.getLogger("cryosplat"), logging.FileHandler(tmp_path / "run.log")
    before = package.level
    with open(terminal, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
        handlers = [logging.StreamHandler(stream), in_file]
        for handler in handlers:
            package.addHandler(handler)
        package.setLevel(logging.INFO)
        with progress.shown(None):
            progress.stage("reading images", 100, "images", first=40)
            progress.at(60, "loss 0.5")
            package.info("a message")
            time.sleep(0.2)
            progress.at(100, "loss 0.5")
            progress.stage("linear maps")
            time.sleep(2.6 * progress.TICK_S)
        for handler in handlers:
            package.removeHandler(handler)
        package.setLevel(before)
        shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "100/100" in shown and "loss 0.5" in shown and "linear maps [00:02" in shown.replace("00:01", "00:02")
    assert "a message\r\n" in shown and "\x1b[3" not in shown  # no colours
    assert "images 60 of 100" not in shown and "images 60 of 100" in (tmp_path / "run.log").read_text()


def test_status_json_is_there_while_a_run_goes_on_and_gone_when_it_is_complete(tmp_path):
    folder = begun(tmp_path / "run")
    with progress.shown(folder):
        progress.stage("summing images", 400, "images")
        assert told(folder)["state"] == "running" and told(folder)["total"] == 400
        status = read_status(folder)
        assert (status.state, status.stage, status.progress) == ("running", "summing images", "0 of 400 images")
        assert f"process {os.getpid()}" in status.holder
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("error", "state"), [(InputError("data.mask: no\nsuch"), "failed"), (Interrupted("asked to go"), "interrupted")]
)
def test_a_run_that_stops_says_why(tmp_path, error, state):
    folder = begun(tmp_path / "run")
    with pytest.raises(type(error)), progress.shown(folder):
        progress.stage("summing images")
        raise error
    found = read_status(folder)
    assert (found.state, found.message) == (state, str(error).splitlines()[0])


def test_a_run_that_is_refused_leaves_no_folder_behind(tmp_path):
    with pytest.raises(InputError), progress.shown(tmp_path / "runs" / "one"):
        progress.stage("reading images", 10, "images")
        assert told(tmp_path / "runs" / "one")["stage"] == "reading images"
        raise InputError("particle 3 is not finite")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_stops_nothing(tmp_path):
    (tmp_path / "run").write_text("a file stands here")
    with progress.shown(tmp_path / "run" / "below"):
        progress.stage("reading images", 10, "images")
        progress.at(10)
    assert (tmp_path / "run").read_text() == "a file stands here"


def test_a_run_whose_messages_go_to_a_file_has_whole_lines_there(tmp_path, capsys):
    folder = tmp_path / "stack"
    cli.main(["simulate", "--box", "32", "--pixel-size", "8", "--images", "40", "--out", str(folder)])
    words = [f"data.particles={folder}/particles.star", f"run_dir={tmp_path / 'run'}", "data.check_signal=false"]
    assert cli.main(["train", *words, "volume.steps=5", "train.threads=1", "model.scale=0.03"]) == 0
    said = capsys.readouterr().err
    assert "linear half maps: " in said and not any(mark in said for mark in "\r\x1b")
    assert not (tmp_path / "run" / NAME).exists()
