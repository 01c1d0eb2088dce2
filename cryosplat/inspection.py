"""Looking at what there is: products and inputs by themselves, and ``cryosplat voxelise``."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from cryosplat.alignments import CTF_COLUMNS, check_poses, load_ctf, load_poses
from cryosplat.directional import view_evenness
from cryosplat.errors import InputError
from cryosplat.gaussians import mixture_to_map
from cryosplat.images import read_header
from cryosplat.outputs import read_mixture
from cryosplat.unpickle import read_pickle
from cryosplat.volumes import read_map, write_map


def voxelise(args: argparse.Namespace) -> None:
    """Write the map of a mixture file, on its own grid or another.

    Raises:
        InputError: no mixture, an unknown grid, or an output that exists.
    """
    mixture = read_mixture(args.mixture, args.model)
    box, pixel_size_a = _grid(args, mixture)
    fields = ("means", "scales", "quaternions", "amplitudes")
    tensors = {name: torch.as_tensor(np.asarray(mixture[name]), dtype=torch.float32) for name in fields}
    volume = mixture_to_map(tensors, box, pixel_size_a).numpy()
    write_map(args.output, volume, pixel_size_a)
    print(f"{args.output}: {box} voxels at {pixel_size_a:.5g} A, {len(tensors['amplitudes']):,} Gaussians")


def _grid(args: argparse.Namespace, mixture: dict) -> tuple[int, float]:
    """Box and A/px: as asked for; of one alone, the other keeps the field of view."""
    box, pixel_size_a = args.box, args.pixel_size
    side_a = mixture["box"] * mixture["pixel_size_a"] if mixture["box"] and mixture["pixel_size_a"] else None
    if side_a is None and (box is None or pixel_size_a is None):
        raise InputError(f"{args.mixture}: the file does not say its grid; give both --box and --pixel-size")
    if box is None and pixel_size_a is None:
        return int(mixture["box"]), float(mixture["pixel_size_a"])
    if (box is not None and box < 1) or (pixel_size_a is not None and not pixel_size_a > 0):
        raise InputError("--box must be at least 1 and --pixel-size above 0")
    if pixel_size_a is None:
        return box, side_a / box
    return box or max(2 * round(side_a / pixel_size_a / 2), 2), pixel_size_a


def describe(path: Path) -> list[tuple[str, str]]:
    """What a run directory, mixture, map, stack, or a pickle of poses or CTF holds: names and values.

    Raises:
        InputError: nothing this program knows.
    """
    if path.is_dir():
        return _run(path)
    if path.suffix in (".npz", ".ply"):
        return _mixture(path)
    if path.suffix in (".mrc", ".mrcs", ".map"):
        return _densities(path)
    if path.suffix == ".pkl":
        return _pickle(path)
    raise InputError(
        f"{path}: expected a run directory, particles (.star, .cs, .txt, .mrcs, or a .yaml of settings), a poses.pkl "
        "or ctf.pkl, a mixture (.npz, .ply) or a map (.mrc)"
    )


def _pickle(path: Path) -> list[tuple[str, str]]:
    """Of cryoDRGN's poses.pkl or ctf.pkl."""
    value = read_pickle(path)
    if isinstance(value, np.ndarray) and value.ndim == 2:
        columns = load_ctf(path)
        ranges = zip(CTF_COLUMNS, columns.min(0), columns.max(0), strict=True)
        return [
            ("CTF parameters of", f"{len(columns):,} images"),
            *((n, f"{low:g} to {high:g}") for n, low, high in ranges),
        ]
    rotations, shifts = load_poses(path)
    check_poses(path, rotations, shifts, np.arange(len(rotations)))
    return [
        ("poses of", f"{len(rotations):,} images"),
        (
            "shifts, fractions of the box",
            f"{np.median(np.abs(shifts)):.4g} (median), {np.abs(shifts).max():.4g} (largest)",
        ),
        ("evenness of views", f"{view_evenness(rotations):.2f} (1: even; 0.81: side views alone)"),
    ]


def _run(folder: Path) -> list[tuple[str, str]]:
    summary = folder / "summary.json"
    if summary.is_file():
        return [(name, _words(value)) for name, value in json.loads(summary.read_text()).items()]
    if (folder / "config.yaml").is_file():
        saved = sorted(folder.glob("checkpoints/step_*.pt"))
        return [("state", "not complete"), ("last checkpoint", saved[-1].name if saved else "none")]
    raise InputError(f"{folder}: no run of cryosplat (it has no config.yaml)")


def _mixture(path: Path) -> list[tuple[str, str]]:
    mixture = read_mixture(path)
    scales, amplitudes = np.asarray(mixture["scales"]), np.asarray(mixture["amplitudes"])
    radius = np.linalg.norm(np.asarray(mixture["means"]), axis=1)
    quantiles = np.quantile(scales, (0.05, 0.5, 0.95))
    return [
        ("Gaussians", f"{len(amplitudes):,}"),
        ("box", f"{mixture['box']} px at {mixture['pixel_size_a']} A" if mixture["box"] else "not said"),
        ("scales, A", "5 %, median, 95 %: " + ", ".join(f"{q:.2f}" for q in quantiles)),
        ("amplitudes", f"sum {amplitudes.sum():.5g}, {np.mean(amplitudes < 0):.1%} negative"),
        ("farthest from the centre, A", f"{radius.max():.1f}"),
    ]


def _densities(path: Path) -> list[tuple[str, str]]:
    if path.suffix == ".mrcs":
        header = read_header(path)
        pixel_size = f"{header.pixel_size_a:.5g} A" if header.pixel_size_a > 0 else "not said"
        return [
            ("images", f"{header.images:,}"),
            ("box", f"{header.box} px"),
            ("pixel size", pixel_size),
            ("type", str(header.pixel_type)),
        ]
    volume, pixel_size_a = read_map(path)
    return [
        ("box", f"{len(volume)} voxels, {len(volume) * pixel_size_a:.1f} A"),
        ("voxel size", f"{pixel_size_a:.5g} A"),
        (
            "density",
            f"{volume.min():.4g} to {volume.max():.4g}, mean {volume.mean():.4g}, deviation {volume.std():.4g}",
        ),
    ]


def _words(value) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)
