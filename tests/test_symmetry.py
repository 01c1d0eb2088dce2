"""Point groups are groups, lie in the map as RELION's do, and symmetrise a reconstruction from the views R S."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryosplat.errors import InputError
from cryosplat.symmetry import fold, operators, point_group, split
from cryosplat.volumes import read_map, write_map

NAMES = ("C1", "C2", "C3", "C7", "D1", "D2", "D3", "D7", "T", "O", "I", "I1", "I2", "I3", "I4")
ORDERS = {"C1": 1, "C2": 2, "C7": 7, "C99": 99, "D1": 2, "D2": 4, "D7": 14, "D99": 198, "T": 12, "O": 24}
ORDERS |= {name: 60 for name in ("I", "I1", "I2", "I3", "I4")}


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest distance of a rotation of either set (K, 3, 3) from the nearest of the other set."""
    apart = np.abs(one[:, None] - other[None]).max((2, 3))
    return max(apart.min(0).max(), apart.min(1).max())


def lumps(extent: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres (5, 3) as (x, y, z) up to ``extent`` voxels from the middle, and weights, of a map without symmetry."""
    rng = np.random.default_rng(4)
    return rng.uniform(-extent, extent, (5, 3)), rng.uniform(0.5, 1.5, 5)


def blobs(box: int, extent: float, rotations: np.ndarray) -> np.ndarray:
    """(box, box, box): the mean over S of V(S x), V the lumps as round Gaussians, a fifth of the extent wide."""
    axis = np.arange(box) - box // 2
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    volume = np.zeros((box, box, box))
    for rotation in rotations:
        centres, weights = lumps(extent)
        for centre, weight in zip(centres @ rotation, weights, strict=True):  # S^T m, where |S x - m| is zero
            squares = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2
            volume += weight * np.exp(-squares / (2 * (extent / 5) ** 2)) / len(rotations)
    return volume


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.mark.parametrize("name", ORDERS)
def test_each_is_a_group_of_rotations_of_its_order_with_the_identity_first(name):
    group = point_group(name)
    assert group.shape == (ORDERS[name], 3, 3) and group.dtype == np.float64
    assert np.array_equal(group[0], np.eye(3))
    assert np.abs(group @ group.transpose(0, 2, 1) - np.eye(3)).max() < 1e-12
    assert np.linalg.det(group) == pytest.approx(1)
    assert distance(group, group.transpose(0, 2, 1)) < 1e-12
    for member in group:
        assert distance(group @ member, group) < 1e-12
    apart = np.abs(group[:, None] - group[None]).max((2, 3)) + np.eye(len(group))
    assert apart.min() > 0.01  # none is there twice


def test_names_are_read_in_upper_and_lower_case():
    assert np.array_equal(point_group("d7"), point_group("D7")) and np.array_equal(point_group("i"), point_group("I2"))


@pytest.mark.parametrize("name", ["", "C", "C0", "D0", "C100", "I5", "T1", "Ci", "C3v", "C-2", "7", "C2.0"])
def test_what_is_no_point_group_is_refused_with_those_there_are(name):
    with pytest.raises(InputError, match=re.escape(f"symmetry {name!r}: expected C<n> or D<n>")) as refusal:
        point_group(name)
    assert all(word in str(refusal.value) for word in ("99", "T, O, I, I1, I2, I3", "I4"))


@pytest.mark.parametrize(
    "name, fold, axis",
    [
        ("D5", 5, (0, 0, 1)), ("D5", 2, (1, 0, 0)), ("T", 3, (0, 0, 1)), ("T", 2, (0, 2**0.5, 1)), ("O", 4, (0, 1, 0)),
        ("O", 3, (1, 1, 1)), ("I1", 5, (1.618034, 0, 1)), ("I2", 5, (0, 1.618034, 1)), ("I2", 3, (1, 1, 1)),
        ("I3", 5, (0, 0, 1)), ("I3", 5, (-2, 0, 1)), ("I4", 5, (2, 0, 1)),
    ],
)  # fmt: skip
def test_the_axes_are_where_they_are_said_to_be(name, fold, axis):
    turn = Rotation.from_rotvec(2 * np.pi / fold * np.array(axis) / np.linalg.norm(axis)).as_matrix()
    assert np.abs(point_group(name) - turn).max((1, 2)).min() < 1e-6


def test_a_map_with_the_symmetry_looks_the_same_from_r_and_from_r_s_but_not_from_s_r():
    group, view = point_group("D3"), Rotation.random(random_state=2).as_matrix()
    centres = np.random.default_rng(1).normal(size=(4, 3))
    mixture = np.concatenate([centres @ member for member in group])  # points of a map with V(S x) = V(x)

    def seen(rotation):
        image = (mixture @ rotation.T)[:, :2]
        return image[np.lexsort(image.round(6).T)]

    for member in group[1:]:
        np.testing.assert_allclose(seen(view @ member), seen(view), atol=1e-5)
        assert np.abs(seen(member @ view) - seen(view)).max() > 0.1


@pytest.mark.parametrize(
    ("name", "views"), [("C1", 1), ("C7", 7), ("C8", 2), ("D4", 1), ("D7", 7), ("T", 12), ("O", 1), ("I1", 5), ("I", 5)]
)
def test_a_group_splits_into_views_and_what_takes_a_grid_to_itself(name, views):
    first, on_grid = split(point_group(name))
    assert len(first) == views and np.array_equal(on_grid, on_grid.round())
    products = (first[:, None] @ on_grid).reshape(-1, 3, 3)
    assert len(products) == len(point_group(name)) and distance(products, point_group(name)) < 1e-9


@pytest.mark.parametrize("name", ["C2", "D7", "O", "I"])
def test_copies_of_a_position_fold_to_the_same_one(name):
    group, positions = point_group(name), np.random.default_rng(0).normal(size=(50, 3))
    folded = fold(positions, group)
    for member in group:
        np.testing.assert_allclose(fold(positions @ member.T, group), folded, atol=1e-9)
    of_each = [
        np.abs(group @ position - target).max(1).min() for position, target in zip(positions, folded, strict=True)
    ]
    assert max(of_each) < 1e-9  # each is a copy of its own


def test_a_group_of_the_identity_alone_is_nothing_to_do():
    assert operators("C1") is None and operators("D1").shape == (2, 3, 3)


@pytest.mark.parametrize("name", ["C3", "D2", "T"])
def test_entering_every_particle_in_all_views_r_s_averages_the_map_over_its_turned_copies(name):
    none, group = np.eye(3)[None], point_group(name)
    symmetric, asymmetric = blobs(32, 5, group), blobs(32, 5, none)
    assert correlation(symmetric, asymmetric) < 0.9
    assert correlation(back_projection(group, lambda view: view @ group), symmetric) > 0.995  # one that has it stays
    # 300 views are not quite evenly spread over the slices that fall on a voxel: 0.98.
    assert correlation(back_projection(none, lambda view: view @ group), symmetric) > 0.97
    assert correlation(back_projection(none, lambda view: group @ view), symmetric) < 0.9
    assert correlation(back_projection(none, lambda view: view @ none), asymmetric) > 0.995


def back_projection(rotations: np.ndarray, entered, box: int = 32, extent: float = 5) -> np.ndarray:
    """The map ``blobs(box, extent, rotations)`` again from 300 slices, each the exact transform under a view R, entered
    at the nearest frequencies under the views ``entered(R)`` (K, 3, 3); no noise, no CTF."""
    total, count = np.zeros((box,) * 3, dtype=complex), np.zeros((box,) * 3)
    ky, kx = np.meshgrid(*[np.arange(-box // 2 + 1, box // 2)] * 2, indexing="ij")
    plane = np.stack([kx, ky, 0 * kx], -1)[np.hypot(kx, ky) < box / 2 - 1]  # (x, y, z)
    lump = np.exp(-2 * (np.pi * extent / 5 / box) ** 2 * (plane**2).sum(-1))
    centres, weights = lumps(extent)
    centres = np.concatenate([centres @ rotation for rotation in rotations])
    weights = np.tile(weights, len(rotations))
    for view in Rotation.random(300, random_state=3).as_matrix():
        values = lump * (np.exp(-2j * np.pi / box * (plane @ view) @ centres.T) @ weights)
        for rotation in entered(view):
            voxels = tuple((np.rint(plane @ rotation).astype(int) + box // 2)[:, ::-1].T)  # R^T k, as [z, y, x]
            np.add.at(total, voxels, values)
            np.add.at(count, voxels, 1)
    return np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(total / np.maximum(count, 1)))).real


# RELION itself


def relion(program: str, *arguments, cwd=None) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} of RELION, which is not installed here")
    ended = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_rotations_are_those_that_relion_prints(name):
    printed = relion("relion_refine", "--sym", name, "--print_symmetry_ops")
    rows = [line.split() for line in printed.splitlines() if re.fullmatch(r"(\s*[-+.\de]+){3}\s*", line)]
    theirs = np.array(rows, dtype=float).reshape(-1, 3, 3)
    assert len(theirs) == len(point_group(name))
    assert distance(point_group(name), theirs) < 1e-5  # RELION's own five digits


@pytest.mark.parametrize("name", ["C3", "D3", "T", "O", "I", "I1", "I3", "I4"])
def test_relion_symmetrises_a_map_to_the_mean_over_these_rotations(tmp_path, name):
    box, extent = 40, 8
    write_map(tmp_path / "map.mrc", blobs(box, extent, np.eye(3)[None]), 2.0)
    relion(
        "relion_image_handler", "--i", tmp_path / "map.mrc", "--o", tmp_path / "symmetric.mrc",
        "--sym", name, "--angpix", 2,
    )  # fmt: skip
    theirs, ours = read_map(tmp_path / "symmetric.mrc")[0], blobs(box, extent, point_group(name))
    assert correlation(theirs, ours) > 0.999  # RELION interpolates
    others = [other for other in ("C3", "D3", "T", "O", "I1", "I2", "I3", "I4") if other not in (name, name + "2")]
    assert max(correlation(theirs, blobs(box, extent, point_group(other))) for other in others) < 0.99
