"""All that a machine with an NVIDIA GPU is for, in order: python -m benchmarks.gpu_checks --output FOLDER.

    1            the extension builds for this chip, and `cryosplat doctor` says what it is
    2-tests      the GPU part of the test suite; 2-memcheck and 2-racecheck: the same under compute-sanitizer
    3-ops        kernels against their floor
    3-step       the training step against its floor, and a roofline of both
    4            the rasteriser of the CryoSplat reference on the same GPU
    5            a whole job: 100,000 images of 256 px
    6            two processes on one GPU against one
    7            a profile of the largest step

Each is a process with a time limit of its own. After each the folder is written anew: gpu_checks.json (everything),
gpu_checks.md (tables for benchmarks/gpu.md), gpu_checks.log, roofline.png. A run cut short has lost no step before it.
No network is needed: wheels that `make gpu-wheels` has collected are installed into build/gpu-env. --only 3 5 runs
some; what the folder's JSON, or those named by --before, hold of other steps stays in the tables. A step that cannot
run here is skipped, with its reason. --device cpu --small tries on any machine all that needs no GPU.

Standard library only: where this starts, nothing is installed yet.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks import gpu_environment
from benchmarks.gpu_runner import Checks, Failure, Result, Skip, last_line, read_results, summary

SANITIZER_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
DOCTORS_YES = "GPUs can be used: yes"
LEAST_S = 15.0
"""With less than this left of --budget no step is begun."""

DESCRIBE = (
    "import json, torch; from benchmarks.machine import describe; print(json.dumps(describe(torch.device('{}'))))"
)


# The steps: each returns what it said and what it measured.


def build(checks: Checks, limit_s: float) -> tuple[str, dict]:
    if checks.device == "cuda":
        prepare(checks, limit_s)
    said = checks.run([checks.python, "-m", "cryosplat.cli", "doctor"], limit_s)
    if checks.device == "cuda" and DOCTORS_YES not in said:
        raise Failure(f"cryosplat doctor does not say '{DOCTORS_YES}'; what it says is in the log")
    return f"```\n{said.rstrip()}\n```", {}


def prepare(checks: Checks, limit_s: float) -> None:
    """The environment that the steps run in, made by whichever comes first on this machine."""
    if checks.device == "cuda" and not gpu_environment.is_ready():
        gpu_environment.prepare(lambda words, more: checks.run(words, limit_s, more) and None)


TESTS = ["tests"]
PYTEST = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "gpu"]


def gpu_tests(checks: Checks, limit_s: float) -> tuple[list[str], list[str]]:
    """Test files that have anything for a GPU, as pytest finds them; and those that it cannot read here, with why."""
    checks.need_gpu()
    words = [checks.python, *PYTEST, "--collect-only", "--continue-on-collection-errors", *TESTS]
    text = checks.run(words, limit_s, may_fail=True)
    lines = text.splitlines()
    files = sorted({line.partition("::")[0] for line in lines if "::" in line and " " not in line})
    if not files:
        raise Failure("pytest finds no test for a GPU; the log says why")
    return files, [line.removeprefix("ERROR ") for line in lines if line.startswith("ERROR ")]


def tests(checks: Checks, limit_s: float) -> tuple[str, dict]:
    files, left_out = gpu_tests(checks, limit_s)
    text = counted(checks.run([checks.python, *PYTEST, *files], limit_s))
    return "\n\n".join([text, *(f"not read: {what}" for what in left_out)]), {}


def counted(text: str) -> str:
    """Pytest's last line; tests that have all been skipped are no proof."""
    counts = [line for line in text.splitlines() if " in " in line and ("passed" in line or "skipped" in line)]
    if not counts or "passed" not in counts[-1]:
        raise Failure(f"no test ran: {counts[-1] if counts else 'pytest says nothing'}")
    return counts[-1]


def sanitized(tool: str):
    def step(checks: Checks, limit_s: float) -> tuple[str, dict]:
        checks.need_gpu()
        places = os.pathsep.join([os.environ.get("PATH", ""), *SANITIZER_PLACES])
        sanitizer = shutil.which("compute-sanitizer", path=places)
        if sanitizer is None:
            raise Skip("compute-sanitizer is not installed")
        files, _ = gpu_tests(checks, limit_s)
        words = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        # PyTorch's cache of memory would hide what is read or written beyond a tensor's end.
        text = checks.run(
            [*words, checks.python, *PYTEST, "-x", *files], limit_s, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        )
        return "\n\n".join([counted(text), *(line for line in text.splitlines() if "SUMMARY" in line)]), {}

    return step


def kernels(checks: Checks, limit_s: float) -> tuple[str, dict]:
    return checks.module("ops", limit_s, *(["--turns", "2"] if checks.small else []))


def steps(checks: Checks, limit_s: float) -> tuple[str, dict]:
    return checks.module("step", limit_s, *(["--epochs", "1"] if checks.small else []))


def reference(checks: Checks, limit_s: float) -> tuple[str, dict]:
    checks.need_gpu()
    if not os.environ.get("CRYOSPLAT_REFERENCE"):
        raise Skip("CRYOSPLAT_REFERENCE names no clone of Chen-Suyi/cryosplat, whose code may not be kept here")
    return checks.module("reference_rasteriser", limit_s, sizes=False)


def whole_job(checks: Checks, limit_s: float) -> tuple[str, dict]:
    return checks.module("wholejob", limit_s)


def two_processes(checks: Checks, limit_s: float) -> tuple[str, dict]:
    return checks.module("two_processes", limit_s)


