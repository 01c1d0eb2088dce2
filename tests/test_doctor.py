"""Whether GPUs can be used is judged from facts, with words that say what to do; and the command runs anywhere."""

import dataclasses
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cryosplat import devices, doctor
from cryosplat.devices import Facts, Gpu, obstacles

ROOT = Path(__file__).resolve().parents[1]

H100 = Gpu("NVIDIA H100", (9, 0), 80.0)
A100 = Gpu("NVIDIA A100", (8, 0), 40.0)
V100 = Gpu("Tesla V100", (7, 0), 32.0)
P100 = Gpu("Tesla P100", (6, 0), 16.0)
L40 = Gpu("NVIDIA L40", (8, 9), 48.0)
THOR = Gpu("NVIDIA Thor", (11, 0), 120.0)
B200 = Gpu("NVIDIA B200", (10, 0), 180.0)

ALL_OF_13 = ("75", "80", "86", "89", "90", "100", "120")
TORCH_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")

GOOD = Facts(
    cuda=(13, 0),
    architectures=ALL_OF_13,
    driver="580.65.06",
    driver_cuda=(13, 0),
    torch="2.13.0+cu130",
    torch_cuda=(13, 0),
    torch_architectures=TORCH_13,
    gpus=(H100, H100),
    seen=True,
)
TWELVE = dict(cuda=(12, 8), torch="2.11.0+cu126", torch_cuda=(12, 6), torch_architectures=())
NO_DRIVER = dict(driver="", driver_cuda=None, gpus=(), seen=False)

USABLE = {
    "as built": {},
    "a GPU between two architectures of one major version": dict(gpus=(L40,), architectures=("80", "100")),
    "a GPU between two major versions, by PTX of the lower": dict(gpus=(THOR,), torch_architectures=()),
    "by PTX and a driver newer than the compiler": dict(gpus=(A100,), architectures=("75", "90"), driver_cuda=(13, 2)),
    "a build of CUDA 12 with an early driver of CUDA 12": dict(TWELVE, driver="525.60.13", driver_cuda=(12, 0)),
    "a build of CUDA 12 with a driver of CUDA 13": TWELVE,
    "Volta with a build for it": dict(TWELVE, gpus=(V100,), architectures=("70", "90")),
    "unlike GPUs, each with its code": dict(gpus=(A100, H100)),
    "some GPUs hidden": dict(visible="1"),
    "a PyTorch whose code is not known": dict(torch_architectures=()),
}


@pytest.mark.parametrize("case", USABLE)
def test_gpus_can_be_used(case):
    assert obstacles(dataclasses.replace(GOOD, **USABLE[case])) == []


