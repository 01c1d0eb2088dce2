"""Submitting to a real Slurm: by launch/submit.py and by the batch scripts, on two nodes."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest
from reader import blocks, commands
from training_set import VOLUME_SETTINGS, trained, training_set

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def place(tmp_path, tmp_path_factory) -> Path:
    """A folder to submit from, with a training that is over at once."""
    return launching.make_place(tmp_path, tmp_path_factory)


def submit(cluster, place: Path, *words: str) -> subprocess.CompletedProcess:
    return launching.launch(place, "submit.py", "--config", "mine.yaml", *words, environment=cluster.environment)


def job_of(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return re.search(r"job (\d+\S*) submitted", done.stdout)[1]


def log_of(done: subprocess.CompletedProcess) -> str:
    path = Path(re.search(r"log: (\S+)", done.stdout)[1])
    return path.read_text() if path.exists() else ""


def status(cluster, place: Path, run: str = "runs/mine") -> str:
    done = launching.launch(place, "status.py", run, environment=cluster.environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Training for real


TRAINING = (*VOLUME_SETTINGS, "train.epochs=1", "train.batch=16", "maps.every=100")
"""Sums, fits in the volume and some steps image by image: all that ranks do together."""


def test_two_nodes_of_two_ranks_come_to_the_same_map_as_one_process(slurm_net, tmp_path, tmp_path_factory):
    place = launching.make_place(tmp_path, tmp_path_factory, stand_in=False)
    done = submit(slurm_net, place, *TRAINING, "--nodes", "2", "--tasks-per-node", "2", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(4):
        assert f"rank {rank} of 4 (submitit): host node{1 + rank // 2}, pid " in done.stdout
    assert "COMPLETED on node[1-2]" in status(slurm_net, place) and "state  complete" in status(slurm_net, place)
    several = json.loads((place / "runs/mine/summary.json").read_text())
    alone = trained(training_set(tmp_path_factory), tmp_path / "alone", of=TRAINING)
    one = json.loads((alone / "summary.json").read_text())
    assert (several["world_size"], one["world_size"]) == (4, 1) and several["steps"] == one["steps"] > 10
    assert several["fsc_truth_mean"] == pytest.approx(one["fsc_truth_mean"], abs=0.01) and one["fsc_truth_mean"] > 0.8


def test_a_loopback_master_fails_on_nodes_with_networks_of_their_own(slurm_net, place):
    (place / "master.yaml").write_text("environment: {MASTER_ADDR: 127.0.0.1}\n")
    done = submit(slurm_net, place, "--site", "master.yaml", "--nodes", "2", "distributed.timeout_minutes=0.05")
    assert slurm_net.wait(job_of(done)) == "FAILED"
    logs = [path.read_text() for path in place.glob("runs/mine/jobs/*/*_log.out")]
    assert any("cannot join the others at 127.0.0.1:" in log for log in logs), logs


@pytest.mark.parametrize("script", ["train.sbatch", "torchrun.sbatch"])
def test_the_plain_scripts_train_on_two_nodes(script, slurm_net, tmp_path, tmp_path_factory):
    place = launching.make_place(tmp_path, tmp_path_factory)
    ranks = ["--ntasks-per-node=2"] if script == "train.sbatch" else []
    environment = slurm_net.environment | {"PYTHON": sys.executable, "RANKS": "2", "PYTHONPATH": str(place)}
    (place / "cryosplat" / "train.py").write_text(launching.TRAINING + MAIN)
    words = ["--nodes=2", "--cpus-per-task=2", *ranks, "--output=log", f"slurm/{script}", "--config", "mine.yaml"]
    job = slurm_net.sbatch(*words, cwd=place, env=environment)
    assert slurm_net.wait(job) == "COMPLETED", (place / "log").read_text()
    launcher = "srun" if script == "train.sbatch" else "torchrun"
    assert f"4 ranks by {launcher}, 0 epochs" in (place / "log").read_text()


def test_the_plain_script_says_with_its_exit_status_what_became_of_the_run(slurm, place):
    (place / "cryosplat" / "train.py").write_text(launching.TRAINING + MAIN)
    environment = slurm.environment | {"PYTHON": sys.executable, "PYTHONPATH": str(place)}
    words = ["--ntasks-per-node=2", "--cpus-per-task=1", "--output=log", "slurm/train.sbatch", "--config", "mine.yaml"]
    job = slurm.sbatch(*words, "train.seed=13", cwd=place, env=environment)
    # The highest of all ranks': 143 is that of one that was ended because the other had left with 2 before it.
    assert slurm.wait(job) == "FAILED" and slurm.facts(job)["ExitCode"] in ("2:0", "143:0")
    assert "error: row 13 is unlucky" in (place / "log").read_text()


MAIN = """
if __name__ == "__main__":
    import argparse
    import sys
    from cryosplat.cli import run_command
    from cryosplat.config import load_config
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    sys.exit(run_command(lambda _: print(ending(train(load_config(args.config, args.settings)))), args))
"""
"""Makes the stand-in for cryosplat.train a program."""


# How jobs are submitted, and what becomes of them


def test_the_job_runs_the_code_as_it_was_when_submitted(slurm, place):
    done = submit(slurm, place, "--slurm", "hold")
    job = job_of(done)
    changed = (place / "cryosplat" / "train.py").read_text().replace("training, %s", "edited, %s")
    (place / "cryosplat" / "train.py").write_text(changed)
    (place / "launch" / "job.py").write_text("raise SystemExit('edited')\n")
    assert "PENDING (JobHeldUser)" in status(slurm, place) and "not begun" in status(slurm, place)
    slurm.ask("scontrol", "release", job)
    assert slurm.wait(job) == "COMPLETED"
    assert "training, None" in log_of(done) and "edited" not in log_of(done)
    assert "resolution  4.50 A" in status(slurm, place)


def test_the_sites_of_the_repository_run(slurm, place):
    """Their partitions and accounts are commented out; amounts that this cluster does not have are made smaller."""
    smaller = {"a100": ["--gpus-per-node", "2"], "h100-infiniband": ["--gpus-per-node", "2"], "cpu": []}
    assert set(smaller) == {path.stem for path in (place / "slurm/sites").glob("*.yaml")}
    submitted = {}
    for site, words in smaller.items():
        words = ["--site", site, *words, "--cpus-per-task", "1", "--mem", "4", f"run_dir=runs/{site}"]
        submitted[site] = submit(slurm, place, *words, "train.device=auto")
    for site, done in submitted.items():
        assert slurm.wait(job_of(done)) == "COMPLETED", log_of(done)
        assert f"{4 if site == 'cpu' else 2} ranks by submitit" in log_of(done)


def test_set_up_lines_variables_and_the_container_reach_the_ranks(slurm, place):
    (place / "lab.yaml").write_text(
        "setup: ['export SAID=two', 'echo module loaded']\n"
        "environment: {SAID_BY_THE_SITE: one}\ncontainer: env SAID_BY_THE_SITE=in-a-container\n"
        "partition: high\nsbatch: {comment: hello}\ntasks_per_node: 2\n"
    )
    done = submit(slurm, place, "--site", "lab.yaml")
    job = job_of(done)
    assert slurm.facts(job)["Partition"] == "high" and slurm.facts(job)["Comment"] == "hello"
    assert slurm.facts(job)["Requeue"] == "1"
    assert slurm.wait(job) == "COMPLETED"
    assert "module loaded" in log_of(done) and "training, in-a-container" in log_of(done)


def test_a_sweep_is_followed_to_its_end(slurm, place):
    # Without sacct, as on a cluster without accounting: that this one has a stand-in is for submitit's sake.
    path = slurm.environment["PATH"].replace(f"{slurm.folder}/bin:", "")
    without = dataclasses.replace(slurm, environment=slurm.environment | {"PATH": path})
    done = submit(without, place, "--array", "train.seed=3,13", "--follow", "--time", "10")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "[train.seed=3] 1 ranks by submitit" in done.stdout
    assert "[train.seed=13] error: row 13 is unlucky" in done.stdout
    told = status(slurm, place)
    good, bad = told.split(f"{place}/runs/mine/train.seed=3\n")[1], told.split(f"{place}/runs/mine/train.seed=13\n")[1]
    assert "COMPLETED" in good and "FAILED (NonZeroExitCode)" in bad and "exit status 2" in bad
    assert not (place / "runs/mine/train.seed=13/summary.json").exists()


def test_a_killed_rank_ends_the_job_and_following_says_so(slurm, place):
    began = time.monotonic()
    done = submit(slurm, place, "--nodes", "2", "--tasks-per-node", "1", "train.seed=15", "--follow")
    assert done.returncode == 137, done.stdout + done.stderr
    assert "FAILED" in done.stderr and "the logs are in" in done.stderr
    assert time.monotonic() - began < 60


def test_a_requeued_job_goes_on_in_the_same_log(slurm, place):
    done = submit(slurm, place, "train.seed=16")
    job = job_of(done)
    slurm.until(lambda: "training" in log_of(done), "the training to begin")
    slurm.ask("scontrol", "requeue", job)
    assert slurm.wait(job) == "COMPLETED"
    assert log_of(done).count("training, None") == 2 and "1 ranks by submitit" in log_of(done)


def test_a_dry_run_is_judged_by_slurm(slurm, place):
    done = submit(slurm, place, "--dry-run", "--nodes", "2")
    assert done.returncode == 0 and re.search(r"to start at \S+ using 2 processors on nodes node\[1-2\]", done.stderr)
    done = submit(slurm, place, "--dry-run", "--nodes", "3")
    assert done.returncode == 2 and "Slurm would not accept this job" in done.stderr
    done = submit(slurm, place, "--partition", "nope")
    assert done.returncode == 2 and "nvalid partition" in done.stderr
    assert not (place / "runs").exists()


# The page for users of clusters

PAGE = ROOT / "docs" / "cluster.md"
NOT_RUN = ("cd ", "make venv", "source ", "ssh ")
"""Commands of the page that install, or need a network."""

BEGIN = "def train(config):\n"
LONG = """
    if config.run_dir == "runs/again" and os.environ.get("SLURM_JOB_NUM_NODES") == "2":
        time.sleep(100)
