"""Images of a map with aberrations and magnification, by exact sums and formulas written out, as star files of RELION.

Nothing here comes from cryosplat/aberrations.py: this is what that is tested with.
"""

import numpy as np
from halfmaps import molecule
from stacks import write_stack
from views import even_views, spectra

from cryosplat.stackfiles import rotation_to_euler

BOX, PIXEL_SIZE_A, COUNT = 40, 2.0, 240
VOLTAGE_KV, CS_MM, CONTRAST = 300.0, 2.7, 0.1
WAVELENGTH_A = 12.2639 / np.sqrt(300e3 + 0.97845e-6 * 300e3**2)
FIELD_A = BOX * PIXEL_SIZE_A

TRUTH = molecule(BOX, 0.2).astype(np.float32)
ROTATIONS = even_views(COUNT, seed=5)
_random = np.random.default_rng(6)
SHIFTS_PX = _random.normal(0, 1, (COUNT, 2))
DEFOCUS_A = np.stack([_random.uniform(9000, 18000, COUNT), _random.uniform(8500, 17500, COUNT)], 1)
ANGLE = _random.uniform(0, np.pi, COUNT)
HALF = np.arange(COUNT) % 2

KY, KX = np.meshgrid(np.fft.fftfreq(BOX, 1 / BOX), np.fft.rfftfreq(BOX, 1 / BOX), indexing="ij")


def coma(x_mrad, y_mrad):
    """Phase of a beam tilt, as RELION has it."""
    factor = 2 * np.pi * CS_MM * 1e7 * WAVELENGTH_A**2 * 1e-3
    return lambda x, y: -factor * (x**2 + y**2) * (x_mrad * x + y_mrad * y)


def trefoil(cosine, sine):
    """r^3 cos 3 phi and r^3 sin 3 phi."""
    return lambda x, y: cosine * (x**3 - 3 * x * y**2) + sine * (3 * x**2 * y - y**3)


def even_to_fourth(astigmatism, secondary, tetrafoil):
    """Z(2, 2), Z(4, 2) and Z(4, -4)."""

    def phase(x, y):
        squared = x**2 + y**2
        return (
            astigmatism * (x**2 - y**2)
            + secondary * (4 * squared - 3) * (x**2 - y**2)
            + tetrafoil * 4 * x * y * (x**2 - y**2)
        )

    return phase


