"""Particle stacks on disk as other programs write them: .mrcs, RELION's .star, cryoDRGN's poses.pkl and ctf.pkl."""

import os
import pickle
from collections.abc import Iterable, Sequence

import mrcfile.constants
import mrcfile.dtypes
import mrcfile.utils
import numpy as np

from cryosplat.files import atomic_path

MRC_HEADER_BYTES = 1024
MRC_MODE_FLOAT32 = 2
MRC_FORMAT_VERSION = 20141
RELION_VERSION = "# version 30001"
PLACEHOLDER_MICROSCOPE = (300.0, 2.7, 0.1)
"""kV, mm and amplitude contrast of images without a CTF: RELION reads no optics table that lacks them."""

GIMBAL_LOCK = 1e-7
"""Below this sine of the tilt, rot and psi turn about the same axis and only their sum has a meaning."""


class PixelStatistics:
    """Minimum, maximum, mean and standard deviation of pixels seen in pieces."""

    def __init__(self):
        self.minimum, self.maximum = np.inf, -np.inf
        self._count, self._sum, self._sum_of_squares = 0, 0.0, 0.0

    def add(self, pixels: np.ndarray) -> None:
        self.minimum = min(self.minimum, float(pixels.min()))
        self.maximum = max(self.maximum, float(pixels.max()))
        self._count += pixels.size
        self._sum += float(pixels.sum(dtype=np.float64))
        self._sum_of_squares += float(np.square(pixels, dtype=np.float64).sum())

    @property
    def mean(self) -> float:
        return self._sum / self._count

    @property
    def standard_deviation(self) -> float:
        return max(0.0, self._sum_of_squares / self._count - self.mean**2) ** 0.5


def stack_header(count: int, box: int, pixel_size_a: float, statistics: PixelStatistics) -> bytes:
    """The 1,024 bytes before the pixels of an MRC2014 image stack, float32, ``count`` images of ``box`` px.

    Made by hand because mrcfile would hold the stack in memory, or map it, and a full disk under a memory
    map kills the process where a plain write says so.
    """
    header = np.zeros((), dtype=mrcfile.dtypes.HEADER_DTYPE).view(np.recarray)
    header.nx = header.ny = header.mx = header.my = box
    header.nz, header.mz = count, 1
    header.mode, header.ispg = MRC_MODE_FLOAT32, mrcfile.constants.IMAGE_STACK_SPACEGROUP
    header.cella = (box * pixel_size_a, box * pixel_size_a, pixel_size_a)
    header.cellb = (90, 90, 90)
    header.mapc, header.mapr, header.maps = 1, 2, 3
    header.dmin, header.dmax = statistics.minimum, statistics.maximum
    header.dmean, header.rms = statistics.mean, statistics.standard_deviation
    header.map, header.nversion = mrcfile.constants.MAP_ID, MRC_FORMAT_VERSION
    header.machst = mrcfile.utils.machine_stamp_from_byte_order(header.mode.dtype.byteorder)
    header.label[0], header.nlabl = b"cryosplat simulate", 1
    return header.tobytes()


def rotation_to_euler(rotations: np.ndarray) -> np.ndarray:
    """RELION's rot, tilt and psi in degrees, (N, 3), of rotations (N, 3, 3): the inverse of ``euler_to_rotation``.

    >>> from cryosplat.conventions import euler_to_rotation
    >>> rotation_to_euler(euler_to_rotation(np.array([30.0]), np.array([70.0]), np.array([-110.0]))).round(6)
    array([[  30.,   70., -110.]])
    """
    rotations = np.asarray(rotations, dtype=np.float64)
    sine = np.hypot(rotations[:, 2, 0], rotations[:, 2, 1])
    tilt = np.arctan2(sine, rotations[:, 2, 2])
    locked = sine < GIMBAL_LOCK
    rot = np.where(locked, 0.0, np.arctan2(rotations[:, 2, 1], rotations[:, 2, 0]))
    # With rot = 0 and tilt = 0 or 180 degrees the second column of R is (sin psi, cos psi, 0).
    psi = np.where(
        locked,
        np.arctan2(rotations[:, 0, 1], rotations[:, 1, 1]),
        np.arctan2(rotations[:, 1, 2], -rotations[:, 0, 2]),
    )
    return np.degrees(np.stack([rot, tilt, psi], axis=1))


