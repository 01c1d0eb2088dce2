"""Times the kernels against their floor and PyTorch: python -m benchmarks.ops [--device cpu|cuda] [--threads N].

Kernels of one size are measured in turns (forward, backward, PyTorch, forward, ...), so that a neighbour's noise falls
on all; the figure is the median over the turns, CPU time on a CPU and time between events on a GPU
(`benchmarks.machine.time_call`). What they are held against is counted in `benchmarks/floors.py`: operations and bytes
that cannot be done without, at the rates that a large matrix product and a large copy reach here.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import floors, torch_splat
from benchmarks.floors import Work
from benchmarks.machine import Machine, describe, measure_machine, time_call
from cryosplat import ops, spectral  # noqa: F401  (spectral registers its operator)
from cryosplat.files import atomic_path

SIZES = ((2048, 128, 64), (8192, 128, 64), (30000, 256, 32))
"""Gaussians, box, batch: as in the project's list of GPU checks."""

VOLUME_SIZES = ((20000, 128), (20000, 256), (200000, 256))
"""Gaussians, box: of maps."""

RESIDUAL_SIZES = ((128, 64), (256, 32))
"""Box, batch: of the residual of two views each, as with half maps."""

INSERT_SIZES = {"cpu": ((128, 256),), "cuda": ((128, 256), (256, 256))}
"""Box, views. On a CPU the sums of the larger take seconds, and none of it is another kernel."""

SMALL = {"splat": ((128, 32, 4),), "residual": ((32, 4),), "voxelise": ((128, 32),), "insert": ((32, 8),)}
"""To see that everything runs: no figure of it means anything."""

KINDS = ("splat", "residual", "voxelise", "insert")
CUTOFF = 3.5
SIGMA_PX = 1.5
PIXEL_SIZE_A = 1.5
TORCH_VIEWS = {"cpu": 2, "cuda": 16}
"""PyTorch is slow and linear in the views: it gets fewer, as many as keep it busy."""


@dataclass(frozen=True)
class Case:
    """A call to be timed: ``views`` images or maps of ``box`` px, of ``gaussians`` (0: none) each; ``work`` of it all,
    None for what has no floor of ours."""

    kernel: str
    gaussians: int
    box: int
    views: int
    call: Callable[[], object]
    work: Work | None


