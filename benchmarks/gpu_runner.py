"""What the checks for a GPU machine are run with: commands under a limit and a log, results and their tables.

Standard library only, as benchmarks/gpu_checks.py says.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import gpu_environment
from benchmarks.gpu_environment import ROOT

ENDING_S = 5.0
"""From the request to stop to the end of a process."""


class Skip(Exception):
    """Why a step does not run here."""


class Failure(Exception):
    """What went wrong in a step."""


@dataclass
class Result:
    """Of a step: status "passed", "failed" or "skipped"; what it said (Markdown) and measured (its JSON), where."""

    step: str
    what: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    text: str = ""
    figures: dict = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)


@dataclass
class Checks:
    """What the steps share."""

    output: Path
    work: Path  # for files that are not kept
    device: str
    small: bool
    end: float  # of the budget, by time.monotonic()

    @property
    def python(self) -> str:
        return str(gpu_environment.python()) if self.device == "cuda" else sys.executable

    def need_gpu(self) -> None:
        if self.device != "cuda":
            raise Skip("needs a GPU, and this is --device cpu")

    def log(self, text: str) -> None:
        with open(self.output / "gpu_checks.log", "a") as log:
            log.write(text.rstrip("\n") + "\n")

    def run(self, words: list[str], limit_s: float, more: dict[str, str] | None = None, may_fail: bool = False) -> str:
        """Run a command to its end or its limit; returns what it printed. Everything goes to the log."""
        limit_s = min(limit_s, self.end - time.monotonic())
        self.log(f"$ {' '.join(words)}")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), **(more or {})}
        with open(self.work / "stdout", "w+") as printed, open(self.work / "stderr", "w+") as said:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=printed, stderr=said, start_new_session=True
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_group(process)
            outputs = []
            for stream in (printed, said):
                stream.seek(0)
                outputs.append(stream.read())
        self.log("\n".join(outputs))
        if code is None:
            raise Failure(f"not done after its {limit_s:.0f} s")
        if code and not may_fail:
            lines = [line for line in "\n".join(outputs).splitlines() if line.strip()]
            raise Failure(f"exit code {code}: {' / '.join(lines[-3:])[:600]}")
        return outputs[0]

    def module(self, name: str, limit_s: float, *words: str, sizes: bool = True) -> tuple[str, dict]:
        """Run a benchmark that writes a JSON; returns what it printed, and the JSON."""
        target = self.work / "measured.json"
        target.unlink(missing_ok=True)
        command = [self.python, "-m", f"benchmarks.{name}", "--output", str(target), *words]
        if sizes:
            command += ["--device", self.device] + (["--small"] if self.small else [])
        text = self.run(command, limit_s)
        return text, json.loads(target.read_text())


def end_group(process: subprocess.Popen) -> None:
    """End a command and all that it has started."""
    for number, wait in ((signal.SIGTERM, ENDING_S), (signal.SIGKILL, ENDING_S)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        time.sleep(0.1)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            continue


def summary(ordered: list[Result]) -> str:
    """Markdown to be pasted into benchmarks/gpu.md."""
    places: dict[str, list[str]] = {}
    for result in ordered:
        if result.about:
            where = ", ".join(f"{name} {value}" for name, value in result.about.items())
            places.setdefault(where, []).append(result.step)
    lines = [f"Steps {', '.join(of_place)}: {where}." for where, of_place in places.items()]
    lines += ["", "| step | what | outcome | s |", "|---|---|---|---|"]
    for result in ordered:
        outcome = result.status + (f": {result.reason}" if result.reason else "")
        outcome = outcome.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {result.step} | {result.what} | {outcome} | {result.seconds:.0f} |")
    for result in ordered:
        if result.text.strip():
            lines += ["", f"### {result.step}: {result.what}", "", result.text.strip()]
    return "\n".join(lines) + "\n"


def read_results(files: list[Path]) -> dict[str, Result]:
    """Results of earlier calls, the later files winning."""
    found = {}
    for file in files:
        for result in json.loads(file.read_text())["results"]:
            found[result["step"]] = Result(**result)
    return found


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
