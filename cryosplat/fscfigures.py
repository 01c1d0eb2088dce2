"""Figures of resolution by direction, of views and of runs side by side; ``figures.save`` writes them."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from cryosplat.directional import DirectionalFsc
from cryosplat.figures import COLOURS, DASHES, GREY, LABEL, TICK, TITLE, frequency_axis
from cryosplat.fsc import FscCurve

_LONGITUDES, _LATITUDES = 72, 36
"""Bins of the maps of the sphere: of equal area, since latitudes are cut evenly in their sine."""


def directional_figure(directional: DirectionalFsc) -> Figure:
    """Left the conical FSC of all directions, right the resolution by direction on the whole sphere."""
    figure = _canvas(9.4, 3.5)
    axes = figure.add_subplot(1, 2, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TICK)
    frequency = FscCurve(directional.fsc[0], directional.box, directional.pixel_size_a).frequency[1:]
    curves = directional.fsc[:, 1:]
    for low, high, alpha, label in ((0, 100, 0.15, "all directions"), (10, 90, 0.3, "8 of 10 directions")):
        band = np.percentile(curves, [low, high], axis=0)
        axes.fill_between(frequency, *band, color="#0072B2", alpha=alpha, linewidth=0, label=label)
    resolutions = np.array([resolution.angstrom for resolution in directional.resolutions])
    for name, number, colour, dashes in (
        ("largest", directional.best, "#009E73", "-"),
        ("smallest", directional.worst, "#D55E00", (0, (4, 1.5))),
    ):
        label = f"{name} area: {resolutions[number]:.2f} Å"
        axes.plot(frequency, curves[number], color=colour, linestyle=dashes, linewidth=1.5, label=label)
    axes.axhline(0.143, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylim(min(-0.05, float(curves.min()) - 0.03), 1.03)
    axes.set_ylabel(f"FSC in cones of {directional.half_angle_deg:g}° half-angle", fontsize=LABEL)
    axes.set_title(f"anisotropy {directional.anisotropy:.2f} (smallest / largest area)", fontsize=TITLE)
    axes.legend(fontsize=TICK, frameon=False)
    frequency_axis(axes, directional.curve(0))
    centres = _bin_centres()
    nearest = np.argmax(np.abs(centres @ directional.directions.T), axis=1)
    globe = resolutions[nearest].reshape(_LATITUDES, _LONGITUDES)
    axes = _globe(figure, (1, 2, 2), globe, "resolution at FSC 0.143 (Å)", "viridis_r")
    axes.set_title("by direction of the cone", fontsize=TITLE)
    return figure


def comparison_figure(panels: Mapping[str, Mapping[str, FscCurve]]) -> Figure:
    """Curves of several runs laid over each other, two panels a row.

    Args:
        panels: curves by run, by title of the panel; a run has one colour in all of them.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    rows = -(-len(panels) // 2)
    figure = _canvas(11.0, 3.5 * rows)
    places = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (title, curves) in zip(places, panels.items(), strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=TICK)
        for name, curve in curves.items():
            number = names.index(name)
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            axes.plot(curve.frequency[1:], curve.fsc[1:], linewidth=1.6, label=name, **style)
        for level in (0.5, 0.143):
            axes.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.set_ylim(-0.1, 1.03)
        axes.set_ylabel("FSC", fontsize=LABEL)
        axes.set_title(title, fontsize=TITLE)
        axes.legend(fontsize=TICK, frameon=False)
        frequency_axis(axes, max(curves.values(), key=lambda curve: curve.frequency[-1]))
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    return figure


def viewing_figure(directions: np.ndarray) -> Figure:
    """How often each part of the sphere was looked at from: (N, 3) unit vectors (x, y, z), by equal areas."""
    longitude = np.arctan2(directions[:, 1], directions[:, 0])
    edges = np.linspace(-np.pi, np.pi, _LONGITUDES // 2 + 1), np.linspace(-1, 1, _LATITUDES // 2 + 1)
    # Coarser than the resolution's map: a bin needs some particles.
    counts, *_ = np.histogram2d(np.clip(directions[:, 2], -1, 1), longitude, bins=(edges[1], edges[0]))
    figure = _canvas(5.6, 3.9)
    axes = _globe(figure, (1, 1, 1), counts / counts.mean(), "particles, relative to even coverage", "cividis")
    empty = 100 * (counts == 0).mean()
    axes.set_title(f"viewing directions of {len(directions):,} particles; {empty:.0f} % of bins empty", fontsize=TITLE)
    return figure


def _canvas(width_in: float, height_in: float) -> Figure:
    figure = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _bin_centres() -> np.ndarray:
    """Unit vectors (x, y, z) of the bins' middles, latitude by latitude: (bins, 3)."""
    z = (np.arange(_LATITUDES) + 0.5) / _LATITUDES * 2 - 1
    longitude = ((np.arange(_LONGITUDES) + 0.5) / _LONGITUDES * 2 - 1) * np.pi
    z, longitude = (grid.ravel() for grid in np.meshgrid(z, longitude, indexing="ij"))
    across = np.sqrt(1 - z**2)
    return np.stack([across * np.cos(longitude), across * np.sin(longitude), z], axis=1)


def _globe(figure: Figure, place: tuple[int, int, int], values: np.ndarray, label: str, colours: str) -> Axes:
    """A Mollweide map of values on bins that are even in longitude and in the sine of the latitude.

    Args:
        figure: to draw in.
        place: rows, columns and number of the panel.
        values: (latitudes, longitudes), south to north, west to east.
        label: of the colour bar.
        colours: name of a colour map.
    """
    axes = figure.add_subplot(*place, projection="mollweide")
    # A cell's edges are drawn straight, so bins are cut into small ones; near the poles large ones would leave gaps.
    across, up = np.linspace(-np.pi, np.pi, 361), np.linspace(-np.pi / 2, np.pi / 2, 181)
    middles = (0.5 * (edges[1:] + edges[:-1]) for edges in (across / np.pi, up))
    column, row = next(middles), np.sin(next(middles))
    rows, columns = values.shape
    fine = values[((row + 1) / 2 * rows).astype(int)[:, None], ((column + 1) / 2 * columns).astype(int)]
    drawn = axes.pcolormesh(across, up, fine, cmap=colours, rasterized=True)
    axes.grid(color="white", alpha=0.35, linewidth=0.5)
    axes.set_xticks(np.radians([-120, -60, 0, 60, 120]))
    axes.set_yticks(np.radians([-60, -30, 0, 30, 60]))
    axes.tick_params(labelsize=TICK)
    for tick in axes.get_xticklabels():
        tick.set(color="white", path_effects=[withStroke(linewidth=1.6, foreground="0.2")])
    bar = figure.colorbar(drawn, ax=axes, orientation="horizontal", shrink=0.75, pad=0.04, aspect=30)
    bar.set_label(label, fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    return axes
