"""Is the resolution true, and is the map better? python -m benchmarks.resolution WORK [--sets NAME ...] [--seeds 1 2 3]

Sets made by ../shared/bench from real structures, images by RELION's projector. Six at the limit of resolution: T20S
and 30S, even and preferred views, one with coloured noise, one with poses that are off by 1 degree and 0.5 px. Four
with much signal (B factor 40, 10,000 images). Every set is reconstructed by
relion_reconstruct, by ``cryosplat backproject`` and by ``cryosplat train`` at its defaults, which know nothing of the
truth, and judged here. Results stay in WORK (a second call goes on); --table prints what is there as Markdown.
"""

import argparse
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
from scipy.spatial.transform import Rotation

SHARED = Path(__file__).resolve().parents[2] / "shared"
BOX, PIXEL_SIZE_A = 128, 2.2
JITTER_DEG, JITTER_PX = 1.0, 0.5
TRUSTED = (0.1, 0.95)
"""True FSC between which calibrated curves are judged."""


@dataclass(frozen=True)
class Set:
    model: str
    views: str
    snr: str
    coloured: bool = False
    jitter: bool = False
    b_factor_a2: int = 170
    particles: int = 4000


SETS = {
    "t20s_even": Set("3j9i", "uniform", "0.005"),
    "t20s_preferred": Set("3j9i", "preferred", "0.008"),
    "30s_even": Set("4v4r_30S", "uniform", "0.004"),
    "30s_preferred": Set("4v4r_30S", "preferred", "0.01"),
    "30s_coloured": Set("4v4r_30S", "uniform", "0.004", coloured=True),
    "t20s_jitter": Set("3j9i", "uniform", "0.01", jitter=True),
    "t20s_b40_0.1": Set("3j9i", "uniform", "0.1", b_factor_a2=40, particles=10000),
    "t20s_b40_0.03": Set("3j9i", "uniform", "0.03", b_factor_a2=40, particles=10000),
    "30s_b40_0.1": Set("4v4r_30S", "uniform", "0.1", b_factor_a2=40, particles=10000),
    "30s_b40_0.03": Set("4v4r_30S", "uniform", "0.03", b_factor_a2=40, particles=10000),
}