def profile(checks: Checks, limit_s: float) -> tuple[str, dict]:
    """The three largest costs of the step of the most Gaussians."""
    words = [] if checks.small else ["--sizes", "2"]
    _, found = checks.module("step", limit_s, "--models", "3", "--epochs", "1", *words)
    costs = found["rows"][-1]["costs"]
    lines = ["| cost | µs a step | share, % |", "|---|---|---|"]
    lines += [f"| `{cost['name'][:100]}` | {cost['us']:.4g} | {100 * cost['share']:.0f} |" for cost in costs[:3]]
    return "\n".join(lines), {"costs": costs}


STEPS = (
    ("1", "build and doctor", 420, build),
    ("2-tests", "GPU tests", 420, tests),
    ("2-memcheck", "GPU tests under memcheck", 420, sanitized("memcheck")),
    ("2-racecheck", "GPU tests under racecheck", 420, sanitized("racecheck")),
    ("3-ops", "kernels against their floor", 300, kernels),
    ("3-step", "training step against its floor", 300, steps),
    ("4", "against the reference's rasteriser", 420, reference),
    ("5", "whole job", 580, whole_job),
    ("6", "two processes against one", 180, two_processes),
    ("7", "profile of the step", 180, profile),
)
"""Name, what it is, seconds it may take, function."""


def perform(checks: Checks, name: str, what: str, limit_s: float, step) -> Result:
    """Run a step; whatever comes of it is a result."""
    began = time.monotonic()
    result = Result(name, what, "passed")
    checks.log(f"\n=== {name}: {what}")
    if checks.end - began < LEAST_S:
        result.status, result.reason = "skipped", "the budget of this call was spent"
        return result
    try:
        prepare(checks, limit_s)
        result.text, result.figures = step(checks, limit_s)
    except Skip as reason:
        result.status, result.reason = "skipped", str(reason)
    except (Failure, RuntimeError, OSError, ValueError, KeyError) as error:
        result.status, result.reason = "failed", str(error)
    result.seconds = time.monotonic() - began
    return result


def describe(checks: Checks) -> dict[str, str]:
    """Date, machine and versions, where no step has said them."""
    try:
        return json.loads(last_line(checks.run([checks.python, "-c", DESCRIBE.format(checks.device)], 120)))
    except Failure as error:
        checks.log(f"no description of the machine: {error}")
        return {}


def mark(results: list[Result], about: dict[str, str]) -> None:
    """Say of what has passed where it did."""
    for result in results:
        result.about = about if result.status == "passed" else {}


def draw(checks: Checks, results: dict[str, Result]) -> None:
    """The roofline, from what is known of kernels and steps."""
    files = []
    for name in ("3-ops", "3-step"):
        if name in results and results[name].status == "passed":
            files.append(checks.work / f"{name}.json")
            files[-1].write_text(json.dumps(results[name].figures))
    picture = str(checks.output / "roofline.png")
    try:
        checks.run([checks.python, "-m", "benchmarks.roofline", picture, *map(str, files)], 120)
    except Failure as error:
        checks.log(f"no roofline: {error}")


def write(checks: Checks, results: dict[str, Result]) -> None:
    """The folder's JSON and Markdown, complete at any moment."""
    found = in_order(results)
    everything = {"results": [asdict(result) for result in found]}
    for name, text in (("json", json.dumps(everything, indent=1)), ("md", summary(found))):
        temporary = checks.output / f".gpu_checks.{name}"
        temporary.write_text(text)
        temporary.replace(checks.output / f"gpu_checks.{name}")


def in_order(results: dict[str, Result]) -> list[Result]:
    return [results[name] for name, *_ in STEPS if name in results]


def wanted(only: list[str]) -> list[tuple]:
    """The steps that --only names, by name or by number: 3 means 3-ops and 3-step."""
    return [step for step in STEPS if not only or step[0] in only or step[0].partition("-")[0] in only]


def sees_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="such as 1 2-tests 3")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="seconds for all of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that tell nothing, to see that all runs")
    parser.add_argument("--before", nargs="+", type=Path, default=[], metavar="JSON", help="of earlier calls")
    parser.add_argument("--merge", action="store_true", help="run nothing: put the results of --before together")
    args = parser.parse_args()
    known = {part for name, *_ in STEPS for part in (name, name.partition("-")[0])}
    if strange := [name for name in args.only if name not in known]:
        parser.error(f"--only {' '.join(strange)}: the steps are {', '.join(name for name, *_ in STEPS)}")
    if args.device == "cuda" and not args.merge and not sees_gpu():
        parser.error("nvidia-smi shows no GPU here; --device cpu --small tries what needs none")
    return args


def main() -> int:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    mine = args.output / "gpu_checks.json"
    results = read_results([*args.before, *([mine] if mine.exists() else [])])
    about: dict[str, str] = {}
    done = []
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as work:
        end = time.monotonic() + args.budget
        checks = Checks(args.output.resolve(), Path(work), args.device, args.small, end)
        for name, what, limit_s, step in () if args.merge else wanted(args.only):
            print(f"{name}: {what} ...", flush=True)
            results[name] = result = perform(checks, name, what, limit_s, step)
            done.append(result)
            # Benchmarks say it themselves; what comes before them is told when something has.
            about = about or result.figures.get("about") or {}
            mark(done, about)
            write(checks, results)
            print(f"  {result.status} {result.reason} ({result.seconds:.0f} s)", flush=True)
        if not about and any(result.status == "passed" for result in done):
            mark(done, describe(checks))
        if any(result.step.startswith("3") and result.status == "passed" for result in done):
            draw(checks, results)
        write(checks, results)
    print(summary(in_order(results)))
    return int(any(result.status == "failed" for result in done))


if __name__ == "__main__":
    sys.exit(main())
