"""Checkpoints: whole or not there, never executed, and always one to go back to."""

import os
import pickle
import resource
import signal

import pytest
import torch

from cryosplat import checkpoint
from cryosplat.errors import InputError


def state(value: float = 1.0) -> dict:
    return {
        "models": {"theta": torch.full((3, 5, 11), value)},
        "optimiser": {"step": 7, "moments": [torch.arange(4, dtype=torch.float64), None]},
        "random": torch.get_rng_state(),
        "position": (2, 35),
        "split": torch.tensor([0, 1, 1], dtype=torch.int8),
        "config": "train: {lr: 0.001}\n",
        "finished": False,
    }


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def damage(path, at: float) -> None:
    """Change one byte of a file, at a fraction of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 0x10
    path.write_bytes(content)


def test_a_state_comes_back_as_it_went(tmp_path):
    before = state()
    path = checkpoint.save(tmp_path / "new" / "folder", 35, before, keep=2)
    after = checkpoint.load(path)
    assert after.keys() == before.keys()
    assert after["position"] == (2, 35) and after["finished"] is False and after["config"] == before["config"]
    assert after["optimiser"]["step"] == 7 and after["optimiser"]["moments"][1] is None
    for one, other in [
        (after["models"]["theta"], before["models"]["theta"]),
        (after["optimiser"]["moments"][0], before["optimiser"]["moments"][0]),
        (after["random"], before["random"]),
        (after["split"], before["split"]),
    ]:
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_an_optimisers_own_state_can_be_saved(tmp_path):
    weights = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.Adam([weights], lr=1e-3)
    weights.sum().backward()
    optimiser.step()
    checkpoint.save(tmp_path, 1, {"optimiser": optimiser.state_dict()}, keep=1)
    loaded = torch.optim.Adam([weights], lr=1.0)
    loaded.load_state_dict(checkpoint.load(tmp_path)["optimiser"])
    assert loaded.param_groups[0]["lr"] == 1e-3
    for name, value in optimiser.state[weights].items():
        assert torch.equal(loaded.state[weights][name], value)


def test_only_the_newest_are_kept_and_the_folder_means_the_newest(tmp_path):
    for step in (5, 10, 99, 100000):
        checkpoint.save(tmp_path, step, state(step), keep=2)
    assert names(tmp_path) == ["step_000000099.pt", "step_000100000.pt"]
    assert checkpoint.latest(tmp_path).name == "step_000100000.pt"
    assert float(checkpoint.load(tmp_path)["models"]["theta"][0, 0, 0]) == 100000


def test_no_checkpoint_is_none_to_ask_for_and_an_error_to_load(tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nowhere") is None
    with pytest.raises(InputError, match="no checkpoint in this folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(InputError, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "step_000000001.pt")


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.99])
def test_a_damaged_byte_is_noticed_and_the_checkpoint_before_it_is_used(tmp_path, caplog, fraction):
    checkpoint.save(tmp_path, 1, state(1.0), keep=3)
    newest = checkpoint.save(tmp_path, 2, state(2.0), keep=3)
    damage(newest, fraction)
    loaded = checkpoint.load(tmp_path)
    value = float(loaded["models"]["theta"][0, 0, 0])
    # A byte of padding between the records may change without harm.
    assert value == 1.0 or torch.equal(loaded["models"]["theta"], state(2.0)["models"]["theta"])
    if value == 1.0:
        assert "step_000000002.pt" in caplog.text and "going on from step_000000001.pt" in caplog.text


@pytest.mark.parametrize("length", [0, 10, 1000])
def test_a_truncated_checkpoint_is_passed_over_in_the_log(tmp_path, caplog, length):
    checkpoint.save(tmp_path, 1, state(1.0), keep=3)
    newest = checkpoint.save(tmp_path, 2, state(2.0), keep=3)
    newest.write_bytes(newest.read_bytes()[:length])
    assert float(checkpoint.load(tmp_path)["models"]["theta"][0, 0, 0]) == 1.0
    assert str(newest) in caplog.text and "going on from step_000000001.pt" in caplog.text


def test_damaged_tensor_data_never_comes_back(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"theta": torch.zeros(100_000)}, keep=1)
    damage(path, 0.5)
    with pytest.raises(InputError, match="check sum"):
        checkpoint.load(path)


def test_when_none_can_be_read_each_is_named(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(), keep=3).write_bytes(b"PK")
    with pytest.raises(InputError, match="(?s)step_000000002.pt.*step_000000001.pt"):
        checkpoint.load(tmp_path)


def test_after_a_step_back_the_unreadable_future_is_removed(tmp_path):
    checkpoint.save(tmp_path, 100, state(), keep=2)
    checkpoint.save(tmp_path, 200, state(), keep=2).write_bytes(b"broken")
    checkpoint.save(tmp_path, 150, state(), keep=2)
    assert names(tmp_path) == ["step_000000100.pt", "step_000000150.pt"]


def test_what_a_killed_process_left_half_written_is_removed_and_other_files_are_not(tmp_path):
    (tmp_path / ".step_000000001.123.abcd.pt").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.save(tmp_path, 2, state(), keep=1)
    assert names(tmp_path) == ["notes.txt", "step_000000002.pt"]


def test_a_full_disk_is_said_so_and_costs_no_older_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, state(1.0), keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*step_000000002.pt"):
            checkpoint.save(tmp_path, 2, state(2.0), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["step_000000001.pt"]
    assert float(checkpoint.load(tmp_path)["models"]["theta"][0, 0, 0]) == 1.0


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(InputError, match="cannot make the folder"):
        checkpoint.save(tmp_path / "checkpoints", 1, state(), keep=1)


def test_what_could_not_be_read_back_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\], a set"):
        checkpoint.save(tmp_path, 1, {"a": [0, {1}]}, keep=1)
    assert names(tmp_path) == []


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_checkpoint_is_ever_run(tmp_path):
    trap = str(tmp_path / "sprung")
    torch.save({"format": checkpoint.FORMAT, "state": Trap(trap)}, tmp_path / "step_000000001.pt")
    (tmp_path / "step_000000002.pt").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(InputError):
        checkpoint.load(tmp_path)
    assert not os.path.exists(trap)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"weights": torch.ones(1)}, "not a checkpoint of cryosplat"), ({"format": 99, "state": {}}, "format 99")],
)
def test_other_peoples_files_and_other_formats_are_named_as_such(tmp_path, content, message):
    torch.save(content, tmp_path / "step_000000001.pt")
    with pytest.raises(InputError, match=message):
        checkpoint.load(tmp_path / "step_000000001.pt")
