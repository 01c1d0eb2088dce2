"""Atomic models: reading them, their electron-scattering density on a grid, and pseudo-atoms in their files."""

import logging
import math
import os
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.ndimage

from cryosplat.errors import InputError
from cryosplat.files import atomic_path

logger = logging.getLogger(__name__)

FINE_SPACING_A = 0.85
"""Coarsest grid on which atoms are summed before the density is cut at Nyquist."""

ALIASING = 1e-3
"""Fraction of a spectrum that the fine grid may fold back into the band that is kept."""

GAUSSIAN_CUTOFF = 1e-5
"""Density, in e/A^3, below which the tail of an atom is dropped (gemmi's own default)."""

PDB_ATOMS, PDB_LARGEST_B, PDB_LEAST_A, PDB_MOST_A = 99_999, 999.99, -999.999, 9999.999
"""What the columns of a PDB file hold: atoms, a B factor, a coordinate."""

RESIDUES_IN_CHAIN = 9_999
"""As many as four columns number."""

LARGEST_FILLED_FRACTION = 0.97
"""Of half the box: how far from the centre an atom may lie."""


@dataclass(frozen=True)
class Atoms:
    """Atoms of one molecule, N of them.

    Attributes:
        positions_a: (N, 3) float64, A, x y z.
        elements: (N,) str, chemical symbols.
        b_factors_a2: (N,) float64, isotropic B in A^2.
        names: (N,) str, "CA", "C", ...
        residues: (N,) int, number of the residue, the same for the atoms of one residue.
    """

    positions_a: np.ndarray
    elements: np.ndarray
    b_factors_a2: np.ndarray
    names: np.ndarray
    residues: np.ndarray

    def __len__(self) -> int:
        return len(self.positions_a)

    @property
    def radius_a(self) -> float:
        """Distance in A of the farthest atom from the centre of mass."""
        return float(np.linalg.norm(self.positions_a - self.centre_of_mass_a, axis=1).max())

    @property
    def centre_of_mass_a(self) -> np.ndarray:
        """Centre of mass (3,) in A."""
        import gemmi

        symbols, inverse = np.unique(self.elements, return_inverse=True)
        masses = np.array([gemmi.Element(str(symbol)).weight for symbol in symbols])[inverse]
        return masses @ self.positions_a / masses.sum()


