"""The ``gaussians`` command: the mixture of a run for other programs, and the same as pseudo-atoms."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryosplat.errors import InputError
from cryosplat.outputs import read_mixture, write_mixture_npz, write_mixture_ply
from cryosplat.pseudoatoms import write_mixture_atoms

MODELS = ("full", "half_a", "half_b")
SUFFIXES = (".pdb", ".cif", ".ply", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat gaussians`` takes."""
    parser.description = (
        "Write the Gaussians of a run for other programs. .pdb and .cif hold pseudo-atoms in A that lie on the run's "
        "maps as they are: B factors are those of the Gaussians' widths (8 pi^2 sigma^2; anisotropic ones beside it), "
        "occupancies are amplitudes over the largest one. .ply and .npz hold all numbers, as the run's own files do."
    )
    parser.add_argument("source", metavar="RUN_OR_FILE", help="a run directory, or its gaussians.npz or gaussians.ply")
    parser.add_argument("-o", "--output", required=True, help="file to write: .pdb, .cif, .ply or .npz")
    parser.add_argument("--model", default="full", choices=MODELS, help="of a run or an .npz; default: full")


def run(args: argparse.Namespace) -> None:
    """Write the file.

    Raises:
        InputError: no mixture there, an unknown suffix, too much for a PDB file, or a file that exists.
    """
    output = Path(args.output)
    _require_format(output)
    source = Path(args.source)
    mixture = read_mixture(source / "gaussians.npz" if source.is_dir() else source, args.model)
    if mixture["box"] is None or mixture["pixel_size_a"] is None:
        raise InputError(f"{source}: the file does not say its box and A/px, so nobody knows where its map begins")
    export_mixture(output, mixture)
    print(f"{output}: {len(mixture['amplitudes']):,} Gaussians ({args.model}), in A")


def export_mixture(path: str | os.PathLike, mixture: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write one mixture in the format of the file's suffix.

    Args:
        path: .pdb, .cif, .ply or .npz.
        mixture: means (G, 3) and scales (G, 3) in A, quaternions (G, 4) wxyz, amplitudes (G,), and box and pixel_size_a
            of its grid, as ``outputs.read_mixture`` gives them.
        overwrite: replace a file that is there.

    Raises:
        InputError: see ``run``.
    """
    _require_format(Path(path))
    suffix, grid = Path(path).suffix, {"box": mixture["box"], "pixel_size_a": mixture["pixel_size_a"]}
    if suffix == ".npz":
        write_mixture_npz(path, {"full": mixture}, **grid, overwrite=overwrite)
    elif suffix == ".ply":
        write_mixture_ply(path, mixture, **grid, overwrite=overwrite)
    else:
        write_mixture_atoms(path, mixture, **grid, overwrite=overwrite)


def _require_format(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}, found {path.suffix or 'none'}")
