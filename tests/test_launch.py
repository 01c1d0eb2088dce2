"""One command submits a run: to Slurm where there is one, else to this machine."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import launching
import pytest
from training_set import training_set

from cryosplat.config import load_config, save_config
from cryosplat.errors import InputError
from cryosplat.settings import Config

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "submission.sh"

SBATCH = """#!/bin/bash
[ -z "$FAIL" ] || { echo "sbatch: error: invalid partition specified: $FAIL" >&2; exit 1; }
if [ "$1" = --test-only ]; then echo "sbatch: Job 7 to start at once" >&2; cat > tested.sh; exit; fi
cp "${@: -1}" script.sh
echo "Submitted batch job 7"
"""


@pytest.fixture
def place(tmp_path, tmp_path_factory) -> Path:
    return launching.make_place(tmp_path, tmp_path_factory)


def submit(place: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """On a machine without Slurm, unless ``PATH`` says otherwise."""
    return launching.launch(
        place, "submit.py", *words, environment=launching.without_launchers() | {"PATH": "/nowhere"} | environment
    )


def with_slurm(place: Path) -> str:
    """A PATH on which sbatch is a script that keeps what it is given."""
    (place / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (place / "bin" / name).write_text(SBATCH)
        (place / "bin" / name).chmod(0o755)
    return f"{place / 'bin'}:/usr/bin:/bin"


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import job
    import sites
    import submit

    return sites, job, submit


def test_a_local_job_is_followed_to_its_end(place):
    done = submit(place, "--config", "mine.yaml", "train.epochs=3", "--local", "--tasks-per-node", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks by submitit, 3 epochs" in done.stdout and "training" in done.stdout
    assert f"run directory: {place / 'runs' / 'mine'}\n" in done.stdout
    assert f"tensorboard --logdir {place}/runs/mine/tensorboard" in done.stdout
    log = next(line.split("log: ")[1] for line in done.stdout.splitlines() if "log: " in line)
    assert "2 ranks by submitit" in Path(log).read_text()
    told = launching.launch(place, "status.py", "runs/mine", environment=launching.without_launchers())
    assert "on this machine; 1 node, 2 ranks" in told.stdout and "state  complete" in told.stdout, told


def test_what_the_user_can_mend_is_said_without_a_traceback_and_fails_the_job(place):
    done = submit(place, "--config", "mine.yaml", "--local", "train.seed=13")
    assert done.returncode == 1
    assert "error: row 13 is unlucky" in done.stdout and "failed on rank 0" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_rank_that_breaks_fails_the_job_and_is_named(place):
    done = submit(place, "--config", "mine.yaml", "--local", "--tasks-per-node", "2", "train.seed=14")
    assert done.returncode == 1 and "failed on rank 1" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine", "train.epoch=3"], "did you mean train.epochs?"),
        (["mine", "train.epochs=-1"], "0 or more"),
        (["mine", "data.ctf=ctf.pkl"], "data.ctf: there is no file ctf.pkl"),
        (["mine", "data.poses=stack/ctf.pkl"], "stack/ctf.pkl: rotations: expected the shape"),
        (["mine", "data.box=64"], "data.box=64: larger than the images, which are 32 px"),
        (["mine", "data.box=16"], "data.truth=stack/truth.mrc: 32 voxels"),
        (["mine", "run_dir=configs"], "run_dir: configs exists and is no run of cryosplat"),
        (["mine", "run_dir=done"], "run_dir: done holds a run that is complete"),
        (["demo"], "there is no file runs/demo-data/particles.star"),
        (["other"], "no configuration file other"),
        (["mine", "--nodes", "2"], "--nodes 2: there is no sbatch on PATH"),
        (["mine", "--site", "cpu"], "there is no sbatch on PATH"),
        (
            ["mine", "--local", "--nodes", "2"],
            "--nodes 2: there is no sbatch on PATH, and a job on this machine has one node",
        ),
        (["mine", "--local", "--site", "cpu"], "--local goes with neither --site nor --array"),
        (["mine", "--dry-run", "--nodes", "0"], "--nodes 0: expected 1 or more"),
        (["mine", "--dry-run", "--site", "cpus"], "did you mean cpu?"),
        (["mine", "--dry-run", "--site", "odd.yaml"], "odd.yaml: a site has no 'partion'; did you mean partition?"),
        (["mine", "--dry-run", "--site", "many.yaml"], "many.yaml: gpus_per_node: "),
        (["mine", "--dry-run", "--time", "soon"], "time = soon: expected minutes"),
        (["mine", "--dry-run", "--time", "0"], "to Slurm 0 would mean no limit"),
        (["mine", "--dry-run", "--mem", "-1"], "memory_gb = -1.0: expected more than 0"),
        (["mine", "--dry-run", "train.device=cuda"], "train.device=cuda, but no GPU is asked for"),
        (["mine", "--dry-run", "--gpus-per-node", "2"], "2 GPUs a node are asked for, but train.device=cpu"),
        (
            ["mine", "--dry-run", "train.device=auto", "--gpus-per-node", "2", "--tasks-per-node", "4"],
            "several ranks on",
        ),
        (
            ["mine", "--dry-run", "train.device=auto", "--gpus-per-node", "2", "--tasks-per-node", "1"],
            "leaves GPUs idle",
        ),
        (["mine", "--dry-run", "--nodes", "9", "--tasks-per-node", "8"], "expected 64 ranks at most"),
        (["mine", "--dry-run", "--array", "train.seed"], "--array train.seed: expected KEY=V1,V2"),
        (["mine", "--dry-run", "--array", "train.seed=1,1"], "with values that differ"),
        (["mine", "--dry-run", "--array", "train.sed=1,2"], "did you mean train.seed?"),
        (["mine", "--dry-run", "--array", "train.seed=1,2", "train.seed=3"], "or is given on the command line too"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(launch, folder, words, message, capsys):
    assert launch[2].main(["--config", f"{words[0]}.yaml", *words[1:]]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "runs").exists()


@pytest.fixture
def folder(tmp_path, tmp_path_factory, monkeypatch) -> Path:
    """The current folder: a stack, configurations and sites good and bad, a run; no Slurm."""
    (tmp_path / "stack").symlink_to(training_set(tmp_path_factory))
    (tmp_path / "mine.yaml").write_text(launching.MINE)
    (tmp_path / "odd.yaml").write_text("partion: gpu\n")
    (tmp_path / "many.yaml").write_text("gpus_per_node: many\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "kept").touch()
    (tmp_path / "done").mkdir()
    save_config(load_config(tmp_path / "mine.yaml", ["run_dir=done"]), tmp_path / "done" / "config.yaml")
    (tmp_path / "done" / "summary.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    return tmp_path


def script_of(done: subprocess.CompletedProcess, place: Path) -> str:
    """The batch script of a dry run, with the paths of this machine taken out."""
    assert done.returncode == 0, done.stderr
    script = done.stdout.partition("# the settings of")[0]
    return script.replace(str(place), "PLACE").replace(sys.executable, "PYTHON")


def test_a_dry_run_prints_script_and_settings_and_submits_nothing(place):
    words = "--site a100 --nodes 2 --time 1-2:30:00 --partition gpu --account lab --slurm exclusive".split()
    done = submit(place, "--config", "mine.yaml", "train.device=auto", "train.epochs=3", *words, "--dry-run")
    assert script_of(done, place) == GOLDEN.read_text()
    settings = done.stdout.partition("# the settings of runs/mine\n")[2]
    (place / "printed.yaml").write_text(settings)
    expected = load_config(place / "mine.yaml", ["train.device=auto", "train.epochs=3"])
    assert load_config(place / "printed.yaml") == expected
    assert "nothing was submitted" in done.stdout and not (place / "runs").exists()


def test_a_dry_run_where_there_is_slurm_asks_it(place):
    done = submit(place, "--config", "mine.yaml", "--dry-run", PATH=with_slurm(place), FAIL="")
    assert done.returncode == 0 and "Job 7 to start at once" in done.stderr
    assert (place / "tested.sh").read_text() in done.stdout and not (place / "script.sh").exists()
    done = submit(place, "--config", "mine.yaml", "--dry-run", PATH=f"{place / 'bin'}:/usr/bin:/bin", FAIL="nope")
    assert done.returncode == 2 and "invalid partition specified: nope" in done.stderr


def test_where_there_is_sbatch_the_job_goes_to_slurm_and_the_command_returns(place):
    options = "--nodes 2 --gpus-per-node 4 --cpus-per-task 6 --mem 64 --time 1-2:30:00 --partition gpu".split()
    words = ["--config", "mine.yaml", *options, "--slurm", "account=lab", "train.epochs=3", "train.device=auto"]
    done = submit(place, *words, PATH=with_slurm(place), FAIL="")
    assert done.returncode == 0, done.stderr
    assert "job 7 submitted" in done.stdout
    folder = next((place / "runs/mine/jobs").iterdir())
    assert f"  log: {folder}/7_0_log.out\n" in done.stdout
    script = (place / "script.sh").read_text()
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=6", "mem=65536M", "time=1590"):
        assert f"#SBATCH --{line}\n" in script
    for line in ("partition=gpu", "account=lab", "job-name=cryosplat-mine", "signal=USR2@90", "requeue"):
        assert f"#SBATCH --{line}\n" in script
    assert "--kill-on-bad-exit=1 --cpus-per-task=6" in script
    record = json.loads((folder / "job.json").read_text())
    assert record["runs"] == {"7": str(place / "runs/mine")} and record["ranks"] == 8
    assert list((folder / "code/cryosplat").glob("_C*.so")) and (folder / "code/launch/job.py").is_file()


def test_what_is_not_asked_for_is_left_out_of_the_request(place):
    done = submit(place, "--config", "mine.yaml", PATH=with_slurm(place), FAIL="")
    assert done.returncode == 0, done.stderr
    asked = re.findall(r"^#SBATCH --([\w-]+)", (place / "script.sh").read_text(), re.MULTILINE)
    own = ["job-name", "nodes", "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time"]
    assert sorted(asked) == own


def test_a_refusal_by_slurm_is_passed_on_and_leaves_nothing_behind(place):
    done = submit(place, "--config", "mine.yaml", PATH=with_slurm(place), FAIL="nope")
    assert done.returncode == 2 and "error: the job was not accepted: " in done.stderr
    assert "invalid partition specified: nope" in done.stderr and "Traceback" not in done.stderr
    assert not (place / "runs").exists()


def test_everything_that_a_site_says_is_in_the_script(place):
    (place / "lab.yaml").write_text(
        """
