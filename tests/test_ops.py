"""The compiled kernels against the float64 reference and the physics, for every instruction set this processor has."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mixtures import KINDS, Case, draw, noise, relative_l2, run_splat, run_voxelise

from cryosplat import ops, reference
from cryosplat._extension import core
from cryosplat.errors import InputError

DTYPES = (torch.float32, torch.float64)
BOXES = (15, 16, 17, 31, 32, 33, 128)
COUNTS = (0, 1, 15, 16, 17, 31, 32, 33)
MODELS_AND_VIEWS = ((1, 1), (3, 5), (1, 2), (3, 2), (1, 5), (3, 1), (3, 0))

FORWARD_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}  # relative L2
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative L2; 1e-4 is a cosine above 1 - 1e-8

CUT_3_5, CUT_4_8 = 2e-3, 1e-5
"""Relative L2 errors that ops.splat states for cut-offs of 3.5 and 4.8 standard deviations."""


@pytest.fixture(autouse=True)
def threads():
    """Restores torch's number of threads; tests run on one unless they say otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_agrees(ours, expected, case: Case, dtype: torch.dtype) -> None:
    """Every image or volume for itself, and of the gradients every kind of Gaussian for itself.

    Small Gaussians have by far the largest derivatives, so a norm over all kinds would not see the others.
    """
    for index, (image, wanted) in enumerate(zip(ours[0], expected[0], strict=True)):
        assert relative_l2(image, wanted) <= FORWARD_TOLERANCE[dtype], f"output {index}"
    for name, gradient, wanted in zip(("means", "covariances", "amplitudes"), ours[1:4], expected[1:4], strict=True):
        for kind in set(case.kinds):
            of_kind = [g for g, other in enumerate(case.kinds) if other == kind]
            error = relative_l2(gradient[:, of_kind], wanted[:, of_kind])
            assert error <= GRADIENT_TOLERANCE[dtype], f"gradient of {name} of {kind} Gaussians"
    for name, gradient, wanted in zip(("rotations", "shifts"), ours[4:], expected[4:], strict=False):
        assert relative_l2(gradient, wanted) <= GRADIENT_TOLERANCE[dtype], f"gradient of {name}"


@functools.cache
def splat_cases(box: int) -> list[tuple[Case, tuple[torch.Tensor, ...]]]:
    """One case for each number of Gaussians, models and views in rotation, with what the reference makes of it."""
    offset = BOXES.index(box)
    cases = [
        draw(box, count, *MODELS_AND_VIEWS[(offset + i) % len(MODELS_AND_VIEWS)], seed=i)
        for i, count in enumerate(COUNTS)
        if box < 100 or count % 16 == 1 or count == 0
    ]
    return [(case, run_splat(reference, case)) for case in cases]


@functools.cache
def volume_cases(box: int) -> list[tuple[Case, tuple[torch.Tensor, ...]]]:
    counts = ((7, 1),) if box > 100 else ((0, 1), (1, 3), (17, 1)) if box > 20 else ((15, 1), (16, 3), (33, 1))
    cases = [draw(box, count, models, views=0, seed=count, volume=True) for count, models in counts]
    return [(case, run_voxelise(reference, case)) for case in cases]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("box", BOXES)
