"""Whether two processes on one device make the gradients of one: python -m benchmarks.two_processes --output JSON.

Each process has its share of a batch, as in training under torchrun; gradients and losses go through
DistributedDataParallel. Rank 0 makes the same of the whole batch by itself and compares. NCCL refuses two processes on
one GPU, so there it is gloo, through host memory; with two GPUs or more each process has its own, and it is NCCL.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.ops import CUTOFF
from benchmarks.step import SIGMA_PX, particles
from cryosplat import distributed
from cryosplat.config import load_config
from cryosplat.dataset import ParticleDataset
from cryosplat.files import atomic_path
from cryosplat.gaussians import GaussianMixture
from cryosplat.reconstruction import MODEL_NAMES, Reconstruction
from cryosplat.sampling import BatchPlan

SIZE, SMALL = (8192, 128, 64), (128, 32, 8)
"""Gaussians, box, batch."""

TOLERANCE = 1e-5
"""Relative L2: sums are made in another order, in float32."""

RANKS = 2


def gradients(
    size: tuple[int, int, int], world: distributed.World, dataset: ParticleDataset, plan: BatchPlan
) -> tuple[list[Tensor], Tensor]:
    """Of every model's mixture after one batch over all ranks, and the losses (M,)."""
    gaussians, box, _ = size
    mixture = GaussianMixture(len(MODEL_NAMES), gaussians, "positive", (0.5 / box, 8 / box))
    mixture.start_randomly(spread=0.12, scale=SIGMA_PX / box, seed=0)
    reconstruction = Reconstruction(mixture, box, dataset.pixel_size_a, None, CUTOFF, world.size).to(world.device)
    wrapped = distributed.wrap(reconstruction, world)
    ids = plan.epoch(0)[0]
    in_b = int(plan.half[ids].sum())
    mine = ids[plan.owner(world.size)[ids] == world.rank]
    objective, _ = wrapped(dataset.batch(mine), [len(ids), len(ids) - in_b, in_b])
    objective.backward()
    return [parameter.grad for parameter in mixture.mixtures], reconstruction.ledger.grad


def work(size: tuple[int, int, int], device: str, backend: str, output: Path) -> None:
    """What each of the processes does; rank 0 writes the comparison."""
    config = load_config(None, [f"train.device={device}", f"distributed.backend={backend}", "train.threads=1"])
    with distributed.join(config) as world:
        _, box, batch = size
        table = particles(batch, box)
        plan = BatchPlan(table.half, batch, seed=0, held_out=table.held_out)
        dataset = ParticleDataset(table, np.arange(len(table)), box, device=world.device)
        dataset.normalise(dataset.statistics.deviation)
        together, losses = gradients(size, world, dataset, plan)
        if world.is_main:
            alone = distributed.World(0, 1, 0, 1, world.device, "none", "single", world.threads)
            expected, expected_losses = gradients(size, alone, dataset, plan)
            errors = {name: distance(*pair) for name, *pair in zip(MODEL_NAMES, together, expected, strict=True)}
            found = {
                "ranks": world.size,
                "device": str(world.device),
                "backend": world.backend,
                "relative_errors": errors | {"losses": distance(losses, expected_losses)},
            }
            with atomic_path(output) as temporary:
                temporary.write_text(json.dumps(found, indent=1))
        distributed.barrier(world)  # rank 0 has more to do, and the others would take its silence for an end


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((found - expected).double().norm() / expected.double().norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="a size that is done at once")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    backend = "nccl" if args.device == "cuda" and torch.cuda.device_count() >= RANKS else "gloo"
    if "RANK" in os.environ:
        work(SMALL if args.small else SIZE, args.device, backend, args.output)
        return 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, "-m", "benchmarks.two_processes", *sys.argv[1:]]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads(args.output.read_text())
    errors = ", ".join(f"{name} {error:.1e}" for name, error in found["relative_errors"].items())
    print(f"{found['ranks']} processes on {found['device']} over {found['backend']}, relative errors: {errors}")
    return int(not max(found["relative_errors"].values()) < TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
