"""The figures of a run, as matplotlib Figures: for the TensorBoard log, and as PNG on paper.

Only matplotlib's object interface is used: no pyplot, no display, nothing shared between figures.
"""

import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.fft
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS, RESOLUTION_THRESHOLD_TRUTH, centre
from cryosplat.files import atomic_path
from cryosplat.fsc import FscCurve, resolution
from cryosplat.sharpening import Sharpened

PAPER_DPI = 200
SCREEN_DPI = 100

# Okabe and Ito's colours, which people with any colour vision can tell apart; the dashes serve printers without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
DASHES = ("-", (0, (6, 1.5)), (0, (2, 1.2)), "-.", ":")
TITLE, LABEL, TICK = 10.0, 9.5, 8.5  # pt
GREY = "0.45"

_LOSS_NAMES = {"loss_full": "full", "loss_half_a": "half a", "loss_half_b": "half b"}

_HALVES, _TRUTH = (RESOLUTION_THRESHOLD_HALF_MAPS,), (RESOLUTION_THRESHOLD_TRUTH,)

# What a curve is called and where its resolution is read; any other keeps its name and is read at every threshold.
_CURVES = {
    "calibrated_map": ("delivered map to the truth, calibrated", _TRUTH),
    "calibrated_half_a": ("mixture of half a to the truth, calibrated", _TRUTH),
    "calibrated_half_b": ("mixture of half b to the truth, calibrated", _TRUTH),
    "linear_half_maps": ("linear half maps", _HALVES),
    "half_maps": ("half maps of mixtures (naive)", _HALVES),
    "truth": ("delivered map to the known truth", _TRUTH),
    "mixture_truth": ("mixture to the known truth", _TRUTH),
    "linear_truth": ("linear map to the known truth", _TRUTH),
    "fsc": ("the two maps", None),
    "unmasked": ("no mask", _HALVES),
    "sphere": ("sphere", _HALVES),
    "loose": ("loose mask", _HALVES),
    "tight": ("tight mask", _HALVES),
    "masked": ("mask", _HALVES),
    "phase_randomised": ("phases randomised", ()),
    "corrected": ("corrected", _HALVES),
}

# Colours of the curves that are drawn together, whichever of them there are: the one to read stands out.
_STYLES = {
    "calibrated_map": ("#0072B2", "-", 2.2),
    "linear_half_maps": ("#009E73", "-.", 1.3),
    "half_maps": ("#D55E00", (0, (6, 1.5)), 1.3),
    "truth": ("#000000", (0, (2, 1.2)), 1.6),
    "calibrated_half_a": ("#56B4E9", "-", 1.1),
    "calibrated_half_b": ("#56B4E9", (0, (6, 1.5)), 1.1),
    "mixture_truth": ("0.5", (0, (6, 1.5)), 1.1),
    "linear_truth": ("0.5", "-.", 1.1),
    "unmasked": ("0.6", "-", 1.2),
    "sphere": ("#E69F00", (0, (6, 1.5)), 1.2),
    "loose": ("#009E73", "-.", 1.3),
    "tight": ("#56B4E9", (0, (2, 1.2)), 1.8),
    "masked": ("#56B4E9", (0, (2, 1.2)), 1.8),
    "phase_randomised": ("#D55E00", ":", 1.5),
    "corrected": ("#000000", "-", 1.8),
}

LEGEND_LINE_IN = 0.17
"""Height of a line of a legend, inches."""

_GUINIER = {"map": "map", "weighted": "weighted by its FSC", "sharpened": "sharpened, low-passed"}

# Resolutions worth a tick, A.
_TICKS_A = (200, 100, 50, 30, 20, 15, 12, 10, 9, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.75, 2.5, 2.25, 2, 1.75, 1.5, 1.25, 1)
_TICK_SPACING = 1 / 15  # of the axis, at least


