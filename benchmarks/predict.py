"""What splatting should take on a GPU, before there is one: python -m benchmarks.predict [--resources FILE].

Counts, for the sizes of ``benchmarks.ops``, what the kernels of csrc/cuda do (tiles met, rows walked, bytes moved), and
multiplies with instructions counted in the compiler's machine code for sm_90. Times are those of a GPU that issues
without a pause: 132 multiprocessors of 4 schedulers at 1.755 GHz, and 3.35 TB/s (H100 SXM). Real ones wait, so a
measured figure should be some 1.3 to 2 times the predicted one; if it is more, something else is the bound, and this
says what it is not. ``--resources`` (build/core.*/cuda_resources.json) adds how many warps a multiprocessor holds.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.ops import CUTOFF, SIZES, mixture

MULTIPROCESSORS, SCHEDULERS, CLOCK_GHZ, COPY_TB_S = 132, 4, 1.755, 3.35
REGISTERS, SHARED_BYTES, MOST_WARPS = 65536, 228 * 1024, 64
"""Of a multiprocessor of sm_90."""

TILE, REGION, TOGETHER, COLUMNS_AT_ONCE, ROWS_AT_ONCE, LAYERS_AT_ONCE = 8, 32, 8, 16, 2, 4
"""Of csrc/cuda/draw.h and gather.h: sides of tiles and regions; Gaussians that a warp draws, or gathers for, at a time;
columns and rows that a group of lanes walks at a time; layers that it prepares at a time."""

# Instructions of a warp, counted in what nvdisasm shows for sm_90 (CUDA 13.0, 2026-11-24), paths that are seldom taken
# left out.
PREPARE = 330  # 32 Gaussians of a view: project, ballots, bits
DRAW_HITS = 118  # eight Gaussians on a tile
DRAW_PICK = 24  # 32 staged footprints looked at for a tile
GATHER_ROWS = 72  # eight Gaussians, 16 columns, 2 rows
GATHER_COLUMNS = 127  # eight Gaussians, 16 columns: what precedes and follows the rows
GATHER_LAYER = 117  # eight Gaussians in a view: exchanges, sums
GATHER_LAYERS = 265  # the same in 4 views: footprints, chain rule

KERNELS = {"prepare_views<float>": 256, "splat_draw<float>": 512, "splat_gather<float, false, true>": 256}
"""Threads of a block."""


def footprints(gaussians: int, box: int, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last pixels (V, G, 2) of the mixture that ``benchmarks.ops`` times."""
    means, covariances, _, rotations, shifts, _ = mixture(gaussians, box, views)
    symmetric = covariances[0][:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].unflatten(-1, (3, 3))
    variances = torch.einsum("vij,gjk,vik->vgi", rotations, symmetric, rotations)[..., :2]
    centres = torch.einsum("vij,gj->vgi", rotations[:, :2], means[0]) + box // 2 - shifts[:, None]
    reach = CUTOFF * variances.sqrt()
    first = torch.ceil(centres - reach).clamp(0, box).long()
    return first, torch.floor(centres + reach).clamp(-1, box - 1).long()


def count(gaussians: int, box: int, views: int) -> dict[str, float]:
    """What the kernels do, of all views together."""
    first, last = footprints(gaussians, box, views)
    size = (last - first + 1).clamp(min=0)
    seen = (size > 0).all(-1)
    size = size * seen[..., None]

    interactions = float(size.prod(-1).sum())

    def met(side: int) -> float:
        return float(((last // side - first // side + 1).prod(-1) * seen).sum())

    # Gaussians of a warp walk together: as long as the one with most rows, in each piece of columns. Columns are
    # counted from a multiple of four on.
    whole = gaussians // TOGETHER * TOGETHER
    size[..., 0] += first[..., 0] % 4 * (size[..., 0] > 0)
    pieces = (-(-size[:, :whole] // torch.tensor([COLUMNS_AT_ONCE, ROWS_AT_ONCE]))).unflatten(1, (-1, TOGETHER))
    columns, rows = pieces.unbind(-1)
    walked = sum(
        torch.where(columns > piece, rows, 0).amax(-1).sum() for piece in range(int(columns.max()) if whole else 0)
    )
    return {
        "pairs": float(gaussians * views),
        "interactions": interactions,
        "tiles": met(TILE),
        "regions": met(REGION),
        "row_pieces": float(walked),
        "column_pieces": float(columns.amax(-1).sum()),
        "layers": gaussians / TOGETHER * views,
    }


def predict(gaussians: int, box: int, views: int) -> dict[str, dict[str, float]]:
    """Instructions of warps, bytes and microseconds a view of each kernel."""
    n = count(gaussians, box, views)
    regions = -((-box // REGION) ** 2)
    bits = views * regions * -(-gaussians // 256) * 32
    pixels = 4 * views * box**2
    work = {
        "prepare_views": (n["pairs"] / 32 * PREPARE, 32 * n["pairs"] + bits),
        "splat_draw": (
            n["tiles"] / TOGETHER * DRAW_HITS + n["regions"] * 16 / 32 * DRAW_PICK,
            32 * n["pairs"] + bits + pixels,
        ),
        "splat_gather": (
            n["row_pieces"] * GATHER_ROWS
            + n["column_pieces"] * GATHER_COLUMNS
            + n["layers"] * (GATHER_LAYER + GATHER_LAYERS / LAYERS_AT_ONCE),
            32 * n["pairs"] + pixels,
        ),
    }
    issued = MULTIPROCESSORS * SCHEDULERS * CLOCK_GHZ * 1e3  # a microsecond
    return {
        name: {
            "instructions": instructions,
            "bytes": moved,
            "issue_us": instructions / issued / views,
            "memory_us": moved / (COPY_TB_S * 1e6) / views,
            "lanes_an_interaction": 32 * instructions / n["interactions"],
        }
        for name, (instructions, moved) in work.items()
    }


def warps_held(usage: dict, threads: int) -> int:
    """Warps that a multiprocessor of sm_90 holds at a time."""
    warps = threads // 32
    of_registers = REGISTERS // (-(-usage["registers"] // 8) * 8 * 32 * warps)
    of_shared = SHARED_BYTES // (usage["shared"] + 1024)
    return warps * min(of_registers, of_shared, MOST_WARPS // warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resources", type=Path, help="cuda_resources.json of a build")
    args = parser.parse_args()
    print("| Gaussians, box, views | kernel | issue, us a view | memory, us a view | lanes an interaction |")
    print("|---|---|---|---|---|")
    for size in SIZES:
        for name, row in predict(*size).items():
            print(
                f"| {', '.join(map(str, size))} | {name} | {row['issue_us']:.2f} | {row['memory_us']:.2f} | "
                f"{row['lanes_an_interaction']:.0f} |"
            )
    if args.resources:
        usages = {f"{u['kernel']}<{u['arguments']}>": u for u in json.loads(args.resources.read_text())["kernels"]
                  if u["architecture"] == "90"}  # fmt: skip
        for name, threads in KERNELS.items():
            print(f"{name}: {usages[name]['registers']} registers, {warps_held(usages[name], threads)} warps of 64")


if __name__ == "__main__":
    main()
