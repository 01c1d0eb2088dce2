"""Ranks find each other, whoever started them, and stop together."""

import dataclasses
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from cryosplat import distributed
from cryosplat.config import load_config
from cryosplat.devices import Facts, Gpu
from cryosplat.errors import InputError, PeerError
from cryosplat.placement import Placement, find_placement, first_host

ROOT = Path(__file__).resolve().parents[1]

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "no-such-host[07-08]",
}
LOCAL = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_LOCALID": "1",
    "SUBMITIT_LOCAL_JOB_ID": "9123",
}


def placement(*parts: dict, without: str = "") -> Placement:
    environment = {name: value for part in parts for name, value in part.items() if name != without}
    return find_placement(environment)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    own = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    return {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}


def run_ranks(folder: Path, code: str, size: int = 2) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of every rank of a small program."""
    program, port = folder / "program.py", free_port()
    program.write_text(code)
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen(
            [sys.executable, program], env=rank_environment(rank, size, port), stdout=pipe, stderr=pipe, text=True
        )
        for rank in range(size)
    ]
    try:
        outputs = [process.communicate(timeout=60) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(ranks, outputs, strict=True)]


def test_without_a_launcher_there_is_one_process():
    assert placement() == Placement("single", rank=0, size=1, local_rank=0)


def test_torchruns_variables_are_taken_as_they_are():
    assert placement(TORCHRUN) == Placement("torchrun", 1, 4, 1, "gpu07", 29500)


def test_a_step_of_srun_meets_at_its_first_node_and_a_port_of_its_own():
    found = placement(SRUN)
    assert (found.launcher, found.rank, found.size, found.local_rank) == ("srun", 3, 4, 1)
    assert found.address == "no-such-host07"
    assert found == placement(SRUN)
    assert found.port != placement(SRUN, {"SLURM_STEP_ID": "3"}).port != placement(SRUN, {"SLURM_JOB_ID": "43"}).port
    assert 12000 <= placement(SRUN, {"SLURM_JOB_ID": "987654321"}).port < 20000


def test_a_step_on_one_node_needs_no_name_service():
    assert placement(SRUN, {"SLURM_STEP_NODELIST": "gpu07"}).address == "127.0.0.1"


def test_a_given_master_wins_over_the_derived_one():
    found = placement(SRUN, {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "5000"})
    assert (found.address, found.port) == ("10.0.0.7", 5000)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("gpu[07-09,12],x", "gpu07"), ("n-[3]", "n-3"), ("r[1-2]-ib", "r1-ib")],
)
def test_the_first_host_is_read_from_slurms_list_without_slurm(nodes, first, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert first_host(nodes) == first


@pytest.mark.parametrize("without", ["SLURM_STEP_NUM_TASKS", "SLURM_PTY_PORT"])
def test_a_batch_script_and_an_interactive_shell_are_one_process(without):
    shell = {**SRUN, "SLURM_PROCID": "0"}
    if without == "SLURM_PTY_PORT":
        shell["SLURM_PTY_PORT"] = "1"
    assert placement(shell, without=without if without in SRUN else "").launcher == "single"


def test_submitit_is_recognised_on_slurm_and_on_this_machine():
    assert placement(SRUN, {"SUBMITIT_EXECUTOR": "slurm"}).launcher == "submitit"
    found = placement(LOCAL)
    assert (found.launcher, found.rank, found.size, found.address) == ("submitit", 1, 2, "127.0.0.1")


def test_the_innermost_launcher_counts():
    assert placement(SRUN, TORCHRUN).launcher == "torchrun"
    assert placement(SRUN, LOCAL).rank == 1


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN, LOCAL], ids=["torchrun", "srun", "submitit"])
def test_half_an_environment_is_refused_with_what_is_missing(environment):
    needed = [name for name in environment if name not in ("SLURM_STEP_ID", "SUBMITIT_EXECUTOR")]
    for name in needed:
        if name in ("SUBMITIT_LOCAL_GLOBALID", "SLURM_PROCID"):
            continue  # what it is recognised by
        with pytest.raises(InputError, match=f"half set for .*{name} missing"):
            placement(environment, without=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "one"}, "RANK='one' in the environment: expected a whole number"),
        ({"RANK": "4"}, "rank 4 .* of 4 ranks is not possible"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_impossible_numbers_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        placement(TORCHRUN, change)


GPUS = (Gpu("one", (9, 0), 80.0), Gpu("two", (9, 0), 80.0))
USABLE = Facts((13, 0), ("75", "90"), "580.65.06", (13, 0), "2.13.0+cu130", (13, 0), ("sm_90",), GPUS, seen=True)


def test_ranks_take_the_visible_gpus_round_and_round(monkeypatch):
    monkeypatch.setattr(distributed, "find_facts", lambda _: USABLE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [distributed.choose_device("auto", rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert distributed.choose_device("cpu", 1) == torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cuda=None, architectures=()), "the core was built without CUDA"),
        (dict(driver_cuda=None, gpus=(), seen=False), "no NVIDIA driver"),
        (dict(driver="550.54", driver_cuda=(12, 4), torch_cuda=(12, 6)), "needs NVIDIA driver 580 or newer"),
        (dict(gpus=(Gpu("old", (7, 0), 16.0),), torch_architectures=()), "CRYOSPLAT_CUDA_ARCH=70"),
        (dict(gpus=(), seen=False, visible=""), "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_cannot_be_used_are_refused_and_auto_is_the_cpu_and_says_why_once(change, message, monkeypatch, log):
    monkeypatch.setattr(distributed, "find_facts", lambda _: dataclasses.replace(USABLE, **change))
    with pytest.raises(InputError, match=f"train.device=cuda, but .*{message}.*train.device=cpu"):
        distributed.choose_device("cuda", 0)
    assert not log
    assert distributed.choose_device("auto", 0) == torch.device("cpu")
    assert len(log) == 1 and log[0].startswith("train.device=auto is the CPU: ") and message in log[0]
    assert distributed.choose_device("cpu", 0) == torch.device("cpu") and len(log) == 1


@pytest.fixture
def log():
    """The messages of the package's logger, which other tests may have cut off from pytest's."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("cryosplat")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_two_ranks_on_one_gpu_are_refused_and_rank_0_says_so():
    def world(rank):
        return distributed.World(rank, 3, 0, 1, torch.device("cpu"), "nccl", "srun", 1)

    distributed._refuse_shared_gpus([("a", "GPU-0"), ("a", "GPU-1"), ("b", "GPU-0"), ("a", ""), ("a", "")], world(0))
    shared = [("a", "GPU-0"), ("a", "GPU-1"), ("a", "GPU-1")]
    with pytest.raises(InputError, match="ranks 1 and 2 share the GPU GPU-1 of host a.*distributed.share_gpus=true"):
        distributed._refuse_shared_gpus(shared, world(0))
    with pytest.raises(PeerError):
        distributed._refuse_shared_gpus(shared, world(1))


