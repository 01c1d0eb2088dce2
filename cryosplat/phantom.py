"""A made-up protein complex to simulate from: helices, sheets, loops and side chains, different for every seed.

Four subunits are built as folds are: a bundle of up-and-down helices, a twisted parallel sheet between two
layers of helices with right-handed crossovers, a sandwich of two antiparallel sheets, and a small bundle.
Each is one chain. They are turned at random and pushed together until they touch, so the complex has no
symmetry and its mirror image is a different object. The geometry of residues is that of textbooks; the
fold is nobody's.
"""

from dataclasses import dataclass

import numpy as np

from cryosplat.atoms import Atoms
from cryosplat.residues import (
    ANGLE_C_N_CA,
    ANGLE_CA_C_N,
    ANGLE_CA_C_O,
    ANGLE_N_CA_C,
    BOND_C_N,
    BOND_C_O,
    BOND_CA_C,
    BOND_N_CA,
    place,
    side_chain,
)

TORSIONS = {"helix": (-57.0, -47.0), "strand": (-120.0, 130.0)}
"""phi and psi in degrees: a right-handed helix of 3.6 residues a turn, 1.5 A each; a strand of 3.3 A a residue."""

COMPOSITION = {
    "helix": ("ALA", "LEU", "LEU", "GLU", "LYS", "MET", "VAL", "PHE", "SER"),
    "strand": ("VAL", "VAL", "PHE", "LEU", "ALA", "SER", "LYS", "GLU"),
    "loop": ("GLY", "SER", "ASP", "ASP", "ALA", "LYS", "GLU", "LEU"),
}
"""Residues drawn for each kind of segment, by and large as proteins prefer them."""

CA_DISTANCE_A = 3.8
HELIX_SPACING_A = 9.8
STRAND_SPACING_A = 4.8
LAYER_SPACING_A = 10.0
SHEET_TWIST_RAD = np.radians(-16.0)
"""Turn from one strand to the next about the line that joins them: the left-handed twist of real sheets."""

SUBUNIT_GAP_A = 7.5
"""Smallest distance of CA atoms of different subunits, room for their side chains."""


APPROACHES = np.array([[0, 0, 0], [1, 0, 0.2], [0.1, 1, 0.2], [0.7, -0.4, -0.8]])
"""From where each subunit is pushed towards the ones before it."""

ORIENTATIONS_TRIED = 15


@dataclass(frozen=True)
class Segment:
    """A helix or strand: its middle (A), its direction, and a direction across it that its carbonyls lie along."""

    kind: str
    length: int
    centre: np.ndarray
    direction: np.ndarray
    across: np.ndarray


def protein_phantom(seed: int = 0) -> Atoms:
    """A compact, asymmetric protein-like model: some 530 residues, 4,100 atoms, 50 A in radius.

    Args:
        seed: fixes the model; other seeds are other molecules.

    Returns:
        The atoms; consecutive residues of a chain have consecutive numbers, and a number is left out
        between chains. B factors grow from 27 A^2 in the middle to some 65 at the surface and in loops.
    """
    rng = np.random.default_rng(seed)
    subunits = (_bundle(rng, 4, 3, (20, 27)), _layers(rng), _sandwich(rng), _bundle(rng, 2, 2, (13, 17)))
    chains = [_chain(rng, segments) for segments in subunits]
    chains = _assemble(rng, chains)
    return _with_side_chains(rng, chains)


def _rotation_about(axis: np.ndarray, angle_rad: float) -> np.ndarray:
    """Rotation matrix about ``axis`` (Rodrigues)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle_rad) * cross + (1 - np.cos(angle_rad)) * cross @ cross


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Uniform on SO(3)."""
    matrix, triangle = np.linalg.qr(rng.standard_normal((3, 3)))
    matrix = matrix * np.sign(np.diag(triangle))
    return matrix * np.linalg.det(matrix)


# Folds: lists of segments in the order of the chain


def _bundle(rng: np.random.Generator, front: int, back: int, lengths: tuple[int, int]) -> list[Segment]:
    """Helices up and down in two rows, along the front one and back along the other."""
    places = [(column, 0.0) for column in range(front)]
    places += [(column + 0.5, np.sqrt(3) / 2) for column in range(front - 2, front - 2 - back, -1)]
    segments = []
    for number, (x, y) in enumerate(places):
        tilt = _rotation_about(rng.standard_normal(3), np.radians(rng.uniform(4, 9)))
        centre = HELIX_SPACING_A * np.array([x, y, 0]) + np.array([0, 0, rng.normal(0, 1.5)])
        up = tilt @ np.array([0, 0, (-1.0) ** number])
        segments.append(Segment("helix", int(rng.integers(*lengths)), centre, up, rng.standard_normal(3)))
    return segments


