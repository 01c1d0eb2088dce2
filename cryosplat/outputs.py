"""The products of a run: maps, the Gaussian mixture, FSC, figures and the summary, each written whole or not at all."""

import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from plyfile import PlyData, PlyElement, PlyParseError

from cryosplat import chimerax, figures
from cryosplat.directional import viewing_directions
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.fsc import FscCurve, write_csv, write_xml
from cryosplat.fscfigures import directional_figure, viewing_figure
from cryosplat.fscsuite import FscSuite
from cryosplat.pseudoatoms import write_mixture_atoms
from cryosplat.scores import Scores, write_scores
from cryosplat.symmetry import point_group
from cryosplat.volumes import write_map

RUN_CURVES = ("calibrated_map", "truth", "linear_half_maps", "half_maps")
"""Curves of a run that fsc.png shows; fsc.csv has all."""

SUMMARY_KEYS = (
    "resolution_a",
    "resolution_naive_a",
    "fsc_truth_mean",
    "particles",
    "gaussians",
    "box",
    "pixel_size_a",
    "world_size",
    "images_per_second",
    "waiting",
    "cpu_seconds",
    "wall_seconds",
    "peak_memory_gib",
)
"""Keys that every summary.json has, in this order; null where a run has no such thing."""

_FIELDS = {"means": 3, "scales": 3, "quaternions": 4, "amplitudes": None}
_PLY_PROPERTIES = {
    "means": ("x", "y", "z"),
    "amplitudes": ("amplitude",),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quaternions": ("rot_0", "rot_1", "rot_2", "rot_3"),
}