"""
"""The run that the page cancels must not be over before."""


def test_the_page_for_clusters_can_be_followed(slurm, tmp_path, tmp_path_factory):
    place = launching.make_place(tmp_path, tmp_path_factory)
    (place / "cryosplat" / "train.py").write_text(launching.TRAINING.replace(BEGIN, BEGIN + LONG) + MAIN)
    yaml = next(text for language, text in blocks(PAGE) if language == "yaml")
    written = re.match(r"# (\S+)\n", yaml)[1]
    # This cluster's only difference to the reader's: the names of its partitions.
    (place / written).write_text(yaml.replace("partition: gpu", "partition: main"))
    (place / "my.yaml").write_text(launching.MINE.replace("device: cpu", "device: auto").replace("mine", "my"))
    tools = f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"
    environment = slurm.environment | {"PATH": tools, "PYTHON": sys.executable, "PYTHONPATH": str(place)}
    ran = []
    for language, text in blocks(PAGE):
        for command in commands(text) if language == "bash" else []:
            if command.startswith(NOT_RUN):
                continue
            command = command.replace("--partition gpu", "--partition main")
            done = slurm.run("bash", "-c", command, cwd=place, env=environment)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            ran.append(command)
    assert len(ran) >= 11
    complete = {str(path.parent.relative_to(place / "runs")) for path in place.glob("runs/**/summary.json")}
    assert complete == {"my", "again", "plain", "torchrun", *(f"priors/volume.prior={v}" for v in ("0.2", "0.5", "1"))}