UNUSABLE = {
    "no driver": (NO_DRIVER, ["no NVIDIA driver answers here .*container"]),
    "no driver, and nothing for GPUs": (
        dict(NO_DRIVER, cuda=None, architectures=(), torch_cuda=None),
        ["no NVIDIA driver", "built without CUDA: install a CUDA toolkit .12.4 to 13.x.", "PyTorch .*whl/cu130"],
    ),
    "driver of CUDA 12 for a build of CUDA 13": (
        dict(driver="550.54.14", driver_cuda=(12, 4), torch_cuda=(12, 6)),
        ["CUDA 13.0, which needs NVIDIA driver 580 or newer, and driver 550.54.14 runs CUDA 12.4 at most: .*"
         "CUDA_HOME=/usr/local/cuda-12 make venv"],
    ),
    "driver of CUDA 11 for a build of CUDA 12": (
        dict(TWELVE, driver="470.82.01", driver_cuda=(11, 4), torch_cuda=(11, 8)),
        ["CUDA 12.8, which needs NVIDIA driver 525 or newer, and driver 470.82.01 runs CUDA 11.4 at most"],
    ),
    "driver too old for PyTorch alone": (
        dict(cuda=(12, 8), driver="570.86.10", driver_cuda=(12, 8), gpus=(), seen=False),
        ["PyTorch 2.13.0.cu130 was built with CUDA 13.0, which needs NVIDIA driver 580 .*whl/cu126"],
    ),
    "the same with Blackwell": (
        dict(cuda=(12, 8), driver="570.86.10", driver_cuda=(12, 8), gpus=(B200,), seen=False),
        ["PyTorch 2.13.0.cu130 was built with CUDA 13.0.*whl/cu128"],
    ),
    "core without CUDA": (dict(cuda=None, architectures=()), [r"built without CUDA.*\(12.4 to 13.x\).*make venv"]),
    "core without CUDA, driver of CUDA 12": (
        dict(cuda=None, architectures=(), driver_cuda=(12, 4), torch_cuda=(12, 6)),
        ["built without CUDA.*12.4 or newer, but not 13"],
    ),
    "core without CUDA, Volta": (
        dict(cuda=None, architectures=(), gpus=(V100,), torch_architectures=()),
        ["built without CUDA.*12.4 or newer, but not 13"],
    ),
    "PyTorch without CUDA": (
        dict(torch="2.13.0+cpu", torch_cuda=None, torch_architectures=(), seen=False),
        ["PyTorch 2.13.0.cpu was built without CUDA: pip install .*torch --index-url https://.*/whl/cu130"],
    ),
    "PyTorch without CUDA, driver of CUDA 12": (
        dict(TWELVE, torch_cuda=None, seen=False, driver_cuda=(12, 4)),
        ["was built without CUDA: pip install .*whl/cu126"],
    ),
    "no PyTorch": (dict(torch="", torch_cuda=None, seen=False), ["PyTorch is missing: pip install torch"]),
    "all GPUs hidden": (dict(gpus=(), seen=False, visible=""), ["CUDA_VISIBLE_DEVICES='' shows no GPU"]),
    "a driver and no GPU": (dict(gpus=(), seen=False), ["PyTorch sees no GPU: ask for one"]),
    "a GPU older than the build": (
        dict(gpus=(A100,), architectures=("90", "100"), torch_architectures=()),
        ["no code for NVIDIA A100 .compute capability 8.0, 40 GiB., but for sm_90 sm_100: .*CRYOSPLAT_CUDA_ARCH=80$"],
    ),
    "Volta with a build of CUDA 13": (
        dict(gpus=(V100,)),
        ["no code for Tesla V100.*CRYOSPLAT_CUDA_ARCH=70 and a toolkit of CUDA 12",
         "PyTorch 2.13.0.cu130 has no code for Tesla V100.*whl/cu126"],
    ),
    "Pascal": (dict(gpus=(P100,), torch_architectures=()), ["Tesla P100.* is too old, the kernels need 7.0.*hide it"]),
    "one GPU of two": (dict(gpus=(P100, H100), torch_architectures=()), ["Tesla P100.* is too old"]),
    "PTX newer than the driver": (
        dict(TWELVE, gpus=(A100,), architectures=("75", "90"), driver="550.54.14", driver_cuda=(12, 4)),
        ["driver 550.54.14 runs CUDA 12.4 at most, so it cannot compile what CUDA 12.8 wrote.*CUDA_ARCH=80"],
    ),
    "PyTorch without this GPU's code": (
        dict(gpus=(B200,), torch_architectures=("sm_80", "sm_90", "sm_90a")),
        ["PyTorch 2.13.0.cu130 has no code for NVIDIA B200.*whl/cu130"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
def test_gpus_cannot_be_used_for_the_reasons_that_are_said_and_no_others(case):
    change, patterns = UNUSABLE[case]
    found = obstacles(dataclasses.replace(GOOD, **change))
    assert len(found) == len(patterns)
    assert all(re.search(pattern, sentence) for pattern, sentence in zip(patterns, found, strict=True)), found


@pytest.mark.parametrize(
    ("architecture", "native", "compiled"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)]),
        ("90a", [(9, 0)], [(9, 0)]),
        ("100f", [(10, 0), (10, 3)], [(10, 0), (10, 3)]),
    ],
)
def test_code_runs_where_nvidia_says(architecture, native, compiled):
    every = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1)]
    assert [capability for capability in every if devices.runs_on(capability, architecture)] == native
    assert [capability for capability in every if devices.compiles_on(capability, architecture)] == compiled


def test_what_nvidia_smi_says_is_read():
    lines = ["NVIDIA A100-SXM4-40GB, 8.0, 40960", "Odd, Name, 12.1, 1024", "", "[N/A], [N/A], [N/A]"]
    assert devices.read_gpus(lines) == [Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40.0), Gpu("Odd, Name", (12, 1), 1.0)]


