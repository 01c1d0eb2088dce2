"""What the compiled kernels must do beside agreeing with the reference: the physics, and numbers that are not."""

import math

import pytest
import torch
from mixtures import Case, draw, noise, random_rotations, run_splat, run_voxelise, six_entries

from cryosplat import reference

DTYPES = (torch.float32, torch.float64)


def test_splat_and_its_backward_are_adjoint_in_the_amplitudes(backend):
    case = draw(33, 33, 3, 5)
    images, _, _, of_amplitudes, *_ = run_splat(backend, case)
    expected = (images * noise(images.shape)).sum()
    torch.testing.assert_close((case.amplitudes * of_amplitudes).sum(), expected, rtol=1e-11, atol=0)


def test_voxelise_and_its_backward_are_adjoint_in_the_amplitudes(backend):
    case = draw(17, 33, 3, 0, volume=True)
    volumes, _, _, of_amplitudes = run_voxelise(backend, case)
    expected = (volumes * noise(volumes.shape)).sum()
    torch.testing.assert_close((case.amplitudes * of_amplitudes).sum(), expected, rtol=1e-11, atol=0)


def broad_case(box=40) -> Case:
    """Round Gaussians within 5 px of the centre of a box that holds their tails, cut where float64 does not see it."""
    case = draw(box, 12, views=3, kinds=("round",), cutoff=8.5)
    case.means.clamp_(-5, 5)
    return case


