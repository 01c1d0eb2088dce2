"""Small particle data sets written for the tests."""

import pickle
from pathlib import Path

import mrcfile
import numpy as np
from scipy.spatial.transform import Rotation

from cryosplat.particles import ParticleTable, read_particles
from cryosplat.settings import DataConfig

CTF_ROW = (8.0, 2.0, 12000.0, 11000.0, 30.0, 300.0, 2.7, 0.1, 90.0)


def write_stack(path: Path, images: np.ndarray, pixel_size_a: float = 2.0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, overwrite=True) as handle:
        handle.set_data(images)
        handle.set_image_stack()
        handle.voxel_size = pixel_size_a
    return images


def write_pickle(path: Path, value: object) -> Path:
    path.write_bytes(pickle.dumps(value))
    return path


def make_images(count: int = 6, box: int = 8, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-100, 100, size=(count, box, box)).astype(dtype)


def make_poses(count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    rotations = Rotation.random(count, random_state=2).as_matrix().reshape(count, 3, 3)
    return rotations.astype(np.float32), random.uniform(-0.1, 0.1, size=(count, 2))


def make_ctf(count: int = 6) -> np.ndarray:
    ctf = np.tile(np.array(CTF_ROW), (count, 1))
    ctf[:, 2] += np.arange(count)
    return ctf


def write_dataset(folder: Path, count: int = 6, box: int = 8) -> dict[str, str]:
    """A good data set in ``folder``: particles.mrcs, poses.pkl, ctf.pkl; the keys of a DataConfig."""
    write_stack(folder / "particles.mrcs", make_images(count, box))
    write_pickle(folder / "poses.pkl", make_poses(count))
    write_pickle(folder / "ctf.pkl", make_ctf(count))
    return {"particles": "particles.mrcs", "poses": "poses.pkl", "ctf": "ctf.pkl"}


def write_star(path: Path, names: list[str], **columns: list) -> None:
    """A star file of particles with the given image names; further columns without their ``_rln``."""
    columns = {"ImageName": names, **columns}
    lines = ["data_particles", "", "loop_", *(f"_rln{name} #{place}" for place, name in enumerate(columns, start=1))]
    lines += [" ".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")


def load(folder: Path, seed: int = 0, half_maps: bool = True, **keys) -> ParticleTable:
    return read_particles(DataConfig(**keys), folder, seed, half_maps)
