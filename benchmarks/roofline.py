"""Draws what benchmarks.ops and benchmarks.step have measured under the roof of the machine:

    python -m benchmarks.roofline PICTURE.png OPS.json [STEP.json]

The roof is the measured copy bandwidth times the intensity, up to the measured rate of multiply-adds. A point is a
kernel (or a whole step) of one size: its operations and bytes as `benchmarks/floors.py` counts them, over its time. So
a point below the roof has its distance to the floor, and one far to the right is not held up by memory.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLES = {
    "splat": ("o", "tab:blue"),
    "splat backward": ("o", "tab:orange"),
    "residual": ("D", "tab:gray"),
    "voxelise": ("s", "tab:green"),
    "voxelise backward": ("s", "tab:red"),
    "insert": ("^", "tab:purple"),
    "insert, deterministic": ("v", "tab:brown"),
    "step": ("*", "black"),
}
OTHERS = ("x", "tab:pink")


def points(ops: dict, step: dict | None) -> list[tuple[str, str, float, float]]:
    """(kernel, size, operations a byte, operations a second)."""
    rows = [(row["kernel"], row) for row in ops["rows"] if "operations" in row]
    rows += [("step", row) for row in (step["rows"] if step else ())]
    return [
        (kernel, size_of(row), row["operations"] / row["bytes"], row["operations"] / row["seconds"])
        for kernel, row in rows
    ]


def size_of(row: dict) -> str:
    words = [f"{row['gaussians']:,} G"] if row["gaussians"] else []
    words.append(f"{row['box']} px")
    return ", ".join(words + ([f"{row['models']} models"] if row.get("models", 1) > 1 else []))


def draw(ops: dict, step: dict | None, path: Path) -> None:
    """Write the picture."""
    machine, about = ops["machine"], ops["about"]
    found = points(ops, step)
    figure, axes = plt.subplots(figsize=(9, 6), constrained_layout=True)
    ridge = machine["fma_per_s"] / machine["bytes_per_s"]
    intensity = [point[2] for point in found]
    along = np.geomspace(min([ridge, *intensity]) / 4, 4 * max([ridge, *intensity]), 200)
    axes.plot(along, np.minimum(along * machine["bytes_per_s"], machine["fma_per_s"]), color="black", lw=1.5)
    top, left = machine["fma_per_s"], along[0]
    axes.annotate(
        f"{top / 1e9:,.0f} G multiply-adds/s", (along[-1], top), (0, 4), textcoords="offset points", ha="right"
    )
    middle = (left * ridge) ** 0.5
    axes.annotate(
        f"{machine['bytes_per_s'] / 1e9:,.0f} GB/s",
        (middle, middle * machine["bytes_per_s"]),
        (-8, 6),
        textcoords="offset points",
        ha="right",
    )
    for kernel in dict.fromkeys(point[0] for point in found):
        marker, colour = STYLES.get(kernel, OTHERS)
        mine = [point for point in found if point[0] == kernel]
        size = 150 if kernel == "step" else 45
        x, y = zip(*(point[2:] for point in mine), strict=True)
        axes.scatter(x, y, size, colour, marker=marker, label=kernel, zorder=3, alpha=0.8)
        # Sizes of one kernel mostly lie together: one label, at the largest.
        last = max(mine, key=lambda point: point[2])
        axes.annotate(last[1], last[2:], (6, -11), textcoords="offset points", fontsize=7, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second (multiply-adds)")
    lowest = min([point[3] for point in found] + [left * machine["bytes_per_s"]])
    axes.set_ylim(lowest / 2, 2.5 * top)
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    threads = f", {about['threads']} of {about['cores']} cores" if machine["device"] == "cpu" else ""
    axes.set_title(f"{machine['name']}{threads}, {about['date']}, PyTorch {about['torch']}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("ops", type=Path)
    parser.add_argument("step", type=Path, nargs="?")
    args = parser.parse_args()
    step = json.loads(args.step.read_text()) if args.step else None
    draw(json.loads(args.ops.read_text()), step, args.picture)


if __name__ == "__main__":
    main()
