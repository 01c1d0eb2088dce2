"""The picture of the README from the run of ``make demo``: python -m benchmarks.demo_figure runs/demo OUT.png"""

import argparse
from pathlib import Path

import mrcfile
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cryosplat import figures

BLUE, GREEN, BLACK = "#0072B2", "#009E73", "#000000"
SHOWN = 0.7
"""Middle part of an image or section that is shown, of its side."""


def picture(run: Path) -> Figure:
    """An image, central sections of the linear and the delivered map and of the truth, and the FSC of both maps."""
    stack = mrcfile.mmap(run.parent / "demo-data/particles.mrcs").data
    curves = np.genfromtxt(run / "fsc.csv", delimiter=",", names=True)
    panels = {
        "one of 3,000 images": stack[0],
        "linear map": middle(run / "linear.mrc"),
        "delivered map": filtered(read(run / "map.mrc"), curves["calibrated_map"]),
        "the truth": middle(run.parent / "demo-data/truth.mrc"),
    }
    figure = Figure(figsize=(9.2, 2.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 5, width_ratios=[1, 1, 1, 1, 1.7])
    for one, (title, image) in zip(axes, panels.items(), strict=False):
        show(one, title, image)
    draw_curves(axes[-1], curves)
    return figure


def read(path: Path) -> np.ndarray:
    return np.array(mrcfile.read(path), np.float64)


def middle(path: Path) -> np.ndarray:
    volume = read(path)
    return volume[len(volume) // 2]


def filtered(volume: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Central section of a map whose shells are weighted by their FSC to the truth, none beyond where it ends."""
    axis = np.fft.fftfreq(len(volume)) * len(volume)
    shell = np.sqrt(sum(part**2 for part in np.meshgrid(axis, axis, axis, indexing="ij"))).round().astype(int)
    weights = np.concatenate([[1.0], np.clip(np.nan_to_num(curve), 0, 1), np.zeros(shell.max())])
    return np.fft.ifftn(np.fft.fftn(volume) * weights[shell]).real[len(volume) // 2]


def show(axes, title: str, image: np.ndarray) -> None:
    box = len(image)
    edge = round(box * (1 - SHOWN) / 2)
    image = image[edge : box - edge, edge : box - edge]
    low, high = np.percentile(image, [1, 99.7])
    axes.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=high)
    axes.set_title(title, fontsize=figures.LABEL)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_curves(axes, curves: np.ndarray) -> None:
    frequency, calibrated = curves["frequency_inv_a"], curves["calibrated_map"]
    error = curves["calibrated_map_error"]
    axes.fill_between(frequency, calibrated - error, calibrated + error, color=BLUE, alpha=0.2, lw=0)
    axes.plot(frequency, calibrated, color=BLUE, lw=1.8, label="delivered map, as reported")
    axes.plot(frequency, curves["truth"], color=BLACK, lw=1.1, ls=":", label="delivered map, true")
    axes.plot(frequency, curves["linear_truth"], color=GREEN, lw=1.1, ls="-.", label="linear map, true")
    axes.axhline(0.5, color=figures.GREY, lw=0.8, ls="--")
    axes.set_ylim(0, 1.03)
    axes.set_xlim(frequency[0], frequency[-1])
    shown_a = (20, 10, 7, 5, 4)
    axes.set_xticks([1 / value for value in shown_a], [f"{value} Å" for value in shown_a])
    axes.tick_params(labelsize=figures.TICK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("FSC to the truth", fontsize=figures.LABEL)
    axes.legend(fontsize=figures.TICK, frameon=False, loc="lower left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="runs/demo, beside runs/demo-data")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    figures.save(picture(options.run), options.output, overwrite=True)


if __name__ == "__main__":
    main()
