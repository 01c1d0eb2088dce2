"""The optics of a particle file: what its columns say beyond defocus, what of it is corrected, and what to warn of.

One place for beam tilt, Zernike coefficients, magnification and A/px of optics groups, and for stacks that were phase
flipped or multiplied by their CTF. Formulas: aberrations.py and docs/physics.md.
"""

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cryosplat.aberrations import (
    Aberrations,
    even_rest,
    fold_ctf,
    is_negligible,
    odd_filter,
)
from cryosplat.columns import Columns
from cryosplat.ctf import ctf_image
from cryosplat.errors import InputError
from cryosplat.listing import Listing

STAR_TILT = ("_rlnBeamTiltX", "_rlnBeamTiltY")
STAR_MAGNIFICATION = ("_rlnMagMat00", "_rlnMagMat01", "_rlnMagMat10", "_rlnMagMat11")
STAR_ODD, STAR_EVEN = "_rlnOddZernike", "_rlnEvenZernike"
STAR_FLIPPED, STAR_MULTIPLIED = "_rlnCtfDataArePhaseFlipped", "_rlnCtfDataAreCtfPremultiplied"

LARGEST_TILT_MRAD = 100.0
LARGEST_COEFFICIENT = 1e6
"""Of a Zernike polynomial of frequencies in 1/A; phases of even the sixth power are some 2500 turns then, at 2 A."""

LARGEST_STRETCH = 1.25
"""Of a magnification matrix, along any direction; what is more is no matrix of a microscope."""

AS_RECORDED, FLIPPED, MULTIPLIED = 0, 1, 2

LEAST_CTF = 0.05
"""Of images that were multiplied by their CTF, coefficients with less of it are set to zero: 3 % of them, with 5e-5 of
the signal's weight. The others are divided by it, which gives their noise its white spectrum back."""