def images(matrices=None, odd=None, even=None, noise=0.0, recorded=None, seed=0, microscope=None):
    """Float32 (COUNT, BOX, BOX).

    Args:
        matrices: M, one or (COUNT, 2, 2), none: the identity; the image at k shows the map at M k, both in 1/A of the
            map's A/px.
        odd: phase of (x, y) in 1/A, in radians.
        even: the same, taken from the CTF's.
        noise: standard deviation of a pixel over that of the images' signal.
        recorded: what to do with the CTF c afterwards: a function of c, multiplied into the spectrum.
        microscope: for ``contrast_transfer``.
    """
    matrices = np.broadcast_to(np.eye(2) if matrices is None else matrices, (COUNT, 2, 2))
    turned = ROTATIONS.copy()
    turned[:, :2] = matrices.transpose(0, 2, 1) @ ROTATIONS[:, :2]
    found = spectra(TRUTH, turned, SHIFTS_PX) * (KX**2 + KY**2 < (BOX // 2) ** 2)
    x = (matrices[:, 0, 0, None, None] * KX + matrices[:, 0, 1, None, None] * KY) / FIELD_A
    y = (matrices[:, 1, 0, None, None] * KX + matrices[:, 1, 1, None, None] * KY) / FIELD_A
    ctf = contrast_transfer(x, y, even, microscope)
    found = found * ctf * (1 if odd is None else np.exp(1j * odd(x, y)))
    signal = np.fft.irfft2(found, s=(BOX, BOX), norm="ortho")
    if noise:
        signal += np.random.default_rng(seed).normal(0, noise * signal.std(), signal.shape)
    if recorded is not None:
        signal = np.fft.irfft2(np.fft.rfft2(signal) * recorded(ctf), s=(BOX, BOX))
    return signal.astype(np.float32)


def contrast_transfer(x, y, even=None, microscope=None):
    """CTFs (COUNT, D, D//2+1). ``microscope``: kV, Cs (mm), amplitude contrast and phase shift (degrees), (COUNT,)."""
    ones = np.ones(COUNT)
    microscope = (VOLTAGE_KV * ones, CS_MM * ones, CONTRAST * ones, 0 * ones) if microscope is None else microscope
    kv, cs_mm, contrast, shift = (np.asarray(values, float)[:, None, None] for values in microscope)
    length = 12.2639 / np.sqrt(kv * 1e3 + 0.97845e-6 * (kv * 1e3) ** 2)
    u, v = DEFOCUS_A[:, :, None, None].transpose(1, 0, 2, 3)
    angle, squared = ANGLE[:, None, None], x**2 + y**2
    defocus = (u + v) / 2 + (u - v) / 2 * np.cos(2 * (np.arctan2(y, x) - angle))
    phase = np.pi * length * defocus * squared - np.pi / 2 * cs_mm * 1e7 * length**3 * squared**2 + np.radians(shift)
    return np.sin(phase + np.arcsin(contrast) - (0 if even is None else even(x, y)))


def write(folder, stack, groups=None, sizes=(PIXEL_SIZE_A,), name="particles", shift_deg=None, **optics):
    """A stack and its star file of RELION 3.1; ``optics``: a column of data_optics each, a value or one for each group.

    Shifts are given in A of each group's own A/px, of which there is one in ``sizes`` for each. ``shift_deg`` is the
    phase shift of every particle.
    """
    groups = np.zeros(COUNT, int) if groups is None else groups
    write_stack(folder / f"{name}.mrcs", stack)
    columns = {
        "OpticsGroup": np.arange(len(sizes)) + 1,
        "OpticsGroupName": [f"g{number}" for number in range(len(sizes))],
        "ImagePixelSize": sizes,
        "MicrographOriginalPixelSize": sizes,
        "ImageSize": [BOX] * len(sizes),
        "ImageDimensionality": [2] * len(sizes),
        "Voltage": [VOLTAGE_KV] * len(sizes),
        "SphericalAberration": [CS_MM] * len(sizes),
        "AmplitudeContrast": [CONTRAST] * len(sizes),
    }
    columns |= {key: value if isinstance(value, list) else [value] * len(sizes) for key, value in optics.items()}
    origins = (SHIFTS_PX * np.array(sizes)[groups][:, None]).T
    rows = {
        "ImageName": [f"{number + 1}@{name}.mrcs" for number in range(COUNT)],
        "OpticsGroup": groups + 1,
        **dict(zip(("AngleRot", "AngleTilt", "AnglePsi"), rotation_to_euler(ROTATIONS).T, strict=True)),
        **dict(zip(("OriginXAngst", "OriginYAngst"), origins, strict=True)),
        "DefocusU": DEFOCUS_A[:, 0],
        "DefocusV": DEFOCUS_A[:, 1],
        "DefocusAngle": np.degrees(ANGLE),
        "PhaseShift": np.zeros(COUNT) if shift_deg is None else shift_deg,
        "RandomSubset": HALF + 1,
    }
    text = "".join(_table(block, table) for block, table in (("optics", columns), ("particles", rows)))
    (folder / f"{name}.star").write_text(text)
    return f"{name}.star"


def _table(block, columns):
    lines = ["# version 30001", "", f"data_{block}", "", "loop_"]
    lines += [f"_rln{name} #{place}" for place, name in enumerate(columns, start=1)]
    lines += [" ".join(map(str, row)) for row in zip(*columns.values(), strict=True)]
    return "\n".join(lines) + "\n\n"


def zernike(*coefficients):
    return "[" + ",".join(f"{value:g}" for value in coefficients) + "]"
