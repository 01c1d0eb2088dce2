"""Particle files of RELION and cryoSPARC with poses and CTF, of the six images that stacks.py writes."""

import numpy as np
from scipy.spatial.transform import Rotation
from stacks import write_star

from cryosplat.stackfiles import rotation_to_euler

COUNT, BOX, PIXEL_SIZE_A = 6, 8, 2.0
NAMES = [f"{image + 1}@particles.mrcs" for image in range(COUNT)]
ROTATIONS = Rotation.random(COUNT, random_state=3).as_matrix()
SHIFTS = np.random.default_rng(4).uniform(-0.1, 0.1, (COUNT, 2))
DEFOCUS_U = 15000.0 + 10 * np.arange(COUNT)


def angles():
    return dict(zip(("AngleRot", "AngleTilt", "AnglePsi"), rotation_to_euler(ROTATIONS).T, strict=True))


def ctf():
    return {"DefocusU": DEFOCUS_U, "DefocusV": DEFOCUS_U - 500, "DefocusAngle": np.full(COUNT, 30.0)}


def microscope(count=COUNT):
    columns = {"Voltage": 300.0, "SphericalAberration": 2.7, "AmplitudeContrast": 0.1}
    return {name: np.full(count, value) for name, value in columns.items()}


def origins_a():
    return dict(zip(("OriginXAngst", "OriginYAngst"), (SHIFTS * BOX * PIXEL_SIZE_A).T, strict=True))


def origins_px():
    return dict(zip(("OriginX", "OriginY"), (SHIFTS * BOX).T, strict=True))


def relion30(**changes):
    """Columns of a star file before 3.1; None leaves one out."""
    detector = {"DetectorPixelSize": [PIXEL_SIZE_A] * COUNT, "Magnification": [10000] * COUNT}
    columns = {**angles(), **origins_px(), **ctf(), **microscope(), **detector} | changes
    return {name: values for name, values in columns.items() if values is not None}


def write_star31(path, groups=(1,) * COUNT, optics=None, **changes):
    """A star file of RELION 3.1 or 5; ``optics`` are columns of data_optics."""
    columns = {**angles(), **origins_a(), **ctf(), "OpticsGroup": groups} | changes
    write_star(path, NAMES, **{name: values for name, values in columns.items() if values is not None})
    if optics is None:
        optics = {"OpticsGroup": [1], "ImagePixelSize": [PIXEL_SIZE_A], "ImageSize": [BOX], **microscope(1)}
    lines = ["# version 50001", "", "data_optics", "", "loop_", *(f"_rln{name}" for name in optics)]
    lines += [" ".join(map(str, row)) for row in zip(*optics.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n\n# version 50001\n\n" + path.read_text())


def cs(**changes):
    """Columns of a cryoSPARC file, "/" written as "__"; None leaves one out."""
    columns = {
        "uid": np.arange(100, 100 + COUNT, dtype=np.uint64),
        "blob__path": np.full(COUNT, b">particles.mrcs"),
        "blob__idx": np.arange(COUNT, dtype=np.uint32),
        "blob__shape": np.full((COUNT, 2), BOX, dtype=np.uint32),
        "blob__psize_A": np.full(COUNT, PIXEL_SIZE_A, dtype=np.float32),
        "blob__sign": np.full(COUNT, -1.0, dtype=np.float32),
        "alignments3D__split": np.array([1, 0, 1, 1, 0, 0], dtype=np.uint32),
        "alignments3D__pose": Rotation.from_matrix(ROTATIONS.transpose(0, 2, 1)).as_rotvec(),
        "alignments3D__shift": SHIFTS * BOX,
        "alignments3D__psize_A": np.full(COUNT, PIXEL_SIZE_A, dtype=np.float32),
        "ctf__df1_A": DEFOCUS_U,
        "ctf__df2_A": DEFOCUS_U - 500,
        "ctf__df_angle_rad": np.full(COUNT, np.pi / 6),
        "ctf__accel_kv": np.full(COUNT, 300.0),
        "ctf__cs_mm": np.full(COUNT, 2.7),
        "ctf__amp_contrast": np.full(COUNT, 0.1),
        "ctf__phase_shift_rad": np.zeros(COUNT),
    } | changes
    return {name.replace("__", "/"): values for name, values in columns.items() if values is not None}


def save_cs(path, columns):
    rows = np.zeros(len(columns["uid"]), [(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        rows[name] = values
    with open(path, "wb") as handle:
        np.save(handle, rows)


def with_value(values, value, row=4):
    values = list(values)
    values[row] = value
    return values
