"""A whole job, from a stack on disk to final maps: python -m benchmarks.wholejob [--device cpu|cuda].

A stack of 100,000 images of 256 px is made on the device from an atomic model (the made-up protein complex of
`cryosplat simulate`), by Fourier slices, with random poses, shifts and CTFs, in half precision, in memory (/dev/shm)
where there is room. Then `cryosplat train` runs on it by its default recipe with 30,000 Gaussians and half maps, as a
user would start it, while nvidia-smi is asked five times a second how busy the GPU is and how much memory it holds. The
stack is removed at the end.
"""

import argparse
import json
import math
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from benchmarks.machine import describe
from cryosplat import stackfiles
from cryosplat.atoms import density
from cryosplat.files import atomic_path
from cryosplat.phantom import protein_phantom
from cryosplat.slices import FourierSlicer, project_on_device
from cryosplat.volumes import write_map

IMAGES_AT_ONCE = {"cpu": 64, "cuda": 512}
SCALE_IMAGES = 512
"""Images whose variance sets the strength of the signal."""

SOLVENT = 0.65
"""Of the molecule's mean density removed, as `cryosplat simulate` does."""

MODE_HALF = 12
"""MRC2014's mode of half-precision pixels."""

IDLE_PERCENT = 5
"""A GPU less busy than this in a fifth of a second counts as waiting."""

LEAST_FREE = 1.2
"""Free space wanted in /dev/shm, in sizes of the stack."""

SMALL = {"images": 500, "box": 64, "gaussians": 500, "pixel_size": 3.0, "snr": 0.5, "threads": 1}
"""To see that all runs: no figure of it means anything."""


def simulate(folder: Path, device: torch.device, count: int, box: int, pixel_size_a: float, snr: float) -> None:
    """Write particles.mrcs, poses.pkl, ctf.pkl and truth.mrc; noise has unit variance."""
    volume = density(protein_phantom(), box, pixel_size_a, None, SOLVENT)
    write_map(folder / "truth.mrc", volume, pixel_size_a)
    rng = np.random.default_rng(0)
    rotations = Rotation.random(count, random_state=rng).as_matrix()
    shifts = rng.normal(0, 2, (count, 2)) / box
    mean, difference = rng.uniform(8000, 25000, count), rng.uniform(0, 500, count)
    drawn = np.stack([mean + difference / 2, mean - difference / 2, rng.uniform(0, np.pi, count)], 1)
    parameters = np.hstack([drawn, np.tile([300.0, 2.7, 0.1, 0.0], (count, 1))])
    stackfiles.write_poses(folder / "poses.pkl", rotations, shifts)
    stackfiles.write_ctf(folder / "ctf.pkl", parameters, box, pixel_size_a)
    slicer = FourierSlicer(volume, device)

    def images(block: slice) -> torch.Tensor:
        return project_on_device(slicer, rotations[block], shifts[block], parameters[block], pixel_size_a)

    at_once = IMAGES_AT_ONCE[device.type]
    blocks = [slice(first, min(first + at_once, count)) for first in range(0, count, at_once)]
    scale = math.sqrt(snr / statistics.mean(float(images(b).var((1, 2)).mean()) for b in blocks[: _few(at_once)]))
    generator = torch.Generator(device).manual_seed(1)
    pixels = stackfiles.PixelStatistics()
    with open(folder / "particles.mrcs", "wb") as handle:
        handle.write(bytes(stackfiles.MRC_HEADER_BYTES))
        for block in blocks:
            signal = images(block).mul_(scale)
            noisy = signal.add_(torch.randn(signal.shape, device=device, generator=generator)).half().cpu().numpy()
            pixels.add(noisy[:1])  # the header's statistics are of every block's first image
            handle.write(noisy.data)
        header = bytearray(stackfiles.stack_header(count, box, pixel_size_a, pixels))
        struct.pack_into("<i", header, 12, MODE_HALF)
        handle.seek(0)
        handle.write(header)