def test_a_driver_is_asked_for_its_cuda(tmp_path, monkeypatch):
    source = tmp_path / "driver.c"
    source.write_text("int cuDriverGetVersion(int* version) { *version = 12080; return 0; }\n")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", source, "-o", library], check=True)
    load = devices.ctypes.CDLL
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: load(str(library) if name == "libcuda.so.1" else name))
    assert devices._ask_driver() == (12, 8)


MACHINE = doctor.Machine(
    core="/somewhere/_C.so",
    instruction_set="avx2",
    processor="A processor",
    cores=8,
    memory_gib=64.0,
    backends=("gloo", "nccl 2.27.3"),
    packages={"cryodrgn": "4.3.1"},
    slurm=True,
    facts=GOOD,
)


def test_the_report_names_what_there_is():
    text = "\n".join(doctor.report(MACHINE))
    for words in (
        "used here: avx2",
        "CUDA 13.0, sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120",
        "A processor, 8 cores to use, 64 GiB",
        "580.65.06, runs CUDA up to 13.0",
        "0: NVIDIA H100 (compute capability 9.0, 80 GiB)",
        "1: NVIDIA H100",
        "2.13.0+cu130, with CUDA 13.0; between ranks: gloo, nccl 2.27.3",
        "cryodrgn 4.3.1",
        "Slurm       here",
        "GPUs can be used: yes",
        "train.device=auto computes on GPUs here.",
    ):
        assert words in text
    assert doctor.faults(MACHINE) == []


def test_without_gpus_the_report_says_so_and_nothing_is_broken():
    facts = Facts(torch="2.13.0+cpu")
    machine = dataclasses.replace(MACHINE, facts=facts, slurm=False, architecture="aarch64", instruction_set="baseline")
    lines = doctor.report(machine)
    text = "\n".join(lines)
    assert "  for GPUs  none" in lines and "driver      none" in lines and "GPUs        none" in lines
    assert "GPUs can be used: no" in lines and sum(line.startswith("  - ") for line in lines) == 3
    assert lines[-1] == "train.device=auto computes on the CPU here." and "Slurm       not here" in text
    assert "AVX" not in text and doctor.faults(machine) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(core="", core_error="The compiled core of cryosplat is missing: make venv"),
            "core of cryosplat is missing",
        ),
        (dict(facts=dataclasses.replace(GOOD, torch="", torch_cuda=None)), "PyTorch is missing or does not load"),
        (dict(backends=()), "no gloo"),
        (dict(missing={"cryodrgn": "ModuleNotFoundError: No module named 'cryodrgn'"}), "pip install cryodrgn"),
    ],
)
def test_what_is_broken_is_said_instead_of_a_verdict_on_gpus(change, message, monkeypatch, capsys):
    machine = dataclasses.replace(MACHINE, **change)
    lines = doctor.report(machine)
    at = lines.index("No run can start here:")
    assert re.search(message, lines[at + 1]) and not [line for line in lines if "can be used" in line]
    monkeypatch.setattr(doctor, "find_machine", lambda: machine)
    assert doctor.run(None) == 1 and message.split(".*")[0] in capsys.readouterr().out


def doctor_of(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cryosplat.cli", "doctor"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_command_runs_here():
    done = doctor_of(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    titles = [line[:12].strip() for line in done.stdout.split("\n\n")[0].splitlines()]
    assert [title for title in titles if title] == [
        *("cryosplat", "core", "for CPUs", "for GPUs", "machine", "driver", "GPUs", "PyTorch", "packages", "Slurm")
    ]
    assert re.search(r"^train\.device=auto computes on (the CPU|GPUs) here\.$", done.stdout, re.MULTILINE)


def test_the_command_runs_with_a_core_that_does_not_load_and_says_what_to_run(tmp_path, monkeypatch):
    package = tmp_path / "cryosplat"
    package.mkdir()
    for path in (ROOT / "cryosplat").glob("*.py"):
        shutil.copy(path, package)
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"not a library")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = doctor_of(tmp_path)
    assert done.returncode == 1 and "is there but does not load" in done.stdout and "make venv" in done.stdout
    assert "Traceback" not in done.stderr