def call(*command: str | Path, cwd: Path) -> float:
    """Run a command on one thread; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_truth(work: Path, model: str, b_factor_a2: int) -> Path:
    """The map of a model, as make_truth.py has it, and its mask beside it."""
    truth = work / (f"{model}.mrc" if b_factor_a2 == 170 else f"{model}_b{b_factor_a2}.mrc")
    if not truth.exists():
        options = ["--box", BOX, "--apix", PIXEL_SIZE_A, "--b", b_factor_a2]
        call(
            sys.executable,
            SHARED / "bench/make_truth.py",
            SHARED / f"data/models/{model}.pdb",
            truth,
            *options,
            cwd=work,
        )
    return truth


def make_set(work: Path, name: str, seed: int) -> Path:
    """The folder of a set, made if it is not there."""
    what, folder = SETS[name], work / f"{name}_{seed}"
    if (folder / "dataset.json").exists():
        return folder
    truth = make_truth(work, what.model, what.b_factor_a2)
    mask = truth.with_name(f"{truth.stem}_mask.mrc")
    call(
        sys.executable, SHARED / "bench/make_dataset.py", "--map", truth, "--mask", mask,
        "--out", folder, "--n", what.particles, "--snr", what.snr, "--orient", what.views, "--seed", seed,
        "--keep-clean",
        cwd=work,
    )  # fmt: skip
    if what.coloured:
        colour_noise(folder, what.snr, seed)
    if what.jitter:
        jitter_poses(folder, what.snr, seed)
    (folder / "clean.mrcs").unlink()
    return folder


def colour_noise(folder: Path, snr: str, seed: int) -> None:
    """Replace the white noise by one with the radial power measured in EMPIAR-10076; variance as before."""
    power = np.asarray(pickle.loads((SHARED / "data/noise_10076.pkl").read_bytes()), dtype=np.float64)
    frequency = np.hypot(np.fft.fftfreq(BOX)[:, None], np.fft.rfftfreq(BOX))
    amplitude = np.sqrt(np.interp(frequency * 2 * len(power), np.arange(len(power)), power))
    mates = np.full(BOX // 2 + 1, 2.0)
    mates[[0, -1]] = 1.0
    amplitude /= np.sqrt((mates * amplitude**2).sum() / BOX**2)
    scale = json.loads((folder / "dataset.json").read_text())["datasets"][snr]["scale"]
    rng = np.random.default_rng([seed, 10076])
    with (
        mrcfile.mmap(folder / "clean.mrcs", permissive=True) as clean,
        mrcfile.mmap(folder / f"particles_snr{snr}.mrcs", mode="r+", permissive=True) as stack,
    ):
        for image in range(len(clean.data)):
            noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((BOX, BOX))) * amplitude, s=(BOX, BOX))
            stack.data[image] = clean.data[image] * scale + noise


def jitter_poses(folder: Path, snr: str, seed: int) -> None:
    """Poses of star and pickle turned by JITTER_DEG about a random axis (r.m.s.) and moved by JITTER_PX an axis."""
    rng = np.random.default_rng([seed, 1])
    rotations, shifts = pickle.loads((folder / "poses.pkl").read_bytes())
    turns = Rotation.from_rotvec(np.radians(JITTER_DEG) / np.sqrt(3) * rng.standard_normal((len(rotations), 3)))
    rotations = turns.as_matrix() @ rotations
    shifts = shifts + JITTER_PX / BOX * rng.standard_normal(shifts.shape)
    (folder / "poses.pkl").write_bytes(pickle.dumps((rotations, shifts)))
    # RELION's R = Rz(psi) Ry(tilt) Rz(rot), each turning the frame: the inverse turns the body, intrinsic ZYZ.
    rot, tilt, psi = Rotation.from_matrix(np.transpose(rotations, (0, 2, 1))).as_euler("ZYZ", degrees=True).T
    star, row = folder / f"particles_snr{snr}.star", 0
    lines = star.read_text().split("\n")
    for number, line in enumerate(lines):
        words = line.split()
        if words and words[-1].endswith(".mrcs"):
            new = [rot[row], tilt[row], psi[row], *(shifts[row] * BOX * PIXEL_SIZE_A)]
            lines[number] = " ".join([f"{value:.6f}" for value in new] + words[5:])
            row += 1
    assert row == len(rotations), "the star file has other rows than the poses"
    star.write_text("\n".join(lines))


def reconstruct(folder: Path, what: Set, before: dict[str, float] | None, retrain: bool) -> dict[str, float]:
    """All reconstructions of a set, or (given the CPU seconds of the first time) the run or its products anew.

    Returns:
        CPU seconds by program.
    """
    star, seconds = f"particles_snr{what.snr}.star", dict(before or {})
    (folder / "relion").mkdir(exist_ok=True)
    subsets = {"full": [], "half1": ["--subset", 1], "half2": ["--subset", 2]}
    if before is None:
        seconds["relion"] = sum(
            call("relion_reconstruct", "--i", star, "--o", f"relion/{name}.mrc", "--ctf", *subset, cwd=folder)
            for name, subset in subsets.items()
        )
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.rmtree(folder / "linear", ignore_errors=True)
    data = [f"data.particles={star}", "data.poses=poses.pkl", "data.ctf=ctf.pkl"]
    program = [sys.executable, "-m", "cryosplat.cli"]
    if before is None:
        seconds["backproject"] = call(*program, "backproject", *data, "-o", "linear", cwd=folder)
    if retrain:
        shutil.rmtree(folder / "run", ignore_errors=True)
        seconds.pop("train", None)
    # Without its summary a trained run makes its products anew from the last checkpoint.
    (folder / "run/summary.json").unlink(missing_ok=True)
    taken = call(*program, "train", *data, "run_dir=run", cwd=folder)
    seconds.setdefault("train", taken)
    return seconds


def judge(folder: Path) -> dict:
    """What came out against the truth: scores under the set's mask, calibration under the run's own."""
    sys.path.insert(0, str(SHARED / "bench"))
    import evaluate

    read = {path: evaluate.read_mrc(folder / path)[0] for path in (
        "truth.mrc", "mask.mrc", "relion/full.mrc", "linear/unregularised.mrc", "linear/linear.mrc", "run/mask.mrc",
        "run/map.mrc", "run/mixture.mrc", "run/linear.mrc", "run/mixture_half_a.mrc", "run/mixture_half_b.mrc",
    )}  # fmt: skip
    truth = read["truth.mrc"]

    def curve(path, mask="run/mask.mrc", other=truth):
        return evaluate.fsc(read[path], other, read[mask])[0]

    def angstrom(values, threshold):
        return float(evaluate.resolution(values, threshold, PIXEL_SIZE_A)[0])

    scores = {
        name: curve(path, "mask.mrc")
        for name, path in (
            ("relion", "relion/full.mrc"), ("unregularised", "linear/unregularised.mrc"), ("wiener", "run/linear.mrc"),
            ("mixture", "run/mixture.mrc"), ("delivered", "run/map.mrc"),
        )
    }  # fmt: skip
    better = np.maximum(scores["wiener"], scores["mixture"])
    middle = (scores["wiener"] > 0.5) & (scores["wiener"] < 0.95) & (np.arange(len(better)) > 0)
    gain = (scores["mixture"] - scores["wiener"])[middle]
    summary = json.loads((folder / "run/summary.json").read_text())
    table = np.genfromtxt(folder / "run/fsc.csv", delimiter=",", names=True)
    naive = np.concatenate([[1], table["half_maps"]])
    result = {
        "score": {name: float(values[1:].mean()) for name, values in scores.items()},
        "crossing": {name: angstrom(values, 0.5) for name, values in scores.items()},
        "worst_shell": float((scores["delivered"] - better)[1:].min()),
        "middle_shells": [len(gain), float(gain.mean()), float(gain.min())] if len(gain) else None,
        "resolution_a": summary["resolution_a"],
        "resolution_error_a": summary["resolution_error_a"],
        "resolution_naive_a": summary["resolution_naive_a"],
        "resolution_true_a": angstrom(curve("run/map.mrc"), 0.5),
        "mixture_resolution_true_a": angstrom(curve("run/mixture.mrc"), 0.5),
        "gaussians": summary["gaussians_by_model"],
        "seconds": summary["wall_seconds"],
    }
    for column, path in (
        ("calibrated_map", "run/map.mrc"),
        ("calibrated_half_a", "run/mixture_half_a.mrc"),
        ("calibrated_half_b", "run/mixture_half_b.mrc"),
    ):
        result[column] = errors(np.concatenate([[1], table[column]]), curve(path))
    # What the naive curve of the mixtures' half maps would say of one of them.
    result["naive"] = errors(np.sqrt(np.clip(naive, 0, 1)), curve("run/mixture_half_a.mrc"))
    return result


def errors(estimate: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Mean signed and absolute error over the shells whose true FSC is in TRUSTED and that have an estimate."""
    judged = (true > TRUSTED[0]) & (true < TRUSTED[1]) & (np.arange(len(true)) > 0)
    difference = (estimate - true)[judged & np.isfinite(estimate)]
    return {
        "signed": float(difference.mean()) if len(difference) else float("nan"),
        "absolute": float(np.abs(difference).mean()) if len(difference) else float("nan"),
        "shells": int(len(difference)), "of": int(judged.sum()),
    }  # fmt: skip