def write_poses(path: str | os.PathLike, rotations: np.ndarray, shifts: np.ndarray) -> None:
    """cryoDRGN's poses.pkl: rotations (N, 3, 3), x_image = R x_volume, and shifts (N, 2) in fractions of the box."""
    _write_pickle(path, (rotations.astype(np.float32), shifts.astype(np.float32)))


def write_ctf(path: str | os.PathLike, parameters: np.ndarray, box: int, pixel_size_a: float) -> None:
    """cryoDRGN's ctf.pkl (N, 9) from parameters (N, 7) as ``ctf.ctf_image`` takes them."""
    columns = np.empty((len(parameters), 9), dtype=np.float32)
    columns[:, 0], columns[:, 1], columns[:, 2:] = box, pixel_size_a, _in_degrees(parameters)
    _write_pickle(path, columns)


def image_names(stack: str, slices: Iterable[int]) -> list[str]:
    """RELION's names of images of a stack, counted from 0 here and from 1 there.

    >>> image_names("s.mrcs", [0, 41])
    ['000001@s.mrcs', '000042@s.mrcs']
    """
    return [f"{image + 1:06d}@{stack}" for image in slices]


def write_star(
    path: str | os.PathLike,
    names: Sequence[str],
    rotations: np.ndarray,
    shifts: np.ndarray,
    parameters: np.ndarray | None,
    half: np.ndarray,
    box: int,
    pixel_size_a: float,
) -> None:
    """RELION 3.1 star file of a stack: an optics table, angles, origins in A, CTF and half sets.

    Args:
        path: the star file.
        names: of the N images, ``image_names`` of one stack; as seen from the star file's folder.
        rotations: (N, 3, 3).
        shifts: (N, 2), fractions of the box; RELION's origins are these times the box in A.
        parameters: (N, 7) as ``ctf.ctf_image`` takes them, or None for images without a CTF. Particles of
            another voltage, Cs or amplitude contrast get an optics group of their own.
        half: (N,) 0 or 1, written as rlnRandomSubset 1 or 2.
        box: px.
        pixel_size_a: A/px.
    """
    import pandas
    import starfile

    count = len(rotations)
    rot, tilt, psi = rotation_to_euler(rotations).T
    origin_x, origin_y = (shifts * (box * pixel_size_a)).T
    particles = pandas.DataFrame(
        {
            "rlnImageName": list(names),
            "rlnAngleRot": rot,
            "rlnAngleTilt": tilt,
            "rlnAnglePsi": psi,
            "rlnOriginXAngst": origin_x,
            "rlnOriginYAngst": origin_y,
        }
    )
    microscopes, group = np.array([PLACEHOLDER_MICROSCOPE]), np.zeros(count, dtype=int)
    if parameters is not None:
        columns = _in_degrees(parameters)
        microscopes, group = np.unique(columns[:, 3:6], axis=0, return_inverse=True)
        for name, column in (("U", 0), ("V", 1), ("Angle", 2)):
            particles["rlnDefocus" + name] = columns[:, column]
        particles["rlnPhaseShift"] = columns[:, 6]
    particles["rlnRandomSubset"] = half.astype(int) + 1
    particles["rlnOpticsGroup"] = group.reshape(-1) + 1
    groups = np.arange(1, len(microscopes) + 1)
    optics = pandas.DataFrame({"rlnOpticsGroup": groups, "rlnOpticsGroupName": [f"opticsGroup{n}" for n in groups]})
    for name, column in zip(("Voltage", "SphericalAberration", "AmplitudeContrast"), microscopes.T, strict=False):
        optics["rln" + name] = column
    optics["rlnImagePixelSize"], optics["rlnImageSize"], optics["rlnImageDimensionality"] = float(pixel_size_a), box, 2
    text = starfile.to_string({"optics": optics, "particles": particles})
    # RELION takes a table without its version for an old one and tries to convert it; and starfile's own first
    # line tells the time, so no two runs would be alike.
    text = "\n" + text[text.index("data_optics") :]
    with atomic_path(path) as temporary:
        temporary.write_text(text.replace("\ndata_", f"\n{RELION_VERSION}\n\ndata_"))


def _in_degrees(parameters: np.ndarray) -> np.ndarray:
    """CTF parameters (N, 7) with the astigmatism angle and the phase shift in degrees, as files have them."""
    columns = np.array(parameters, dtype=np.float64)
    columns[:, [2, 6]] = np.degrees(columns[:, [2, 6]])
    return columns


def _write_pickle(path: str | os.PathLike, value: object) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        pickle.dump(value, handle, protocol=4)