def _twisted(kind: str, length: int, x_a: float, y_a: float, sense: float) -> Segment:
    """A segment at ``x_a`` along a sheet and ``y_a`` off it, turned as the sheet is there."""
    turn = _rotation_about(np.array([1.0, 0, 0]), SHEET_TWIST_RAD * x_a / STRAND_SPACING_A)
    centre = np.array([x_a, 0, 0]) + turn @ np.array([0, y_a, 0])
    return Segment(kind, length, centre, turn @ np.array([0, 0, sense]), np.array([1.0, 0, 0]))


def _layers(rng: np.random.Generator) -> list[Segment]:
    """Six parallel strands in the order 3 2 1 4 5 6 and five helices over and under them (a Rossmann fold).

    Helices lie on +y while the chain moves towards -x and on -y while it moves towards +x: crossovers
    between parallel strands are right-handed in proteins.
    """
    strands = STRAND_SPACING_A * (np.array([2, 1, 0, 3, 4, 5]) - 2.5)
    helices = ((3.0, 1), (-8.0, 1), (-10.5, -1), (0.0, -1), (10.5, -1))
    segments = []
    for number, x_a in enumerate(strands):
        segments.append(_twisted("strand", int(rng.integers(6, 9)), x_a, 0.0, 1.0))
        if number < len(helices):
            helix_x, side = helices[number]
            segments.append(_twisted("helix", int(rng.integers(12, 16)), helix_x, side * LAYER_SPACING_A, -1.0))
    return segments


def _sandwich(rng: np.random.Generator) -> list[Segment]:
    """Two antiparallel sheets of four strands, face to face at -30 degrees."""
    segments = []
    for layer, columns in enumerate(([-1.5, -0.5, 0.5, 1.5], [1.5, 0.5, -0.5, -1.5])):
        turn = _rotation_about(np.array([0, 1.0, 0]), np.radians(-30.0 * layer))
        lift = np.array([0, layer * LAYER_SPACING_A, 0])
        for column in columns:
            sense = (-1.0) ** len(segments)
            flat = _twisted("strand", int(rng.integers(7, 10)), column * STRAND_SPACING_A, 0.0, sense)
            placed = (turn @ flat.centre + lift, turn @ flat.direction, turn @ flat.across)
            segments.append(Segment("strand", flat.length, *placed))
    return segments


# Backbones: arrays (residues, 4, 3) of N, CA, C, O


def _ideal_backbone(kind: str, length: int) -> np.ndarray:
    """Backbone with constant torsions, its middle at the origin, its axis along z, its carbonyls along x."""
    phi, psi = np.radians(TORSIONS[kind])
    trace = [np.array([0.0, 0, 0]), np.array([BOND_N_CA, 0, 0])]
    trace.append(trace[1] + BOND_CA_C * np.array([-np.cos(ANGLE_N_CA_C), np.sin(ANGLE_N_CA_C), 0]))
    for _ in range(length):
        trace.append(place(*trace[-3:], BOND_C_N, ANGLE_CA_C_N, psi))
        trace.append(place(*trace[-3:], BOND_N_CA, ANGLE_C_N_CA, np.pi))
        trace.append(place(*trace[-3:], BOND_CA_C, ANGLE_N_CA_C, phi))
    trace = np.array(trace).reshape(-1, 3, 3)
    oxygens = [place(*residue, BOND_C_O, ANGLE_CA_C_O, psi + np.pi) for residue in trace[:length]]
    backbone = np.concatenate([trace[:length], np.array(oxygens)[:, None]], axis=1)
    turn = 4 if kind == "helix" else 2
    smooth = np.stack([np.convolve(backbone[:, 1, k], np.ones(turn) / turn, mode="valid") for k in range(3)], -1)
    axis = smooth[-1] - smooth[0]
    # Carbonyls of a strand point to either side in turn.
    sides = (-1.0) ** np.arange(length) if kind == "strand" else np.eye(length)[0]
    across = ((backbone[:, 3] - backbone[:, 2]) * sides[:, None]).sum(0)
    return (backbone - smooth.mean(0)) @ _frame(axis, across)


