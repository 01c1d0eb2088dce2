"""Times the training step against its floor: python -m benchmarks.step [--device cpu|cuda] [--threads N].

The step is the one that training makes: `Trainer.run_epoch` on images of noise, with all that belongs to it (the
epoch's plan, batches, splat, transforms, residual, gradients, optimiser, looks at the losses). Its parts come from
another epoch under PyTorch's profiler, which slows it down: their shares are what counts. The floor is the sum over the
kernels of a step of what `benchmarks/floors.py` counts for each. CPU figures are CPU time, GPU figures wall time
between looks at the losses, each of which waits for the GPU. Memory is the process's largest so far, on a CPU of all
sizes before it too.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import floors
from benchmarks.machine import Machine, describe, measure_machine
from benchmarks.ops import CUTOFF, PIXEL_SIZE_A, SIZES
from cryosplat.costs import peak_memory_gib
from cryosplat.dataset import ParticleDataset
from cryosplat.distributed import World, sum_arrays
from cryosplat.files import atomic_path
from cryosplat.gaussians import GaussianMixture
from cryosplat.particles import ParticleTable
from cryosplat.reconstruction import MODEL_NAMES, Reconstruction
from cryosplat.sampling import BatchPlan
from cryosplat.settings import TrainConfig
from cryosplat.trainer import Report, Trainer

SMALL = ((128, 32, 8),)
SIGMA_PX = 1.2
"""Standard deviation of a round Gaussian whose footprint is some 71 pixels: what the narrow ones of a fit come to."""

STEPS = {"cpu": 8, "cuda": 50}
"""Of an epoch, and between looks at the losses."""

PARTS = (
    ("splat backward", ("splat_backward", "splat_gather", "sum_chunks", "sum_poses")),
    # On a CPU the forward pass goes by the name of what saves its inputs for the backward one.
    ("splat", ("cryosplat::splat", "cryosplat_splat", "splat_draw", "prepare_views")),
    ("covariances", ("covariances",)),
    ("residual", ("residual", "prepare_phases", "SpectralLoss")),
    ("transforms", ("fft", "dft", "preprocess", "postprocess")),
    ("optimiser", ("adam", "Adam")),
    ("copies", ("Memcpy", "Memset", "copy", "index", "gather", "stack", "cat")),
)
"""Part of a step, and what its operators or GPU kernels have in their names; the first that fits counts."""


@dataclass(frozen=True)
class NoiseImages:
    """Stands for a stack: white noise, the same few images again and again."""

    box: int

    def read(self, ids: np.ndarray) -> np.ndarray:
        """(n, D, D) float32."""
        pixels = np.random.default_rng(0).standard_normal((16, self.box, self.box), dtype=np.float32)
        return pixels[np.asarray(ids) % 16]

    def in_file_order(self, ids: np.ndarray) -> np.ndarray:
        """Any order is."""
        return ids

    def require_finite(self, images: np.ndarray, ids: np.ndarray) -> None:
        """They are."""


def particles(count: int, box: int) -> ParticleTable:
    """A table of noise images at random poses and defoci."""
    rng = np.random.default_rng(1)
    rotations = np.linalg.qr(rng.standard_normal((count, 3, 3)))[0]
    rotations[:, :, 0] *= np.linalg.det(rotations)[:, None]
    defocus = rng.uniform(8000, 25000, (count, 1))
    fixed = np.tile([0.5, 300.0, 2.7, 0.1, 0.0], (count, 1))
    return ParticleTable(
        images=NoiseImages(box),
        box=box,
        pixel_size_a=PIXEL_SIZE_A,
        rotations=rotations,
        shifts=rng.normal(0, 2 / box, (count, 2)),
        ctf=np.concatenate([defocus + 200, defocus - 200, fixed], axis=1),
        half=(np.arange(count) % 2).astype(np.int8),
        half_origin="every other one",
        rows=np.arange(count),
        group=np.full(count, -1),
        held_out=np.zeros(count, dtype=bool),
    )


def make_trainer(size: tuple[int, int, int], models: int, steps: int, world: World) -> Trainer:
    """A trainer as a run has it, with as many epochs as anyone wants of so many steps of a batch over all ranks."""
    gaussians, box, batch = size
    table = particles(steps * batch, box)
    plan = BatchPlan(table.half, batch, seed=0, held_out=table.held_out)
    owned = np.flatnonzero(plan.owner(world.size) == world.rank)
    dataset = ParticleDataset(table, owned, box, device=world.device)
    dataset.normalise(sum_arrays([dataset.statistics.deviation], world)[0])
    mixture = GaussianMixture(models, gaussians, "positive", (0.5 / box, 8 / box))
    mixture.start_randomly(spread=0.12, scale=SIGMA_PX / box, seed=0)
    reconstruction = Reconstruction(mixture, dataset.box, dataset.pixel_size_a, None, CUTOFF, world.size)
    reconstruction = reconstruction.to(world.device)
    config = TrainConfig(epochs=10_000, batch=batch, lr=1e-6, schedule="constant", log_every=steps)
    return Trainer(world, table, dataset, plan, reconstruction, config)


def alone(device: torch.device) -> World:
    """One process."""
    return World(0, 1, 0, 1, device, "none", "single", torch.get_num_threads())


def time_steps(trainer: Trainer, epochs: int) -> list[float]:
    """Seconds a step of each of some epochs, after one that warms up."""
    on_cpu = trainer.world.device.type == "cpu"
    found: list[float] = []

    def note(report: Report) -> None:
        found.append((time.process_time() - began if on_cpu else report.seconds) / trainer.plan.batches)

    for _ in range(1 + epochs):
        began = time.process_time()
        trainer.run_epoch(note)
    return found[1:]


def profile_steps(trainer: Trainer) -> list[dict]:
    """Every operator (CPU) or kernel (GPU) of an epoch by its own time, the longest first, a step."""
    on_cpu = trainer.world.device.type == "cpu"
    activities = [ProfilerActivity.CPU] + ([] if on_cpu else [ProfilerActivity.CUDA])
    with profile(activities=activities) as profiler:
        trainer.run_epoch(lambda report: None)
    costs = []
    for event in profiler.key_averages():
        # Beside kernels a GPU's list has the operators and marked stretches around them, with the same time again.
        kernel = event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        if on_cpu or kernel:
            own = event.self_cpu_time_total if on_cpu else event.self_device_time_total
            if own > 0:
                costs.append({"name": event.key, "us": own / trainer.plan.batches, "calls": event.count})
    total = sum(cost["us"] for cost in costs)
    return sorted(({**cost, "share": cost["us"] / total} for cost in costs), key=lambda cost: -cost["us"])


def part_of(name: str) -> str:
    """Which of PARTS an operator or kernel belongs to.

    >>> [part_of(name) for name in ("cryosplat::splat_backward", "aten::_fft_r2c", "aten::mul")]
    ['splat backward', 'transforms', 'other']
    """
    return next((part for part, words in PARTS if any(word in name for word in words)), "other")


def parts_of(costs: list[dict]) -> dict[str, float]:
    """Shares of a step by part."""
    shares = dict.fromkeys([*(part for part, _ in PARTS), "other"], 0.0)
    for cost in costs:
        shares[part_of(cost["name"])] += cost["share"]
    return shares


def floor_of(trainer: Trainer, batch: int, machine: Machine) -> dict[str, dict]:
    """Operations, bytes and seconds of the floor of every kernel of a step, with the poses of its first batch."""
    mixture = trainer.reconstruction.mixture
    ids = trainer.plan.epoch(0)[0]
    seen = trainer.dataset.batch(ids)
    shown_by = [torch.zeros_like(seen.half)] + ([1 + seen.half] if mixture.models > 1 else [])
    views = len(shown_by)
    poses = seen.rotations.repeat(views, 1, 1), seen.shifts.repeat(views, 1), torch.cat(shown_by)
    with torch.no_grad():
        inputs = [*mixture.in_pixels(trainer.reconstruction.box), *poses]
        works = floors.step(inputs, trainer.reconstruction.box, CUTOFF, batch, machine.lanes)
    return {
        name: {"operations": work.operations, "bytes": work.bytes, "floor_seconds": work.floor_s(machine)}
        for name, work in works.items()
    }


def measure(size: tuple[int, int, int], models: int, machine: Machine, epochs: int, steps: int) -> dict:
    """A row: seconds, rates, memory, parts and floor of one size."""
    device = torch.device(machine.device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = make_trainer(size, models, steps, alone(device))
    seconds = statistics.median(time_steps(trainer, epochs))
    memory = peak_memory_gib(device)
    costs = profile_steps(trainer)
    gaussians, box, batch = size
    views = batch * min(models, 2)
    floor = floor_of(trainer, batch, machine)
    least = sum(kernel["floor_seconds"] for kernel in floor.values())
    return {
        "gaussians": gaussians,
        "box": box,
        "batch": batch,
        "models": models,
        "views": views,
        "seconds": seconds,
        "us_per_image": 1e6 * seconds / batch,
        "us_per_view": 1e6 * seconds / views,
        "images_per_s": batch / seconds,
        "memory_gib": memory,
        "parts": parts_of(costs),
        "costs": costs[:12],
        "operations": sum(kernel["operations"] for kernel in floor.values()),
        "bytes": sum(kernel["bytes"] for kernel in floor.values()),
        "floor": floor,
        "floor_seconds": least,
        "times_the_floor": seconds / least,
    }


def tables(machine: Machine, rows: list[dict]) -> str:
    """Markdown: the steps, their parts and their three largest costs."""
    kind = "CPU" if machine.device == "cpu" else "GPU"
    memory = "cpu_max_rss" if machine.device == "cpu" else "gpu_max_reserved"
    lines = [
        f"{machine.name}; {kind} time of a step, cut-off {CUTOFF}, Gaussians of {SIGMA_PX} px",
        "",
        f"| Gaussians | box | batch | models | µs an image | µs an image and view | images/s | {kind} memory, GiB | "
        "floor, µs an image | times the floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['gaussians']} | {r['box']} | {r['batch']} | {r['models']} | {r['us_per_image']:.4g} | "
            f"{r['us_per_view']:.4g} | {r['images_per_s']:.4g} | {r['memory_gib'].get(memory, 0):.2f} | "
            f"{1e6 * r['floor_seconds'] / r['batch']:.3g} | {r['times_the_floor']:.2f} |"
        )
    names = [*(part for part, _ in PARTS), "other"]
    lines += ["", f"| share of the step, % | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for r in rows:
        shares = " | ".join(f"{100 * r['parts'][name]:.0f}" for name in names)
        lines.append(f"| {r['gaussians']}, {r['box']} px, {r['models']} models | {shares} |")
    lines += ["", "| largest costs | µs a step | share, % |", "|---|---|---|"]
    for r in rows:
        for cost in r["costs"][:3]:
            size = f"{r['gaussians']}, {r['box']} px, {r['models']} models"
            lines.append(f"| {size}: `{cost['name'][:80]}` | {cost['us']:.4g} | {100 * cost['share']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5, help="of which the median is taken")
    parser.add_argument("--models", type=int, nargs="+", choices=(1, len(MODEL_NAMES)), default=[1, len(MODEL_NAMES)])
    parser.add_argument("--sizes", type=int, nargs="+", choices=range(len(SIZES)), default=list(range(len(SIZES))))
    parser.add_argument("--small", action="store_true", help="a size that tells nothing, to see that all runs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    machine = measure_machine(device, 0.005 if args.small else 0.05)
    sizes = SMALL if args.small else [SIZES[place] for place in args.sizes]
    rows = [measure(size, models, machine, args.epochs, STEPS[args.device]) for size in sizes for models in args.models]
    print(tables(machine, rows))
    if args.output:
        found = {"machine": machine.as_dict(), "about": describe(device), "rows": rows}
        with atomic_path(args.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
