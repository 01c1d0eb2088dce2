"""The benchmarks run to their end, count what they say they count, and the checks for a GPU machine go as far as they
can without one."""

import doctest
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import floors, gpu_checks, gpu_environment, predict, roofline, scaling, step, wholejob
from benchmarks.gpu_runner import Checks, Failure, Result, Skip
from benchmarks.machine import Machine
from benchmarks.ops import mixture

ROOT = Path(__file__).resolve().parents[1]
MACHINE = Machine("cuda", "a GPU", 1, 1e12, 1e11)


@pytest.fixture
def checks(tmp_path) -> Checks:
    return Checks(tmp_path, tmp_path, "cpu", True, time.monotonic() + 60)


def test_a_dry_run_passes_what_needs_no_gpu_and_skips_the_rest_with_a_reason(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--device", "cpu", "--small", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["step"]: result for result in json.loads((tmp_path / "gpu_checks.json").read_text())["results"]}
    on_gpus = {"2-tests", "2-memcheck", "2-racecheck", "4"}
    assert set(results) == {name for name, *_ in gpu_checks.STEPS}
    for name, result in results.items():
        assert result["status"] == ("skipped" if name in on_gpus else "passed"), result
        assert name not in on_gpus or "needs a GPU" in result["reason"]
    assert results["5"]["figures"]["rows"][0]["fsc_truth_mean"] > 0.9
    assert max(results["6"]["figures"]["relative_errors"].values()) < 1e-5
    kernels = {row["kernel"] for row in results["3-ops"]["figures"]["rows"]}
    assert {"splat", "splat backward", "voxelise", "voxelise backward", "insert"} <= kernels
    assert sum(results["3-step"]["figures"]["rows"][0]["parts"].values()) == pytest.approx(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu_checks.json",
        "gpu_checks.log",
        "gpu_checks.md",
        "roofline.png",
    ]
    assert "| 5 | whole job | passed |" in (tmp_path / "gpu_checks.md").read_text()


def test_a_step_over_its_limit_or_with_an_error_fails_and_says_so(checks):
    with pytest.raises(Failure, match="not done after its 1 s"):
        checks.run([sys.executable, "-c", "import time; time.sleep(60)"], 1)
    with pytest.raises(Failure, match="exit code 3: .*what went wrong"):
        checks.run([sys.executable, "-c", "import sys; print('what went wrong'); sys.exit(3)"], 60)
    assert "what went wrong" in (checks.output / "gpu_checks.log").read_text()

    def failing(checks, limit_s):
        raise Failure("as expected")

    assert gpu_checks.perform(checks, "9", "nothing", 60, failing).reason == "as expected"
    checks.end = time.monotonic()
    assert gpu_checks.perform(checks, "9", "nothing", 60, failing).reason == "the budget of this call was spent"


def test_tests_that_were_all_skipped_are_no_proof():
    assert gpu_checks.counted("..s\n2 passed, 1 skipped in 3.10s\n") == "2 passed, 1 skipped in 3.10s"
    with pytest.raises(Failure, match="no test ran: 11 skipped"):
        gpu_checks.counted("s\n11 skipped, 296 deselected in 2.63s\n")
    with pytest.raises(Failure, match="no test ran"):
        gpu_checks.counted("")


def test_the_gpu_tests_run_plain_and_under_the_sanitizer_where_there_is_one(checks, monkeypatch, tmp_path):
    """A stand-in for it says what it was asked for; without a GPU the tests are found and all are skipped."""
    checks.device = "cuda"
    monkeypatch.setattr(gpu_environment, "python", lambda: Path(sys.executable))
    monkeypatch.setattr(gpu_checks, "SANITIZER_PLACES", ())
    monkeypatch.setattr(gpu_checks, "TESTS", [f"tests/test_{name}.py" for name in ("ops", "cuda_insert", "ctf")])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skip, match="not installed"):
        gpu_checks.sanitized("memcheck")(checks, 60)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"\necho "1 passed in 0.1s"\necho "SUMMARY: 0"\n'
    )
    tool.chmod(0o755)
    assert gpu_checks.sanitized("racecheck")(checks, 60)[0] == "1 passed in 0.1s\n\nSUMMARY: 0"
    log = (tmp_path / "gpu_checks.log").read_text()
    assert "1 --tool racecheck" in log and "-m pytest" in log
    files, left_out = gpu_checks.gpu_tests(checks, 60)
    assert (files, left_out) == (["tests/test_cuda_insert.py", "tests/test_ops.py"], [])