def write_run_outputs(
    run_dir: str | os.PathLike,
    *,
    maps: Mapping[str, np.ndarray],
    mixtures: Mapping[str, Mapping[str, np.ndarray]],
    curves: Mapping[str, FscCurve],
    summary: Mapping[str, Any],
    pixel_size_a: float,
    for_the_eye: np.ndarray | None = None,
    suite: FscSuite | None = None,
    rotations: np.ndarray | None = None,
    metrics: Mapping[str, np.ndarray] | None = None,
    volume_fit: Mapping[str, np.ndarray] | None = None,
    held_out: Sequence[Any] = (),
    symmetry: str = "C1",
    scores: Scores | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write all products of a run into its directory; summary.json last, so that it stands for the rest.

    Args:
        run_dir: exists.
        maps: (D, D, D) by name of their file without suffix; "map" is the delivered one.
        mixtures: exported mixtures by model: means (G, 3) and scales (G, 3) in A, quaternions (G, 4) wxyz,
            amplitudes (G,).
        symmetry: point group of the mixtures; their first G / K Gaussians are the asymmetric unit.
        curves: FSC curves by name; with none, there is no fsc.csv and no fsc.png.
        summary: what summary.json is to say: ``SUMMARY_KEYS`` and anything else that JSON can hold.
        pixel_size_a: A/px of the maps.
        for_the_eye: (D, D, D) what the figures show; none: the delivered map as it is.
        suite: all curves of the linear half maps; none, no fsc.xml and no directional.png.
        rotations: (N, 3, 3) of all particles, for viewing_directions.png.
        metrics: columns of metrics.csv, for loss.png; none or no rows, no figure.
        volume_fit: columns of volume_fit.csv, for volume_fit.png; none, no figure.
        held_out: panels of ``figures.panels_figure`` on held-out images, for holdout.png; none, no figure.
        scores: of all particles, for particles.csv; none, no such file.
        overwrite: replace the products that are there. Only a run that goes on in its own directory may.

    Returns:
        The files written.

    Raises:
        InputError: a product exists and ``overwrite`` is false (nothing is written then), or the disk is full.
    """
    run_dir, shown = Path(run_dir), maps["map"] if for_the_eye is None else for_the_eye
    grid = {"box": len(shown), "pixel_size_a": float(pixel_size_a), "symmetry": symmetry}
    writers = {
        f"{name}.mrc": lambda path, volume=volume: write_map(path, volume, pixel_size_a, overwrite)
        for name, volume in maps.items()
    }
    writers["gaussians.npz"] = lambda path: write_mixture_npz(path, mixtures, **grid, overwrite=overwrite)
    writers["gaussians.ply"] = lambda path: write_mixture_ply(path, mixtures["full"], **grid, overwrite=overwrite)
    writers["gaussians.cif"] = lambda path: write_mixture_atoms(
        path, mixtures["full"], len(shown), float(pixel_size_a), overwrite=overwrite
    )
    writers[chimerax.NAME] = lambda path: chimerax.write_view(
        path, maps, pixel_size_a, mixtures["full"], "gaussians.cif", overwrite
    )
    if curves:
        writers["fsc.csv"] = lambda path: write_csv(path, curves, overwrite, errors=True)
    if suite is not None:
        writers["fsc.xml"] = lambda path: write_xml(path, suite.curves[suite.final], "linear half maps", overwrite)
    if scores is not None:
        writers["particles.csv"] = lambda path: write_scores(path, scores, overwrite)
    drawn = _drawings(shown, pixel_size_a, curves, suite, rotations, metrics, volume_fit)
    if held_out:
        drawn["holdout.png"] = lambda: figures.panels_figure(held_out)
    writers |= {
        name: lambda path, draw=draw: figures.save(draw(), path, overwrite=overwrite) for name, draw in drawn.items()
    }
    writers["summary.json"] = lambda path: write_summary(path, summary, overwrite)
    for name in () if overwrite else writers:
        if (run_dir / name).exists():
            raise InputError(f"{run_dir / name} exists already; choose another run_dir or remove it first")
    for name, write in writers.items():
        write(run_dir / name)
    return [run_dir / name for name in writers]


def _drawings(
    shown: np.ndarray,
    pixel_size_a: float,
    curves: Mapping[str, FscCurve],
    suite: FscSuite | None,
    rotations: np.ndarray | None,
    metrics: Mapping[str, np.ndarray] | None,
    volume_fit: Mapping[str, np.ndarray] | None,
) -> dict[str, Callable[[], Any]]:
    """What draws each figure of a run, by its file; arguments as of ``write_run_outputs``."""
    drawn = {
        "sections.png": lambda: figures.sections_figure(shown, pixel_size_a),
        "projections.png": lambda: figures.projections_figure(shown, pixel_size_a),
    }
    if curves:
        chosen = {name: curves[name] for name in RUN_CURVES if name in curves} or curves
        drawn["fsc.png"] = lambda: figures.fsc_figure(chosen)
    if suite is not None:
        drawn["fsc_half_maps.png"] = lambda: figures.fsc_figure(suite.curves)
        if suite.directional is not None:
            drawn["directional.png"] = lambda: directional_figure(suite.directional)
    if rotations is not None:
        drawn["viewing_directions.png"] = lambda: viewing_figure(viewing_directions(rotations))
    if metrics is not None and len(metrics["step"]):
        drawn["loss.png"] = lambda: figures.loss_figure(metrics)
    if volume_fit is not None:
        drawn["volume_fit.png"] = lambda: figures.volume_fit_figure(volume_fit)
    return drawn


def write_summary(path: str | os.PathLike, summary: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write summary.json: ``SUMMARY_KEYS`` in their order, then the others in theirs; NaN and infinity become null."""
    whole = {key: summary.get(key) for key in SUMMARY_KEYS} | dict(summary)
    text = json.dumps(_plain(whole), indent=2, allow_nan=False, ensure_ascii=False)
    _write(path, (text + "\n").encode(), overwrite)


def _plain(value: Any) -> Any:
    """A value in JSON's own types. What has no place in JSON raises TypeError: that is ours to mend."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"summary.json cannot hold a {type(value).__name__}")


def write_mixture_npz(
    path: str | os.PathLike,
    mixtures: Mapping[str, Mapping[str, np.ndarray]],
    box: int,
    pixel_size_a: float,
    symmetry: str = "C1",
    overwrite: bool = False,
) -> None:
    """Write mixtures as NumPy arrays, float32: means, scales, quaternions, amplitudes for "full", the same names with
    the model before them (half_a_means) for others, and box and pixel_size_a of the grid they were made for. With a
    symmetry also its name, its operators (K, 3, 3) and by model the G / K of the asymmetric unit, which come first.

    Args:
        path: ends in .npz.
        mixtures: as in ``write_run_outputs``.
    """
    arrays = {"box": np.int64(box), "pixel_size_a": np.float64(pixel_size_a)}
    for model, mixture in mixtures.items():
        for field in _FIELDS:
            arrays[_npz_key(model, field)] = np.asarray(mixture[field], dtype=np.float32)
    if len(operators := point_group(symmetry)) > 1:
        arrays |= {"symmetry": np.array(symmetry), "operators": operators}
        units = {model: np.int64(len(mixture["means"]) // len(operators)) for model, mixture in mixtures.items()}
        arrays |= {_npz_key(model, "asymmetric_unit"): unit for model, unit in units.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _write(path, buffer.getvalue(), overwrite)


def _npz_key(model: str, field: str) -> str:
    return field if model == "full" else f"{model}_{field}"


def write_mixture_ply(
    path: str | os.PathLike,
    mixture: Mapping[str, np.ndarray],
    box: int,
    pixel_size_a: float,
    symmetry: str = "C1",
    overwrite: bool = False,
) -> None:
    """Write one mixture as a binary PLY point cloud, float32: x, y, z, amplitude, scale_0..2, rot_0..3.

    Units and origin stand in its comments, and box and A/px, which ``read_mixture`` takes from there. With a symmetry
    its name, too, and how many of the first Gaussians are the asymmetric unit.
    """
    columns = [np.asarray(mixture[field]).reshape(len(mixture["means"]), -1) for field in _PLY_PROPERTIES]
    names = [name for properties in _PLY_PROPERTIES.values() for name in properties]
    vertices = np.concatenate(columns, 1).astype("<f4").view([(name, "<f4") for name in names])[:, 0]
    comments = [
        "Gaussian mixture by cryosplat: map(r) = pixel_size_a sum of amplitude * N(r; (x, y, z), R diag(scale^2) R^T)",
        "x, y, z: Angstrom from the origin, which is voxel box // 2 on every axis; voxel = x / pixel_size_a + box // 2",
        "scale_0, scale_1, scale_2: standard deviations in Angstrom along the columns of R; R: unit quaternion rot_0 "
        "(w), rot_1, rot_2, rot_3 (x, y, z)",
        "amplitude: image units times A^2, of either sign; amplitude / pixel_size_a^2 is its sum over the voxels",
        f"box {box}",
        f"pixel_size_a {pixel_size_a!r}",
    ]
    if (copies := len(point_group(symmetry))) > 1:
        comments += [f"symmetry {symmetry}", f"asymmetric_unit {len(vertices) // copies}"]
    buffer = io.BytesIO()
    PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<", comments=comments).write(buffer)
    _write(path, buffer.getvalue(), overwrite)


def read_mixture(path: str | os.PathLike, model: str = "full") -> dict[str, Any]:
    """Read a mixture that a run wrote, gaussians.npz or gaussians.ply.

    Args:
        path: .npz or .ply.
        model: "full", "half_a" or "half_b"; a .ply holds "full" alone.

    Returns:
        means (G, 3) and scales (G, 3) in A, quaternions (G, 4) wxyz, amplitudes (G,), all float32; box (int) and
        pixel_size_a (float) of the grid it was made for, None where a file of another program says nothing of them.

    Raises:
        InputError: not such a file, no such model, a field missing or of the wrong shape, a non-finite number, a
            scale that is not positive, or a quaternion of length 0.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".npz":
        mixture = _read_npz(path, model)
    elif path.suffix == ".ply":
        if model != "full":
            raise InputError(f"{path}: a .ply holds the full model only; read {model} from gaussians.npz")
        mixture = _read_ply(path)
    else:
        raise InputError(f"{path}: expected a mixture in a .npz or .ply file, found {path.suffix or 'no suffix'}")
    _check_mixture(path, mixture)
    return mixture


def _read_npz(path: Path, model: str) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path):  # np.load also takes a .npy or a pickle of this name
            pass
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz file of arrays ({error})") from error
    missing = [_npz_key(model, field) for field in _FIELDS if _npz_key(model, field) not in arrays]
    if missing:
        raise InputError(f"{path}: no array {', '.join(missing)}; found {', '.join(sorted(arrays))}")
    mixture = {field: arrays[_npz_key(model, field)] for field in _FIELDS}
    for key, convert in (("box", int), ("pixel_size_a", float)):
        mixture[key] = convert(arrays[key]) if key in arrays and arrays[key].size == 1 else None
    return mixture


