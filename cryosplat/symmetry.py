"""Point groups: the rotations under which a particle looks the same, in RELION's axes."""

import numpy as np

from cryosplat.errors import InputError
from cryosplat.pointgroups import KNOWN, canonical

ROUNDING = 1e-6
"""Entries nearer than this are the same rotation; the closest two of C99 are 0.06 apart."""

_GOLDEN = (1 + 5**0.5) / 2

# Two rotations (fold, axis) that generate each group. Any two that are not in a common smaller group would do; these
# show how the group lies in the map, and agree with the operators that relion_refine --print_symmetry_ops prints.
_GENERATORS = {
    "T": ((3, (0, 0, 1)), (2, (0, 2**0.5, 1))),
    "O": ((4, (0, 0, 1)), (4, (1, 0, 0))),
    "I1": ((2, (0, 0, 1)), (5, (_GOLDEN, 0, 1))),
    "I2": ((2, (0, 0, 1)), (5, (0, _GOLDEN, 1))),
    "I3": ((5, (0, 0, 1)), (5, (2, 0, -1))),
    "I4": ((5, (0, 0, 1)), (5, (2, 0, 1))),
}

_DIRECTION = np.array([0.842, 0.229, 0.489])


def point_group(name: str) -> np.ndarray:
    """The rotations of a point group.

    Axes are RELION's, in the map's x, y, z; all go through voxel D // 2:

    - C<n>, n = 1 to 99: n-fold about z. D<n>: n-fold about z and a two-fold about x.
    - T: a three-fold about z and a two-fold in the plane x = 0, at atan(sqrt 2) = 54.7 degrees from +z towards +y.
    - O: four-folds about x, y, z.
    - I1, I2: two-folds about x, y, z. The five-folds next to z lie in the plane y = 0 for I1 and in x = 0 for I2.
    - I3, I4: a five-fold about z; another at 63.4 degrees from +z towards -x for I3, towards +x for I4.
    - I: I2, as RELION takes it.

    A map V with the symmetry has V(S x) = V(x) for every S returned, where S acts as a matrix on the column x = (x, y,
    z) from the centre. Then a particle with x_image = R x_volume looks the same in every view R S, since the projection
    under R S is that of V(S^T R^T .) = V(R^T .). So a reconstruction is symmetrised by entering every particle K times,
    with the rotations R S (S first, in the frame of the map; S R would turn the image instead) and its own shift. In
    Fourier space its slice then goes to (R S)^T (kx, ky, 0) = S^T R^T (kx, ky, 0), and for evenly spread views the
    result is the map averaged over its turned copies, (1/K) sum_S V(S x).

    Args:
        name: as above, in upper or lower case.

    Returns:
        float64 (K, 3, 3), the identity first; K is n for C<n>, 2n for D<n>, 12 for T, 24 for O, 60 for I. The rotations
        are a group: products and transposes of members are members.

    Raises:
        InputError: another name.

    >>> point_group("D7").shape, point_group("C2")[1].round(12).diagonal().tolist()
    ((14, 3, 3), [-1.0, -1.0, 1.0])
    """
    generators = [_turn(fold, axis) for fold, axis in _generators(name)]
    group = [np.eye(3)]
    for member in group:  # which grows meanwhile, until all products are in it
        for product in (member @ generator for generator in generators):
            if np.abs(np.stack(group) - product).max((1, 2)).min() > ROUNDING:
                group.append(product)
    return np.stack(group)


def operators(name: str) -> np.ndarray | None:
    """The same, but None of a group that has the identity alone: what takes operators need then do nothing.

    Raises:
        InputError: another name.
    """
    group = point_group(name)
    return None if len(group) == 1 else group


def split(operators: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A group as products r h: h take a cubic grid to itself (quarter turns about its axes and what they make).

    Sums on a grid are symmetrised over the h without interpolation, so images need only be inserted in the views R r.
    Of D2, C4 or O that is one view an image; five of I1 and I2, which have two-folds about x, y, z; all of C7 or T.

    Args:
        operators: (K, 3, 3), all of a group.

    Returns:
        r (K/H, 3, 3) and h (H, 3, 3), the identity first in each.

    >>> [len(part) for part in split(point_group("I"))], [len(part) for part in split(point_group("C7"))]
    ([5, 12], [7, 1])
    """
    whole = np.abs(operators - np.rint(operators)).max((1, 2)) < ROUNDING
    on_grid, first = np.rint(operators[whole]), []
    for operator in operators:
        if not any(_among(before.T @ operator, on_grid) for before in first):
            first.append(operator)
    return np.stack(first), on_grid


def fold(positions: np.ndarray, operators: np.ndarray) -> np.ndarray:
    """Positions (N, 3) taken into one asymmetric unit: to where, of all their copies, they are nearest to a direction.

    The direction is on no axis of any group, so that the unit is one piece: the cone of what is nearer to it than to
    its copies.
    """
    copies = np.einsum("kij,nj->nki", operators, positions)
    return copies[np.arange(len(positions)), np.argmax(copies @ _DIRECTION, axis=1)]


def _among(one: np.ndarray, group: np.ndarray) -> bool:
    return bool(np.abs(group - one).max((1, 2)).min() < ROUNDING)


def _generators(name: str) -> tuple[tuple[int, tuple[float, float, float]], ...]:
    key = canonical(name)
    if key is None:
        raise InputError(f"symmetry {name!r}: expected {KNOWN}")
    if key in _GENERATORS:
        return _GENERATORS[key]
    about_z = (int(key[1:]), (0, 0, 1))
    return (about_z,) if key[0] == "C" else (about_z, (2, (1, 0, 0)))


def _turn(fold: int, axis: tuple[float, float, float]) -> np.ndarray:
    """Rotation (3, 3) by 1 / fold of a turn about an axis of any length, by Rodrigues' formula."""
    x, y, z = np.asarray(axis, dtype=np.float64) / np.linalg.norm(axis)
    across = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = 2 * np.pi / fold
    return np.eye(3) + np.sin(angle) * across + (1 - np.cos(angle)) * across @ across
