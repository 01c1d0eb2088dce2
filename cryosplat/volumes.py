"""Maps on disk: MRC volumes in and out, with their A/px."""

import os

import mrcfile
import numpy as np

from cryosplat.errors import InputError
from cryosplat.files import atomic_path


def read_map(path: str | os.PathLike) -> tuple[np.ndarray, float]:
    """Read a cubic MRC map.

    Returns:
        The map, float32 (D, D, D) in [z, y, x] order, and its A/px.

    Raises:
        InputError: not an MRC file, not cubic, non-finite voxels, or no A/px.
    """
    try:
        with mrcfile.open(path, permissive=False) as handle:
            data = np.array(handle.data, dtype=np.float32)
            pixel_size = float(handle.voxel_size.x)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such map") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable MRC map ({error})") from error
    if data.ndim != 3 or len(set(data.shape)) != 1:
        raise InputError(f"{path}: expected a cubic map, found shape {data.shape}")
    if not np.isfinite(data).all():
        raise InputError(f"{path}: the map has {int((~np.isfinite(data)).sum())} non-finite voxels")
    if not pixel_size > 0:
        raise InputError(f"{path}: the header has no A/px (cella is 0); set it, for example with mrcfile")
    return data, pixel_size


def write_map(
    path: str | os.PathLike,
    volume: np.ndarray,
    pixel_size_a: float,
    overwrite: bool = False,
    label: str = "cryosplat",
) -> None:
    """Write a map, float32 (D, D, D) in [z, y, x] order, with its A/px and a label of up to 80 characters, atomically.

    The MRC origin fields stay zero: the molecule's origin is voxel D//2, as
    RELION and cryoDRGN have it, so maps superpose without any alignment.
    """
    with atomic_path(path, overwrite=overwrite) as temporary:
        with mrcfile.new(temporary) as handle:
            handle.set_data(np.ascontiguousarray(volume, dtype=np.float32))
            handle.voxel_size = pixel_size_a
            handle.update_header_stats()
            handle.add_label(label)
