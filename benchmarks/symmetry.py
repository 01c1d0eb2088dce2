"""What a point group is worth: python -m benchmarks.symmetry WORK [--images 286 1000 4000] [--snr 0.005]

T20S (3J9I, D7), turned so that its axes lie where RELION has them, seen by ``cryosplat simulate``, and reconstructed
from the first images of one set with and without model.symmetry=D7. Prints a Markdown table. WORK is made anew.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import gemmi
import numpy as np
from scipy.spatial.transform import Rotation

MODEL = Path(__file__).resolve().parents[2] / "shared/data/models/3j9i.pdb"


def align(source: Path, target: Path, fold: int) -> None:
    """Write a model of symmetry D<fold> with its axes through the origin along z and x, found from its chains."""
    structure = gemmi.read_structure(str(source))
    chains = [np.array([atom.pos.tolist() for atom in residues]) for residues in carbons(structure)]
    one = [chain for chain in chains if len(chain) == len(chains[0])]
    centre = np.concatenate(one).mean(0)
    turns = [Rotation.align_vectors(other - centre, one[0] - centre)[0] for other in one[1:]]
    vectors = np.stack([turn.as_rotvec() for turn in turns])
    angles = np.linalg.norm(vectors, axis=1)
    z = unit(vectors[np.argmin(np.abs(angles - 2 * np.pi / fold))])
    x = vectors[np.argmin(np.abs(angles - np.pi) + np.abs(vectors @ z))]
    x = unit(x - (x @ z) * z)
    matrix = np.stack([x, np.cross(z, x), z])
    move = gemmi.Transform(gemmi.Mat33(matrix.tolist()), gemmi.Vec3(*(-matrix @ centre)))
    for model in structure:
        model.transform_pos_and_adp(move)
    structure.write_pdb(str(target))


def carbons(structure: gemmi.Structure) -> list[list[gemmi.Atom]]:
    """The CA atoms of every chain."""
    return [[atom for residue in chain for atom in residue if atom.name == "CA"] for chain in structure[0]]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def call(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "cryosplat.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[286, 1000, 4000])
    parser.add_argument("--snr", type=float, default=0.005)
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    align(MODEL, args.work / "aligned.pdb", 7)
    stack, source = args.work / "stack", ("--model", args.work / "aligned.pdb", "--b-factor", 170)
    grid = ("--box", 128, "--pixel-size", 2.2, "--images", max(args.images), "--snr", args.snr)
    call("simulate", "--out", stack, *source, *grid)
    print("| images | symmetry | Gaussians | FSC: linear, mixture, delivered | resolution, true | fit, all s |")
    print("|---|---|---|---|---|---|")
    for images in args.images:
        for symmetry in ("C1", "D7"):
            run = args.work / f"{symmetry}_{images}"
            data = (f"data_root={stack}", "data.particles=particles.star", "data.truth=truth.mrc", "data.mask=mask.mrc")
            call("train", *data, f"data.first={images}", f"model.symmetry={symmetry}", f"run_dir={run}")
            found = json.loads((run / "summary.json").read_text())
            scores = ", ".join(f"{found[f'fsc_{name}truth_mean']:.4f}" for name in ("linear_", "mixture_", ""))
            resolutions = f"{found['resolution_a']:.2f} / {found['resolution_truth_a']:.2f}"
            seconds = f"{found['volume_fit_seconds']:.1f}, {found['wall_seconds']:.1f}"
            print(
                f"| {images} | {symmetry} | {found['gaussians']} | {scores} | {resolutions} | {seconds} |", flush=True
            )


if __name__ == "__main__":
    main()