def test_a_rank_on_a_gpu_says_which_one(monkeypatch):
    facts = types.SimpleNamespace(name="NVIDIA H100", uuid="0f3a-77")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    place = distributed._Place.of(torch.device("cuda", 1))
    assert (place.device, place.gpu) == ("cuda:1 (NVIDIA H100)", "0f3a-77")
    assert distributed._Place.of(torch.device("cpu")).gpu == ""


def test_ranks_that_may_share_gpus_do_not_speak_over_nccl():
    gpu = torch.device("cuda", 0)
    assert distributed._choose_backend(load_config(None), gpu) == "nccl"
    assert distributed._choose_backend(load_config(None, ["distributed.share_gpus=true"]), gpu) == "gloo"
    with pytest.raises(InputError, match="distributed.share_gpus = True needs distributed.backend = 'gloo'"):
        load_config(None, ["distributed.share_gpus=true", "distributed.backend=nccl"])


def test_a_single_process_in_a_job_of_several_tasks_says_that_it_is_alone(monkeypatch, threads, log):
    for name in (*TORCHRUN, *SRUN, *LOCAL):
        monkeypatch.delenv(name, raising=False)
    settings = load_config(None, ["train.device=cpu", "train.threads=1"])
    for tasks, said in (("1", False), ("4", True)):
        monkeypatch.setenv("SLURM_NTASKS", tasks)
        with distributed.join(settings):
            pass
        assert any("this job of Slurm has 4 tasks, but this is one process alone" in line for line in log) == said


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_single_process_needs_no_connection_and_helpers_change_nothing(threads, monkeypatch):
    for name in (*TORCHRUN, *SRUN, *LOCAL):
        monkeypatch.delenv(name, raising=False)
    values, module = torch.ones(3), torch.nn.Linear(2, 2)
    with distributed.join(load_config(None, ["train.device=cpu", "train.threads=1"])) as world:
        assert (world.size, world.backend, world.launcher, world.threads) == (1, "none", "single", 1)
        assert distributed.sum_over_ranks(values, world) is values
        assert distributed.gather_objects("a", world) == ["a"]
        assert distributed.broadcast_object("a", world) == "a"
        assert distributed.wrap(module, world) is module
        distributed.barrier(world)
        assert torch.get_num_threads() == 1


TWO_RANKS = """
import json, logging, sys, torch
from cryosplat import distributed
from cryosplat.config import load_config

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
with distributed.join(load_config(None, ["train.device=cpu"])) as world:
    torch.manual_seed(world.rank)
    module = torch.nn.Linear(300_000, 1)
    wrapped = distributed.wrap(module, world)
    start = float(module.weight[0, 0])
    for _ in range(3):
        module.zero_grad()
        wrapped(torch.full((1, 300_000), world.rank + 1.0)).sum().backward()
    values = torch.tensor([1.0, float(world.rank)], dtype=torch.float64)
    report = {
        "rank": world.rank, "local": [world.local_rank, world.local_size], "launcher": world.launcher,
        "backend": world.backend, "threads": [world.threads, torch.get_num_threads()],
        "sum": distributed.sum_over_ranks(values, world).tolist(), "own": values.tolist(),
        "gathered": distributed.gather_objects({"rank": world.rank}, world),
        "broadcast": distributed.broadcast_object(f"from {world.rank}", world, source=1),
        "start": start, "gradient": float(module.weight.grad[0, 0]),
        "buckets": wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"],
    }
    distributed.barrier(world)
with open(f"{sys.argv[1]}/{world.rank}.json", "w") as file:
    json.dump(report, file)
assert not torch.distributed.is_initialized()
"""