@dataclass(frozen=True, eq=False)
class Optics:
    """Of n particles, what their images are corrected for and what their projections and CTFs have to include.

    Attributes:
        groups: what is common to the particles of a group.
        group: (n,) int64, index into these.
        recorded: (n,) int8, AS_RECORDED, FLIPPED or MULTIPLIED.
        box: px, of the stored images.
        pixel_size_a: A/px of the map; that of a group's own images is in its magnification.
        labels: of the groups, for messages.
    """

    groups: tuple[Aberrations, ...]
    group: np.ndarray
    recorded: np.ndarray
    box: int
    pixel_size_a: float
    labels: tuple[str, ...]
    _filters: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def digest(self, ctf: np.ndarray | None) -> str:
        """What prepared images depend on besides the stack, by which they can be kept: "" if on nothing else.

        Args:
            ctf: (n, 7) of the table, which counts for images that had their CTF applied.
        """
        applied = bool(self.recorded.any())
        if not applied and not any(group.is_odd for group in self.groups):
            return ""
        parts = [repr((self.groups, self.pixel_size_a)).encode(), self.group.tobytes(), self.recorded.tobytes()]
        return hashlib.sha256(b"".join([*parts, ctf.tobytes() if applied and ctf is not None else b""])).hexdigest()

    def ctf(self, parameters: np.ndarray) -> np.ndarray:
        """CTF parameters (n, 7) with what seven numbers can hold of even aberrations and magnification."""
        result = parameters
        for index, group in enumerate(self.groups):
            if any(group.even) or not _is_identity(group):
                mine = self.group == index
                result = result.copy() if result is parameters else result
                result[mine] = fold_ctf(parameters[mine], group)
        return result

    def projections(self, rotations: np.ndarray) -> np.ndarray:
        """Rotations (n, 3, 3) whose first two rows P are M^T P: what an image shows of the map."""
        if all(_is_identity(group) for group in self.groups):
            return rotations
        matrices = np.array([group.magnification for group in self.groups])[self.group]
        result = rotations.copy()
        result[:, :2] = matrices.transpose(0, 2, 1) @ rotations[:, :2]
        return result

    @functools.cached_property
    def rest(self) -> np.ndarray | None:
        """Float32 (groups, D, D//2+1), even phases of the stored box that are not in ``ctf``; None where negligible."""
        found = [
            even_rest(group, self.box, self.pixel_size_a)
            if any(group.even) or not _is_identity(group)
            else np.zeros((self.box, self.box // 2 + 1))
            for group in self.groups
        ]
        return None if all(is_negligible(phase) for phase in found) else np.stack(found).astype(np.float32)

    def restored(self, images: Tensor, ids: np.ndarray, ctf: np.ndarray | None) -> Tensor:
        """Images (b, D, D) of the particles ``ids`` as they were recorded: flips and products with the CTF undone."""
        recorded = self.recorded[ids]
        if ctf is None or not recorded.any():
            return images
        device = images.device
        phases = None if self.rest is None else torch.from_numpy(self.rest[self.group[ids]]).to(device)
        factor = ctf_image(torch.from_numpy(ctf[ids]).float().to(device), self.box, self.pixel_size_a, phases)
        flipped = torch.where(factor < 0, -1.0, 1.0)
        divided = torch.where(factor.abs() < LEAST_CTF, 0.0, 1 / factor)
        how = torch.from_numpy(recorded).to(device)[:, None, None]
        spectra = torch.fft.rfft2(images) * torch.where(how == FLIPPED, flipped, divided)
        return torch.where(how == AS_RECORDED, images, torch.fft.irfft2(spectra, s=images.shape[-2:]))

    def corrected(self, spectra: Tensor, ids: np.ndarray) -> Tensor:
        """Half-spectra (b, D, D//2+1) of the stored box of the particles ``ids``, without their odd aberrations."""
        for index in np.unique(self.group[ids]).tolist():
            if self.groups[index].is_odd:
                if index not in self._filters:
                    self._filters[index] = odd_filter(self.groups[index], self.box, self.pixel_size_a)
                mine = torch.from_numpy(np.flatnonzero(self.group[ids] == index)).to(spectra.device)
                spectra[mine] *= self._filters[index].to(spectra.device)
        return spectra


def _is_identity(group: Aberrations) -> bool:
    return group.magnification == ((1.0, 0.0), (0.0, 1.0))


def read_optics(
    listing: Listing,
    rows: np.ndarray,
    box: int,
    pixel_size_a: float,
    sizes: np.ndarray | None,
    ctf: np.ndarray | None,
) -> Optics | None:
    """What the columns of a particle file say of the optics of the particles ``rows`` (n,).

    Args:
        box: px of the stored images.
        pixel_size_a: A/px of the map.
        sizes: (n,) A/px of the images, or None where they are all that.
        ctf: (n, 7), or None for images without a CTF, of which nothing but magnification is taken.

    Returns:
        None where there is nothing to correct.

    Raises:
        InputError: a column that is no number or impossible.
    """
    columns, count = listing.columns, len(rows)
    star = columns is not None and listing.path.suffix.lower() == ".star"
    scale = np.ones(count) if sizes is None else pixel_size_a / sizes
    tilt, odd, even = np.zeros((count, 2)), np.zeros((count, 0)), np.zeros((count, 0))
    matrices, recorded = np.tile(np.eye(2).ravel(), (count, 1)), np.zeros(count, np.int8)
    if star:
        matrices = _magnification(columns, rows)
    if star and ctf is not None:
        tilt = np.stack([columns.take(name, rows) if name in columns else np.zeros(count) for name in STAR_TILT], 1)
        _refuse(columns, rows, np.abs(tilt).max(1) > LARGEST_TILT_MRAD, "a beam tilt of more than 100 mrad; its unit?")
        odd, even = (_coefficients(columns, name, rows) for name in (STAR_ODD, STAR_EVEN))
        recorded = _recorded(columns, rows)
    microscope = np.zeros((count, 2)) if ctf is None else ctf[:, [4, 3]]
    every = np.concatenate([matrices * scale[:, None], tilt, microscope, odd, even], axis=1)
    first, group = _distinct(every)
    split = np.cumsum([4, 2, 2, odd.shape[1]])
    groups = []
    for row in every[first]:
        matrix, tilts, (cs_mm, kv), odds, evens = (part.tolist() for part in np.split(row, split))
        magnification = (tuple(matrix[:2]), tuple(matrix[2:]))
        groups.append(Aberrations(magnification, tuple(tilts), tuple(odds), tuple(evens), cs_mm, kv))
    plain = not recorded.any() and all(_is_identity(g) and not g.is_odd and not any(g.even) for g in groups)
    if plain:
        return None
    return Optics(tuple(groups), group, recorded, box, pixel_size_a, _labels(columns, rows[first]))


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (g,) of ``values`` (n, k) that are the first of their kind, and the kind (n,) of every row."""
    varying = (values != values[0]).any(axis=0)
    if not varying.any():
        return np.zeros(1, np.int64), np.zeros(len(values), np.int64)
    _, first, group = np.unique(values[:, varying], axis=0, return_index=True, return_inverse=True)
    return first, group.reshape(-1).astype(np.int64)


def _labels(columns: Columns | None, first: np.ndarray) -> tuple[str, ...]:
    if columns is None or columns.group is None:
        return tuple(f"the particles like row {row}" for row in first)
    numbers = columns.group[first].tolist()
    return tuple(f"optics group {number:g} {columns.group_names.get(number, '')}".rstrip() for number in numbers)


def _refuse(columns: Columns, rows: np.ndarray, bad: np.ndarray, message: str) -> None:
    places = np.flatnonzero(bad)
    if len(places):
        raise InputError(f"{columns.path}: row {rows[places[0]]}: {message} ({len(places)} of {len(rows)} rows)")


def _magnification(columns: Columns, rows: np.ndarray) -> np.ndarray:
    """Magnification matrices (n, 4), the identity where the file has none."""
    there = [name for name in STAR_MAGNIFICATION if name in columns]
    if not there:
        return np.tile(np.eye(2).ravel(), (len(rows), 1))
    if len(there) < len(STAR_MAGNIFICATION):
        raise InputError(
            f"{columns.path}: of the magnification matrix it has {', '.join(there)} alone; write all four of "
            f"{', '.join(STAR_MAGNIFICATION)}, or none"
        )
    matrices = np.stack([columns.take(name, rows) for name in STAR_MAGNIFICATION], 1)
    first, kind = _distinct(matrices)
    stretch = np.linalg.svd(matrices[first].reshape(-1, 2, 2), compute_uv=False)
    bad = (stretch.max(1) > LARGEST_STRETCH) | (stretch.min(1) < 1 / LARGEST_STRETCH)
    message = f"_rlnMagMat00 to 11 stretch by more than {LARGEST_STRETCH:g} along some direction; they are near 1 0 0 1"
    _refuse(columns, rows, bad[kind], message)
    return matrices


def _coefficients(columns: Columns, name: str, rows: np.ndarray) -> np.ndarray:
    """Zernike coefficients (n, k), k as many as the longest list of the file."""
    if name not in columns or columns.values[name].shape[1] == 0:
        return np.zeros((len(rows), 0))
    found = columns.take(name, rows, columns.values[name].shape[1:], "a list such as [0,0,1.5]")
    huge = np.abs(found).max(1) > LARGEST_COEFFICIENT
    _refuse(
        columns, rows, huge, f"{name} has a coefficient above {LARGEST_COEFFICIENT:g}; the file was not fitted well"
    )
    return found


def _recorded(columns: Columns, rows: np.ndarray) -> np.ndarray:
    """(n,) int8: what was done to each image before it came to the stack."""
    found = np.zeros(len(rows), np.int8)
    for name, value in ((STAR_FLIPPED, FLIPPED), (STAR_MULTIPLIED, MULTIPLIED)):
        if name in columns:
            flags = columns.take(name, rows, expected="0 or 1")
            _refuse(columns, rows, ~np.isin(flags, (0, 1)), f"{name} is neither 0 nor 1")
            both = (flags == 1) & (found != AS_RECORDED)
            _refuse(columns, rows, both, f"{STAR_FLIPPED} and {STAR_MULTIPLIED} are both 1; which is it?")
            found[flags == 1] = value
    return found