def _read_ply(path: Path) -> dict[str, Any]:
    try:
        ply = PlyData.read(path)
        vertices = ply["vertex"].data
    except (OSError, ValueError, KeyError, PlyParseError) as error:
        raise InputError(f"{path}: not a readable .ply file with vertices ({error})") from error
    names = vertices.dtype.names
    missing = [name for properties in _PLY_PROPERTIES.values() for name in properties if name not in names]
    if missing:
        raise InputError(f"{path}: no vertex property {', '.join(missing)}; found {', '.join(names)}")
    mixture = {}
    for field, properties in _PLY_PROPERTIES.items():
        columns = np.stack([vertices[name] for name in properties], -1)
        mixture[field] = columns if _FIELDS[field] else columns[:, 0]
    said = dict(comment.split(None, 1) for comment in ply.comments if len(comment.split()) == 2)
    try:
        mixture["box"] = int(said["box"]) if "box" in said else None
        mixture["pixel_size_a"] = float(said["pixel_size_a"]) if "pixel_size_a" in said else None
    except ValueError as error:
        raise InputError(f"{path}: the comment on box or pixel_size_a is not a number ({error})") from error
    return mixture


def _check_mixture(path: Path, mixture: dict[str, Any]) -> None:
    """Refuse what is no mixture, naming the first Gaussian at fault; make the arrays float32."""
    count = len(np.atleast_1d(mixture["amplitudes"]))
    for field, width in _FIELDS.items():
        array = mixture[field]
        expected = (count, width) if width else (count,)
        if array.shape != expected or count == 0 or array.dtype.kind not in "fiu":
            raise InputError(
                f"{path}: {field}: expected numbers of shape {expected if count else '(at least 1, ...)'}, "
                f"found {array.dtype} {array.shape}"
            )
        mixture[field] = array.astype(np.float32)
        _refuse(path, ~np.isfinite(mixture[field]), field, "is not finite")
    _refuse(path, mixture["scales"] <= 0, "scales", "is not positive")
    _refuse(path, np.linalg.norm(mixture["quaternions"], axis=-1) == 0, "quaternions", "has length 0")
    pixel_size, box = mixture["pixel_size_a"], mixture["box"]
    if (pixel_size is not None and not 0 < pixel_size < math.inf) or (box is not None and box < 1):
        raise InputError(f"{path}: box {box} and pixel_size_a {pixel_size}: expected positive numbers")


def _refuse(path: Path, wrong: np.ndarray, field: str, what: str) -> None:
    if wrong.any():
        raise InputError(f"{path}: {field} of Gaussian {int(np.argwhere(wrong)[0][0])} (counted from 0) {what}")


def _write(path: str | os.PathLike, content: bytes, overwrite: bool) -> None:
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(content)
