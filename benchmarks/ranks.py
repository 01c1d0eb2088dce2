"""Training speed on one and on two ranks of one thread: python -m benchmarks.ranks FOLDER [--gaussians 2048].

FOLDER holds particles.star (or --stack), poses.pkl and ctf.pkl. Each run is one epoch with half maps; runs of one and
of two ranks take turns, and the medians and their ratio are printed, with CPU time and memory (all ranks together).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def run(folder: Path, stack: str, gaussians: int, batch: int, ranks: int) -> dict[str, float]:
    """summary.json of one epoch on a number of ranks of one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = [
            f"data_root={folder.resolve()}",
            f"data.particles={stack}",
            "data.poses=poses.pkl",
            "data.ctf=ctf.pkl",
            f"model.gaussians={gaussians}",
            f"train.batch={batch}",
            "train.epochs=1",
            "train.threads=1",
            f"run_dir={scratch}/run",
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "cryosplat.train", *settings]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(Path(scratch, "run", "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stack", default="particles.star")
    parser.add_argument("--gaussians", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    found = {1: [], 2: []}
    for _ in range(args.turns):
        for ranks, runs in found.items():
            runs.append(run(args.folder, args.stack, args.gaussians, args.batch, ranks))
    print("| ranks | images/s | CPU s, whole run | wall s, whole run | training s | memory, GiB |")
    print("|---|---|---|---|---|---|")
    for ranks, runs in found.items():
        columns = ("images_per_second", "cpu_seconds", "wall_seconds", "training_seconds", "peak_memory_gib")
        medians = [statistics.median(summary[name] for summary in runs) for name in columns]
        print(f"| {ranks} | {medians[0]:.0f} | " + " | ".join(f"{value:.2f}" for value in medians[1:]) + " |")
    rates = {ranks: statistics.median(s["images_per_second"] for s in runs) for ranks, runs in found.items()}
    print(f"\ntwo ranks do {rates[2] / rates[1]:.2f} times the images/s of one")


if __name__ == "__main__":
    main()