def test_two_ranks_under_torchrun_add_share_and_average(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(TWO_RANKS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        program,
        tmp_path,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    cores = len(os.sched_getaffinity(0))
    for rank, report in enumerate((first, second)):
        assert report["rank"] == rank and report["local"] == [rank, 2]
        assert (report["launcher"], report["backend"]) == ("torchrun", "gloo")
        assert report["threads"] == [max(1, cores // 2)] * 2
        assert report["sum"] == [2.0, 1.0] and report["own"] == [1.0, float(rank)]
        assert report["gathered"] == [{"rank": 0}, {"rank": 1}] and report["broadcast"] == "from 1"
        assert report["gradient"] == 1.5
        assert len(str(report["buckets"]).split(",")) == 1
    assert first["start"] == second["start"]
    for rank in (0, 1):
        assert f"rank {rank} of 2 (torchrun): host {socket.gethostname()}, pid " in done.stderr


def test_what_one_rank_finds_wrong_stops_all_and_is_said_once(tmp_path):
    code = """
import sys
from cryosplat import distributed
from cryosplat.config import load_config
from cryosplat.errors import InputError, PeerError

def work():
    if world.rank == 1:
        raise InputError("row 17 of poses.pkl is bad")

with distributed.join(load_config(None, ["train.device=cpu"])) as world:
    try:
        distributed.together(work, world)
    except PeerError as error:
        print("peer:", error)
    except InputError as error:
        print("own:", error)
"""
    first, second = run_ranks(tmp_path, code)
    assert first[:2] == (0, "peer: row 17 of poses.pkl is bad\n"), first
    assert second[:2] == (0, "own: row 17 of poses.pkl is bad\n"), second


def test_a_rank_that_dies_takes_the_waiting_one_with_it(tmp_path):
    code = """
import os
from cryosplat import distributed
from cryosplat.config import load_config

with distributed.join(load_config(None, ["train.device=cpu"])) as world:
    if world.rank == 1:
        os._exit(9)
    distributed.barrier(world)
"""
    first, second = run_ranks(tmp_path, code)  # its time limit is far below distributed.timeout_minutes
    assert first[0] != 0 and second[0] == 9


SLOW = """
import time
from cryosplat import distributed
from cryosplat.config import load_config

with distributed.join(load_config(None, ["train.device=cpu", "distributed.timeout_minutes=0.05"])) as world:
    if world.is_main:
        time.sleep(5)
    WAIT
    distributed.barrier(world)
"""


def test_what_rank_0_does_alone_may_take_longer_than_collectives_wait(tmp_path):
    waited = run_ranks(tmp_path, SLOW.replace("WAIT", "distributed.wait_for_main(world)"))
    assert [code for code, _, _ in waited] == [0, 0], waited
    not_waited = run_ranks(tmp_path, SLOW.replace("WAIT", ""))
    assert not_waited[1][0] != 0 and "Timed out" in not_waited[1][2], not_waited


def test_a_rank_0_that_ends_is_noticed_by_those_that_wait_for_it(tmp_path):
    code = SLOW.replace("time.sleep(5)", "import os; os._exit(9)").replace("WAIT", "distributed.wait_for_main(world)")
    first, second = run_ranks(tmp_path, code)
    assert first[0] == 9 and second[0] != 0


def test_a_rank_that_raises_leaves_and_the_others_stop(tmp_path):
    code = """
from cryosplat import distributed
from cryosplat.config import load_config

with distributed.join(load_config(None, ["train.device=cpu"])) as world:
    if world.rank == 1:
        raise ValueError("mine")
    distributed.barrier(world)
"""
    first, second = run_ranks(tmp_path, code)
    assert first[0] != 0 and second[0] != 0 and "ValueError: mine" in second[2]


def test_others_that_do_not_come_are_an_error_that_names_the_place(tmp_path, monkeypatch):
    for name, value in rank_environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    settings = load_config(None, ["train.device=cpu", "distributed.timeout_minutes=0.02"])
    with pytest.raises(InputError, match="rank 1 of 2 .*cannot join the others at 127.0.0.1:"):
        with distributed.join(settings):
            pass


def test_nccl_without_a_gpu_is_refused_before_any_connection(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in rank_environment(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="distributed.backend=nccl needs GPUs"):
        with distributed.join(load_config(None, ["distributed.backend=nccl"])):
            pass
