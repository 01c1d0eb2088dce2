"""Figures of docs/resolution.md from the results of benchmarks.resolution: -m benchmarks.resolution_figures WORK OUT"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.resolution import PIXEL_SIZE_A, SETS, SHARED
from cryosplat import figures

SHOWN = ("30s_even", "t20s_preferred", "30s_coloured", "t20s_jitter")
BLUE, RED, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"


def panels(width_in: float, height_in: float, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=figures.TICK)
    return figure, axes


def calibrated(work: Path, seed: int) -> Figure:
    """Calibrated curves with their errors beside the true ones, and what half maps of mixtures would say."""
    sys.path.insert(0, str(SHARED / "bench"))
    import evaluate

    figure, axes = panels(7.2, 5.2, 2, 2)
    for name, one in zip(SHOWN, axes, strict=True):
        folder = work / f"{name}_{seed}"
        table = np.genfromtxt(folder / "run/fsc.csv", delimiter=",", names=True)
        truth, mask = (evaluate.read_mrc(folder / path)[0] for path in ("truth.mrc", "run/mask.mrc"))
        frequency = table["frequency_inv_a"]

        def true(path, folder=folder, truth=truth, mask=mask):
            return evaluate.fsc(evaluate.read_mrc(folder / path)[0], truth, mask)[0][1:]

        for column, path, colour, label in (
            ("calibrated_map", "run/map.mrc", BLUE, "delivered map"),
            ("calibrated_half_a", "run/mixture_half_a.mrc", RED, "mixture of half a"),
        ):
            error = table[f"{column}_error"]
            one.fill_between(frequency, table[column] - error, table[column] + error, color=colour, alpha=0.2, lw=0)
            one.plot(frequency, table[column], color=colour, lw=1.8, label=f"{label}, calibrated")
            one.plot(
                frequency, true(path), color=BLACK, lw=1.1, ls=":", label="true" if column == "calibrated_map" else None
            )
        naive = np.sqrt(np.clip(table["half_maps"], 0, 1))
        one.plot(frequency, naive, color=RED, lw=1.0, ls=(0, (6, 2)), label="mixture, naive: sqrt(half-map FSC)")
        one.axhline(0.5, color=figures.GREY, lw=0.8, ls="--")
        one.set_ylim(-0.03, 1.03)
        one.set_xlim(0, frequency[-1])
        one.set_title(name.replace("_", ", "), fontsize=figures.LABEL)
    for one in axes[2:]:
        one.set_xlabel("spatial frequency (1/Å)", fontsize=figures.LABEL)
    for one in axes[::2]:
        one.set_ylabel("FSC to the truth", fontsize=figures.LABEL)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=figures.TICK, frameon=False)
    return figure


def crossings(work: Path) -> Figure:
    """Reported against true resolution of every run, and what the naive curve reports."""
    figure, axes = panels(7.2, 3.4, 1, 2)
    results = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("result_*.json"))}
    # With much signal all are at Nyquist.
    limited = [name for name, what in SETS.items() if what.b_factor_a2 > 100]
    for number, name in enumerate(limited):
        rows = [r for key, r in results.items() if key.removeprefix("result_").rsplit("_", 1)[0] == name]
        marker = "osD^vP"[number]
        known = [r for r in rows if r["resolution_a"] is not None]
        true, said = ([r[key] for r in known] for key in ("resolution_true_a", "resolution_a"))
        axes[0].errorbar(
            true,
            said,
            yerr=[r["resolution_error_a"] or 0 for r in known],
            fmt=marker,
            ms=5,
            lw=1,
            label=name.replace("_", ", "),
        )
        axes[1].plot(
            [r["mixture_resolution_true_a"] for r in rows],
            [r["resolution_naive_a"] for r in rows],
            marker,
            ms=5,
            ls="none",
        )
    for one, title in zip(
        axes, ("delivered map, calibrated FSC 0.5", "mixture, half-map FSC 0.143 (naive)"), strict=True
    ):
        low, high = one.get_xlim()
        low, high = min(low, one.get_ylim()[0]) - 0.2, max(high, one.get_ylim()[1]) + 0.2
        line = np.array([low, high])
        one.plot(line, line, color=figures.GREY, lw=0.8)
        one.fill_between(line, 0.95 * line, 1.05 * line, color=figures.GREY, alpha=0.15, lw=0)
        one.set_xlim(low, high)
        one.set_ylim(low, high)
        one.set_title(title, fontsize=figures.LABEL)
        one.set_xlabel("true FSC = 0.5 (Å)", fontsize=figures.LABEL)
    axes[1].axhline(2 * PIXEL_SIZE_A, color=figures.GREY, lw=0.8, ls=":")
    axes[0].set_ylabel("reported (Å)", fontsize=figures.LABEL)
    axes[0].legend(fontsize=figures.TICK, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    figures.save(calibrated(args.work, args.seed), args.out / "calibrated.png", overwrite=True, dpi=130)
    figures.save(crossings(args.work), args.out / "crossings.png", overwrite=True, dpi=130)


if __name__ == "__main__":
    main()