def test_mass_is_conserved(backend):
    case = broad_case()
    images = backend.splat(*case.mixture(torch.float64), case.rotations, case.shifts, case.model, case.box, case.cutoff)
    volume = backend.voxelise(*case.mixture(torch.float64), case.box, case.cutoff)
    torch.testing.assert_close(images.sum((1, 2)), case.amplitudes.sum().expand(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(volume.sum(), case.amplitudes.sum(), rtol=0, atol=1e-6)


def test_voxels_of_the_turned_mixture_project_to_the_image_of_the_turned_pose(backend):
    case = broad_case()
    rotations = random_rotations(3, torch.Generator().manual_seed(9))
    still = torch.zeros(3, 2, dtype=torch.float64)
    images = backend.splat(*case.mixture(torch.float64), rotations, still, case.model, case.box, case.cutoff)
    for image, rotation in zip(images, rotations, strict=True):
        turned = rotation @ reference.symmetric_matrices(case.covariances) @ rotation.T
        mixture = (case.means @ rotation.T, six_entries(turned), case.amplitudes)
        torch.testing.assert_close(
            backend.voxelise(*mixture, case.box, case.cutoff)[0].sum(0), image, rtol=0, atol=1e-7
        )
        untilted = torch.eye(3, dtype=torch.float64)[None], still[:1], case.model[:1]
        torch.testing.assert_close(
            backend.splat(*mixture, *untilted, case.box, case.cutoff)[0], image, rtol=0, atol=1e-13
        )


def test_views_do_not_depend_on_the_batch_they_are_in(backend):
    case = draw(33, 33, 3, 5)
    mixture = [t.detach() for t in case.mixture(torch.float32)]
    rotations, shifts = (t.detach() for t in case.poses(torch.float32))
    together = backend.splat(*mixture, rotations, shifts, case.model, 33, 3.5)
    for v in range(5):
        alone = backend.splat(*mixture, rotations[v : v + 1], shifts[v : v + 1], case.model[v : v + 1], 33, 3.5)
        assert torch.equal(alone[0], together[v])


DEGENERATE = {
    "a NaN position": ("means", [math.nan, 0.0, 0.0]),
    "an infinite depth": ("means", [0.0, 0.0, math.inf]),
    "a NaN amplitude": ("amplitudes", math.nan),
    "an infinite amplitude": ("amplitudes", -math.inf),
    "a NaN covariance along z": ("covariances", [1.0, 0.0, 0.0, 1.0, 0.0, math.nan]),
    "an infinite covariance": ("covariances", [math.inf, 0.0, 0.0, 1.0, 0.0, 1.0]),
    "no size": ("covariances", [0.0] * 6),
    "negative variances": ("covariances", [-1.0, 0.0, 0.0, -1.0, 0.0, -1.0]),
    "an indefinite covariance": ("covariances", [1.0, 2.0, 2.0, 1.0, 2.0, 1.0]),
    "no width along x = y = z": ("covariances", [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 16, 18])
@pytest.mark.parametrize("what", DEGENERATE)
def test_a_degenerate_gaussian_is_nan_in_its_own_outputs_alone(backend, what, place, dtype):
    case = draw(17, 19, 3, 5)
    case.rotations[:] = torch.eye(3, dtype=torch.float64)  # so that a flat Gaussian stays exactly flat
    case.means[1, place] = torch.tensor([200.0, 0.0, 0.0])  # far off the image: it is not skipped even there
    healthy, healthy_volumes = run_splat(backend, case, dtype), run_voxelise(backend, case, dtype)
    argument, value = DEGENERATE[what]
    getattr(case, argument)[1, place] = torch.tensor(value, dtype=torch.float64)
    ours, volumes = run_splat(backend, case, dtype), run_voxelise(backend, case, dtype)
    views, others = case.model == 1, case.model != 1
    assert ours[0][views].isnan().all() and torch.equal(ours[0][others], healthy[0][others])
    assert volumes[0][1].isnan().all() and torch.equal(volumes[0][[0, 2]], healthy_volumes[0][[0, 2]])
    for result, expected in ((ours, healthy), (volumes, healthy_volumes)):
        for gradient, unharmed in zip(result[1:4], expected[1:4], strict=True):
            assert gradient[1, place].isnan().all() and torch.equal(gradient[[0, 2]], unharmed[[0, 2]])
    for gradient, unharmed in zip(ours[4:], healthy[4:], strict=True):
        assert gradient[views, :2].isnan().all() and torch.equal(gradient[others], unharmed[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("argument", ["rotations", "shifts"])
def test_a_degenerate_pose_is_nan_in_its_own_view_alone(backend, argument, dtype):
    case = draw(17, 19, 3, 5)
    healthy = run_splat(backend, case, dtype)[0]
    getattr(case, argument)[2, 1] = math.nan
    images = run_splat(backend, case, dtype)[0]
    others = [0, 1, 3, 4]
    assert images[2].isnan().all() and torch.equal(images[others], healthy[others])


def test_a_gaussian_is_degenerate_only_in_the_views_that_see_it_so(backend):
    covariances = torch.tensor([[[1.0, 0.0, 0.0, 1.0, 0.0, -1.0]]])
    along_x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    rotations = torch.stack((torch.eye(3), along_x))
    model, shifts = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2)
    images = backend.splat(torch.zeros(1, 1, 3), covariances, torch.ones(1, 1), rotations, shifts, model, 15, 3.5)
    assert images[0].sum() == pytest.approx(1, abs=3e-3) and images[1].isnan().all()
    assert backend.voxelise(torch.zeros(1, 1, 3), covariances, torch.ones(1, 1), 15, 3.5).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussians_far_away_or_between_the_pixels_give_zeros(backend, dtype):
    tiny = torch.tensor([1e-6, 0, 0, 1e-6, 0, 1e-6], dtype=dtype)
    broad = torch.tensor([2.0, 0, 0, 2.0, 0, 2.0], dtype=dtype)
    for mean, covariance in ((0.5, tiny), (1e4, broad), (-1e12, broad), (1e30, broad)):
        means = torch.full((1, 1, 3), mean, dtype=dtype, requires_grad=True)
        amplitudes = torch.ones(1, 1, dtype=dtype)
        pose = torch.eye(3, dtype=dtype)[None], torch.zeros(1, 2, dtype=dtype), torch.zeros(1, dtype=torch.int64)
        images = backend.splat(means, covariance.view(1, 1, 6), amplitudes, *pose, 16, 3.5)
        volumes = backend.voxelise(means, covariance.view(1, 1, 6), amplitudes, 16, 3.5)
        assert not images.any() and not volumes.any()
        (images.sum() + volumes.sum()).backward()
        assert not means.grad.any()