def fsc_figure(
    curves: Mapping[str, FscCurve],
    thresholds: Sequence[float] = (RESOLUTION_THRESHOLD_TRUTH, RESOLUTION_THRESHOLD_HALF_MAPS),
) -> Figure:
    """FSC against spatial frequency, ticks in A, with the thresholds and where each curve crosses them.

    Args:
        curves: by name, at least one, all of one grid; the program's own names are written out and read at their own
            thresholds (half maps at 0.143, truth at 0.5), others at every threshold. Of "corrected" and
            "calibrated_map" one standard error is shaded.
        thresholds: levels to draw.
    """
    figure, axes = new_figure(6.0, 3.9)
    for threshold in thresholds:
        axes.axhline(threshold, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{threshold:g}", (1, threshold), (3, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=TICK, color=GREY,
        )  # fmt: skip
    for number, (name, curve) in enumerate(curves.items()):
        label, levels = _CURVES.get(name, (name.replace("_", " "), None))
        known = np.isfinite(curve.fsc[1:]).any()
        levels = [level for level in thresholds if known and (levels is None or level in levels)]
        crossings = [(level, resolution(curve, level)) for level in levels]
        colour, dashes, width = _STYLES.get(name, (COLOURS[number % 5], DASHES[number % 5], 1.8))
        read = ", ".join(f"{_angstrom(crossing)} at {level:g}" for level, crossing in crossings)
        if name in ("corrected", "calibrated_map") and curve.error is not None:
            low, high = (curve.fsc + sign * curve.error for sign in (-1, 1))
            axes.fill_between(curve.frequency[1:], low[1:], high[1:], color=colour, alpha=0.2, linewidth=0, zorder=2)
        axes.plot(
            curve.frequency[1:], curve.fsc[1:], linewidth=width, linestyle=dashes, color=colour, zorder=3,
            label=f"{label}: {read}" if read else label,
        )  # fmt: skip
        for level, crossing in crossings:
            if not (crossing.limited_by_nyquist or crossing.limited_by_data):
                place = (1 / crossing.angstrom, level)
                axes.plot(*place, "o", markersize=5, markeredgecolor="white", color=colour, zorder=3)
    frequency_axis(axes, next(iter(curves.values())))
    lowest = float(np.fmin.reduce(np.concatenate([[0.0], *(curve.fsc[1:] for curve in curves.values())])))
    axes.set_ylim(-1.03 if lowest < -0.15 else lowest - 0.03, 1.03)
    axes.set_ylabel("Fourier shell correlation", fontsize=LABEL)
    _legend_below(figure, len(curves))
    return figure