partition: gpu
qos: long
constraint: a100
gpus_per_node: 2
gpu_type: a100
gpu_option: gres
setup: ["module load cuda/12.8"]
container: apptainer exec --nv image.sif
python: python3
environment: {NCCL_DEBUG: INFO, WORDS: "two words"}
srun: ["--cpu-bind=cores"]
sbatch: {reservation: cryoem}
"""
    )
    words = ["--config", "mine.yaml", "train.device=auto", "--dry-run", "--site", "lab.yaml", "--qos", "short"]
    lines = script_of(submit(place, *words), place).splitlines()
    for name, value in dict(partition="gpu", qos="short", constraint="a100", gres="gpu:a100:2").items():
        assert f"#SBATCH --{name}={value}" in lines
    assert "#SBATCH --reservation=cryoem" in lines and not any("gpus-per-node" in line for line in lines)
    assert "#SBATCH --ntasks-per-node=2" in lines
    setup = lines.index("module load cuda/12.8")
    assert lines[setup + 1 : setup + 3] == ["export NCCL_DEBUG=INFO", "export WORDS='two words'"]
    assert lines[-2].count(" --cpu-bind=cores apptainer exec --nv image.sif python3 -u -m submitit") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "slurm/sites").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sites_load_with_what_is_commented_out_in_them_too(launch, path, tmp_path):
    assert launch[0].load_site(path.stem) == launch[0].load_site(str(path))
    whole = tmp_path / "whole.yaml"
    # An example line is one that is YAML without its mark; a sentence is not.
    whole.write_text(re.sub(r"^( *)# (?=\w+:|  - | +\w+:)", r"\1", path.read_text(), flags=re.MULTILINE))
    assert launch[0].load_site(str(whole)).partition


def test_a_sweep_is_an_array_with_a_run_directory_each(place):
    words = ["--config", "mine.yaml", "--array", "data.pixel_size=4,5e0", "data.ctf=null", "data.truth=null"]
    done = submit(place, *words, PATH=with_slurm(place), FAIL="")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-1%2\n" in (place / "script.sh").read_text()
    runs = json.loads(next((place / "runs/mine/jobs").glob("*/job.json")).read_text())["runs"]
    assert runs == {f"7_{i}": f"{place}/runs/mine/data.pixel_size={value}" for i, value in enumerate(("4", "5e0"))}


def test_a_refused_job_leaves_what_others_have_made(place):
    path = with_slurm(place)
    assert submit(place, "--config", "mine.yaml", PATH=path, FAIL="").returncode == 0
    kept = sorted((place / "runs").rglob("*"))
    assert submit(place, "--config", "mine.yaml", "run_dir=runs/mine/inner", PATH=path, FAIL="nope").returncode == 2
    assert sorted((place / "runs").rglob("*")) == kept


@pytest.fixture
def told(launch, tmp_path, monkeypatch):
    """What scontrol and sacct answer, set by the test; then the module that asks them."""
    import jobs

    def answers(scontrol: str = "", sacct: str = ""):
        for name, text in (("scontrol", scontrol), ("sacct", sacct)):
            (tmp_path / f"{name}.txt").write_text(text)
            (tmp_path / name).write_text(f"#!/bin/bash\nexec cat {tmp_path}/{name}.txt\n")
            (tmp_path / name).chmod(0o755)
        return jobs.ask_slurm

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return answers


def test_the_state_of_a_job_is_what_the_controller_says_or_else_the_accounts(told):
    live = "JobId=7 JobName=x JobState=RUNNING Reason=None RunTime=00:01:02 ExitCode=0:0 NodeList=node[1-2]\n"
    state = told(live, "7|COMPLETED|0:0|a|1:00\n")("7")
    assert (state.name, state.reason, state.nodes, state.elapsed, state.over) == (
        *("RUNNING", "", "node[1-2]", "00:01:02"),
        False,
    )
    ended = "7|CANCELLED by 1000|0:15|node1|00:10:00\n7.batch|CANCELLED|0:15|node1|00:10:00\n"
    state = told("", ended)("7")
    assert (state.name, state.status, state.over) == ("CANCELLED", 128 + 15, True)
    assert told("JobId=7 JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0\n")("7").status == 2
    assert told("", "")("7").name == "UNKNOWN"


@pytest.fixture
def followed(launch, tmp_path, monkeypatch, capsys):
    """Follow a job that goes through these states; returns exit status and what was said."""
    import follow
    import jobs

    monkeypatch.setattr(follow, "ASK_S", 0.0)
    monkeypatch.setattr(follow, "READ_S", 0.01)
    record = jobs.JobRecord(str(tmp_path), {"7": str(tmp_path / "run")}, 1, 1, "2026-01-01T00:00:00")

    def through(*states, sure_s=0.0):
        rest = list(states)
        monkeypatch.setattr(follow, "SURE_S", sure_s)
        monkeypatch.setattr(follow, "ask_slurm", lambda job: rest.pop(0) if len(rest) > 1 else rest[0])
        return follow.follow_slurm(record), capsys.readouterr()

    return jobs, record, through


def test_following_shows_the_log_and_ends_with_the_status_of_the_job(followed, tmp_path):
    jobs, record, through = followed
    record.log("7").write_text("first\nlast")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").touch()
    status, said = through(jobs.JobState("PENDING", "Priority"), jobs.JobState("RUNNING"), jobs.JobState("COMPLETED"))
    assert status == 0 and said.out == "first\nlast"
    assert [line for line in said.err.splitlines()] == [
        "job 7: PENDING (Priority)",
        "job 7: RUNNING",
        "job 7: COMPLETED",
    ]
    assert through(jobs.JobState("FAILED", status=2))[0] == 2
    assert through(jobs.JobState("TIMEOUT"))[0] == 1


def test_a_job_that_slurm_takes_for_complete_has_failed_if_its_run_is_not(followed):
    jobs, _, through = followed
    status, said = through(jobs.JobState("COMPLETED"))
    assert status == 1 and "is COMPLETED to Slurm, but" in said.err


def test_an_end_that_a_requeued_job_leaves_again_is_none(followed, tmp_path):
    jobs, _, through = followed
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").touch()
    lost = [jobs.JobState("NODE_FAIL")] * 3
    assert through(*lost, jobs.JobState("PENDING", "BeginTime"), jobs.JobState("COMPLETED"), sure_s=60)[0] == 0
    assert through(*lost, sure_s=0.05)[0] == 1


def test_a_run_in_training_is_shown_by_its_files(launch, tmp_path, capsys):
    import status

    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    assert status.main([str(run)]) == 0
    assert "begun; no checkpoint yet" in capsys.readouterr().out
    (run / "checkpoints" / "step_000000020.pt").touch()
    (run / "metrics.csv").write_text("step,epoch,loss_full,images_per_second\n20,1,0.5,1234.4\n40,1,0.4,12")
    (run / "run.log").write_text("12:00:00 after epoch 1: resolution calibrated 0.5 7.25 A, mean FSC 0.9\nlast\n")
    assert status.main([str(run)]) == 0
    told = capsys.readouterr().out
    for row in (
        "training image by image",
        "20, epoch 1, loss 0.5",
        "1234",
        "calibrated 0.5 7.25 A",
        "step_000000020.pt",
    ):
        assert f"  {row}" in told
    assert "12:00:00" not in told and "  last (" in told
    assert status.main([str(tmp_path)]) == 2 and "no run and no job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30:00", 90), ("90:00", 90), ("10:30", 11), ("2-12", 3600), ("1-0:01", 1441), ("0-0:0:1", 1)],
)
def test_slurms_ways_to_write_a_time_are_understood(launch, text, minutes):
    assert launch[0].minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-"])
def test_other_times_are_refused(launch, text):
    with pytest.raises(InputError, match="--time"):
        launch[0].minutes(text)


def test_an_interrupted_job_goes_on_even_if_it_was_to_be_a_new_run(launch):
    config = load_config(None, ["resume=never", "train.seed=4"])
    again = launch[1].TrainingJob(config, "/place").checkpoint()
    assert again.function == launch[1].TrainingJob(dataclasses.replace(config, resume="auto"), "/place")


def test_a_job_is_read_where_the_launch_folder_is_not(launch, tmp_path):
    import cloudpickle

    cloudpickle.register_pickle_by_value(launch[1])
    try:
        (tmp_path / "job.pkl").write_bytes(cloudpickle.dumps(launch[1].TrainingJob(Config(run_dir="there"), "/place")))
    finally:
        cloudpickle.unregister_pickle_by_value(launch[1])
    code = "import pickle; print(pickle.load(open('job.pkl', 'rb')).config.run_dir)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "there\n", done.stderr


@pytest.mark.parametrize("name", ["train.sbatch", "torchrun.sbatch"])
def test_the_plain_scripts_are_bash_and_start_the_training(name):
    script = ROOT / "slurm" / name
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert 'srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1' in script.read_text()
    assert '-m cryosplat.train "$@"' in script.read_text()
