"""Axes, units, signs and the centre: stated once, used everywhere.

Arrays are [z, y, x] (volumes) and [y, x] (images); x is the fastest axis. The
origin is voxel ``n // 2`` on every axis, which is where ``fftshift`` puts
frequency zero. There is no half-pixel shift anywhere.

Poses are cryoDRGN's (``poses.pkl``), which are RELION's: ``x_image = R
x_volume`` for column vectors (x, y, z), and the Fourier transform of an image
at (kx, ky) is the volume's at ``R^T (kx, ky, 0)``. Shifts ``t`` are fractions
of the box; an image is centred by translating it by ``+t``, so a particle's
own origin sits at pixel ``n // 2 - t n``. A point ``r`` of the volume (pixels,
from its origin) is seen at pixel ``(R r)_xy + n // 2 - t n``.

Units inside the program: Angstrom and radians; lengths of the Gaussian
mixture are fractions of the box, so they do not change when images are
down-sampled. Particle images are white on dark with a CTF that is +w at zero
frequency (RELION's sign); cryoDRGN's CTF is the negative of that, and its
default ``invert`` undoes it.

Fourier transforms of images are orthonormal half-spectra, ``rfft2(image,
norm="ortho")``: phases refer to the first pixel, which is the same point of the
specimen at every sampling of one field of view. Nothing here needs them to
refer to the centre, so no image is ever shifted for a transform.
"""

import numpy as np

RESOLUTION_THRESHOLD_HALF_MAPS = 0.143
"""FSC between half maps at which resolution is read (Rosenthal & Henderson 2003)."""

RESOLUTION_THRESHOLD_TRUTH = 0.5
"""FSC to a noise-free map at which resolution is read; the counterpart of 0.143 between halves."""


def centre(box: int) -> int:
    """Index of the origin along an axis of ``box`` samples.

    >>> centre(128), centre(15)
    (64, 7)
    """
    return box // 2


def shell_to_angstrom(shell: float, box: int, pixel_size_a: float) -> float:
    """Resolution in Angstrom of a (fractional) Fourier shell.

    >>> shell_to_angstrom(64, 128, 2.0)
    4.0
    """
    return box * pixel_size_a / shell


def rescaled_pixel_size(pixel_size_a: float, box_from: int, box_to: int) -> float:
    """A/px after the same field of view is resampled from ``box_from`` to ``box_to`` pixels.

    >>> rescaled_pixel_size(1.0273, 256, 128)
    2.0546
    """
    return pixel_size_a * box_from / box_to


def euler_to_rotation(rot_deg: np.ndarray, tilt_deg: np.ndarray, psi_deg: np.ndarray) -> np.ndarray:
    """RELION's Euler angles (ZYZ, degrees, each (N,)) as rotations (N, 3, 3) with x_image = R x_volume.

    R = Rz(psi) Ry(tilt) Rz(rot), each factor rotating the frame (Heymann et al., J. Struct. Biol. 2005).

    >>> euler_to_rotation(np.array([90.0]), np.array([0.0]), np.array([0.0]))[0].round(6) + 0.0
    array([[ 0.,  1.,  0.],
           [-1.,  0.,  0.],
           [ 0.,  0.,  1.]])
    """

    def about_z(angle):
        c, s, zero, one = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
        return np.stack([c, s, zero, -s, c, zero, zero, zero, one], -1).reshape(-1, 3, 3)

    def about_y(angle):
        c, s, zero, one = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
        return np.stack([c, zero, -s, zero, one, zero, s, zero, c], -1).reshape(-1, 3, 3)

    rot, tilt, psi = (np.radians(np.asarray(angle, dtype=np.float64)) for angle in (rot_deg, tilt_deg, psi_deg))
    return about_z(psi) @ about_y(tilt) @ about_z(rot)
