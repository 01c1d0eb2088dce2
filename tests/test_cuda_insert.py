"""The CUDA source of Fourier insertion computes what csrc/insert.h says: compiled for the host, and on a GPU if any."""

import itertools
import math
import mmap
from types import ModuleType

import hostcuda
import numpy as np
import pytest
import torch
from backends import needs_gpu
from insertion_reference import half_disc, insert_reference
from scipy.spatial.transform import Rotation

from cryosplat import cudaops
from cryosplat._extension import core

SCALARS = {"float32": (np.float32, np.complex64), "float64": (np.float64, np.complex128)}
WAYS = [pytest.param(False, id="scatter"), pytest.param(True, id="gather")]


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """The CUDA kernels, run on the host."""
    return hostcuda.load()


class Batch:
    """Random coefficients, weights and poses, rounded to a precision."""

    def __init__(self, seed: int, views: int, box: int, padded: int, grids: int, rotations=None, scalar="float64"):
        random = np.random.default_rng(seed)
        real, complex_ = SCALARS[scalar]
        self.scalar, self.grids, self.views, self.box, self.padded = scalar, grids, views, box, padded
        size = (views, box, box // 2 + 1)
        self.values = (random.normal(size=size) + 1j * random.normal(size=size)).astype(complex_)
        self.weights = random.uniform(0.1, 2, size).astype(real)
        if rotations is None:
            rotations = Rotation.random(views, random_state=seed).as_matrix() if views else np.zeros((0, 3, 3))
        self.rotations = np.ascontiguousarray(rotations, real)
        self.shifts = (random.normal(size=(views, 2)) * box / 8).astype(real)
        self.grid = random.integers(0, grids, views)
        self.before = random.normal(size=(grids, padded, padded, padded // 2 + 1, 4)).astype(real)

    @property
    def inputs(self) -> list[np.ndarray]:
        return [self.values, self.weights, self.rotations, self.shifts, self.grid]

    def truth(self) -> np.ndarray:
        n, d, g = insert_reference(*self.inputs, self.grids, self.padded)
        return np.stack([n.real, n.imag, d, g], axis=-1)


def insert(host: ModuleType, batch: Batch, deterministic: bool, backwards: bool = False) -> np.ndarray:
    """Accumulators afterwards. Around them lies memory that must stay as it was."""
    margin = 4096
    memory = np.full(batch.before.size + 2 * margin, 7, batch.before.dtype)
    inside = memory[margin:-margin].reshape(batch.before.shape)
    inside[...] = batch.before
    host.turn_round(backwards)
    launch(host, batch, inside.ctypes.data, deterministic)
    assert (memory[:margin] == 7).all() and (memory[-margin:] == 7).all()
    return inside


def launch(host: ModuleType, batch: Batch, to: int, deterministic: bool) -> None:
    """Insert into accumulators at an address."""
    shape = (batch.grids, batch.views, batch.box, batch.padded)
    addresses = (array.ctypes.data for array in batch.inputs)
    getattr(host, batch.scalar).insert(*shape, *addresses, to, deterministic, 0, 0)


def check(found: np.ndarray, batch: Batch) -> None:
    truth = batch.truth()
    error = np.abs(found - batch.before - truth)
    bound = {"float32": 1e-5, "float64": 1e-13}[batch.scalar]
    for part in (slice(0, 2), 2, 3):
        size = np.linalg.norm(truth[..., part])
        assert np.linalg.norm(error[..., part]) <= bound * (size + np.linalg.norm(batch.before[..., part]))
        # No single voxel may be wrong either, however large the grid. Positions of float lie within some 1e-5 voxels.
        assert error[..., part].max(initial=0) <= 30 * bound * (1 + np.abs(truth[..., part]).max(initial=0))


def cube_rotations() -> np.ndarray:
    """The 24 rotations with entries 0, 1 and -1: every point falls on an axis, a plane x = 0, or a voxel."""
    signed = [
        np.diag(signs)[:, order]
        for order in map(list, itertools.permutations(range(3)))
        for signs in itertools.product([1, -1], repeat=3)
    ]
    return np.array([matrix for matrix in signed if round(np.linalg.det(matrix)) == 1], float)


SIZES = [
    # D, P, V, K
    *[(2, 2, 33, 3), (2, 4, 32, 2), (4, 4, 31, 1), (4, 6, 33, 2), (4, 8, 1, 1)],
    *[(16, 16, 33, 3), (16, 22, 32, 2), (16, 32, 31, 1), (30, 30, 32, 2), (30, 44, 33, 1), (30, 60, 5, 3)],
    *[(32, 32, 31, 1), (32, 50, 33, 2), (32, 64, 9, 2), (34, 34, 33, 2), (34, 50, 31, 1), (34, 68, 3, 3)],
    *[(64, 64, 33, 2), (64, 90, 2, 1), (64, 128, 2, 1)],
]


@pytest.mark.parametrize("deterministic", WAYS)
@pytest.mark.parametrize(("box", "padded", "views", "grids"), SIZES)
def test_every_size_agrees_with_the_reference_in_double_precision(host, box, padded, views, grids, deterministic):
    batch = Batch(box + padded, views, box, padded, grids)
    check(insert(host, batch, deterministic), batch)


@pytest.mark.parametrize("deterministic", WAYS)
@pytest.mark.parametrize(("box", "padded", "views", "grids"), [size for size in SIZES if size[0] in (2, 16, 30, 34)])
def test_single_precision_agrees_within_its_rounding(host, box, padded, views, grids, deterministic):
    batch = Batch(box + padded, views, box, padded, grids, scalar="float32")
    check(insert(host, batch, deterministic), batch)


@pytest.mark.parametrize("deterministic", WAYS)
@pytest.mark.parametrize("views", [0, 1, 31, 32, 33, 255, 256, 257, 600])
def test_every_number_of_views_agrees(host, views, deterministic):
    batch = Batch(views, views, 6, 12, 2)
    check(insert(host, batch, deterministic), batch)


@pytest.mark.parametrize("deterministic", WAYS)
def test_more_views_than_a_launch_has_layers_agree(host, deterministic):
    batch = Batch(1, 2100, 4, 4, 2)
    check(insert(host, batch, deterministic), batch)


@pytest.mark.parametrize("deterministic", WAYS)
@pytest.mark.parametrize("scalar", list(SCALARS))
@pytest.mark.parametrize(("box", "padded"), [(16, 16), (16, 32), (30, 44), (32, 64)])
def test_axis_aligned_poses_agree(host, box, padded, scalar, deterministic):
    batch = Batch(box, 24, box, padded, 2, cube_rotations(), scalar)
    check(insert(host, batch, deterministic), batch)


@pytest.mark.parametrize("scalar", list(SCALARS))
def test_gathering_gives_the_same_bits_in_any_order_of_threads_and_blocks_and_scattering_need_not(host, scalar):
    batch = Batch(5, 40, 16, 24, 2, scalar=scalar)
    gathered, scattered = (
        [insert(host, batch, way, backwards) for backwards in (False, True)] for way in (True, False)
    )
    np.testing.assert_array_equal(*gathered)
    # The orders do differ, so the line above could fail.
    assert (scattered[0] != scattered[1]).any()


def test_views_of_one_grid_leave_the_others_alone(host):
    batch = Batch(3, 20, 16, 32, 3)
    batch.grid[:] = 1
    for deterministic in (False, True):
        found = insert(host, batch, deterministic)
        np.testing.assert_array_equal(found[[0, 2]], batch.before[[0, 2]])
        check(found, batch)


@pytest.mark.parametrize("deterministic", WAYS)
def test_what_is_not_finite_shows_in_its_grid_and_in_no_other(host, deterministic):
    for spoil in ("values", "weights", "shifts", "rotations"):
        batch = Batch(1, 6, 8, 16, 2)
        batch.grid[:] = [0, 1, 0, 1, 0, 1]
        getattr(batch, spoil)[1] = np.nan
        found = insert(host, batch, deterministic)
        assert np.isnan(found[1]).any() and np.isfinite(found[0]).all(), spoil
        # Frequency zero is the voxel that everyone looks at.
        assert np.isnan(found[1, 0, 0, 0]).any(), spoil


@pytest.mark.parametrize("deterministic", WAYS)
def test_a_coefficient_that_falls_on_a_voxel_spoils_no_other(host, deterministic):
    batch = Batch(1, 1, 8, 8, 1, np.eye(3)[None])
    batch.values[0, 2, 3] = np.nan
    spoiled = np.argwhere(np.isnan(insert(host, batch, deterministic)).any(axis=-1))
    assert spoiled.tolist() == [[0, 0, 2, 3]]


@pytest.mark.parametrize("deterministic", WAYS)
@pytest.mark.parametrize("scale", [1.5, 1e9, np.inf])
def test_a_matrix_that_is_no_rotation_writes_nothing_outside(host, deterministic, scale):
    batch = Batch(1, 3, 8, 16, 1)
    with np.errstate(invalid="ignore"):
        batch.rotations *= scale
    assert np.isnan(insert(host, batch, deterministic)[0, 0, 0, 0]).any()


def test_an_address_that_vectors_cannot_use_is_refused_in_words(host):
    batch = Batch(1, 1, 4, 4, 1, scalar="float32")
    memory = np.zeros(batch.before.size + 8, np.float32)
    with pytest.raises(RuntimeError, match="divisible by 16"):
        launch(host, batch, memory.ctypes.data // 16 * 16 + 4, True)
    assert not memory.any()


def test_grids_of_more_than_two_billion_voxels_are_addressed(host):
    # P = 1400: the third grid begins at voxel 2.7e9. k = (1, 0) of a view along each axis falls on voxel 350 of it.
    padded, grids, far = 1400, 3, 350
    batch = Batch(1, 3, 4, 4, grids, np.eye(3)[[[0, 1, 2], [1, 2, 0], [2, 0, 1]]], "float32")
    batch.grid[:] = 2
    batch.shifts[:] = 0
    batch.values[...], batch.weights[...] = 0, 0
    batch.weights[:, 0, 1] = [2, 3, 5]
    size = (grids, padded, padded, padded // 2 + 1, 4)
    try:
        # MAP_NORESERVE: 66 GB of addresses, of which a few pages become memory.
        memory = mmap.mmap(-1, math.prod(size) * 4, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    except OSError as error:
        pytest.skip(f"the system lends no 66 GB of addresses: {error}")
    grid = np.frombuffer(memory, np.float32).reshape(size)
    batch.padded = padded
    launch(host, batch, grid.ctypes.data, False)
    found = [grid[2, 0, 0, far, 2], grid[2, 0, far, 0, 2], grid[2, far, 0, 0, 2]]
    assert found == [2, 3, 5]


def test_the_reference_takes_a_point_at_the_images_origin_to_a_point_at_the_centre():
    # A delta function at D/2 - t: n = d, real, whatever the pose; and d is the density of the half-disc's points.
    batch = Batch(0, 7, 16, 32, 1)
    kx, ky = np.arange(9), np.fft.fftfreq(16, 1 / 16)[:, None]
    origin = 8 - batch.shifts[:, :, None, None]
    batch.values = batch.weights * np.exp(-2j * np.pi * (kx * origin[:, 0] + ky * origin[:, 1]) / 16)
    n, d, g = insert_reference(*batch.inputs, 1, 32)
    np.testing.assert_allclose(n, d, atol=1e-12)
    inserted = half_disc(16)
    np.testing.assert_allclose(d.sum(), batch.weights[:, inserted[1] % 16, inserted[0]].sum())
    np.testing.assert_allclose(g.sum(), 7 * len(inserted[0]))  # every coefficient of every view once


def test_the_reference_is_the_adjoint_of_slicing_a_hermitian_grid():
    # <insert(y), V> = <y, slice(V)> with V sampled by trilinear interpolation of the transform of a real volume.
    batch = Batch(2, 3, 12, 24, 1)
    volume = np.random.default_rng(0).normal(size=(24, 24, 24))
    whole = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(volume)))
    n = insert_reference(*batch.inputs, 1, 24)[0][0]
    kx, ky = half_disc(12)
    inner = 0
    for view, rotation in enumerate(batch.rotations):
        q = 2 * np.stack([kx, ky, 0 * kx], axis=1) @ rotation
        low = np.floor(q).astype(int)
        sampled = np.zeros(len(kx), complex)
        for corner in np.ndindex(2, 2, 2):
            t = np.abs(1 - np.array(corner) - (q - low)).prod(axis=1)
            at = (low + corner + 12) % 24
            sampled += t * whole[at[:, 2], at[:, 1], at[:, 0]]
        phase = np.exp(-2j * np.pi * (kx * (6 - batch.shifts[view, 0]) + ky * (6 - batch.shifts[view, 1])) / 12)
        inner += (batch.values[view, ky % 12, kx].conj() * sampled * phase).sum().real
    half = np.fft.ifftshift(whole)[:, :, :13]
    np.testing.assert_allclose((n.conj() * half).sum().real, inner)


@needs_gpu
@pytest.mark.parametrize("deterministic", WAYS)
@pytest.mark.parametrize("scalar", list(SCALARS))
def test_the_gpu_agrees_with_the_reference(scalar, deterministic):
    for box, padded, views, grids in [*SIZES, (6, 12, 0, 1), (6, 12, 600, 2), (64, 128, 257, 2)]:
        batch = Batch(box + padded, views, box, padded, grids, scalar=scalar)
        check(insert_on_gpu(batch, deterministic), batch)
    batch = Batch(24, 24, 32, 64, 2, cube_rotations(), scalar)
    check(insert_on_gpu(batch, deterministic), batch)


@needs_gpu
@pytest.mark.parametrize("scalar", list(SCALARS))
def test_the_gpu_gathers_the_same_bits_twice(scalar):
    batch = Batch(9, 300, 32, 64, 2, scalar=scalar)
    np.testing.assert_array_equal(insert_on_gpu(batch, True), insert_on_gpu(batch, True))


def insert_on_gpu(batch: Batch, deterministic: bool) -> np.ndarray:
    arrays = [torch.from_numpy(array).cuda() for array in (*batch.inputs, batch.before)]
    getattr(core.cuda, batch.scalar).insert(
        *(batch.grids, batch.views, batch.box, batch.padded),
        *(array.data_ptr() for array in arrays),
        deterministic,
        *cudaops.queue_of(arrays[0]),
    )
    return arrays[-1].cpu().numpy()