def _legend_below(figure: Figure, curves: int) -> None:
    """Below the axes, on paper added for it: labels are long, and inside they would cover curves."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_LINE_IN * curves)
    figure.legend(loc="outside lower left", fontsize=TICK, frameon=False, handlelength=3.2)


def guinier_figure(sharpened: Sharpened) -> Figure:
    """ln(amplitude) against 1/d^2 before and after sharpening, with the line that was fitted over its range."""
    figure, axes = new_figure(6.0, 3.9)
    box, cut_off = len(sharpened.volume), sharpened.resolution_a**-2.0
    squares = (np.arange(1, box // 2 + 1) / (box * sharpened.pixel_size_a)) ** 2
    seen = []
    for name, values in sharpened.amplitudes.items():
        number = list(_GUINIER).index(name)
        logarithms = np.log(values[1:], out=np.full(len(squares), np.nan), where=values[1:] > 0)
        style = {"color": COLOURS[number], "linestyle": DASHES[number], "linewidth": 1.8}
        axes.plot(squares, logarithms, label=_GUINIER[name], zorder=3, **style)
        seen.append(logarithms[squares <= cut_off])  # beyond it, weights and filter fall without a floor
    fit, label = sharpened.fit, f"B = {sharpened.b_factor_a2:.1f} Å²"
    if fit is None:
        axes.plot([], [], " ", label=f"{label}, given")
    else:
        ends = np.array([fit.from_a, fit.to_a]) ** -2.0
        label += f", fitted from {fit.from_a:.3g} to {fit.to_a:.3g} Å (R² {fit.r_squared:.3f})"
        axes.plot(ends, fit.intercept + fit.slope * ends, "o-", color=COLOURS[4], markersize=4, label=label, zorder=4)
    axes.axvline(cut_off, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"{sharpened.resolution_a:.3g} Å", (cut_off, 1), (0, 2), xycoords=("data", "axes fraction"),
        textcoords="offset points", ha="center", va="bottom", fontsize=TICK, color=GREY,
    )  # fmt: skip
    low, high = np.nanmin(np.concatenate(seen)), np.nanmax(np.concatenate(seen))
    axes.set_ylim(low - 0.15 * (high - low), high + 0.1 * (high - low))
    axes.set_xlim(0, min(2 * cut_off, squares[-1]))
    axes.set_xlabel("1/d² (1/Å²)", fontsize=LABEL)
    axes.set_ylabel("ln (mean amplitude of the shell)", fontsize=LABEL)
    axes.legend(fontsize=TICK, frameon=True, framealpha=0.9, edgecolor="none", handlelength=2.6)
    return figure


def _angstrom(crossing) -> str:
    error = "" if crossing.error_a is None else f" ± {crossing.error_a:.2f}"
    limit = " or better (Nyquist)" if crossing.limited_by_nyquist else " or better (data end)"
    limited = crossing.limited_by_nyquist or crossing.limited_by_data
    return f"{crossing.angstrom:.2f}{error} Å" + (limit if limited else "")


def frequency_axis(axes: Axes, curve: FscCurve) -> None:
    """Ticks at Nyquist and at round resolutions in A that have room, on an axis linear in 1/A."""
    last = float(curve.frequency[-1])
    room = _TICK_SPACING * last
    places = [0.0]
    for angstrom in _TICKS_A:
        if places[-1] + room <= 1 / angstrom <= last - room:
            places.append(1 / angstrom)
    places = [*places[1:], last]
    axes.set_xlim(0, last * 1.005)
    axes.set_xticks(places, [f"1/{1 / place:.3g}" for place in places])
    axes.set_xlabel("spatial frequency (1/Å)", fontsize=LABEL)


def sections_figure(volume: np.ndarray, pixel_size_a: float) -> Figure:
    """The three central sections of a map (D, D, D), one grey scale for all, with a scale bar."""
    middle = centre(len(volume))
    images = {
        f"section z = {middle}": (volume[middle], "x", "y"),
        f"section y = {middle}": (volume[:, middle], "x", "z"),
        f"section x = {middle}": (volume[:, :, middle], "y", "z"),
    }
    return _density_figure(images, pixel_size_a, [_limits(*(image for image, _, _ in images.values()))] * 3)


def projections_figure(volume: np.ndarray, pixel_size_a: float) -> Figure:
    """The projections of a map (D, D, D) along z, y and x, one grey scale for all, with a scale bar."""
    images = {
        "projection along z": (volume.sum(0), "x", "y"),
        "projection along y": (volume.sum(1), "x", "z"),
        "projection along x": (volume.sum(2), "y", "z"),
    }
    return _density_figure(images, pixel_size_a, [_limits(*(image for image, _, _ in images.values()))] * 3)


def particle_figure(
    particle: np.ndarray, projection: np.ndarray, residual: np.ndarray, pixel_size_a: float, name: str = "particle"
) -> Figure:
    """A particle beside what the model makes of it and what is left over.

    A particle is mostly noise, so all three are shown through the same low-pass, which the figure states. Particle
    and residual share one grey scale; the projection has its own.

    Args:
        particle: (D, D), white on dark.
        projection: (D, D), the model's projection in the same pose, times the CTF.
        residual: (D, D), particle - projection.
        pixel_size_a: A/px.
        name: what to call the particle, such as "particle 17".
    """
    # 20 A is where a protein still has its shape and most of the noise is gone; 6 px keeps coarse images readable.
    cut_off_a = max(20.0, 6 * pixel_size_a)
    stack = (particle, projection, residual)
    particle, projection, residual = (low_pass(image, cut_off_a, pixel_size_a) for image in stack)
    images = {
        name: (particle, "x", "y"),
        "model projection × CTF": (projection, "x", "y"),
        "particle − projection": (residual, "x", "y"),
    }
    noisy = _limits(particle, residual)
    figure = _density_figure(images, pixel_size_a, [noisy, _limits(projection), noisy])
    figure.suptitle(f"all low-passed to {cut_off_a:.3g} Å for the eye", fontsize=LABEL, color=GREY)
    return figure


def volume_fit_figure(columns: Mapping[str, np.ndarray]) -> Figure:
    """Log likelihood of every model over an empty map against the step of its fit in the volume.

    Args:
        columns: of volume_fit.csv: "step" and "gain_<model>".
    """
    figure, axes = new_figure(6.0, 3.4)
    for number, (loss, label) in enumerate(_LOSS_NAMES.items()):
        column = loss.replace("loss", "gain")
        if column in columns:
            style = {"color": COLOURS[number], "linestyle": DASHES[number]}
            axes.plot(columns["step"], columns[column], linewidth=1.6, label=label, **style)
    axes.legend(fontsize=TICK, frameon=False)
    axes.set_xlabel("step of the fit in the volume", fontsize=LABEL)
    axes.set_ylabel("log likelihood over an empty map, nats", fontsize=LABEL)
    return figure


def loss_figure(metrics: Mapping[str, np.ndarray]) -> Figure:
    """Loss of every model against the step: every logged value, and their running mean.

    Args:
        metrics: columns of metrics.csv, as ``metrics.read_metrics`` gives them: "step" and "loss_<model>", NaN
            where a model has none.
    """
    figure, axes = new_figure(6.0, 3.4)
    steps, drawn = metrics["step"], []
    for number, (column, label) in enumerate(_LOSS_NAMES.items()):
        values = metrics.get(column, np.empty(0))
        there = np.isfinite(values)
        if not there.any():
            continue
        colour = COLOURS[number]
        smooth = _running_mean(values[there])
        axes.plot(steps[there], values[there], color=colour, linewidth=0.6, alpha=0.25)
        axes.plot(steps[there], smooth, color=colour, linewidth=1.6, linestyle=DASHES[number], label=label)
        drawn.append(values[there])
    if drawn:
        # The first steps from a random start can be far above all that follows.
        low, high = np.percentile(np.concatenate(drawn), [0, 99])
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)
        axes.legend(fontsize=TICK, frameon=False)
    axes.set_xlabel("step", fontsize=LABEL)
    axes.set_ylabel("loss (mean squared error)", fontsize=LABEL)
    axes.ticklabel_format(useOffset=False)
    return figure


def panels_figure(panels: Sequence) -> Figure:
    """Panels of curves, two beside each other; each has title, x_label, y_label, x, lines (y by label), the half width
    of a shaded band round 0 or None, an x to mark or None, and in_pairs (``verdicts.Panel``)."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10.0, 3.6 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, panel in zip(places, panels, strict=False):
        for number, (label, values) in enumerate(panel.lines.items()):
            colour, dash = (number // 2, number % 2) if panel.in_pairs else (number, number)
            style = {"color": COLOURS[colour % len(COLOURS)], "linestyle": DASHES[dash % len(DASHES)]}
            single = "o" if len(panel.x) == 1 else None
            axes.plot(panel.x, values, linewidth=1.6, label=label, marker=single, **style)
        if panel.band is not None:
            axes.fill_between(panel.x, -panel.band, panel.band, color=GREY, alpha=0.2, linewidth=0)
            axes.set_ylim(-0.3, 1.03)
        if panel.mark is not None:
            axes.axvline(panel.mark, color=GREY, linewidth=0.8)
        axes.set_title(panel.title, fontsize=TITLE)
        axes.set_xlabel(panel.x_label, fontsize=LABEL)
        axes.set_ylabel(panel.y_label, fontsize=LABEL)
        axes.tick_params(labelsize=TICK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=TICK, frameon=False)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a thirtieth of the values, over fewer at the ends."""
    half = len(values) // 60
    total = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[end] - total[first]) / (end - first)


def low_pass(image: np.ndarray, cut_off_a: float, pixel_size_a: float) -> np.ndarray:
    """An image (D, D) through a Gaussian low-pass that halves the amplitude at ``cut_off_a``: no ringing."""
    full = np.fft.fftfreq(len(image), pixel_size_a)
    half = np.fft.rfftfreq(len(image), pixel_size_a)
    weight = 0.5 ** ((full[:, None] ** 2 + half**2) * cut_off_a**2)
    return scipy.fft.irfft2(scipy.fft.rfft2(np.asarray(image, dtype=np.float64)) * weight, image.shape)


def rasterise(figure: Figure, dpi: int = SCREEN_DPI) -> np.ndarray:
    """Pixels of a figure: uint8 (height, width, 3)."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def as_png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels: uint8 (height, width, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save(figure: Figure, path: str | os.PathLike, overwrite: bool = False, dpi: int = PAPER_DPI) -> None:
    """Write a figure as PNG, atomically.

    Raises:
        InputError: the file exists and ``overwrite`` is false, or it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(buffer.getvalue())


def new_figure(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """An empty figure with one open pair of axes."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=TICK)
    return figure, axes


def _density_figure(
    images: Mapping[str, tuple[np.ndarray, str, str]], pixel_size_a: float, limits: Sequence[tuple[float, float]]
) -> Figure:
    """Grey panels side by side; each image comes with the names of its column and row axis and has its own limits."""
    figure = Figure(figsize=(7.2, 2.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axes, (title, (image, across, up)), (low, high) in zip(
        figure.subplots(1, len(images)), images.items(), limits, strict=True
    ):
        # "hanning" smooths small boxes and keeps large ones from aliasing, so that a figure does not depend on dpi.
        axes.imshow(image, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="hanning")
        axes.set_title(title, fontsize=TITLE)
        axes.set_xlabel(f"{across} →", fontsize=TICK, labelpad=2)
        axes.set_ylabel(f"{up} →", fontsize=TICK, labelpad=2)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        _scale_bar(axes, len(image), pixel_size_a)
    return figure


def _limits(*images: np.ndarray) -> tuple[float, float]:
    """Grey levels that a few extreme pixels do not decide; never an empty range."""
    low, high = (float(limit) for limit in np.percentile(np.stack(images), [0.3, 99.7]))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def scale_bar_length(extent_a: float) -> float:
    """Largest of 1, 2 or 5 times a power of ten (A) within a third of ``extent_a``.

    >>> scale_bar_length(262.4), scale_bar_length(40.0)
    (50.0, 10.0)
    """
    limit = extent_a / 3
    power = 10.0 ** np.floor(np.log10(limit))
    return float(max(factor * power for factor in (1, 2, 5) if factor * power <= limit * (1 + 1e-9)))


def _scale_bar(axes: Axes, box: int, pixel_size_a: float) -> None:
    """A bar with its length in A on a dark plate, readable on any grey."""
    length_a = scale_bar_length(box * pixel_size_a)
    length, left, bottom = length_a / pixel_size_a, 0.05 * box, 0.045 * box
    pad = 0.025 * box
    plate = (left - pad, bottom - pad), length + 2 * pad, 0.145 * box
    axes.add_patch(Rectangle(*plate, color="black", alpha=0.6, linewidth=0))
    axes.add_patch(Rectangle((left, bottom), length, 0.018 * box, color="white", linewidth=0))
    place = {"ha": "center", "va": "bottom"}
    axes.text(left + length / 2, bottom + 0.028 * box, f"{length_a:g} Å", color="white", fontsize=TICK, **place)
