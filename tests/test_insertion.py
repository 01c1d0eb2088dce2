"""Fourier insertion on this CPU through ops.insert: against the reference, as an adjoint, and whom it blames."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from insertion_reference import half_disc, insert_reference
from scipy.spatial.transform import Rotation

from cryosplat import ops
from cryosplat._extension import HAS_CUDA, core
from cryosplat.errors import InputError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}  # relative L2 of n, d and g
DTYPES = tuple(TOLERANCE)
SIZES = [
    # D, P, V, K
    *[(2, 2, 33, 3), (2, 4, 31, 1), (4, 4, 31, 2), (4, 6, 33, 1), (4, 8, 0, 2), (6, 6, 33, 2), (6, 8, 1, 1)],
    *[(6, 12, 31, 3), (16, 16, 33, 3), (16, 22, 31, 1), (16, 32, 1, 2), (30, 30, 33, 1), (30, 44, 1, 2)],
    *[(30, 60, 31, 1), (32, 32, 31, 2), (32, 50, 0, 1), (32, 64, 33, 3), (34, 34, 1, 3), (34, 50, 31, 2)],
    *[(34, 68, 33, 1), (64, 64, 31, 2), (64, 90, 1, 1), (64, 128, 33, 2)],
]
NAMES = ("values", "weights", "rotations", "shifts", "grid")


@pytest.fixture(autouse=True)
def threads():
    """Restores torch's number of threads; tests run on one unless they say otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(box: int, views: int, grids: int, rotations: np.ndarray | None = None, seed: int = 0) -> dict:
    """Random arguments of ops.insert in float64, without sums; a tenth of the weights is 0."""
    random = np.random.default_rng([seed, box, views])
    size = (views, box, box // 2 + 1)
    if rotations is None:
        rotations = Rotation.random(views, random_state=seed).as_matrix() if views else np.zeros((0, 3, 3))
    weights = random.uniform(0.1, 2, size) * (random.random(size) > 0.1)
    values = weights * (random.normal(size=size) + 1j * random.normal(size=size))
    shifts, grid = random.normal(0, box / 8, (views, 2)), random.integers(0, grids, views)
    return dict(zip(NAMES, map(torch.from_numpy, (values, weights, rotations, shifts, grid)), strict=True))


def cast(case: dict, dtype: torch.dtype) -> dict:
    kinds = {torch.float64: dtype, torch.complex128: dtype.to_complex(), torch.int64: torch.int64}
    return {name: value.to(kinds[value.dtype]) for name, value in case.items()}


def empty(grids: int, padded: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(grids, padded, padded, padded // 2 + 1, 4, dtype=dtype)


def inserted(case: dict, grids: int, padded: int) -> torch.Tensor:
    sums = empty(grids, padded, case["weights"].dtype)
    ops.insert(**case, sums=sums)
    return sums


def assert_agrees(sums: torch.Tensor, case: dict, dtype: torch.dtype) -> None:
    grids, padded = sums.shape[:2]
    n, d, g = insert_reference(*(value.numpy() for value in case.values()), grids, padded)
    sums = sums.double().numpy()
    found = {"n": sums[..., 0] + 1j * sums[..., 1], "d": sums[..., 2], "g": sums[..., 3]}
    for name, expected in (("n", n), ("d", d), ("g", g)):
        error = np.linalg.norm(found[name] - expected)
        assert error <= TOLERANCE[dtype] * np.linalg.norm(expected), f"{name} of {tuple(sums.shape)}"


def cube_rotations() -> np.ndarray:
    """The 24 rotations of a cube: every point falls on a voxel or between two, many on the plane x = 0."""
    return Rotation.create_group("O").as_matrix().round(12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("box", "padded", "views", "grids"), SIZES)
def test_every_size_agrees_with_the_reference(box, padded, views, grids, dtype, threads):
    threads(1 + views % 3)
    # Rounded first: a pose in single precision is a pose like any other.
    case = cast(draw(box, views, grids), dtype)
    assert_agrees(inserted(case, grids, padded), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("box", "padded"), [(6, 12), (16, 16), (16, 22), (32, 64)])
def test_axis_aligned_poses_agree(box, padded, dtype):
    case = cast(draw(box, 24, 2, cube_rotations()), dtype)
    assert_agrees(inserted(case, 2, padded), case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slice_next_to_an_axis_is_one_slice_still(dtype):
    """Poses a rounding away from the axes: points scatter to both sides of x = 0, y = 0, z = 0 and of the slabs."""
    tilts = Rotation.from_rotvec(np.random.default_rng(0).normal(0, 1e-7, (24, 3))).as_matrix()
    case = cast(draw(16, 24, 1, cube_rotations() @ tilts), dtype)
    sums = inserted(case, 1, 32)
    kx, ky = half_disc(16)
    seen = (case["weights"][:, ky % 16, kx] != 0).sum().item()
    assert sums[..., 3].sum().item() == pytest.approx(seen, rel=1e-6)
    assert_agrees(sums, case, dtype)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_passes(isa):
    if isa == core.instruction_set():
        pytest.skip(f"{isa} is what the other tests of this process run on")
    environment = {**os.environ, "CRYOSPLAT_ISA": isa, "OMP_NUM_THREADS": "1"}
    here = Path(__file__).resolve()
    run = functools.partial(subprocess.run, cwd=here.parents[1], env=environment, capture_output=True, text=True)
    print_set = "from cryosplat._extension import core; print(core.instruction_set())"
    if run([sys.executable, "-c", print_set], check=True).stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}, or CRYOSPLAT_ISA forbids it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(here)]
    done = run([*command, "-k", "agree or slice or bitwise"])
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_bitwise_equal_for_any_number_of_threads(dtype, threads):
    cases = [(cast(draw(32, 33, 3), dtype), 3, 64), (cast(draw(30, 31, 1), dtype), 1, 44)]
    one = [inserted(*case) for case in cases]
    for count in (2, 3):
        threads(count)
        for case, expected in zip(cases, one, strict=True):
            assert torch.equal(inserted(*case), expected)


@pytest.mark.parametrize(("box", "padded", "dtype"), [(64, 128, torch.float32), (56, 112, torch.float64)])
def test_results_are_bitwise_equal_where_the_first_slab_meets_the_last(box, padded, dtype, threads):
    """Three slabs: the highest plane of the last is the lowest of the first. Views that reach it, from both sides."""
    random = np.random.default_rng(0)
    kx, ky = half_disc(box)
    farthest = np.argmax(kx**2 + ky**2)  # whose direction in the image is to be the map's z axis
    sine, cosine = np.array([ky[farthest], kx[farthest]]) / np.hypot(ky[farthest], kx[farthest])
    pose = np.array([[0, -sine, cosine], [0, cosine, sine], [-1, 0, 0]])
    either_end = np.array([np.eye(3), np.diag([1, -1, -1])])[random.integers(0, 2, 64)]
    tilts = Rotation.from_rotvec(random.normal(0, 0.01, (64, 3))).as_matrix()
    case = cast(draw(box, 64, 1, pose @ either_end @ tilts), dtype)
    one = inserted(case, 1, padded)
    assert (one[0, padded // 2, ..., 3] > 0).sum() > 3
    assert_agrees(one, case, dtype)
    for count in (2, 3) * 5:  # threads that meet differ by chance
        threads(count)
        assert torch.equal(inserted(case, 1, padded), one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_calls_add_up_to_one(dtype):
    case = cast(draw(16, 33, 2), dtype)
    sums = empty(2, 32, dtype)
    for part in (slice(0, 20), slice(20, None)):
        ops.insert(**{name: value[part] for name, value in case.items()}, sums=sums)
    torch.testing.assert_close(sums, inserted(case, 2, 32), rtol=0, atol=sums.abs().max().item() * TOLERANCE[dtype])


def test_views_of_one_grid_leave_the_others_alone():
    case = draw(16, 9, 1)
    case["grid"][:] = 1
    sums = inserted(case, 3, 32)
    assert sums[1].any() and not sums[[0, 2]].any()


def test_insertion_is_the_adjoint_of_trilinear_slicing():
    """<insert(y), F> = <y, slice(F)>, F the transform of a real volume, sampled between eight voxels of the grid."""
    box, padded = 12, 24
    case = draw(box, 5, 1)
    volume = np.random.default_rng(0).normal(size=(padded,) * 3)
    transform = np.fft.fftn(volume)
    sums = inserted(case, 1, padded)[0].numpy()
    ours = ((sums[..., 0] - 1j * sums[..., 1]) * transform[..., : padded // 2 + 1]).sum().real
    kx, ky = half_disc(box)
    product = 0
    for values, rotation, shift in zip(
        *(case[name].numpy() for name in ("values", "rotations", "shifts")), strict=True
    ):
        points = padded / box * (np.outer(kx, rotation[0]) + np.outer(ky, rotation[1]))
        low = np.floor(points).astype(int)
        sampled = np.zeros(len(kx), complex)
        for corner in np.ndindex(2, 2, 2):
            share = np.prod(np.where(corner, points - low, 1 - (points - low)), axis=1)
            x, y, z = ((low + corner) % padded).T
            sampled += share * transform[z, y, x]
        # The volume's origin is seen at D // 2 - shift, and the image's phases refer to its first pixel.
        sampled *= np.exp(-2j * np.pi / box * (kx * (box // 2 - shift[0]) + ky * (box // 2 - shift[1])))
        product += (values[ky % box, kx].conj() * sampled).sum().real
    assert ours == pytest.approx(product, rel=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_that_is_no_rotation_shows_at_frequency_zero_of_its_grid_and_nowhere_else(dtype):
    for spoiled in (1.5, 1e9, np.inf, np.nan):
        case = cast(draw(16, 4, 2), dtype)
        case["grid"][:] = torch.tensor([0, 1, 0, 0])
        case["rotations"][1] *= spoiled
        memory = torch.full((2 * 32 * 32 * 17 * 4 + 4096,), 7, dtype=dtype)
        sums = memory[2048:-2048].view(2, 32, 32, 17, 4).zero_()
        ops.insert(**case, sums=sums)
        assert (memory[:2048] == 7).all() and (memory[-2048:] == 7).all()
        assert sums[1, 0, 0, 0].isnan().all() and sums[0].isfinite().all()


def test_strided_and_conjugated_arguments_are_taken_as_they_are():
    case = draw(16, 9, 1)
    strided = {name: torch.stack((value, value), -1)[..., 1] for name, value in case.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    assert torch.equal(inserted(strided, 1, 32), inserted(case, 1, 32))
    lazily = case | {"values": case["values"].conj().clone().conj()}
    assert lazily["values"].is_conj()
    assert torch.equal(inserted(lazily, 1, 32), inserted(case, 1, 32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_passes(dtype):
    case = cast(draw(8, 3, 2), dtype)
    torch.library.opcheck(torch.ops.cryosplat.insert, (*case.values(), empty(2, 16, dtype)))


BAD_ARGUMENTS = {
    "real values": ("values", torch.ones(3, 8, 5), "values.*complex.*float32"),
    "values without views": ("values", torch.ones(8, 5, dtype=torch.complex64), r"values.*\(8, 5\)"),
    "values of an odd box": ("values", torch.ones(3, 7, 4, dtype=torch.complex64), r"values.*D even.*\(3, 7, 4\)"),
    "values of the whole plane": ("values", torch.ones(3, 8, 8, dtype=torch.complex64), r"values.*\(3, 8, 5\).*8, 8"),
    "weights in float64": ("weights", torch.ones(3, 8, 5, dtype=torch.float64), "weights.*float32.*float64"),
    "one weight for all": ("weights", torch.ones(8, 5), r"weights.*\(3, 8, 5\).*\(8, 5\)"),
    "weights elsewhere": ("weights", torch.ones(3, 8, 5, device="meta"), "weights.*cpu.*meta"),
    "one rotation too few": ("rotations", torch.zeros(2, 3, 3), r"rotations.*\(3, 3, 3\).*\(2, 3, 3\)"),
    "shifts of three numbers": ("shifts", torch.zeros(3, 3), r"shifts.*\(3, 2\).*\(3, 3\)"),
    "grid as int32": ("grid", torch.zeros(3, dtype=torch.int32), "grid.*int64.*int32"),
    "a grid index too high": ("grid", torch.tensor([0, 1, 2]), "grid.*0..1.*2"),
    "a grid index below zero": ("grid", torch.tensor([0, -1, 1]), "grid.*0..1.*-1"),
    "sums without a last axis": ("sums", torch.zeros(2, 16, 16, 9), r"sums.*\(2, 16, 16, 9\)"),
    "sums that are no cube": ("sums", torch.zeros(2, 16, 14, 9, 4), r"sums.*\(2, 16, 16, 9, 4\).*\(2, 16, 14, 9, 4\)"),
    "sums of an odd side": ("sums", torch.zeros(2, 15, 15, 8, 4), "sums.*even.*15"),
    "sums smaller than the box": ("sums", torch.zeros(2, 6, 6, 4, 4), "sums.*at least 8.*6"),
    "sums in float64": ("sums", torch.zeros(2, 16, 16, 9, 4, dtype=torch.float64), "sums.*float32.*float64"),
    "sums of another order": ("sums", torch.zeros(4, 2, 16, 16, 9).permute(1, 2, 3, 4, 0), "sums.*contiguous"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_by_name(what):
    name, value, message = BAD_ARGUMENTS[what]
    good = cast(draw(8, 3, 2), torch.float32) | {"sums": empty(2, 16, torch.float32)}
    ops.insert(**good)
    with pytest.raises(InputError, match=message):
        ops.insert(**{**good, name: value})


@pytest.mark.skipif(not HAS_CUDA, reason="the core was built without CUDA")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_agrees_through_the_operator(dtype, deterministic):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(deterministic)
        for box, padded, views, grids in SIZES:
            case = cast(draw(box, views, grids), dtype)
            sums = empty(grids, padded, dtype).cuda()
            ops.insert(**{name: value.cuda() for name, value in case.items()}, sums=sums)
            assert_agrees(sums.cpu(), case, dtype)
    finally:
        torch.use_deterministic_algorithms(before)
