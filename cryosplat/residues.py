"""Geometry of amino acids: bonds, angles and the side chains of ten residues, for the phantom."""

import numpy as np

BOND_N_CA, BOND_CA_C, BOND_C_N, BOND_C_O = 1.458, 1.525, 1.329, 1.231
"""Backbone bonds in A (Engh & Huber 1991)."""

ANGLE_N_CA_C, ANGLE_CA_C_N, ANGLE_C_N_CA, ANGLE_CA_C_O = np.radians([111.0, 116.6, 121.7, 120.4])
"""Backbone angles in radians (Engh & Huber 1991)."""

CB_TORSION_DEG = 122.5
"""Torsion N-C-CA-CB of an L residue; its negative would make a D one."""

ROTAMERS_DEG = (-60.0, 180.0, 60.0)
"""Staggered torsions."""

ROTAMER_TRIALS = 30

CLASH_A = 3.4
"""Atoms that are not bonded keep this distance."""

FARTHEST_CLASH_A = 10.0
"""From CB: the longest side chain and a clash beyond it."""

# Every atom: its name, the three atoms it is placed from, bond (A), angle (degrees), which chi turns it (0: none),
# and degrees added to that chi.
_GAMMA = ("N", "CA", "CB")
_DELTA = ("CA", "CB", "CG")
_PHENYL = (
    ("CG", _GAMMA, 1.50, 113.8, 1, 0.0),
    ("CD1", _DELTA, 1.39, 120.7, 2, 0.0),
    ("CD2", _DELTA, 1.39, 120.7, 2, 180.0),
    ("CE1", ("CB", "CG", "CD1"), 1.39, 120.7, 0, 180.0),
    ("CE2", ("CB", "CG", "CD2"), 1.39, 120.7, 0, 180.0),
    ("CZ", ("CG", "CD1", "CE1"), 1.39, 120.0, 0, 0.0),
)
_SIDE_CHAINS = {
    "GLY": None,
    "ALA": (),
    "SER": (("OG", _GAMMA, 1.42, 111.0, 1, 0.0),),
    "VAL": (("CG1", _GAMMA, 1.52, 110.5, 1, 0.0), ("CG2", _GAMMA, 1.52, 110.5, 1, 122.0)),
    "LEU": (
        ("CG", _GAMMA, 1.53, 116.3, 1, 0.0),
        ("CD1", _DELTA, 1.52, 110.5, 2, 0.0),
        ("CD2", _DELTA, 1.52, 110.5, 2, 122.0),
    ),
    "ASP": (
        ("CG", _GAMMA, 1.52, 112.6, 1, 0.0),
        ("OD1", _DELTA, 1.25, 118.4, 2, 0.0),
        ("OD2", _DELTA, 1.25, 118.4, 2, 180.0),
    ),
    "GLU": (
        ("CG", _GAMMA, 1.52, 114.1, 1, 0.0),
        ("CD", _DELTA, 1.52, 112.6, 2, 0.0),
        ("OE1", ("CB", "CG", "CD"), 1.25, 118.4, 3, 0.0),
        ("OE2", ("CB", "CG", "CD"), 1.25, 118.4, 3, 180.0),
    ),
    "LYS": (
        ("CG", _GAMMA, 1.52, 114.1, 1, 0.0),
        ("CD", _DELTA, 1.52, 111.3, 2, 0.0),
        ("CE", ("CB", "CG", "CD"), 1.52, 111.3, 3, 0.0),
        ("NZ", ("CG", "CD", "CE"), 1.49, 111.9, 4, 0.0),
    ),
    "MET": (
        ("CG", _GAMMA, 1.52, 114.1, 1, 0.0),
        ("SD", _DELTA, 1.80, 112.7, 2, 0.0),
        ("CE", ("CB", "CG", "SD"), 1.79, 100.9, 3, 0.0),
    ),
    "PHE": _PHENYL,
}


def place(
    first: np.ndarray,
    second: np.ndarray,
    third: np.ndarray,
    bond_a: float,
    angle_rad: float,
    torsion_rad: float | np.ndarray,
) -> np.ndarray:
    """Position (..., 3) of an atom bonded to ``third``, from its bond, its angle at ``third`` and its torsion."""
    along = third - second
    along = along / np.linalg.norm(along, axis=-1, keepdims=True)
    normal = np.cross(second - first, along)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    torsion = np.asarray(torsion_rad)[..., None]
    across = np.cos(torsion) * np.cross(normal, along) + np.sin(torsion) * normal
    return third + bond_a * (np.sin(angle_rad) * across - np.cos(angle_rad) * along)


def side_chain(
    rng: np.random.Generator, label: str, backbone: np.ndarray, others: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Side chain of one residue in the rotamer, of a few drawn, that collides least.

    Args:
        rng: draws the rotamers.
        label: three-letter name of the residue.
        backbone: (4, 3), N, CA, C, O in A.
        others: (M, 3) atoms of other residues, to avoid.

    Returns:
        Names, and positions (names, 3) in A; L residues.
    """
    recipe = _SIDE_CHAINS[label]
    if recipe is None:
        return [], np.zeros((0, 3))
    trials = ROTAMER_TRIALS
    chi = np.radians(rng.choice(ROTAMERS_DEG, (trials, 4)) + rng.normal(0, 8, (trials, 4)))
    chi = np.hstack([np.zeros((trials, 1)), chi])
    atoms = {name: np.tile(position, (trials, 1)) for name, position in zip(("N", "CA", "C"), backbone, strict=False)}
    atoms["CB"] = place(atoms["N"], atoms["C"], atoms["CA"], 1.53, np.radians(110.1), np.radians(CB_TORSION_DEG))
    for name, references, bond, angle, turned_by, offset in recipe:
        torsion = chi[:, turned_by] + np.radians(offset)
        atoms[name] = place(*(atoms[other] for other in references), bond, np.radians(angle), torsion)
    names = ["CB", *(atom[0] for atom in recipe)]
    positions = np.stack([atoms[name] for name in names], axis=1)
    near = others[np.abs(others - positions[0, 0]).max(1) < FARTHEST_CLASH_A]
    distance = np.linalg.norm(positions[:, :, None] - near, axis=-1)
    clash = (np.maximum(CLASH_A - distance, 0) ** 2).sum((1, 2))
    return names, positions[np.argmin(clash)]