def read_model(path: str | os.PathLike, b_factor: float | None = None) -> Atoms:
    """Heavy atoms of the first model in a PDB or mmCIF file, plain or gzipped; no waters, alternative A only.

    Args:
        path: the file.
        b_factor: B in A^2 for every atom; none keeps the file's.

    Raises:
        InputError: no such file, not a model, no atoms, or no B factors and none given.
    """
    import gemmi

    if not os.path.isfile(path):
        raise InputError(f"{path}: no such model")
    try:
        structure = gemmi.read_structure(os.fspath(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable PDB or mmCIF model ({error})") from error
    if len(structure) == 0:
        raise InputError(f"{path}: the file holds no atoms; expected a PDB or mmCIF model")
    structure.setup_entities()
    structure.remove_alternative_conformations()
    structure.remove_hydrogens()
    structure.remove_waters()
    structure.remove_empty_chains()
    rows = [
        (atom.pos.tolist(), atom.element.name, atom.b_iso, atom.name, number)
        for number, residue in enumerate(residue for chain in structure[0] for residue in chain)
        for atom in residue
    ]
    if not rows:
        raise InputError(f"{path}: no atoms are left after waters and hydrogens are dropped")
    positions, elements, b_factors, names, residues = (np.array(column) for column in zip(*rows, strict=True))
    if b_factor is not None:
        b_factors = np.full(len(rows), float(b_factor))
    elif not (b_factors > 0).any():
        raise InputError(f"{path}: every B factor is 0; give one, for example --b-factor 40")
    return Atoms(positions, elements, b_factors.astype(np.float64), names, residues)


def density(
    atoms: Atoms, box: int, pixel_size_a: float, b_factor: float | None = None, solvent: float = 0.0
) -> np.ndarray:
    """Electron-scattering density of a model, band-limited to Nyquist.

    The atoms (Gaussians of gemmi's electron scattering factors, widened by B) are summed on a grid at
    least twice as fine as asked for and no coarser than 0.85 A, and the Fourier transform is cut to the
    sphere that the wanted grid holds. Sharp atoms are widened by an extra B on the fine grid, taken back
    in Fourier space, so that at most 1e-3 of them is folded into the band.

    Args:
        atoms: the model; its centre of mass goes to voxel ``box // 2``.
        box: D in voxels.
        pixel_size_a: A/px.
        b_factor: B in A^2 for every atom; none keeps the atoms' own.
        solvent: fraction of the mean density inside the molecule's envelope that is subtracted there,
            as bulk solvent of that density would do; 0 is vacuum.

    Returns:
        float32 (D, D, D), [z, y, x].

    Raises:
        InputError: the model does not fit the box.
    """
    field_a = box * pixel_size_a
    limit = LARGEST_FILLED_FRACTION * field_a / 2
    if atoms.radius_a > limit:
        needed = math.ceil(atoms.radius_a / LARGEST_FILLED_FRACTION * 2 / pixel_size_a)
        raise InputError(
            f"the model reaches {atoms.radius_a:.1f} A from its centre, and a box of {box} px at {pixel_size_a:g} A/px "
            f"holds {limit:.1f} A; use a box of at least {needed + needed % 2} px or more A/px"
        )
    b_factors = atoms.b_factors_a2 if b_factor is None else np.full(len(atoms), float(b_factor))
    oversampling = max(2, math.ceil(pixel_size_a / FINE_SPACING_A))
    fine = box * oversampling
    # Frequencies fold about the fine grid's Nyquist: the first that lands in the kept band is this one.
    first_alias = (oversampling - 0.5) / pixel_size_a
    blur = max(0.0, 4 * math.log(1 / ALIASING) / first_alias**2 - b_factors.min())
    positions = atoms.positions_a - atoms.centre_of_mass_a + box // 2 * pixel_size_a
    summed = _sum_atoms(atoms, positions, b_factors + blur, field_a, fine)
    volume = _fourier_crop(summed, box, pixel_size_a, blur)
    if solvent:
        volume = _subtract_solvent(volume, pixel_size_a, solvent)
    return volume


def write_pseudo_atoms(
    path: str | os.PathLike,
    positions_a: np.ndarray,
    displacements_a2: np.ndarray,
    occupancies: np.ndarray,
    field_a: float,
    overwrite: bool = False,
) -> None:
    """Write points as pseudo-atoms: carbons of residues UNX, each a residue of its own, not bonded to anything.

    B factors above the 999.99 A^2 that a PDB file has room for are cut to it there, which the log says; its ANISOU
    records have them whole.

    Args:
        path: .pdb or .cif; gemmi writes either.
        positions_a: (N, 3) x, y, z in A.
        displacements_a2: (N, 3, 3) mean square displacements U in A^2; B is 8 pi^2 tr(U) / 3.
        occupancies: (N,) of either sign.
        field_a: side of the cubic cell, A.
        overwrite: replace a file that is there.

    Raises:
        InputError: too much for the columns of a PDB file, or the file cannot be written.
    """
    import gemmi

    b_factors = 8 * np.pi**2 * np.trace(displacements_a2, axis1=1, axis2=2) / 3
    is_pdb = os.fspath(path).endswith(".pdb")
    if is_pdb:
        _require_columns(path, positions_a)
        wide = int((b_factors > PDB_LARGEST_B).sum())
        if wide:
            said = "%s: %d of %d B factors are above %.2f A^2, where the column of a PDB file ends, and are cut to it; "
            logger.warning(
                said + "the ANISOU records and a .cif have them whole", path, wide, *(len(b_factors), PDB_LARGEST_B)
            )
            b_factors = np.minimum(b_factors, PDB_LARGEST_B)
    structure, model = gemmi.Structure(), gemmi.Model(1)
    structure.name = "gaussians"
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(*[field_a] * 3, 90, 90, 90), "P 1"
    entity = gemmi.Entity("1")
    entity.entity_type = gemmi.EntityType.NonPolymer
    for first in range(0, len(positions_a), RESIDUES_IN_CHAIN):
        chain = gemmi.Chain(_chain_name(first // RESIDUES_IN_CHAIN))
        for number in range(first, min(first + RESIDUES_IN_CHAIN, len(positions_a))):
            residue, atom, (u, v, w) = gemmi.Residue(), gemmi.Atom(), displacements_a2[number].tolist()
            residue.name, residue.seqid, residue.het_flag = "UNX", gemmi.SeqId(number - first + 1, " "), "H"
            residue.entity_type, residue.entity_id, residue.subchain = entity.entity_type, entity.name, chain.name
            atom.name, atom.element = "C", gemmi.Element("C")
            atom.pos = gemmi.Position(*positions_a[number].tolist())
            atom.occ, atom.b_iso = float(occupancies[number]), float(b_factors[number])
            atom.aniso = gemmi.SMat33f(u[0], v[1], w[2], u[1], u[2], v[2])
            residue.add_atom(atom)
            chain.add_residue(residue)
        entity.subchains = [*entity.subchains, chain.name]
        model.add_chain(chain)
    structure.add_model(model)
    structure.entities = [entity]
    options = gemmi.PdbWriteOptions(minimal=True)
    options.cryst1_record = options.end_record = True
    text = structure.make_pdb_string(options) if is_pdb else structure.make_mmcif_document().as_string()
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(text)


def _require_columns(path: str | os.PathLike, positions_a: np.ndarray) -> None:
    """See that pseudo-atoms fit into the columns of a PDB file."""
    instead = "write a .cif, whose numbers may be of any length"
    if len(positions_a) > PDB_ATOMS:
        raise InputError(f"{path}: {len(positions_a):,} pseudo-atoms, and a PDB file numbers {PDB_ATOMS:,}; {instead}")
    if positions_a.min() < PDB_LEAST_A or positions_a.max() > PDB_MOST_A:
        raise InputError(f"{path}: coordinates beyond {PDB_LEAST_A} to {PDB_MOST_A} A, a PDB file's columns; {instead}")


def _chain_name(number: int) -> str:
    """A to Z, a to z, 0 to 9, then two of them."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return ("" if number < len(letters) else _chain_name(number // len(letters) - 1)) + letters[number % len(letters)]


def _sum_atoms(atoms: Atoms, positions: np.ndarray, b_factors: np.ndarray, field_a: float, fine: int) -> np.ndarray:
    """Density (fine, fine, fine), [x, y, z], of atoms at ``positions`` in a periodic cube of ``field_a``."""
    import gemmi

    model = gemmi.Model(1)
    chain = gemmi.Chain("A")
    residue = gemmi.Residue()
    for position, symbol, b_factor, name in zip(positions, atoms.elements, b_factors, atoms.names, strict=True):
        atom = gemmi.Atom()
        atom.pos = gemmi.Position(*position)
        atom.element = gemmi.Element(str(symbol))
        atom.name = str(name)
        atom.b_iso = b_factor
        atom.occ = 1.0
        residue.add_atom(atom)
    chain.add_residue(residue)
    model.add_chain(chain)
    calculator = gemmi.DensityCalculatorE()
    calculator.grid.set_unit_cell(gemmi.UnitCell(field_a, field_a, field_a, 90, 90, 90))
    calculator.grid.spacegroup = gemmi.SpaceGroup("P 1")
    calculator.grid.set_size(fine, fine, fine)
    calculator.cutoff = GAUSSIAN_CUTOFF
    calculator.add_model_density_to_grid(model)
    return np.asarray(calculator.grid)


def _squared_frequency(box: int, pixel_size_a: float) -> np.ndarray:
    """s^2 in 1/A^2 on the ``rfftn`` grid, (D, D, D//2+1)."""
    full, half = np.fft.fftfreq(box, pixel_size_a) ** 2, np.fft.rfftfreq(box, pixel_size_a) ** 2
    return (full[:, None, None] + full[:, None] + half).astype(np.float32)


def _fourier_crop(fine: np.ndarray, box: int, pixel_size_a: float, blur: float) -> np.ndarray:
    """Fine [x, y, z] density on the (box)^3 [z, y, x] grid, cut at Nyquist's sphere, without its B of ``blur``."""
    size = len(fine)
    spectrum = scipy.fft.rfftn(fine.transpose(2, 1, 0))
    keep = np.fft.fftfreq(box, 1 / box).round().astype(int) % size
    spectrum = spectrum[np.ix_(keep, keep, np.arange(box // 2 + 1))]
    squared = _squared_frequency(box, pixel_size_a)
    spectrum *= np.exp(blur / 4 * squared) * (squared <= _nyquist(pixel_size_a))
    return (scipy.fft.irfftn(spectrum, s=(box,) * 3) * (box / size) ** 3).astype(np.float32)


def _nyquist(pixel_size_a: float) -> float:
    """Largest s^2 in 1/A^2 inside Nyquist's sphere, with room for float32 rounding."""
    return (0.5 / pixel_size_a) ** 2 * (1 + 1e-5)


def _low_pass(volume: np.ndarray, pixel_size_a: float, sigma_a: float) -> np.ndarray:
    """The map blurred by a Gaussian of standard deviation ``sigma_a`` in A."""
    squared = _squared_frequency(len(volume), pixel_size_a)
    return scipy.fft.irfftn(scipy.fft.rfftn(volume) * np.exp(-2 * np.pi**2 * sigma_a**2 * squared), s=volume.shape)


def _inside_level(blurred: np.ndarray) -> float:
    """Typical density well inside a molecule, from its blurred map."""
    return float(np.percentile(blurred[blurred > 0.2 * blurred.max()], 90))


def surface_level(volume: np.ndarray, pixel_size_a: float) -> float:
    """The density at the surface of a molecule: half of what is typical well inside it.

    After a blur of 2 A it encloses the volume that a protein excludes (1.21 A^3/Da: measured 799 of 790 nm^3 for the
    proteasome 3J9I), whatever the A/px. Noise must be low already: of a noisy map the level is too low.
    """
    return 0.5 * _inside_level(_low_pass(volume, pixel_size_a, 2.0))


def _subtract_solvent(volume: np.ndarray, pixel_size_a: float, fraction: float) -> np.ndarray:
    """The map minus ``fraction`` of its mean density inside a smooth envelope of the molecule."""
    # As in surface_level; a B of 50 A^2 then softens the envelope's edge.
    blurred = _low_pass(volume, pixel_size_a, 2.0)
    envelope = (blurred > 0.5 * _inside_level(blurred)).astype(np.float32)
    envelope = _low_pass(envelope, pixel_size_a, math.sqrt(50 / (8 * np.pi**2)))
    mean = (volume * envelope).sum() / (envelope**2).sum()
    spectrum = scipy.fft.rfftn(volume - fraction * mean * envelope)
    spectrum *= _squared_frequency(len(volume), pixel_size_a) <= _nyquist(pixel_size_a)
    return scipy.fft.irfftn(spectrum, s=volume.shape).astype(np.float32)


def soft_mask(volume: np.ndarray, pixel_size_a: float, dilate_a: float = 5.0, edge_a: float = 8.0) -> np.ndarray:
    """Soft mask round a map's molecule: 1 within ``dilate_a`` of it, then a cosine edge of ``edge_a`` down to 0.

    The molecule is where the map, blurred to some 15 A, passes a tenth of its typical inside value.

    Args:
        volume: (D, D, D) map.
        pixel_size_a: A/px.

    Returns:
        float32 (D, D, D), 0 to 1.

    Raises:
        InputError: the map has no positive density.
    """
    blurred = _low_pass(volume, pixel_size_a, 15.0 / (2 * np.pi))
    if not blurred.max() > 0:
        raise InputError("the map has no positive density, so no mask can be drawn round it")
    molecule = scipy.ndimage.binary_closing(blurred > 0.1 * _inside_level(blurred), iterations=2)
    distance = scipy.ndimage.distance_transform_edt(~molecule) * pixel_size_a
    return (0.5 * (1 + np.cos(np.pi * np.clip((distance - dilate_a) / edge_a, 0, 1)))).astype(np.float32)