def _frame(direction: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Orthonormal columns x, y, z with z along ``direction`` and x along ``across`` as far as that allows."""
    z = direction / np.linalg.norm(direction)
    x = across - (across @ z) * z
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=1)


def _chain(rng: np.random.Generator, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """Backbone (residues, 4, 3) of segments joined by loops, and the kind of every residue."""
    placed = [
        _ideal_backbone(segment.kind, segment.length) @ _frame(segment.direction, segment.across).T + segment.centre
        for segment in segments
    ]
    pieces, kinds = [placed[0]], [segments[0].kind] * len(placed[0])
    for segment, before, after in zip(segments[1:], placed, placed[1:], strict=False):
        loop = np.full((_loop_length(before, after), 4, 3), np.nan)
        loop[:, 1] = _loop_start(before[:, 1], after[:, 1], len(loop)) + rng.normal(0, 0.2, (len(loop), 3))
        pieces += [loop, after]
        kinds += ["loop"] * len(loop) + [segment.kind] * len(after)
    backbone, kinds = np.concatenate(pieces), np.array(kinds)
    _relax_loops(backbone[:, 1], kinds == "loop")
    _join_peptides(backbone, kinds)
    return backbone, kinds


def _loop_length(before: np.ndarray, after: np.ndarray) -> int:
    """Residues that span two segments with some slack."""
    return 2 + int(np.ceil(np.linalg.norm(after[0, 1] - before[-1, 1]) / CA_DISTANCE_A))


def _loop_start(before: np.ndarray, after: np.ndarray, length: int) -> np.ndarray:
    """Points (length, 3) on a cubic that leaves one segment and enters the next along their ends."""
    leave, enter = before[-1] - before[-4], after[3] - after[0]
    start, end = before[-1], after[0]
    reach = 8.0 / np.linalg.norm(leave), 8.0 / np.linalg.norm(enter)
    control = np.stack([start, start + reach[0] * leave, end - reach[1] * enter, end])
    t = (np.arange(length) + 1.0)[:, None] / (length + 1)
    return np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3]) @ control


def _relax_loops(trace: np.ndarray, loop: np.ndarray, steps: int = 600) -> None:
    """Move the CA atoms of loops, in place, until they are 3.8 A apart along the chain and clear of all others.

    Steepest descent on three quadratic penalties: distance to the next CA other than 3.8 A, to the one after it
    above 7.2 A (angles stay in the range of proteins), and to any other CA below 5 A.
    """
    number = len(trace)
    separation = np.abs(np.subtract.outer(np.arange(number), np.arange(number)))
    nearest = np.where(separation <= 1, 0.0, 5.0)[loop]
    for _ in range(steps):
        push = np.zeros_like(trace)
        bond = np.diff(trace, axis=0)
        length = np.linalg.norm(bond, axis=1, keepdims=True)
        pull = bond * (length - CA_DISTANCE_A) / length
        push[:-1] += pull
        push[1:] -= pull
        span = trace[2:] - trace[:-2]
        length = np.linalg.norm(span, axis=1, keepdims=True)
        pull = 0.3 * span * np.maximum(length - 7.2, 0) / length
        push[:-2] += pull
        push[2:] -= pull
        offset = trace[loop][:, None] - trace[None]
        distance = np.linalg.norm(offset, axis=-1)
        overlap = np.maximum(nearest - distance, 0)
        push[loop] += 0.3 * (offset * (overlap / np.maximum(distance, 1e-6))[..., None]).sum(1)
        trace[loop] += np.clip(0.4 * push[loop], -0.5, 0.5)


def _join_peptides(backbone: np.ndarray, kinds: np.ndarray) -> None:
    """Fill in C, O and N between CA atoms wherever one of them is in a loop, in place.

    A peptide is planar and fixed in shape; its turn about the CA-CA line is the one, of 36, that gives
    N-CA-C the angle nearest to tetrahedral and keeps its oxygen clear of the trace.
    """
    flat = _flat_peptide()
    trace = backbone[:, 1]
    for i in np.flatnonzero((kinds[:-1] == "loop") | (kinds[1:] == "loop")):
        frame = _frame(trace[i + 1] - trace[i], np.array([0.3, 0.5, 0.8]))
        best = None
        for angle in np.arange(36) * (np.pi / 18):
            across = frame[:, 0] * np.cos(angle) + frame[:, 1] * np.sin(angle)
            carbon, oxygen, nitrogen = trace[i] + np.outer(flat[:, 0], frame[:, 2]) + np.outer(flat[:, 1], across)
            cost = _bend(backbone[i, 0], trace[i], carbon) + _bend(nitrogen, trace[i + 1], backbone[i + 1, 2])
            distance = np.linalg.norm(np.delete(trace, [i, i + 1], axis=0) - oxygen, axis=1)
            cost += (np.maximum(3.6 - distance, 0) ** 2).sum()
            if best is None or cost < best[0]:
                best = (cost, carbon, oxygen, nitrogen)
        _, backbone[i, 2], backbone[i, 3], backbone[i + 1, 0] = best
    # The ends of a chain lie in segments, so every loop atom has been set.
    assert np.isfinite(backbone).all()


def _bend(first: np.ndarray, middle: np.ndarray, last: np.ndarray) -> float:
    """Squared deviation of an angle from N-CA-C's, in units of 10 degrees; 0 if an atom is not known yet."""
    if np.isnan(first).any() or np.isnan(last).any():
        return 0.0
    u, v = first - middle, last - middle
    angle = np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1))
    return ((angle - ANGLE_N_CA_C) / np.radians(10.0)) ** 2


