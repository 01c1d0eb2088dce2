"""Particle stacks with known truth: a map seen by Fourier slices, CTF, shifts and noise."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cryosplat import stackfiles
from cryosplat.alignments import check_ctf, check_poses
from cryosplat.atoms import Atoms, density, read_model, soft_mask
from cryosplat.conventions import euler_to_rotation
from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.phantom import protein_phantom
from cryosplat.slices import FourierSlicer, project
from cryosplat.unpickle import read_pickle
from cryosplat.volumes import read_map, write_map

DEFAULT_IMAGES = 5000
DEFAULT_SHIFT_PX = 2.0
DEFAULT_PIXEL_SIZE_A = 2.0
FILLED_FRACTION = 0.7
"""Of half the box that the molecule fills when the box is not given."""

PREFERRED_CONCENTRATION = 20.0
"""kappa of the von Mises-Fisher cap of preferred views: 13 degrees r.m.s. along each axis."""

PREFERRED_UNIFORM_FRACTION = 0.1
"""Of the particles with preferred orientations, those that have any orientation."""

PIXELS_AT_ONCE = 4_000_000
"""Pixels of images worked on together; some 100 MB."""


@dataclass
class SimulateOptions:
    """What to simulate. The source is ``model``, else ``map``, else the phantom."""

    out: str
    model: str | None = None  # PDB or mmCIF
    map: str | None = None  # MRC, with A/px in its header
    phantom_seed: int = 0
    images: int | None = None  # none: as many as poses, else 5,000
    box: int | None = None  # px; none: the map's, or 1.4 times the molecule
    pixel_size: float | None = None  # A/px; none: the map's, or 2
    b_factor: float | None = None  # A^2, for every atom; none: the model's own
    solvent: float = 0.65  # fraction of the molecule's mean density removed as bulk solvent
    snr: float = 0.1  # mean whole-box signal variance over noise variance; inf: no noise
    noise_spectrum: str | None = None  # pickled radial power, first shell 0, last Nyquist; none: white
    orientations: str = "uniform"  # uniform or preferred
    poses: str | None = None  # poses.pkl: particle i has pose i
    shift: float | None = None  # px, standard deviation; none: those of poses, else 2
    ctf: str | None = None  # ctf.pkl; none: drawn from the ranges below
    keep_order: bool = False  # particle i has CTF row i, as it has pose i
    no_ctf: bool = False
    defocus_min: float = 8000.0  # A
    defocus_max: float = 25000.0  # A
    astigmatism: float = 500.0  # A, largest difference of the two defoci
    voltage: float = 300.0  # kV
    cs: float = 2.7  # mm
    amplitude_contrast: float = 0.1
    phase_shift: float = 0.0  # degrees
    seed: int = 0


def simulate(options: SimulateOptions) -> dict:
    """Write a simulated particle stack and its truth into a new folder.

    Image i is ``truth_scale * CTF_i * projection_i + noise`` with noise of unit variance, where the
    projection is the plain sum of the map's voxels along the view. The folder appears at the end, complete,
    or not at all: particles.mrcs, particles.star, poses.pkl, ctf.pkl (unless there is no CTF), truth.mrc,
    mask.mrc and simulation.json. The same options give the same images, bit by bit.

    Returns:
        What simulation.json holds: options, image count, box, A/px, truth_scale, signal variance.

    Raises:
        InputError: an impossible option or file, a molecule larger than the box, or an output folder in use.
    """
    _check_options(options)
    with _new_folder(Path(os.path.abspath(options.out))) as folder:
        volume, pixel_size_a = _source(options)
        box = len(volume)
        _require(box % 2 == 0, f"a box of {box} px is odd; use an even one")
        rotations, shifts = _poses(options, box)
        parameters = _ctf_parameters(options, len(rotations), box)
        power = None if options.noise_spectrum is None else _noise_power(options.noise_spectrum, box)
        half = np.arange(len(rotations)) % 2
        mask = soft_mask(volume, pixel_size_a)
        scale, variance = _write_images(
            folder / "particles.mrcs", options, volume, pixel_size_a, rotations, shifts, parameters, power
        )
        names = stackfiles.image_names("particles.mrcs", range(len(rotations)))
        stackfiles.write_star(folder / "particles.star", names, rotations, shifts, parameters, half, box, pixel_size_a)
        stackfiles.write_poses(folder / "poses.pkl", rotations, shifts)
        if parameters is not None:
            stackfiles.write_ctf(folder / "ctf.pkl", parameters, box, pixel_size_a)
        write_map(folder / "truth.mrc", volume, pixel_size_a)
        write_map(folder / "mask.mrc", mask, pixel_size_a)
        summary = {
            "options": dataclasses.asdict(options) | ({"snr": "inf"} if math.isinf(options.snr) else {}),
            "images": len(rotations),
            "box": box,
            "pixel_size_a": pixel_size_a,
            "truth_scale": scale,
            "signal_variance": variance,
            "noise_variance": 0.0 if math.isinf(options.snr) else 1.0,
        }
        with atomic_path(folder / "simulation.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _check_options(options: SimulateOptions) -> None:
    """Everything about the options that no file has to be read for."""
    _require(options.model is None or options.map is None, "both a model and a map are given; choose one source")
    _require(options.images is None or options.images >= 1, f"{options.images} images asked for; at least 1 is needed")
    _require(options.snr > 0, f"an SNR of {options.snr}; it must be positive, or inf for no noise")
    _require(options.seed >= 0 and options.phantom_seed >= 0, "a seed is negative; use 0 or more")
    _require(options.shift is None or 0 <= options.shift < np.inf, f"a shift of {options.shift} px; use 0 or more")
    _require(0 <= options.solvent <= 1, f"a solvent fraction of {options.solvent}; it lies between 0 and 1")
    _require(options.b_factor is None or options.b_factor >= 0, f"a B factor of {options.b_factor}; use 0 or more")
    orientations = ("uniform", "preferred")
    _require(
        options.orientations in orientations, f"orientations {options.orientations!r}; choose uniform or preferred"
    )
    _require(options.pixel_size is None or 0 < options.pixel_size < np.inf, f"{options.pixel_size} A/px is impossible")
    if options.box is not None:
        _require(options.map is None, "a map has its own box; leave --box out, or resample the map first")
        even = options.box >= 16 and options.box % 2 == 0
        _require(even, f"a box of {options.box} px; use an even one of 16 or more")
    _require(not (options.no_ctf and options.ctf), "both a CTF file and no CTF are asked for; choose one")
    paired = options.poses is not None and options.ctf is not None
    _require(paired or not options.keep_order, "keeping the order of CTF rows needs both --poses and --ctf")
    ordered = 0 < options.defocus_min <= options.defocus_max < np.inf
    limits = f"defocus from {options.defocus_min} to {options.defocus_max} A"
    _require(ordered, f"{limits}; the minimum must be positive and not above the maximum")


@contextlib.contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside ``final`` that takes its name if all goes well and is removed if not."""
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise InputError(f"{final} exists and is not an empty folder; choose another name or remove it first")
    temporary = final.with_name(f".{final.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, final)
    except OSError as error:
        raise InputError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _source(options: SimulateOptions) -> tuple[np.ndarray, float]:
    """The true map (D, D, D) and its A/px."""
    if options.map is not None:
        volume, pixel_size_a = read_map(options.map)
        # Headers hold the cell in float32; five decimals are what a pixel size is known to.
        return volume, options.pixel_size or round(pixel_size_a, 5)
    pixel_size_a = options.pixel_size or DEFAULT_PIXEL_SIZE_A
    if options.model is None:
        atoms = protein_phantom(options.phantom_seed)
    else:
        atoms = read_model(options.model, options.b_factor)
    box = options.box or _fitting_box(atoms, pixel_size_a)
    return density(atoms, box, pixel_size_a, options.b_factor, options.solvent), pixel_size_a


def _fitting_box(atoms: Atoms, pixel_size_a: float) -> int:
    """Smallest multiple of 8 px that leaves room round the molecule."""
    return 8 * max(2, math.ceil(2 * atoms.radius_a / FILLED_FRACTION / pixel_size_a / 8))


def _random(options: SimulateOptions, purpose: str) -> np.random.Generator:
    """A stream of its own for every purpose, so that another SNR leaves poses and CTF as they were."""
    return np.random.default_rng([options.seed, *purpose.encode()])


def _poses(options: SimulateOptions, box: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotations (N, 3, 3) and shifts (N, 2) in fractions of the box."""
    count, shifts = options.images or DEFAULT_IMAGES, None
    if options.poses is not None:
        rotations, shifts = _read_poses(Path(options.poses), options.images)
        count = len(rotations)
    else:
        rotations = _random_rotations(options.orientations, count, _random(options, "orientations"))
    if shifts is None or options.shift is not None:
        sigma_px = DEFAULT_SHIFT_PX if options.shift is None else options.shift
        _require(sigma_px <= box / 10, f"shifts of {sigma_px} px r.m.s. are too large for a box of {box} px")
        shifts = _random(options, "shifts").normal(0, sigma_px, (count, 2)) / box
    return rotations, shifts


def _random_rotations(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform on SO(3), or 90 % within a cap round the view along z (von Mises-Fisher) and the rest uniform."""
    cosine = rng.uniform(-1, 1, count)
    if kind == "preferred":
        uniform = rng.uniform(0, 1, count) < PREFERRED_UNIFORM_FRACTION
        quantile = rng.uniform(0, 1, count)
        kappa = PREFERRED_CONCENTRATION
        cap = 1 + np.log(quantile + (1 - quantile) * np.exp(-2 * kappa)) / kappa
        cosine = np.where(uniform, cosine, np.clip(cap, -1, 1))
    rot, psi = rng.uniform(-180, 180, (2, count))
    return euler_to_rotation(rot, np.degrees(np.arccos(cosine)), psi)


def _read_poses(path: Path, count: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The first ``count`` (none: all) rotations and shifts of cryoDRGN's poses.pkl; it may lack shifts."""
    poses = read_pickle(path)
    parts = list(poses) if isinstance(poses, tuple | list) else [poses]
    shapes = [getattr(part, "shape", ()) for part in parts]
    rows = shapes[0][0] if shapes and shapes[0] else 0
    if rows == 0 or shapes not in ([(rows, 3, 3)], [(rows, 3, 3), (rows, 2)]):
        raise InputError(f"{path}: expected rotations (N, 3, 3) and shifts (N, 2), found arrays of shapes {shapes}")
    count = count or rows
    _require(count <= rows, f"{path}: {rows} poses for {count} images; ask for {rows} images at most")
    rotations = parts[0][:count].astype(np.float64)
    shifts = parts[1][:count].astype(np.float64) if len(parts) == 2 else None
    check_poses(path, rotations, np.zeros((count, 2)) if shifts is None else shifts, np.arange(count))
    return rotations, shifts


def _ctf_parameters(options: SimulateOptions, count: int, box: int) -> np.ndarray | None:
    """CTF parameters (N, 7) as ``ctf_image`` takes them, or None."""
    if options.no_ctf:
        return None
    rng = _random(options, "ctf")
    if options.ctf is None:
        mean = rng.uniform(options.defocus_min, options.defocus_max, count)
        difference = rng.uniform(0, options.astigmatism, count)
        angle = rng.uniform(0, np.pi, count)
        fixed = np.array([options.voltage, options.cs, options.amplitude_contrast, np.radians(options.phase_shift)])
        drawn = np.stack([mean + difference / 2, mean - difference / 2, angle], axis=1)
        return np.hstack([drawn, np.tile(fixed, (count, 1))])
    path = Path(options.ctf)
    columns = read_pickle(path)
    if not isinstance(columns, np.ndarray) or columns.ndim != 2 or columns.shape[1] != 9 or len(columns) == 0:
        raise InputError(f"{path}: expected CTF parameters of shape (N, 9), found {getattr(columns, 'shape', columns)}")
    if options.keep_order:
        _require(len(columns) >= count, f"{path}: {len(columns)} CTF rows for {count} images whose order is to be kept")
        rows = np.arange(count)
    else:
        rows = rng.choice(len(columns), count, replace=len(columns) < count)
    return check_ctf(path, columns[rows].astype(np.float64), rows, box)[0]


def _noise_power(path: str, box: int) -> np.ndarray:
    """Noise power on the ``rfft2`` grid, (D, D//2+1), mean 1 over the whole plane, from a pickled radial spectrum."""
    radial = read_pickle(path)
    if not isinstance(radial, np.ndarray) or radial.ndim != 1 or len(radial) < 2:
        found = getattr(radial, "shape", radial)
        raise InputError(f"{path}: expected a radial power spectrum of shape (shells,), found {found}")
    radial = radial.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(radial) & (radial >= 0)))
    _require(len(bad) == 0, f"{path}: shell {bad[0] if len(bad) else 0} is not a power: it must be finite, 0 or more")
    ky, kx = np.meshgrid(np.fft.fftfreq(box), np.fft.fftfreq(box), indexing="ij")
    # Shells run from 0 to Nyquist, whatever their number; corners beyond Nyquist take the last one.
    shell = np.hypot(ky, kx) / 0.5 * (len(radial) - 1)
    power = np.interp(shell, np.arange(len(radial)), radial)
    _require(power.mean() > 0, f"{path}: the noise power is 0 everywhere")
    return (power / power.mean())[:, : box // 2 + 1]


def _write_images(
    path: Path,
    options: SimulateOptions,
    volume: np.ndarray,
    pixel_size_a: float,
    rotations: np.ndarray,
    shifts: np.ndarray,
    parameters: np.ndarray | None,
    power: np.ndarray | None,
) -> tuple[float, float]:
    """Write the stack; return the scale of the truth in it and the mean signal variance before scaling.

    The noise-free images go to the file first, because the scale depends on all of them; a second pass adds
    the noise in place. So memory does not grow with the number of images.
    """
    count, box = len(rotations), len(volume)
    slicer = FourierSlicer(volume)
    at_once = max(1, PIXELS_AT_ONCE // box**2)
    blocks = [slice(first, min(first + at_once, count)) for first in range(0, count, at_once)]
    variance = 0.0
    noise = _random(options, "noise")
    statistics = stackfiles.PixelStatistics()
    with atomic_path(path) as temporary, open(temporary, "w+b") as handle:
        handle.write(bytes(stackfiles.MRC_HEADER_BYTES))
        for block in tqdm(blocks, desc="projections", disable=None):
            rows = None if parameters is None else parameters[block]
            images = project(slicer, rotations[block], shifts[block], rows, pixel_size_a)
            variance += float(images.reshape(len(images), -1).var(axis=1, dtype=np.float64).sum()) / count
            handle.write(images.tobytes())
        _require(variance > 0, "the images are empty: the map is constant")
        signal_to_noise = 1.0 if math.isinf(options.snr) else options.snr
        scale = math.sqrt(signal_to_noise / variance)
        for block in tqdm(blocks, desc="noise", disable=None):
            images = np.empty((block.stop - block.start, box, box), dtype=np.float32)
            start = stackfiles.MRC_HEADER_BYTES + block.start * box * box * images.itemsize
            handle.seek(start)
            handle.readinto(images.data.cast("B"))
            images *= np.float32(scale)
            if not math.isinf(options.snr):
                images += _noise(noise, images.shape, power)
            statistics.add(images)
            handle.seek(start)
            handle.write(images.tobytes())
        handle.seek(0)
        handle.write(stackfiles.stack_header(count, box, pixel_size_a, statistics))
    return scale, variance


def _noise(rng: np.random.Generator, shape: tuple[int, ...], power: np.ndarray | None) -> np.ndarray:
    """Gaussian noise of unit variance, float32, white or with ``power`` on the ``rfft2`` grid."""
    noise = rng.standard_normal(shape, dtype=np.float32)
    if power is None:
        return noise
    spectra = torch.fft.rfft2(torch.from_numpy(noise)) * torch.from_numpy(np.sqrt(power)).float()
    return torch.fft.irfft2(spectra, s=shape[-2:]).numpy()


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``cryosplat simulate``: the fields of SimulateOptions."""
    what = parser.add_argument_group("what is imaged (default: a made-up protein complex)")
    what.add_argument("--model", metavar="FILE", help="atomic model, PDB or mmCIF; its centre of mass is the origin")
    what.add_argument("--map", metavar="FILE", help="cubic MRC map with A/px in its header, molecule positive")
    what.add_argument("--phantom-seed", type=int, metavar="N", help="another made-up complex for every number")
    what.add_argument("--box", type=int, metavar="PX", help="even image size; default 1.4 times the molecule")
    what.add_argument("--pixel-size", type=float, metavar="A", help="A/px; default 2, or that of the map")
    what.add_argument("--b-factor", type=float, metavar="A2", help="B of every atom; default the model's own")
    what.add_argument(
        "--solvent", type=float, metavar="F", help="bulk solvent as a fraction of the mean density, %(default)s"
    )

    how = parser.add_argument_group("how it is seen")
    how.add_argument("--images", type=int, metavar="N", help=f"default {DEFAULT_IMAGES}, or as many as --poses has")
    how.add_argument("--orientations", choices=("uniform", "preferred"), help="preferred: 90 %% near one view")
    how.add_argument("--poses", metavar="PKL", help="cryoDRGN's poses.pkl; particle i has pose i")
    how.add_argument("--shift", type=float, metavar="PX", help="r.m.s. shift in px; default 2, or those of --poses")
    how.add_argument(
        "--snr", type=float, metavar="R", help="signal over noise variance in the whole box, %(default)s; inf: no noise"
    )
    how.add_argument("--noise-spectrum", metavar="PKL", help="radial noise power, shells from 0 to Nyquist")
    how.add_argument("--seed", type=int, metavar="N", help="of everything drawn at random, %(default)s")

    ctf = parser.add_argument_group("CTF")
    ctf.add_argument("--ctf", metavar="PKL", help="cryoDRGN's ctf.pkl; rows are drawn from it")
    ctf.add_argument("--keep-order", action="store_true", help="with --poses and --ctf: particle i has CTF row i")
    ctf.add_argument("--no-ctf", action="store_true", help="plain projections")
    ctf.add_argument("--defocus-min", type=float, metavar="A", help="%(default)s, if there is no --ctf, as below")
    ctf.add_argument("--defocus-max", type=float, metavar="A", help="%(default)s")
    ctf.add_argument("--astigmatism", type=float, metavar="A", help="largest difference of the defoci, %(default)s")
    ctf.add_argument("--voltage", type=float, metavar="KV", help="%(default)s")
    ctf.add_argument("--cs", type=float, metavar="MM", help="spherical aberration, %(default)s")
    ctf.add_argument("--amplitude-contrast", type=float, metavar="W", help="%(default)s")
    ctf.add_argument("--phase-shift", type=float, metavar="DEG", help="of a phase plate, %(default)s")

    parser.add_argument("--out", required=True, metavar="FOLDER", help="new or empty folder for all files")
    fields = dataclasses.fields(SimulateOptions)
    parser.set_defaults(**{field.name: field.default for field in fields if field.name != "out"})


def run(arguments: argparse.Namespace) -> None:
    """Simulate as the command line says and tell where the stack is."""
    names = [field.name for field in dataclasses.fields(SimulateOptions)]
    options = SimulateOptions(**{name: getattr(arguments, name) for name in names})
    summary = simulate(options)
    print(
        f"{options.out}: {summary['images']} images of {summary['box']} px at {summary['pixel_size_a']:g} A/px, "
        f"SNR {options.snr:g}; particles.star, poses.pkl, truth.mrc and mask.mrc are beside particles.mrcs"
    )