def _few(at_once: int) -> int:
    return -(-SCALE_IMAGES // at_once)


def train(folder: Path, device: str, gaussians: int, run_dir: Path, threads: int | None) -> dict:
    """summary.json of a run by the default recipe, and what nvidia-smi said meanwhile."""
    settings = [
        f"data_root={folder}",
        "data.particles=particles.mrcs",
        "data.poses=poses.pkl",
        "data.ctf=ctf.pkl",
        "data.truth=truth.mrc",
        f"model.gaussians={gaussians}",
        f"train.device={device}",
        f"run_dir={run_dir}",
        f"train.threads={threads or 'null'}",
    ]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as watched:
        watcher = _watch(watched) if device == "cuda" else None
        try:
            # What it says is for the log; the table below is the output.
            subprocess.run([sys.executable, "-m", "cryosplat.train", *settings], check=True, stdout=sys.stderr)
        finally:
            if watcher is not None:
                watcher.terminate()
                watcher.wait()
        seconds = time.perf_counter() - began
        watched.seek(0)
        samples = [[float(word) for word in line.split(",")] for line in watched if line.count(",") == 1]
    summary = json.loads((run_dir / "summary.json").read_text())
    return {"seconds": seconds, "gpu": of_samples(samples), "summary": summary}


def _watch(output) -> subprocess.Popen:
    query = "--query-gpu=utilization.gpu,memory.used"
    return subprocess.Popen(
        ["nvidia-smi", query, "--format=csv,noheader,nounits", "--id=0", "--loop-ms=200"],
        stdout=output,
        stderr=subprocess.DEVNULL,
    )


def of_samples(samples: list[list[float]]) -> dict[str, float] | None:
    """Mean load and share of time without any (of 1), and the peak memory, of (percent busy, MiB) samples.

    >>> of_samples([[0.0, 100.0], [100.0, 2048.0]])
    {'busy': 0.5, 'idle_share': 0.5, 'peak_memory_gib': 2.0}
    """
    if not samples:
        return None
    busy, memory = zip(*samples, strict=True)
    return {
        "busy": statistics.mean(busy) / 100,
        "idle_share": sum(percent < IDLE_PERCENT for percent in busy) / len(busy),
        "peak_memory_gib": max(memory) / 1024,
    }


def row_of(size: argparse.Namespace, simulated_s: float, trained: dict) -> dict:
    summary, gpu = trained["summary"], trained["gpu"]
    ours, linear = summary["fsc_truth_mean"], summary["fsc_linear_truth_mean"]
    return {
        "images": size.images,
        "box": size.box,
        "gaussians": size.gaussians,
        "snr": size.snr,
        "simulation_seconds": simulated_s,
        "seconds": trained["seconds"],
        "images_per_s": size.images / trained["seconds"],
        "epochs": summary["epochs"],
        "volume_fit_seconds": summary["volume_fit_seconds"],
        "peak_memory_gib": summary["peak_memory_gib"],
        "peak_gpu_memory_gib": gpu["peak_memory_gib"] if gpu else None,
        "reserved_gpu_memory_gib": summary["peak_gpu_memory_gib"] or None,
        "gpu_idle_share": gpu["idle_share"] if gpu else None,
        "gpu_busy": gpu["busy"] if gpu else None,
        "fsc_truth_mean": ours,
        "fsc_linear_truth_mean": linear,
        "gain_over_linear": ours - linear,
        "resolution_a": summary["resolution_a"],
    }


def table(row: dict) -> str:
    """Markdown, a line a figure."""
    names = {
        "images": "images",
        "box": "box, px",
        "gaussians": "Gaussians",
        "snr": "signal over noise variance",
        "epochs": "epochs over the images (default recipe: none)",
        "simulation_seconds": "making the stack, s",
        "seconds": "stack to final maps, s",
        "volume_fit_seconds": "of it the fit in the volume, s",
        "images_per_s": "images/s of the whole job",
        "peak_memory_gib": "host memory, GiB",
        "peak_gpu_memory_gib": "GPU memory (nvidia-smi, with what made the stack), GiB",
        "reserved_gpu_memory_gib": "GPU memory reserved by the run, GiB",
        "gpu_busy": "GPU busy, share of time (nvidia-smi)",
        "gpu_idle_share": "GPU waiting, share of time",
        "fsc_truth_mean": "mean FSC to truth, delivered map",
        "fsc_linear_truth_mean": "mean FSC to truth, linear map",
        "gain_over_linear": "difference",
        "resolution_a": "resolution, A",
    }
    lines = ["| | |", "|---|---|"]
    for name, words in names.items():
        value = row[name]
        lines.append(f"| {words} | {'not measured' if value is None else format(value, ',.4g')} |")
    return "\n".join(lines)


def find_room(needed_bytes: float) -> str | None:
    """/dev/shm if the stack fits there, else None for the default folder of temporary files."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > LEAST_FREE * needed_bytes
    return str(memory) if roomy else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--box", type=int, default=256)
    parser.add_argument("--gaussians", type=int, default=30_000)
    parser.add_argument("--pixel-size", type=float, default=1.0, help="A/px")
    parser.add_argument("--snr", type=float, default=0.02, help="signal over noise variance in the whole box")
    parser.add_argument("--threads", type=int, help="CPU threads of the run; default all cores")
    parser.add_argument("--small", action="store_true", help=f"{SMALL}: to see that all runs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.small:
        vars(args).update(SMALL)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory(dir=find_room(2 * args.images * args.box**2), prefix="cryosplat-") as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        simulate(folder, device, args.images, args.box, args.pixel_size, args.snr)
        simulated_s = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the run is another process
        trained = train(folder, args.device, args.gaussians, folder / "run", args.threads)
    row = row_of(args, simulated_s, trained)
    print(table(row))
    if args.output:
        with atomic_path(args.output) as temporary:
            temporary.write_text(json.dumps({"about": describe(device), "rows": [row]}, indent=1))


if __name__ == "__main__":
    main()
