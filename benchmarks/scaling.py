"""How far image-by-image training scales: python -m benchmarks.scaling [--measure] [--us-per-view 5].

A step of W ranks is each rank's own work on its share of the batch and one all-reduce of all gradients. As training is
written the two follow each other: the gradients' bucket is full when the last kernel of the backward pass ends, and the
optimiser needs the sums. Were they overlapped (half a batch computed while the other half's gradients travel), a step
would be the longer of both. The model here has both, with

    work        fixed + images a rank x views x time an image and view
    all-reduce  the time that NCCL's own tuner assigns to its ring and to its tree, the shorter one

and names the smallest batch a rank that keeps 90 % of W times the speed of one rank at the same batch a rank.
--measure checks the sum on this machine with 1, 2 and 4 ranks of one thread over gloo.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import describe
from benchmarks.step import make_trainer, time_steps
from cryosplat import distributed
from cryosplat.config import load_config
from cryosplat.files import atomic_path
from cryosplat.gaussians import NUMBERS

GAUSSIANS, MODELS = 30_000, 3
GRADIENT_BYTES = 4 * (MODELS * GAUSSIANS * NUMBERS + MODELS)
"""Of all models, and the losses that ride along."""

VIEWS = 2
"""Of a particle, with half maps: the full model and its half's."""

EFFICIENCY = 0.9
RANKS = (8, 64, 512)
GPUS_A_NODE = 4
SMALL = (500, 32)
"""Gaussians and box, to see that all runs."""

MEASURED = (GAUSSIANS, 64)
"""Gaussians and box of the check: gradients of the full size, images as small as they can be."""

MEASURED_BATCHES, MEASURED_RANKS = (2, 8), (1, 2, 4)
STEPS, EPOCHS, REDUCTIONS = 4, 3, 20
GRID_NUMBERS, PADDING, HALVES = 4, 2, 2


