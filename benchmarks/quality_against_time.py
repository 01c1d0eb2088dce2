"""Quality against time, one thread: python -m benchmarks.quality_against_time WORK [--set 30s_even] [--seed 1]

On a set of benchmarks.resolution: the recipes of ``cryosplat train``, stopped at several points, relion_reconstruct and
``cryosplat backproject``. Writes WORK/quality_against_time.json and .png. A point of a fit in the volume is a run of
its own; points of training image by image are the epochs of one run, whose evaluations are in its time.
"""

import argparse
import datetime
import json
import re
import shutil
import sys
from pathlib import Path

from benchmarks.resolution import SETS, SHARED, call, make_set
from cryosplat import figures

STEPS = {"default": (10, 20, 40, 80, 120, 240), "random": (25, 50, 100, 200, 400)}
COLOURS = {"default": "#0072B2", "random": "#009E73", "images": "#E69F00", "paper": "#D55E00"}
LABELS = {
    "default": "default: from the map, in the volume",
    "random": "recipe=random: in the volume",
    "images": "recipe=images: image by image",
    "paper": "recipe=paper: the paper's settings",
}
EPOCH = re.compile(
    r"^\S+ (\d\d:\d\d:\d\d) INFO after epoch (\d+).* mean FSC truth ([\d.]+), mean FSC mixture truth ([\d.]+)"
)


def run(folder: Path, star: str, *settings: str) -> tuple[float, Path]:
    """CPU seconds of a training run of a set, and its folder."""
    run_dir = folder / "timed"
    shutil.rmtree(run_dir, ignore_errors=True)
    data = [f"data.particles={star}", "data.poses=poses.pkl", "data.ctf=ctf.pkl", "data.truth=truth.mrc"]
    words = [*data, "data.mask=mask.mrc", "run_dir=timed", "train.threads=1", *settings]
    return call(sys.executable, "-m", "cryosplat.cli", "train", *words, cwd=folder), run_dir


def in_volume(folder: Path, star: str, recipe: str) -> list[tuple[float, float, float]]:
    """(CPU seconds, score of the mixture, score of the delivered map) by number of steps."""
    points = []
    for steps in STEPS[recipe]:
        seconds, run_dir = run(folder, star, f"recipe={recipe}", f"volume.steps={steps}")
        summary = json.loads((run_dir / "summary.json").read_text())
        points.append((seconds, summary["fsc_mixture_truth_mean"], summary["fsc_truth_mean"]))
    return points


def by_image(folder: Path, star: str, recipe: str) -> list[tuple[float, float, float]]:
    """The same by epoch, of one run."""
    seconds, run_dir = run(folder, star, f"recipe={recipe}")
    return epochs_of(run_dir, seconds)


def epochs_of(run_dir: Path, seconds: float) -> list[tuple[float, float, float]]:
    """Points of a run that took so many CPU seconds, told by the times in its log: CPU time passes evenly."""
    found = [match.groups() for match in map(EPOCH.search, (run_dir / "run.log").read_text().splitlines()) if match]
    pace = seconds / json.loads((run_dir / "summary.json").read_text())["wall_seconds"]

    def clock(text: str) -> datetime.timedelta:
        return datetime.timedelta(**dict(zip(("hours", "minutes", "seconds"), map(int, text.split(":")), strict=True)))

    last = clock(found[-1][0])
    before_end = [(last - clock(time)).total_seconds() % 86400 for time, *_ in found]
    return [
        (seconds - pace * before, float(m), float(d)) for before, (_, _, d, m) in zip(before_end, found, strict=True)
    ]


def linear(folder: Path, star: str) -> dict[str, tuple[float, float]]:
    """(CPU seconds, score) of the linear tools: map and both half maps."""
    sys.path.insert(0, str(SHARED / "bench"))
    import evaluate

    truth, mask = (evaluate.read_mrc(folder / f"{name}.mrc")[0] for name in ("truth", "mask"))

    def score(path: str) -> float:
        return float(evaluate.fsc(evaluate.read_mrc(folder / path)[0], truth, mask)[0][1:].mean())

    relion = sum(
        call("relion_reconstruct", "--i", star, "--o", f"timed_{name}.mrc", "--ctf", *subset, cwd=folder)
        for name, subset in {"full": (), "half1": ("--subset", 1), "half2": ("--subset", 2)}.items()
    )
    shutil.rmtree(folder / "timed_linear", ignore_errors=True)
    data = [f"data.particles={star}", "data.poses=poses.pkl", "data.ctf=ctf.pkl", "train.threads=1"]
    ours = call(sys.executable, "-m", "cryosplat.cli", "backproject", *data, "-o", "timed_linear", cwd=folder)
    return {
        "relion_reconstruct, three maps": (relion, score("timed_full.mrc")),
        "cryosplat backproject": (ours, score("timed_linear/linear.mrc")),
    }


def draw(points: dict, path: Path) -> None:
    """Scores against CPU seconds: mixtures dashed, delivered maps whole."""
    figure, axes = figures.new_figure(6.4, 4.0)
    for recipe, rows in points["recipes"].items():
        seconds, mixture, delivered = zip(*rows, strict=True)
        axes.plot(seconds, delivered, "o-", color=COLOURS[recipe], ms=3.5, lw=1.6, label=LABELS[recipe])
        axes.plot(seconds, mixture, "o--", color=COLOURS[recipe], ms=2.5, lw=1.0)
    for (name, (seconds, score)), marker in zip(points["linear"].items(), "sD", strict=True):
        axes.plot(seconds, score, marker, color="black", ms=6, label=name)
    axes.plot([], [], "--", color="black", lw=1.0, label="dashed: the mixture alone")
    axes.set_xscale("log")
    axes.set_xlabel("CPU seconds, one thread, everything included", fontsize=figures.LABEL)
    axes.set_ylabel("mean FSC to the truth", fontsize=figures.LABEL)
    axes.legend(fontsize=figures.TICK, frameon=False)
    figures.save(figure, path, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--set", choices=SETS, default="30s_even")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", choices=LABELS, default=list(LABELS), help="those to run (anew)")
    args = parser.parse_args()
    folder = make_set(args.work.resolve(), args.set, args.seed)
    star = f"particles_snr{SETS[args.set].snr}.star"
    file = args.work / "quality_against_time.json"
    known = json.loads(file.read_text())["recipes"] if file.exists() else {}
    points = {"linear": linear(folder, star), "recipes": known}
    for recipe in args.recipes:
        measure = in_volume if recipe in STEPS else by_image
        points["recipes"][recipe] = measure(folder, star, recipe)
        print(recipe, points["recipes"][recipe], flush=True)
    file.write_text(json.dumps(points, indent=1))
    draw(points, args.work / "quality_against_time.png")


if __name__ == "__main__":
    main()
