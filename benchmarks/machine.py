"""What a machine can do, measured with PyTorch alone, and how a call is timed on it."""

import dataclasses
import datetime
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cryosplat._extension import core

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Of the buffer that is copied: several times the last cache."""

PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
"""Side of the matrices whose product tells the rate of multiply-adds."""


@dataclass(frozen=True)
class Machine:
    """A device and its measured roofs.

    Attributes:
        device: "cpu" or "cuda".
        name: of the processor or GPU.
        lanes: numbers in a vector register of the instruction set in use; 1 on a GPU, where a thread is a lane.
        fma_per_s: float32 multiply-adds a second of a large matrix product, TF32 off. On a CPU of the threads that
            PyTorch uses; on a GPU of its ordinary cores, through cuBLAS: tensor cores, which splatting cannot use,
            have no part in it.
        bytes_per_s: of a copy between two large buffers, bytes read and bytes written together.
    """

    device: str
    name: str
    lanes: int
    fma_per_s: float
    bytes_per_s: float

    def floor_s(self, operations: float, moved_bytes: float) -> float:
        """Seconds that so many multiply-adds and so many bytes take at the least, one hidden behind the other."""
        return max(operations / self.fma_per_s, moved_bytes / self.bytes_per_s)

    def as_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)


def measure_machine(device: torch.device, least_seconds: float = 0.05) -> Machine:
    """Measure the roofs, each the best of five runs of at least so many seconds."""
    kind = device.type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else _processor()
    lanes = 1 if kind == "cuda" else {"avx512": 16, "avx2": 8, "baseline": 4}[core.instruction_set()]
    size = PRODUCT_SIZE[kind]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        product_s = min(time_call(lambda: torch.mm(a, b), device, least_seconds) for _ in range(5))
    finally:
        torch.set_float32_matmul_precision(precision)
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    copy_s = min(time_call(lambda: target.copy_(source), device, least_seconds) for _ in range(5))
    return Machine(kind, name, lanes, size**3 / product_s, 2 * COPY_BYTES[kind] / copy_s)


def time_call(call: Callable[[], object], device: torch.device, least_seconds: float = 0.05) -> float:
    """Seconds of one call, repeated until it has run long enough to be measured.

    CPU time on a CPU. On a GPU time between two events on the stream, after shorter runs that warm it up; calls follow
    each other without a pause, so this is the longer of the kernels' time and of what the host needs to launch them.
    """
    if device.type == "cpu":
        calls, began = 0, time.process_time()
        while (elapsed := time.process_time() - began) < least_seconds or not calls:
            call()
            calls += 1
        return elapsed / calls
    calls = 1
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        seconds = max(start.elapsed_time(end) * 1e-3, 1e-6)
        if seconds >= least_seconds:
            return seconds / calls
        calls = max(2 * calls, min(32 * calls, int(1.2 * calls * least_seconds / seconds)))


def describe(device: torch.device) -> dict[str, str]:
    """Date, machine and versions: what a figure must be kept with."""
    found = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "cores": str(len(os.sched_getaffinity(0))),
        "instruction set": core.instruction_set(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "device memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "driver": driver_version(),
            "CUDA of torch": str(torch.version.cuda),
        }
    return found


def driver_version() -> str:
    """Of the NVIDIA driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.split("\n")[0].strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