def test_splat_agrees_with_the_reference(backend, box, dtype, threads):
    for index, (case, expected) in enumerate(splat_cases(box)):
        threads(1 + index % 3)
        assert_agrees(run_splat(backend, case, dtype), expected, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("box", BOXES)
def test_voxelise_agrees_with_the_reference(backend, box, dtype, threads):
    for index, (case, expected) in enumerate(volume_cases(box)):
        threads(1 + index % 3)
        assert_agrees(run_voxelise(backend, case, dtype), expected, case, dtype)


@functools.cache
def kind_cases(kind: str, cutoff: float):
    images, volume = draw(40, 24, 2, 3, 5, cutoff, (kind,)), draw(16, 8, 1, 0, 5, cutoff, (kind,), volume=True)
    return (images, run_splat(reference, images)), (volume, run_voxelise(reference, volume))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cutoff", [0.4, 3.5, 9.0])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_gaussian_agrees_at_each_cutoff(backend, kind, cutoff, dtype):
    (images, expected_images), (volume, expected_volume) = kind_cases(kind, cutoff)
    assert_agrees(run_splat(backend, images, dtype), expected_images, images, dtype)
    assert_agrees(run_voxelise(backend, volume, dtype), expected_volume, volume, dtype)


@functools.cache
def lone_case(kind: str, cutoff: float) -> tuple[Case, torch.Tensor]:
    """101 mixtures of one Gaussian, each seen in one view (101 is odd, so `draw` shows every model), and the images."""
    case = draw(40, 1, 101, 101, seed=11, cutoff=cutoff, kinds=(kind,))
    inputs = (case.means, case.covariances, case.amplitudes, case.rotations, case.shifts, case.model)
    return case, reference.splat(*inputs, case.box, case.cutoff)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cutoff", [3.5, 12.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_one_of_many_gaussians_agrees_alone(backend, kind, cutoff, dtype):
    """Thin tilted ones reach exponents of hundreds inside their rectangle, where products over rows overflow or decay.

    One Gaussian to a mixture, so that none hides behind others; the error is relative to the norm of the whole
    Gaussian, of which the image may show a tail only.
    """
    case, expected = lone_case(kind, cutoff)
    images = backend.splat(*case.mixture(dtype), *case.poses(dtype), case.model, case.box, case.cutoff).detach()
    errors = (images.double() - expected).flatten(1).norm(dim=1)
    rows, matrices = case.rotations[:, :2], reference.symmetric_matrices(case.covariances)[case.model, 0]
    areas = torch.linalg.det(rows @ matrices @ rows.mT).sqrt()
    norms = case.amplitudes[case.model, 0].abs() / (4 * math.pi * areas).sqrt()
    assert (errors / norms).max() <= FORWARD_TOLERANCE[dtype]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_passes(isa):
    if isa == core.instruction_set():
        pytest.skip(f"{isa} is what the other tests of this process run on")
    environment = {**os.environ, "CRYOSPLAT_ISA": isa, "OMP_NUM_THREADS": "1"}
    here = Path(__file__).resolve().parent
    run = functools.partial(subprocess.run, cwd=here.parent, env=environment, capture_output=True, text=True)
    print_set = "from cryosplat._extension import core; print(core.instruction_set())"
    if run([sys.executable, "-c", print_set], check=True).stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}, or CRYOSPLAT_ISA forbids it")
    files = [str(here / name) for name in ("test_ops.py", "test_ops_physics.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    done = run([*command, *files, "-k", "(agree or bitwise or degenerate) and not host and not gpu"])
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_are_bitwise_equal_for_any_number_of_threads(dtype, threads):
    cases = [draw(33, 33, 3, 5), draw(32, 40, 1, 1), draw(17, 1, 1, 3)]
    volumes = [draw(17, 33, 3, 0, volume=True), draw(16, 20, 1, 0, volume=True)]

    def results():
        flat = [run_splat(ops, case, dtype) for case in cases] + [run_voxelise(ops, case, dtype) for case in volumes]
        return [t for result in flat for t in result]

    one = results()
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(ours, expected) for ours, expected in zip(results(), one, strict=True))


def test_gradients_of_the_mixture_are_the_same_with_poses_fixed(backend):
    case = draw(31, 17, 3, 5)
    with_poses, without = run_splat(backend, case), run_splat(backend, case, poses=False)
    for ours, expected in zip(without, with_poses, strict=False):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_the_third_row_of_a_rotation_gets_no_gradient(backend):
    gradient = run_splat(backend, draw(31, 17, 3, 5))[4]
    assert not gradient[:, 2].any() and gradient[:, :2].any()


@pytest.mark.parametrize(("cutoff", "stated"), [(3.5, CUT_3_5), (4.8, CUT_4_8)])
def test_the_cut_costs_what_is_stated(backend, cutoff, stated):
    """For one broad Gaussian theory gives sqrt(n erfc(cutoff)) over n axes: 1.2e-3 and 5e-6 of an image."""
    case = draw(32, 20, kinds=("round",))
    mixture, poses = case.mixture(torch.float64), (*case.poses(torch.float64), case.model)
    of_image = relative_l2(backend.splat(*mixture, *poses, 32, cutoff), reference.splat(*mixture, *poses, 32, None))
    of_volume = relative_l2(backend.voxelise(*mixture, 32, cutoff), reference.voxelise(*mixture, 32, None))
    assert stated / 3 < of_image < stated and stated / 3 < of_volume < stated


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_beyond_everything_is_no_cut(backend, dtype):
    case, volume = draw(24, 21, views=2), draw(12, 14, volume=True)
    poses = (*case.poses(torch.float64), case.model)
    images = reference.splat(*case.mixture(torch.float64), *poses, 24, None)
    density = reference.voxelise(*volume.mixture(torch.float64), 12, None)
    for cutoff in (1e4, 1e30, math.inf):
        ours = backend.splat(*case.mixture(dtype), *case.poses(dtype), case.model, 24, cutoff)
        assert relative_l2(ours.double(), images) <= FORWARD_TOLERANCE[dtype]
        ours = backend.voxelise(*volume.mixture(dtype), 12, cutoff)
        assert relative_l2(ours.double(), density) <= FORWARD_TOLERANCE[dtype]


def test_gradcheck_passes_in_float64(backend):
    case = draw(6, 3, 2, 3, kinds=("round", "disc", "sub-pixel"), seed=1)
    inputs = (*case.mixture(torch.float64), *case.poses(torch.float64))
    assert torch.autograd.gradcheck(lambda *t: backend.splat(*t, case.model, 6, 3.5), inputs)
    case = draw(5, 3, 2, 0, kinds=("round", "disc", "sub-pixel"), seed=1, volume=True)
    assert torch.autograd.gradcheck(lambda *t: backend.voxelise(*t, 5, 3.5), case.mixture(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_passes(dtype):
    case = draw(16, 5, 2, 3)
    mixture = case.mixture(dtype)
    torch.library.opcheck(torch.ops.cryosplat.splat, (*mixture, *case.poses(dtype), case.model, 16, 3.5))
    torch.library.opcheck(torch.ops.cryosplat.voxelise, (*mixture, 16, 3.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_need_no_zeroing(backend, dtype):
    """Deterministic mode fills every newly allocated tensor with NaN: what is not written shows."""
    cases, volumes = [draw(17, n, 3, 2) for n in (0, 1, 17)], [draw(15, n, 3, 0, volume=True) for n in (0, 1, 17)]
    try:
        torch.use_deterministic_algorithms(True)
        assert torch.ones(1).new_empty(3).isnan().all()
        results = [run_splat(backend, case, dtype) for case in cases] + [
            run_voxelise(backend, case, dtype) for case in volumes
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(t.isfinite().all() for result in results for t in result)
    assert not results[0][0].any() and not results[3][0].any(), "no Gaussians, no density"
    assert not results[0][4].any() and not results[0][5].any(), "no Gaussians, no gradient of the poses"
    model_not_seen = [m for m in range(3) if m not in cases[2].model]
    assert model_not_seen and not any(t[model_not_seen].any() for t in results[2][1:4])


def test_strided_arguments_and_gradients_are_taken_as_they_are(backend):
    case = draw(17, 8, 2, 3)
    arguments = (*case.mixture(torch.float64), *case.poses(torch.float64), case.model)
    strided = [torch.stack((t.detach(), t.detach()), -1)[..., 1] for t in arguments]
    assert not any(t.is_contiguous() for t in strided)
    images = backend.splat(*arguments, 17, 3.5)
    assert torch.equal(backend.splat(*strided, 17, 3.5), images)
    assert torch.equal(backend.voxelise(*strided[:3], 17, 3.5), backend.voxelise(*arguments[:3], 17, 3.5))
    transposed = noise(images.shape).mT
    ours, expected = (torch.autograd.grad(images, arguments[:5], g, retain_graph=True)
                      for g in (transposed, transposed.contiguous()))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


BAD_ARGUMENTS = {
    "means of integers": ("means", torch.zeros(2, 4, 3, dtype=torch.int64), "means.*int64"),
    "means of half precision": ("means", torch.zeros(2, 4, 3, dtype=torch.float16), "means.*float16"),
    "means without models": ("means", torch.zeros(4, 3), r"means.*\(4, 3\)"),
    "means in two dimensions": ("means", torch.zeros(2, 4, 2), r"means.*\(2, 4, 2\)"),
    "covariances as matrices": ("covariances", torch.zeros(2, 4, 3, 3), r"covariances.*\(2, 4, 6\).*\(2, 4, 3, 3\)"),
    "covariances in float64": ("covariances", torch.ones(2, 4, 6, dtype=torch.float64), "covariances.*float64"),
    "covariances elsewhere": ("covariances", torch.ones(2, 4, 6, device="meta"), "covariances.*cpu.*meta"),
    "too few amplitudes": ("amplitudes", torch.ones(2, 3), r"amplitudes.*\(2, 4\).*\(2, 3\)"),
    "one rotation too few": ("rotations", torch.zeros(2, 3, 3), r"rotations.*\(3, 3, 3\).*\(2, 3, 3\)"),
    "shifts in float64": ("shifts", torch.zeros(3, 2, dtype=torch.float64), "shifts.*float32.*float64"),
    "shifts of three numbers": ("shifts", torch.zeros(3, 3), r"shifts.*\(3, 2\).*\(3, 3\)"),
    "a model index too high": ("model", torch.tensor([0, 1, 2]), "model.*0..1.*2"),
    "a model index below zero": ("model", torch.tensor([0, 1, -1]), "model.*0..1.*-1"),
    "model as int32": ("model", torch.zeros(3, dtype=torch.int32), "model.*int64.*int32"),
    "model of two axes": ("model", torch.zeros(3, 1, dtype=torch.int64), "model"),
    "no box": ("box", 0, "box.*0"),
    "a negative cutoff": ("cutoff", -1.0, "cutoff.*-1"),
    "a cutoff that is not a number": ("cutoff", math.nan, "cutoff.*nan"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_by_name(what):
    argument, value, message = BAD_ARGUMENTS[what]
    mixture = {"means": torch.zeros(2, 4, 3), "covariances": torch.zeros(2, 4, 6), "amplitudes": torch.ones(2, 4)}
    poses = {"rotations": torch.zeros(3, 3, 3), "shifts": torch.zeros(3, 2), "model": torch.tensor([0, 1, 1])}
    numbers = {"box": 8, "cutoff": 3.5}
    with pytest.raises(InputError, match=message):
        ops.splat(**{**mixture, **poses, **numbers, argument: value})
    if argument not in poses:
        with pytest.raises(InputError, match=message):
            ops.voxelise(**{**mixture, **numbers, argument: value})


def test_models_without_views_and_views_without_models(backend):
    case = draw(9, 3, 2, 0)
    assert backend.splat(*case.mixture(torch.float32), *case.poses(torch.float32), case.model, 9, 3.5).shape == (
        0,
        9,
        9,
    )
    assert backend.voxelise(torch.zeros(0, 3, 3), torch.zeros(0, 3, 6), torch.zeros(0, 3), 9, 3.5).shape == (0, 9, 9, 9)