@dataclass(frozen=True)
class Network:
    """What joins GPUs; bandwidths in GB/s as nccl-tests' bus bandwidth, latencies in microseconds.

    Base and step latencies are NCCL's (src/graph/tuning.cc, protocol LL128, where it may use that, else Simple), and so
    are the factors of its bandwidths: 0.92 for the ring and 0.92 x 0.9375 for the tree with LL128. The tree's algorithm
    bandwidth is half its bus bandwidth.

    Attributes:
        inside: bus bandwidth of the ring within a node; None: there is one node only, of 8 GPUs.
        between: bus bandwidth that the adapters of a node have together.
        base, ring_inside, ring_between, tree_inside, tree_between: latencies, of a call and of its steps.
        ring_factor, tree_factor: of the bandwidths.
    """

    name: str
    inside: float
    between: float | None
    base: float = 14.0
    ring_inside: float = 1.9
    ring_between: float = 4.0
    tree_inside: float = 1.25
    tree_between: float = 8.5
    ring_factor: float = 0.92
    tree_factor: float = 0.92 * 0.9375

    def nodes(self, ranks: int) -> int:
        return 1 if self.between is None else max(1, ranks // GPUS_A_NODE)

    def ring_s(self, ranks: int, size: float) -> float:
        """Seconds of an all-reduce of ``size`` bytes round a ring."""
        nodes, steps = self.nodes(ranks), 2 * (ranks - 1)
        crossing = 2 * nodes if nodes > 1 else 0
        latency = self.base + (steps - crossing) * self.ring_inside + crossing * self.ring_between
        bus = min(self.inside, self.between if nodes > 1 else math.inf) * self.ring_factor
        return 1e-6 * latency + size * steps / ranks / (1e9 * bus)

    def tree_s(self, ranks: int, size: float) -> float:
        """The same up and down NCCL's double binary tree over nodes, a chain within each."""
        nodes = self.nodes(ranks)
        depth = math.log2(nodes)
        latency = self.base + 2 * ((ranks // nodes - 1) * self.tree_inside + depth * self.tree_between)
        bus = min(self.inside, self.between if nodes > 1 else math.inf) * self.tree_factor
        return 1e-6 * latency + 2 * size / (1e9 * bus)

    def all_reduce_s(self, ranks: int, size: float) -> float:
        return min(self.ring_s(ranks, size), self.tree_s(ranks, size))


NETWORKS = (
    Network("NVLink, one node of 8", 370, None),
    Network("InfiniBand 400 Gb/s, an adapter a GPU", 370, 188),
    Network("InfiniBand 200 Gb/s, an adapter a node", 230, 24),
    Network("InfiniBand 100 Gb/s, an adapter a node", 230, 12.2),
    Network("Ethernet 25 Gb/s (TCP)", 230, 1.7, 8.4, 3.4, 16.0, 28.0, 28.0, 1.0, 0.92),
)
"""Sources in benchmarks/scaling.md."""


def smallest_batch(all_reduce_s: float, image_s: float, overlapped: bool, fixed_s: float = 0.0) -> int:
    """Images a rank from which on a step is at most work / EFFICIENCY.

    >>> smallest_batch(90e-6, 10e-6, overlapped=False), smallest_batch(100e-6, 10e-6, overlapped=True)
    (81, 9)
    """
    work_s = EFFICIENCY * all_reduce_s / (1 if overlapped else 1 - EFFICIENCY)
    return max(1, math.ceil((work_s - fixed_s) / image_s - 1e-9))


def batch_table(us_per_view: Sequence[float]) -> str:
    """Markdown: all-reduce and smallest batch a rank by network, number of GPUs and time a view."""
    titles = [f"{us:g} µs a view: as it is / overlapped" for us in us_per_view]
    lines = [f"| network | GPUs | all-reduce, µs | by | {' | '.join(titles)} |", "|---" * (4 + len(titles)) + "|"]
    for network in NETWORKS:
        for ranks in RANKS:
            if network.between is None and ranks > 8:
                continue
            seconds = network.all_reduce_s(ranks, GRADIENT_BYTES)
            way = "ring" if seconds == network.ring_s(ranks, GRADIENT_BYTES) else "tree"
            cells = []
            for us in us_per_view:
                batches = (smallest_batch(seconds, 1e-6 * us * VIEWS, overlapped) for overlapped in (False, True))
                cells.append(" / ".join(f"{batch:,}" for batch in batches))
            lines.append(f"| {network.name} | {ranks} | {1e6 * seconds:,.0f} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def grid_bytes(box: int) -> int:
    """Of the Fourier sums of both halves."""
    padded = PADDING * box
    return HALVES * padded * padded * (padded // 2 + 1) * GRID_NUMBERS * 4


def linear_table(us_per_image: float, box: int = 256) -> str:
    """Markdown: the linear pass of the default recipe, which ends in one reduction of the grids."""
    size = grid_bytes(box)
    lines = [
        f"| network | GPUs | reduction of {size / 1e9:.2f} GB, s | images for 90 % at {us_per_image:g} µs an image |",
        "|---|---|---|---|",
    ]
    for network in NETWORKS:
        for ranks in RANKS:
            if network.between is None and ranks > 8:
                continue
            # A reduction moves each byte once along a chain of all ranks: half of what an all-reduce moves.
            bus = network.inside if network.between is None else min(network.inside, network.between)
            seconds = size / (1e9 * bus)
            images = EFFICIENCY / (1 - EFFICIENCY) * seconds / (1e-6 * us_per_image) * ranks
            lines.append(f"| {network.name} | {ranks} | {seconds:.2g} | {float(f'{images:.2g}'):,.0f} |")
    return "\n".join(lines)


# The check with gloo


def work(size: tuple[int, int], output: Path) -> None:
    """What every rank does: steps of each batch a rank, then all-reduces alone; rank 0 writes means over ranks."""
    gaussians, box = size
    config = load_config(None, ["train.device=cpu", "train.threads=1"])
    with distributed.join(config) as world:
        rows = []
        for batch in MEASURED_BATCHES:
            trainer = make_trainer((gaussians, box, batch * world.size), MODELS, STEPS, world)
            began = time.perf_counter()
            cpu = sorted(time_steps(trainer, EPOCHS))[EPOCHS // 2]
            wall = (time.perf_counter() - began) / ((1 + EPOCHS) * STEPS)
            rows.append([cpu, wall])
        buffer = torch.zeros(MODELS * gaussians * NUMBERS + MODELS)
        distributed.barrier(world)
        began = time.process_time(), time.perf_counter()
        for _ in range(REDUCTIONS):
            distributed.sum_over_ranks(buffer, world)
        spent = time.process_time() - began[0], time.perf_counter() - began[1]
        rows.append([seconds / REDUCTIONS for seconds in spent])
        means = distributed.sum_over_ranks(torch.tensor(rows, dtype=torch.float64), world) / world.size
        if world.is_main:
            with atomic_path(output) as temporary:
                temporary.write_text(json.dumps(means.tolist()))


def measure(small: bool) -> list[dict]:
    """Seconds of steps and all-reduces on each number of ranks, each in processes of its own."""
    found = []
    for ranks in MEASURED_RANKS:
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch, "times.json")
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            words = ["-m", "benchmarks.scaling", "--output", str(output)] + (["--small"] if small else [])
            command = [sys.executable, *launcher, *words]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            *steps, reduction = json.loads(output.read_text())
        for batch, (cpu, wall) in zip(MEASURED_BATCHES, steps, strict=True):
            row = {"ranks": ranks, "batch": batch, "cpu_s": cpu, "wall_s": wall}
            found.append(row | {"all_reduce_cpu_s": reduction[0], "all_reduce_wall_s": reduction[1]})
    return predicted(found)


def predicted(rows: list[dict]) -> list[dict]:
    """Add what the model says of each row: the work of one rank at the same batch, and the all-reduce."""
    alone = {row["batch"]: row["cpu_s"] for row in rows if row["ranks"] == 1}
    for row in rows:
        row["model_cpu_s"] = alone[row["batch"]] + (row["all_reduce_cpu_s"] if row["ranks"] > 1 else 0.0)
    return rows


def measured_table(rows: list[dict]) -> str:
    lines = [
        "| ranks | images a rank | step, CPU ms a rank | model | all-reduce, CPU ms a rank | wall ms | step, wall ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{1e3 * row[name]:.1f}" for name in ("cpu_s", "model_cpu_s", "all_reduce_cpu_s", "all_reduce_wall_s")]
        if row["ranks"] == 1:
            cells[1:] = ["", "", ""]
        lines.append(f"| {row['ranks']} | {row['batch']} | {' | '.join(cells)} | {1e3 * row['wall_s']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--us-per-view", type=float, nargs="+", default=[2, 5, 20], help="time of an image and view")
    parser.add_argument("--us-per-image", type=float, default=10, help="of the linear pass, an image")
    parser.add_argument("--measure", action="store_true", help="check with 1, 2 and 4 ranks on this machine")
    parser.add_argument("--small", action="store_true", help="of the check: sizes that tell nothing")
    parser.add_argument("--output", type=Path, help="JSON file of the check")
    args = parser.parse_args()
    if "RANK" in os.environ:
        work(SMALL if args.small else MEASURED, args.output)
        return
    print(f"{GRADIENT_BYTES / 1e6:.2f} MB of gradients, {VIEWS} views an image\n\n{batch_table(args.us_per_view)}\n")
    print(linear_table(args.us_per_image))
    if args.measure:
        rows = measure(args.small)
        print(f"\n{measured_table(rows)}")
        if args.output:
            with atomic_path(args.output) as temporary:
                temporary.write_text(json.dumps({"about": describe(torch.device("cpu")), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
