"""The last words of a run: what came out, what it is worth, where it lies."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LIMITS = {"at_nyquist": " (Nyquist)", "at_limit_of_data": " or better (the data say nothing beyond)"}


def ending(summary: dict[str, Any]) -> str:
    """What summary.json says, in a few lines for the terminal."""
    folder, halves = Path(summary["run_dir"]), summary.get("resolution_naive_a") is not None
    gaussians = summary["gaussians_by_model"]
    counts = f"{summary['gaussians']:,}" + (
        f" ({gaussians['half_a']:,} and {gaussians['half_b']:,} in the halves)" if halves else ""
    )
    rows = [(found["level"], found["title"]) for found in summary.get("findings", ())]
    rows += [("Gaussians, particles", f"{counts}, {summary['particles']:,}")]
    rows += _resolutions(summary, halves) + _costs(summary) + [("map", str(folder / "map.mrc"))]
    if halves:
        rows += [
            ("half maps", f"{folder / 'half_a.mrc'}, half_b.mrc (linear, unfiltered: for deposition)"),
            ("parts of the map", f"{folder / 'mixture.mrc'}, linear.mrc"),
            ("filter and sharpen", f"cryosplat postprocess {folder} -o {folder / 'postprocess'}"),
            ("test it", f"cryosplat validate {folder}"),
        ]
    rows += [
        ("report", f"{folder / 'report.html'}: all this on a page, with figures and what to look at"),
        ("Gaussians", f"{folder / 'gaussians.npz'}, .ply"),
        ("plots", ", ".join(str(folder / name) for name in _plots(summary))),
        ("numbers, logs", f"{folder / 'summary.json'}, fsc.csv, metrics.csv, run.log"),
        ("watch it", f"tensorboard --logdir {folder / 'tensorboard'}"),
    ]
    return "\n".join(f"{name:>22}  {value}" for name, value in rows)


def _resolutions(summary: dict[str, Any], halves: bool) -> list[tuple[str, str]]:
    rows = []
    if halves:
        rows = [
            (
                "resolution",
                f"{angstrom(summary, 'resolution')} (calibrated FSC 0.5, a little modest, under {summary['mask']})",
            ),
            (
                "naive resolution",
                f"{angstrom(summary, 'resolution_naive')} (half maps of mixtures, FSC 0.143: they share the model's "
                "bias, so it says too much)",
            ),
        ]
    if summary.get("fsc_truth_mean") is not None:
        said = f"{angstrom(summary, 'resolution_truth')} (FSC 0.5), mean FSC {summary['fsc_truth_mean']:.3f}"
        rows.append(("against the truth", said))
    return rows


def angstrom(summary: Mapping[str, Any], name: str) -> str:
    """A resolution with its error and its limits; ``name`` is that of its keys without "_a"."""
    value, error = summary.get(f"{name}_a"), summary.get(f"{name}_error_a")
    limit = next((words for key, words in _LIMITS.items() if summary.get(f"{name}_{key}")), "")
    return "none" if value is None else f"{value:.2f} A" + (f" +- {error:.2f}" if error else "") + limit


def _costs(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rate, processes = summary.get("images_per_second"), summary["world_size"]
    memory = f"{summary['peak_memory_gib']:.2f} GiB in {processes} process{'es' if processes > 1 else ''}"
    rated = f", {rate:.0f} images/s" if rate else ""
    spent = [f"{summary['wall_seconds']:.0f} s"]
    if summary["volume_fit_seconds"]:
        spent.append(f"{summary['volume_fit_seconds']:.0f} s of fitting in the volume")
    if summary["training_seconds"]:
        spent.append(f"{summary['training_seconds']:.0f} s of training{rated}")
    return [("time", ", ".join(spent)), ("memory", memory)]


def _plots(summary: dict[str, Any]) -> list[str]:
    fitted = ["volume_fit.png"] if summary["volume_fit_seconds"] else []
    return ["fsc.png", "sections.png", "projections.png", *fitted, *(["loss.png"] if summary["steps"] else [])]
