"""Times the kernels against PyTorch and against what the machine can do: python -m benchmarks.ops [--threads N].

Each row is measured in turns (kernel, PyTorch, kernel, ...), so that a neighbour's noise falls on both; the figure is
the median CPU time over the turns. The floor is what the inner loops alone would take at the rate of fused
multiply-adds that a large matrix product reaches here: 3 vector operations a row of a footprint forward (onto the
image, and two of the recurrence) and 6 backward; it leaves out set-up, exponentials, loads and the tails of vectors.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks import torch_splat
from cryosplat import ops
from cryosplat._extension import core
from cryosplat.files import atomic_path

SIZES = ((2048, 128, 64), (8192, 128, 64), (30000, 256, 32))
"""Gaussians, box, batch: as in the project's list of GPU checks."""

CUTOFF = 3.5
SIGMA_PX = 1.5
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 3, 6
TORCH_VIEWS = 2
"""PyTorch is slow and linear in the views: it gets fewer."""


def mixture(gaussians: int, box: int, views: int, seed: int = 0) -> list[torch.Tensor]:
    """A ball of Gaussians of 0.75 to 2.25 px (mean SIGMA_PX) in random orientations, and random views."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.12 * box * torch.randn(1, gaussians, 3, generator=generator)
    scales = SIGMA_PX * (0.5 + torch.rand(1, gaussians, 3, generator=generator))
    covariances = ops.covariances(torch.randn(1, gaussians, 4, generator=generator), scales)
    rotations = torch.linalg.qr(torch.randn(views, 3, 3, generator=generator))[0]
    shifts = torch.randn(views, 2, generator=generator)
    amplitudes = torch.rand(1, gaussians, generator=generator)
    return [means, covariances, amplitudes, rotations, shifts, torch.zeros(views, dtype=torch.long)]


def footprint(inputs: list[torch.Tensor]) -> tuple[float, float]:
    """Mean pixels, and mean rows, of the cut-off's rectangle, without clipping at the image's edge."""
    _, covariances, _, rotations, *_ = inputs
    symmetric = covariances[..., [0, 1, 2, 1, 3, 4, 2, 4, 5]].unflatten(-1, (3, 3))[0]
    projected = torch.einsum("vij,gjk,vik->vgi", rotations, symmetric, rotations)[..., :2]
    sides = 2 * CUTOFF * projected.sqrt()
    return float(sides.prod(-1).mean()), float(sides[..., 1].mean())


def time_cpu(call, least_seconds: float = 0.05) -> float:
    """CPU seconds of one call, repeated until it has run long enough to be measured."""
    calls, began = 0, time.process_time()
    while (elapsed := time.process_time() - began) < least_seconds or not calls:
        call()
        calls += 1
    return elapsed / calls


def vector_operations_per_ns(size: int = 1536) -> float:
    """Measured rate of vector multiply-adds of this instruction set: a matrix product does size^3 / lanes of them."""
    lanes = {"avx512": 16, "avx2": 8, "baseline": 4}[core.instruction_set()]
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(time_cpu(lambda: a @ b) for _ in range(5))
    return size**3 / lanes / best * 1e-9


def measure(gaussians: int, box: int, batch: int, turns: int) -> dict[str, float]:
    """Medians over turns, in ns a Gaussian and view, of forward and backward by the kernels and by PyTorch."""
    inputs = mixture(gaussians, box, batch)
    few = [*inputs[:3], *(t[:TORCH_VIEWS] for t in inputs[3:])]
    residual = torch.randn(batch, box, box, generator=torch.Generator().manual_seed(1))
    leaves = [t.clone().requires_grad_() for t in few[:3]]

    def torch_both():
        images = torch_splat.splat(*leaves, *few[3:], box, CUTOFF)
        torch.autograd.grad(images, leaves, residual[:TORCH_VIEWS])

    calls = {
        "forward": (lambda: ops.splat(*inputs, box, CUTOFF), batch),
        "backward": (lambda: torch.ops.cryosplat.splat_backward(residual, *inputs, box, CUTOFF, False), batch),
        "torch": (torch_both, TORCH_VIEWS),
    }
    found = {name: [] for name in calls}
    for _ in range(turns):
        for name, (call, views) in calls.items():
            found[name].append(time_cpu(call) / gaussians / views * 1e9)
    row = {name: statistics.median(values) for name, values in found.items()}
    pixels, rows = footprint(inputs)
    both = row["forward"] + row["backward"]
    floor = rows * (FORWARD_OPERATIONS + BACKWARD_OPERATIONS) / vector_operations_per_ns()
    return {
        "gaussians": gaussians,
        "box": box,
        "batch": batch,
        "pixels": pixels,
        "rows": rows,
        **{f"{name}_ns": value for name, value in row.items()},
        "times_faster_than_torch": row["torch"] / both,
        "interactions_per_ns": 2 * pixels / both,
        "floor_ns": floor,
        "times_the_floor": both / floor,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(*size, args.turns) for size in SIZES]
    print(f"{core.instruction_set()}, {args.threads} threads, cut-off {CUTOFF}, CPU ns a Gaussian and view")
    print(
        "| Gaussians | box | batch | pixels | forward | backward | PyTorch, both | times faster | "
        "interactions/ns | floor, both | times the floor |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['gaussians']} | {r['box']} | {r['batch']} | {r['pixels']:.0f} | {r['forward_ns']:.1f} | "
            f"{r['backward_ns']:.1f} | {r['torch_ns']:.0f} | {r['times_faster_than_torch']:.1f} | "
            f"{r['interactions_per_ns']:.2f} | {r['floor_ns']:.1f} | {r['times_the_floor']:.1f} |"
        )
    if args.output:
        with atomic_path(args.output) as temporary:
            temporary.write_text(json.dumps({"instruction_set": core.instruction_set(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