def mixture(gaussians: int, box: int, views: int, seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    """A ball of Gaussians of 0.75 to 2.25 px (mean SIGMA_PX) in random orientations, and random views."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.12 * box * torch.randn(1, gaussians, 3, generator=generator)
    scales = SIGMA_PX * (0.5 + torch.rand(1, gaussians, 3, generator=generator))
    covariances = ops.covariances(torch.randn(1, gaussians, 4, generator=generator), scales)
    rotations = torch.linalg.qr(torch.randn(views, 3, 3, generator=generator))[0]
    shifts = torch.randn(views, 2, generator=generator)
    amplitudes = torch.rand(1, gaussians, generator=generator)
    inputs = [means, covariances, amplitudes, rotations, shifts, torch.zeros(views, dtype=torch.long)]
    return [tensor.to(device) for tensor in inputs]


def splat_cases(gaussians: int, box: int, batch: int, machine: Machine) -> list[Case]:
    """The splat, its gradients, and both of them by PyTorch for a few of the views."""
    inputs = mixture(gaussians, box, batch, device=machine.device)
    forward, backward = (floors.splat(inputs, box, CUTOFF, way, machine.lanes) for way in (False, True))
    torch_leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    views = min(TORCH_VIEWS[machine.device], batch)
    few = [t[:views] for t in inputs[3:]]
    residual = torch.randn(batch, box, box, generator=torch.Generator().manual_seed(1)).to(machine.device)

    def both_by_torch():
        images = torch_splat.splat(*torch_leaves, *few, box, CUTOFF)
        torch.autograd.grad(images, torch_leaves, residual[:views])

    size = gaussians, box, batch
    return [
        Case("splat", *size, lambda: ops.splat(*inputs, box, CUTOFF), forward),
        Case("splat backward", *size, gradient_of(ops.splat, inputs, residual, box), backward),
        Case("PyTorch, both", gaussians, box, views, both_by_torch, None),
    ]


def residual_cases(box: int, batch: int, machine: Machine) -> list[Case]:
    """From spectra of projections to losses and to spectra of gradients, CTF and data of half precision included."""
    generator = torch.Generator().manual_seed(3)
    half_plane = box, box // 2 + 1
    spectra = torch.randn(2, batch, *half_plane, dtype=torch.complex64, generator=generator)
    stored = torch.randn(batch, *half_plane, 2, generator=generator).half()
    ctf = torch.tensor([15000.0, 14500.0, 0.5, 300.0, 2.7, 0.1, 0.0]).repeat(batch, 1)
    rows, gain = torch.arange(batch), torch.ones(batch)
    inputs = [t.to(machine.device) for t in (spectra, stored, rows, gain, ctf, rows % 2)]
    work = floors.residual(box, batch, 2 * batch)

    def call():
        torch.ops.cryosplat.spectral_residual(*inputs, None, box, PIXEL_SIZE_A, True)

    return [Case("residual", 0, box, 2 * batch, call, work)]


def voxelise_cases(gaussians: int, box: int, machine: Machine) -> list[Case]:
    """A map, and the gradients of what is fitted in it."""
    inputs = mixture(gaussians, box, 0, device=machine.device)[:3]
    forward, backward = (floors.voxelise(inputs, box, CUTOFF, way, machine.lanes) for way in (False, True))
    residual = torch.randn(1, box, box, box, generator=torch.Generator().manual_seed(1)).to(machine.device)
    size = gaussians, box, 1
    return [
        Case("voxelise", *size, lambda: ops.voxelise(*inputs, box, CUTOFF), forward),
        Case("voxelise backward", *size, gradient_of(ops.voxelise, inputs, residual, box), backward),
    ]


def gradient_of(op: Callable, inputs: list[torch.Tensor], residual: torch.Tensor, box: int) -> Callable[[], object]:
    """The backward pass of an op alone, for means, covariances and amplitudes."""
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    output = op(*leaves, *inputs[3:], box, CUTOFF)
    return lambda: torch.autograd.grad(output, leaves, residual, retain_graph=True)


def insert_cases(box: int, views: int, machine: Machine) -> list[Case]:
    """Insertion into two grids: as it is by default, and on a GPU in the deterministic way too."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(views, box, box // 2 + 1, dtype=torch.complex64, generator=generator)
    weights = torch.rand(views, box, box // 2 + 1, generator=generator)
    _, _, _, rotations, shifts, _ = mixture(1, box, views)
    inputs = [t.to(machine.device) for t in (values, weights, rotations, shifts, torch.arange(views) % 2)]
    sums = torch.zeros(2, 2 * box, 2 * box, box + 1, 4, device=machine.device)
    work = floors.insertion(inputs[2], inputs[4], box, 2 * box)

    def deterministic():
        torch.use_deterministic_algorithms(True)
        ops.insert(*inputs, sums)
        torch.use_deterministic_algorithms(False)

    cases = [Case("insert", 0, box, views, lambda: ops.insert(*inputs, sums), work)]
    if machine.device == "cuda":
        cases.append(Case("insert, deterministic", 0, box, views, deterministic, work))
    return cases


def all_cases(machine: Machine, kinds: tuple[str, ...], small: bool) -> Iterator[list[Case]]:
    """Cases by size, made when they are asked for: the largest take gigabytes."""
    full = dict(zip(KINDS, (SIZES, RESIDUAL_SIZES, VOLUME_SIZES, INSERT_SIZES[machine.device]), strict=True))
    makers = dict(zip(KINDS, (splat_cases, residual_cases, voxelise_cases, insert_cases), strict=True))
    for kind in kinds:
        for size in (SMALL if small else full)[kind]:
            yield makers[kind](*size, machine)


def measure(cases: list[Case], machine: Machine, turns: int, least_seconds: float) -> list[dict]:
    """A row for each case: the median of its seconds, and what they mean."""
    for case in cases:
        case.call()
    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(turns):
        for case, found in zip(cases, seconds, strict=True):
            found.append(time_call(case.call, torch.device(machine.device), least_seconds))
    return [row_of(case, statistics.median(found), machine) for case, found in zip(cases, seconds, strict=True)]


def row_of(case: Case, seconds: float, machine: Machine) -> dict:
    row = {
        "kernel": case.kernel,
        "gaussians": case.gaussians,
        "box": case.box,
        "views": case.views,
        "seconds": seconds,
        "us_per_view": 1e6 * seconds / case.views,
        "ns_per_gaussian_and_view": 1e9 * seconds / case.views / case.gaussians if case.gaussians else None,
    }
    if case.work is not None:
        work, floor = case.work, case.work.floor_s(machine)
        row |= {
            "interactions": work.interactions,
            "interactions_per_s": work.interactions / seconds,
            "operations": work.operations,
            "bytes": work.bytes,
            "arithmetic_floor_us_per_view": 1e6 * work.issued / machine.fma_per_s / case.views,
            "memory_floor_us_per_view": 1e6 * work.bytes / machine.bytes_per_s / case.views,
            "floor_seconds": floor,
            "times_the_floor": seconds / floor,
        }
    return row


def against_torch(rows: list[dict]) -> list[dict]:
    """Of each size both ways by the kernels and by PyTorch, in ns a Gaussian and view."""
    found = []
    for ours, back, theirs in zip(rows, rows[1:], rows[2:], strict=False):
        if theirs["kernel"].startswith("PyTorch"):
            both = ours["ns_per_gaussian_and_view"] + back["ns_per_gaussian_and_view"]
            size = {name: ours[name] for name in ("gaussians", "box", "views")}
            other = theirs["ns_per_gaussian_and_view"]
            found.append(size | {"kernels_ns": both, "torch_ns": other, "times_faster": other / both})
    return found


def tables(machine: Machine, rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        f"{machine.name}: {machine.fma_per_s / 1e12:.3g} T multiply-adds/s (matrix product, float32), "
        f"{machine.bytes_per_s / 1e9:.0f} GB/s (copy); cut-off {CUTOFF}; {'CPU' if machine.device == 'cpu' else 'GPU'} "
        "time",
        "",
        "| kernel | Gaussians | box | views | µs a view | ns a Gaussian and view | interactions/ns | MB | "
        "floor, µs a view: arithmetic | memory | times the floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "floor_seconds" in r:
            each = r["ns_per_gaussian_and_view"]
            lines.append(
                f"| {r['kernel']} | {r['gaussians'] or ''} | {r['box']} | {r['views']} | {r['us_per_view']:.4g} | "
                f"{'' if each is None else f'{each:.3g}'} | {r['interactions_per_s'] * 1e-9:.3g} | "
                f"{r['bytes'] * 1e-6:.3g} | {r['arithmetic_floor_us_per_view']:.3g} | "
                f"{r['memory_floor_us_per_view']:.3g} | {r['times_the_floor']:.2f} |"
            )
    lines += ["", "| Gaussians | box | batch | both ways, ns a Gaussian and view | PyTorch | times faster |"]
    lines.append("|---|---|---|---|---|---|")
    for r in against_torch(rows):
        lines.append(
            f"| {r['gaussians']} | {r['box']} | {r['views']} | {r['kernels_ns']:.3g} | {r['torch_ns']:.4g} | "
            f"{r['times_faster']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--small", action="store_true", help="sizes that tell nothing, to see that all runs")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    machine = measure_machine(device, 0.005 if args.small else 0.05)
    rows = []
    for cases in all_cases(machine, tuple(args.kinds), args.small):
        rows += measure(cases, machine, args.turns, 0.005 if args.small else 0.05)
    print(tables(machine, rows))
    if args.output:
        found = {
            "machine": machine.as_dict(),
            "about": describe(device),
            "rows": rows,
            "against_torch": against_torch(rows),
        }
        with atomic_path(args.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