def print_table(results: dict[str, dict]) -> None:
    """Means over seeds, a row a set."""
    print(
        "| set | seeds | relion | unregularised | Wiener | mixture | in its middle shells | delivered | worst shell |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    grouped = {name: [r for key, r in sorted(results.items()) if key.rsplit("_", 1)[0] == name] for name in SETS}
    grouped = {name: rows for name, rows in grouped.items() if rows}
    for name, rows in grouped.items():
        kinds = ("relion", "unregularised", "wiener", "mixture", "delivered")
        cells = [f"{np.mean([r['score'][kind] for r in rows]):.4f}" for kind in kinds]
        middle = [r["middle_shells"] for r in rows if r["middle_shells"]]
        gain = f"{np.mean([m[1] for m in middle]):+.4f}, {min(m[2] for m in middle):+.4f}" if middle else "-"
        cells.insert(4, gain)
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} | {min(r['worst_shell'] for r in rows):+.4f} |")
    print(
        "\n| set | map: abs., signed | halves' mixtures: abs., signed | naive, abs. | shells | resolution, true | naive |"  # noqa: E501
    )
    print("|---|---|---|---|---|---|---|")
    for name, rows in grouped.items():
        whole = [r["calibrated_map"] for r in rows]
        halves = [r[f"calibrated_half_{h}"] for r in rows for h in "ab"]

        def mean(items, key):
            return np.mean([item[key] for item in items])

        said = ", ".join(f"{r['resolution_a'] or float('nan'):.2f} / {r['resolution_true_a']:.2f}" for r in rows)
        shells = f"{sum(w['shells'] for w in whole)} of {sum(w['of'] for w in whole)}"
        print(
            f"| {name} | {mean(whole, 'absolute'):.4f}, {mean(whole, 'signed'):+.4f} "
            f"| {mean(halves, 'absolute'):.4f}, {mean(halves, 'signed'):+.4f} "
            f"| {mean([r['naive'] for r in rows], 'absolute'):.3f} | {shells} | {said} "
            f"| {mean(rows, 'resolution_naive_a'):.2f} / {mean(rows, 'mixture_resolution_true_a'):.2f} |"
        )
    print("\n| set | crossing of relion, A | CPU s: relion | backproject | train |\n|---|---|---|---|---|")
    for name, rows in grouped.items():
        cpu = [f"{np.mean([r['cpu'][program] for r in rows]):.1f}" for program in ("relion", "backproject", "train")]
        print(f"| {name} | {np.mean([r['crossing']['relion'] for r in rows]):.2f} | {' | '.join(cpu)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--again", action="store_true", help="products of the runs anew, without training")
    parser.add_argument("--retrain", action="store_true", help="runs anew, beside the old maps of the linear tools")
    parser.add_argument("--table", action="store_true", help="print what is there and do nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for seed in [] if args.table else args.seeds:
        for name in args.sets:
            file = args.work / f"result_{name}_{seed}.json"
            if file.exists() and not (args.again or args.retrain):
                continue
            folder = make_set(args.work.resolve(), name, seed)
            before = json.loads(file.read_text())["cpu"] if file.exists() else None
            cpu = reconstruct(folder, SETS[name], before, args.retrain)
            file.write_text(json.dumps(judge(folder) | {"cpu": cpu}, indent=1))
            print(f"{name} {seed}: done", flush=True)
    found = sorted(args.work.glob("result_*.json"))
    print_table({path.stem.removeprefix("result_"): json.loads(path.read_text()) for path in found})


if __name__ == "__main__":
    main()
