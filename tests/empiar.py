"""Stand-ins for what the walk-throughs of docs/ fetch: cryoDRGN's repository and entries of EMPIAR, with the same
files, folders and columns, and a few small images."""

import shutil
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import starfile

from cryosplat.unpickle import read_pickle

STACKS = {
    "10028": ("Particles/MRC_0601/001_particles.mrcs", "Particles/MRC_0602/001_particles.mrcs"),
    "10049": ("ragSEC_150309.mrcs", "ragSEC_150311.mrcs"),
    "10076": ("L17Combine_weight_local.mrcs",),
    "10180": ("Particles/set1.mrcs", "Particles/set2.mrcs"),
}
"""Image stacks by the names that the lists of images have for them."""

LISTS = {"10028": "shiny_2sets.star", "10049": "allimg.star", "10076": "Parameters.star"}
"""Lists of images in cryoDRGN's repository; that of 10180 is in EMPIAR."""

REFINEMENTS = {
    "10028": "cryosparc_P11_J4_003_particles.cs",
    "10049": "cryosparc_P53_J26_006_particles.cs",
    "10076": "cryosparc_P4_J33_004_particles.cs",
}


def clone_repository(stack: Path, folder: Path, write_cs) -> None:
    """What 'git clone https://github.com/zhonge/cryodrgn_empiar' leaves."""
    for number in STACKS:
        inputs = folder / f"empiar{number}/inputs"
        inputs.mkdir(parents=True)
        for name in ("poses.pkl", "ctf.pkl"):
            shutil.copy(stack / name, inputs)
        if number in LISTS:
            write_list(inputs / LISTS[number], number, stack)
        if number in REFINEMENTS:
            write_cs(inputs / REFINEMENTS[number], stack)


def fetch_entry(number: str, stack: Path, folder: Path) -> None:
    """What the wget of an entry's data leaves in ``folder``/NUMBER/data."""
    images = mrcfile.read(stack / "particles.mrcs")
    parts = np.array_split(images, len(STACKS[number]))
    for name, part in zip(STACKS[number], parts, strict=True):
        if number == "10076":  # dark particles, and an ending that has to be mended
            name, part = name.removesuffix("s"), -part
        path = folder / number / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mrcfile.write(path, np.ascontiguousarray(part), voxel_size=8.0)
    if number == "10180":
        example = folder / number / "data/Example"
        example.mkdir()
        write_list(example / "consensus_data.star", number, stack)


def write_list(path: Path, number: str, stack: Path) -> None:
    """A RELION 3.0 list of the stack's images under the names that they have in the entry."""
    _, ctf = read_pickle(stack / "poses.pkl"), read_pickle(stack / "ctf.pkl")
    parts = np.array_split(np.arange(len(ctf)), len(STACKS[number]))
    names = [
        f"{row + 1:06d}@{name}" for name, part in zip(STACKS[number], parts, strict=True) for row in range(len(part))
    ]
    columns = {
        "rlnImageName": names,
        "rlnMicrographName": [f"{row // 4}" for row in range(len(ctf))],
        "rlnDefocusU": ctf[:, 2],
        "rlnDefocusV": ctf[:, 3],
        "rlnDefocusAngle": ctf[:, 4],
        "rlnVoltage": ctf[:, 5],
        "rlnSphericalAberration": ctf[:, 6],
        "rlnAmplitudeContrast": ctf[:, 7],
        "rlnMagnification": np.full(len(ctf), 10000.0),
        "rlnDetectorPixelSize": ctf[:, 1],
    }
    starfile.write(pd.DataFrame(columns), path)