def _flat_peptide() -> np.ndarray:
    """C, O and the next N of a trans peptide, (3, 2): A along the line between its CA atoms, and across it."""
    ca, carbon = np.array([0.0, 0, 0]), np.array([BOND_CA_C, 0, 0])
    side = np.array([0.0, 1.0, 0])
    nitrogen = place(side, ca, carbon, BOND_C_N, ANGLE_CA_C_N, np.pi)
    oxygen = place(side, ca, carbon, BOND_C_O, ANGLE_CA_C_O, 0.0)
    following = place(ca, carbon, nitrogen, BOND_N_CA, ANGLE_C_N_CA, np.pi)
    along = following / np.linalg.norm(following)
    across = np.array([-along[1], along[0], 0])
    # The real CA-CA distance is 3.80 A; a relaxed loop differs by a few hundredths.
    return np.array([[atom @ along, atom @ across] for atom in (carbon, oxygen, nitrogen)])


# The complex


def _assemble(rng: np.random.Generator, chains: list) -> list:
    """Chains pushed against what is there already, from sides that share no symmetry.

    Each is turned in the way, of a few drawn at random, that lets it come nearest.
    """
    placed = []
    for (backbone, kinds), direction in zip(chains, APPROACHES, strict=True):
        backbone = backbone - backbone[:, 1].mean(0)
        if placed:
            there = np.concatenate([other[:, 1] for other, _ in placed])
            turned = [backbone @ _random_rotation(rng).T for _ in range(ORIENTATIONS_TRIED)]
            distances = [_touching_distance(there - there.mean(0), chain[:, 1], direction) for chain in turned]
            nearest = int(np.argmin(distances))
            backbone = turned[nearest] + there.mean(0) + distances[nearest] * direction
        placed.append((backbone, kinds))
    return placed


def _touching_distance(there: np.ndarray, coming: np.ndarray, direction: np.ndarray) -> float:
    """How far out along ``direction``, in its lengths, the CA atoms ``coming`` have to stay from those ``there``."""
    length = np.linalg.norm(direction)
    offset = (coming[:, None] - there[None]).reshape(-1, 3)
    along = offset @ direction / length
    across2 = (offset**2).sum(1) - along**2
    # A pair is too near between the two points where the line meets the sphere of the gap; the outer one counts.
    meets = across2 < SUBUNIT_GAP_A**2
    return float(np.max(np.sqrt(SUBUNIT_GAP_A**2 - across2[meets]) - along[meets], initial=0.0) / length)


def _with_side_chains(rng: np.random.Generator, chains: list) -> Atoms:
    """All atoms: backbones, and side chains in the rotamers that collide least."""
    backbone = np.concatenate([chain for chain, _ in chains])
    kinds = np.concatenate([kind for _, kind in chains])
    # A number is left out at each chain's end.
    numbers = np.concatenate([np.arange(len(chain)) + 1 for chain, _ in chains])
    starts = np.cumsum([0] + [len(chain) + 1 for chain, _ in chains[:-1]])
    numbers += np.repeat(starts, [len(chain) for chain, _ in chains])
    positions, names, residues = backbone.reshape(-1, 3), ["N", "CA", "C", "O"] * len(backbone), np.repeat(numbers, 4)
    for atoms, kind, number in zip(backbone, kinds, numbers, strict=True):
        label = COMPOSITION[kind][rng.integers(len(COMPOSITION[kind]))]
        more_names, more = side_chain(rng, label, atoms, positions[residues != number])
        positions = np.concatenate([positions, more])
        names += more_names
        residues = np.append(residues, [number] * len(more)).astype(int)
    order = np.argsort(residues, kind="stable")
    positions, names, residues = positions[order], np.array(names)[order], residues[order]
    positions -= positions.mean(0)
    loops = np.isin(residues, numbers[kinds == "loop"])
    side = ~np.isin(names, ["N", "CA", "C", "O"])
    b_factors = 25 + 0.5 * np.linalg.norm(positions, axis=1) + 10 * loops + 5 * side
    return Atoms(positions, np.array([name[0] for name in names]), b_factors, names, residues)