def test_the_reference_is_looked_for_where_its_variable_says(checks, monkeypatch):
    monkeypatch.delenv("CRYOSPLAT_REFERENCE", raising=False)
    checks.device = "cuda"
    with pytest.raises(Skip, match="CRYOSPLAT_REFERENCE"):
        gpu_checks.reference(checks, 60)


def test_results_of_earlier_calls_stay_in_the_tables_with_the_machine_they_are_from(tmp_path):
    def file(name: str, *results: Result) -> Path:
        (tmp_path / name).write_text(json.dumps({"results": [vars(result) for result in results]}))
        return tmp_path / name

    first = file("a.json", Result("1", "build", "passed", about={"device": "X"}), Result("5", "job", "failed", "slow"))
    second = file("b.json", Result("5", "job", "passed", text="table", about={"device": "Y"}))
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--merge", "--output", str(tmp_path / "both"), "--before"]
    subprocess.run([*command, str(first), str(second)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    text = (tmp_path / "both" / "gpu_checks.md").read_text()
    assert "Steps 1: device X." in text and "Steps 5: device Y." in text
    assert "| 5 | job | passed | 0 |" in text and "slow" not in text and text.endswith("table\n")


def test_steps_are_chosen_by_name_or_number():
    chosen = [step[0] for step in gpu_checks.wanted(["2", "3-ops"])]
    assert chosen == ["2-tests", "2-memcheck", "2-racecheck", "3-ops"]
    assert len(gpu_checks.wanted([])) == len(gpu_checks.STEPS)


def test_carried_wheels_are_installed_where_the_package_is_missing(tmp_path, monkeypatch):
    for name in ("pytest-9.9.9-py3-none-any.whl", "no_such_thing-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(gpu_environment, "WHEELS", tmp_path)
    assert [Path(path).name for path in gpu_environment.missing_wheels()] == ["no_such_thing-1.0-py3-none-any.whl"]


@pytest.mark.parametrize("backward", [False, True])
def test_the_splat_s_work_counts_the_pixels_that_it_draws(backward):
    """Far from the edges, against a count of the pixels within the cut-off."""
    inputs, box, cutoff = mixture(3, 64, 2), 64, 3.5
    inputs[0] *= 0.1
    _, covariances, _, rotations, shifts, _ = inputs
    count = 0
    for view, shift in zip(rotations, shifts, strict=True):
        for mean, entries in zip(inputs[0][0], covariances[0], strict=True):
            matrix = entries[[0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(3, 3)
            centre = (view @ mean)[:2] + box // 2 - shift
            reach = cutoff * (view @ matrix @ view.T).diagonal()[:2].sqrt()
            inside = (torch.arange(box)[:, None] - centre).abs() <= reach
            count += int(inside.sum(0).prod())
    work = floors.splat(inputs, box, cutoff, backward, lanes=1)
    # A rectangle of a by b pixels has about a b of them inside, now one row more and now one less.
    assert work.interactions == pytest.approx(count, rel=0.1)
    assert work.operations == work.issued == (6 if backward else 3) * work.interactions
    assert work.bytes == 4 * ((2 if backward else 1) * 30 + 2 * (64**2 + 12))


def test_a_map_s_work_is_that_of_its_planes():
    """Of a round Gaussian: as many planes as rows and columns."""
    inputs = [torch.zeros(1, 1, 3), torch.tensor([[[4.0, 0, 0, 4.0, 0, 4.0]]]), torch.ones(1, 1)]
    work = floors.voxelise(inputs, 32, 3.0, False, lanes=16)
    assert work.interactions == pytest.approx(12.0**3) and work.issued == pytest.approx(3 * 16 * 12**2)


def test_insertion_reaches_the_lines_of_its_slice():
    """Without rotation a view lies in the plane z = 0; each of its rows reaches all lines that its columns need."""
    box, padded = 8, 16
    work = floors.insertion(torch.eye(3)[None], torch.zeros(1, dtype=torch.long), box, padded)
    y, x = torch.meshgrid(torch.fft.fftfreq(8) * 8, torch.fft.rfftfreq(8) * 8, indexing="ij")
    inside = int((((x**2 + y**2) < 16) & ((x > 0) | (y >= 0))).sum())
    assert work.interactions == 8 * inside and work.operations == 32 * inside
    # Columns 0 to 7 are two lines of four voxels; rows -6 to 7 in both planes z = 0 and 1, fewer far out.
    lines = (work.bytes - 12 * inside) / 128
    assert 2 * 14 < lines <= 2 * 2 * 14


@pytest.mark.parametrize("module", [scaling, step, wholejob])
def test_the_examples_hold(module):
    assert doctest.testmod(module).failed == 0


def test_every_kernel_of_a_step_has_its_part():
    """By the names in csrc/cuda, as a profile of a GPU shows them."""
    sources = {"covariances": "covariances", "residual": "residual", "splat": "splat"}
    for file, part in sources.items():
        text = (ROOT / "csrc" / "cuda" / f"{file}.cu").read_text()
        kernels = re.findall(r"__launch_bounds__\([^;{]*?\)\s+(\w+)\(", text)
        assert kernels, file
        assert {step.part_of(f"void cryosplat::{name}<float>(int)").removesuffix(" backward") for name in kernels} == {
            part
        }


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    assert MACHINE.floor_s(1e12, 1e9) == 1 and MACHINE.floor_s(1e9, 1e11) == 1


def test_the_roofline_shows_every_kernel_and_step():
    row = {"gaussians": 10, "box": 64, "operations": 4.0, "bytes": 2.0, "seconds": 0.5}
    ops = {"rows": [row | {"kernel": "splat"}, {"kernel": "PyTorch, both", "seconds": 1.0}]}
    found = roofline.points(ops, {"rows": [row | {"models": 3}]})
    assert found == [("splat", "10 G, 64 px", 2.0, 8.0), ("step", "10 G, 64 px, 3 models", 2.0, 8.0)]


def test_a_smaller_batch_a_rank_would_be_below_ninety_per_cent():
    for all_reduce_s in (60e-6, 5e-3):
        for image_s in (4e-6, 5e-3):
            as_it_is = scaling.smallest_batch(all_reduce_s, image_s, overlapped=False)
            overlapped = scaling.smallest_batch(all_reduce_s, image_s, overlapped=True)
            enough, less = (b * image_s / (b * image_s + all_reduce_s) for b in (as_it_is, as_it_is - 1))
            assert enough > 0.9 - 1e-9 and less < 0.9
            enough, less = (b * image_s / max(b * image_s, all_reduce_s) for b in (overlapped, overlapped - 1))
            assert enough > 0.9 - 1e-9 and less < 0.9
    assert scaling.smallest_batch(100e-6, 10e-6, False, fixed_s=500e-6) == 40


def test_all_reduces_follow_what_was_published_for_such_networks():
    """4.19 MB over two nodes of four GPUs with 400 Gb/s adapters took 102 us (nccl#1411)."""
    network = scaling.NETWORKS[1]
    assert network.ring_s(8, 2**22) == pytest.approx(102e-6, rel=0.2)
    assert network.all_reduce_s(512, 8) == network.tree_s(512, 8) < network.ring_s(512, 8)


def test_the_page_on_scaling_has_the_tables_of_the_model():
    page = (ROOT / "benchmarks" / "scaling.md").read_text()
    assert scaling.batch_table([2, 5, 20, 2580]) in page
    assert scaling.linear_table(10) in page


def test_the_model_is_compared_with_the_work_of_one_rank_and_the_all_reduce():
    times = {"all_reduce_cpu_s": 2.0, "all_reduce_wall_s": 3.0, "batch": 8, "wall_s": 1.0}
    rows = scaling.predicted([times | {"ranks": 1, "cpu_s": 10.0}, times | {"ranks": 2, "cpu_s": 13.0}])
    assert [row["model_cpu_s"] for row in rows] == [10.0, 12.0]
    assert "| 2 | 8 | 13000.0 | 12000.0 | 2000.0 | 3000.0 | 1000.0 |" in scaling.measured_table(rows)


def test_what_is_predicted_counts_what_the_kernels_meet():
    """Against one pixel, tile and region at a time."""
    gaussians, box, views = 21, 40, 3
    found = predict.count(gaussians, box, views)
    pixels = torch.arange(box)
    first, last = predict.footprints(gaussians, box, views)
    inside = (pixels[:, None] >= first[..., None, :]) & (pixels[:, None] <= last[..., None, :])  # (V, G, D, xy)
    covered = inside[..., 0][..., None, :] & inside[..., 1][..., :, None]  # (V, G, y, x)
    assert found["interactions"] == float(covered.sum())
    for name, side in (("tiles", predict.TILE), ("regions", predict.REGION)):
        met = torch.nn.functional.max_pool2d(covered.float(), side, ceil_mode=True)
        assert found[name] == float(met.sum())
    assert found["layers"] == gaussians / predict.TOGETHER * views


def test_a_multiprocessor_holds_as_many_warps_as_registers_and_memory_allow():
    assert predict.warps_held({"registers": 80, "shared": 27688}, 256) == 24
    assert predict.warps_held({"registers": 33, "shared": 0}, 512) == 48
    assert predict.warps_held({"registers": 16, "shared": 100 * 1024}, 256) == 16
