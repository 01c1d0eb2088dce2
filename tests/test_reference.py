"""The plain PyTorch reference against closed forms and the physics; it is what the compiled core is then held to."""

import math

import pytest
import torch
from mixtures import random_rotations, six_entries

from cryosplat import conventions, reference

BOX = 24


def rotations_of(seed: int, count: int) -> torch.Tensor:
    return random_rotations(count, torch.Generator().manual_seed(seed))


def isotropic(mean, sigma, amplitude=1.0):
    means = torch.tensor([[mean]], dtype=torch.float64)
    covariances = six_entries(sigma**2 * torch.eye(3, dtype=torch.float64)).reshape(1, 1, 6)
    return means, covariances, torch.full((1, 1), amplitude, dtype=torch.float64)


def broad_mixture(count=4, seed=0, spread=2.0):
    """Tilted ellipsoids of 1.2 to 2.2 px near the centre: wide enough to be sampled, clear of the edges."""
    generator = torch.Generator().manual_seed(seed)
    scales = 1.2 + torch.rand(1, count, 3, generator=generator, dtype=torch.float64)
    axes = random_rotations(count, generator)[None]
    means = spread * (2 * torch.rand(1, count, 3, generator=generator, dtype=torch.float64) - 1)
    amplitudes = torch.randn(1, count, generator=generator, dtype=torch.float64)
    return means, six_entries(axes @ torch.diag_embed(scales**2) @ axes.mT), amplitudes


def poses(rotations, shifts=None):
    shifts = torch.zeros(len(rotations), 2, dtype=torch.float64) if shifts is None else shifts
    return rotations, shifts, torch.zeros(len(rotations), dtype=torch.int64)


IDENTITY = torch.eye(3, dtype=torch.float64)[None]


def test_the_pixels_of_a_broad_gaussian_sum_to_its_amplitude():
    mixture = broad_mixture()
    images = reference.splat(*mixture, *poses(rotations_of(0, 3)), BOX, None)
    torch.testing.assert_close(images.sum((1, 2)), mixture[2].sum().expand(3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reference.voxelise(*mixture, BOX, None).sum(), mixture[2].sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("box", [15, 16])
def test_one_isotropic_gaussian_is_the_closed_form(box):
    sigma, amplitude, (x0, y0, z0) = 1.7, -2.5, (0.3, -1.2, 2.1)
    mixture = isotropic((x0, y0, z0), sigma, amplitude)
    image = reference.splat(*mixture, *poses(IDENTITY), box, None)[0]
    volume = reference.voxelise(*mixture, box, None)[0]
    for x, y, z in ((7, 7, 7), (0, 14, 3), (9, 4, 11)):
        squared = ((x - box // 2 - x0) ** 2 + (y - box // 2 - y0) ** 2) / sigma**2
        value = amplitude * math.exp(-squared / 2) / (2 * math.pi * sigma**2)
        assert image[y, x].item() == pytest.approx(value, rel=1e-12)
        along_z = math.exp(-((z - box // 2 - z0) ** 2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
        assert volume[z, y, x].item() == pytest.approx(value * along_z, rel=1e-12)


def test_a_tilted_gaussian_is_the_density_of_scipy():
    from scipy.stats import multivariate_normal

    means, covariances, amplitudes = broad_mixture(count=1)
    rotation = rotations_of(7, 1)
    matrix = reference.symmetric_matrices(covariances)[0, 0]
    centre, projected = rotation[0] @ means[0, 0], (rotation[0] @ matrix @ rotation[0].T)[:2, :2]
    image = reference.splat(means, covariances, amplitudes, *poses(rotation), BOX, None)[0]
    volume = reference.voxelise(means, covariances, amplitudes, BOX, None)[0]
    grid = torch.arange(BOX, dtype=torch.float64) - BOX // 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    expected = multivariate_normal(centre[:2].numpy(), projected.numpy()).pdf(torch.stack((x, y), -1).numpy())
    torch.testing.assert_close(image, amplitudes[0, 0] * torch.from_numpy(expected))
    z, y, x = torch.meshgrid(grid, grid, grid, indexing="ij")
    expected = multivariate_normal(means[0, 0].numpy(), matrix.numpy()).pdf(torch.stack((x, y, z), -1).numpy())
    torch.testing.assert_close(volume, amplitudes[0, 0] * torch.from_numpy(expected))


def test_the_volume_summed_along_z_is_the_unrotated_projection():
    mixture = broad_mixture()
    image = reference.splat(*mixture, *poses(IDENTITY), BOX, None)[0]
    torch.testing.assert_close(reference.voxelise(*mixture, BOX, None)[0].sum(0), image, rtol=1e-5, atol=1e-7)


def test_rotating_the_mixture_equals_rotating_the_pose():
    means, covariances, amplitudes = broad_mixture()
    for rotation in rotations_of(5, 3):
        turned = rotation @ reference.symmetric_matrices(covariances) @ rotation.T
        turned_mixture = means @ rotation.T, six_entries(turned), amplitudes
        expected = reference.splat(means, covariances, amplitudes, *poses(rotation[None]), BOX, 3.0)
        torch.testing.assert_close(reference.splat(*turned_mixture, *poses(IDENTITY), BOX, 3.0), expected)


def test_a_pose_puts_a_point_where_the_conventions_say():
    point = torch.tensor([3.0, -2.0, 4.0], dtype=torch.float64)
    mixture = isotropic(point.tolist(), 0.6)
    quarter = torch.from_numpy(conventions.euler_to_rotation([0.0, 90.0], [0.0, 90.0], [0.0, 0.0]))
    shifts = torch.tensor([[2.0, -1.0], [0.0, 3.0]], dtype=torch.float64)
    images = reference.splat(*mixture, *poses(quarter, shifts), BOX, None)
    for image, rotation, shift in zip(images, quarter, shifts, strict=True):
        x, y = ((rotation @ point)[:2] + conventions.centre(BOX) - shift).round().long().tolist()
        assert divmod(image.argmax().item(), BOX) == (y, x)


def test_a_whole_pixel_shift_moves_the_image_against_its_sign():
    mixture = broad_mixture()
    shifts = torch.tensor([[0.0, 0.0], [2.0, -3.0]], dtype=torch.float64)
    plain, shifted = reference.splat(*mixture, *poses(IDENTITY.expand(2, 3, 3), shifts), BOX, None)
    torch.testing.assert_close(shifted[3:, :-2], plain[:-3, 2:])


def test_the_cut_keeps_a_rectangle_of_the_projected_standard_deviations():
    means, covariances, amplitudes = isotropic((0.2, 0.0, 0.0), 2.0)
    kept = reference.splat(means, covariances, amplitudes, *poses(IDENTITY), BOX, 1.55)[0] != 0
    rows, columns = kept.any(1).nonzero().flatten().tolist(), kept.any(0).nonzero().flatten().tolist()
    assert (rows[0], rows[-1]) == (9, 15) and (columns[0], columns[-1]) == (10, 15)  # 12 +- 3.1 and 12.2 +- 3.1
    assert kept.sum() == 7 * 6


def test_the_cut_of_a_volume_follows_the_conditional_gaussian_of_each_plane():
    sxx, sxz, szz = 2.0, 2.4, 4.0  # given z, x has mean 0.6 dz and variance 0.56
    covariances = torch.tensor([[[sxx, 0.0, sxz, 1.0, 0.0, szz]]], dtype=torch.float64)
    means, amplitudes = torch.zeros(1, 1, 3, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    kept = reference.voxelise(means, covariances, amplitudes, BOX, 1.9)[0] != 0
    centre, reach = BOX // 2, 1.9 * math.sqrt(sxx - sxz**2 / szz)
    for z in range(BOX):
        columns = [x for x in range(BOX) if abs(x - centre - 0.6 * (z - centre)) <= reach]
        expected = columns if abs(z - centre) <= 1.9 * 2 else []
        assert kept[z, centre].nonzero().flatten().tolist() == expected
        assert int(kept[z].sum()) == 3 * len(expected)  # y within 1.9 of the centre


def test_uncut_equals_a_cut_beyond_the_box():
    mixture, view = broad_mixture(), poses(rotations_of(0, 2))
    torch.testing.assert_close(reference.splat(*mixture, *view, BOX, 50.0), reference.splat(*mixture, *view, BOX, None))
    torch.testing.assert_close(reference.voxelise(*mixture, BOX, 50.0), reference.voxelise(*mixture, BOX, None))


def test_chunks_do_not_change_the_result(monkeypatch):
    mixture = tuple(t.requires_grad_() for t in broad_mixture(count=7))
    rotations, shifts, model = poses(rotations_of(0, 2))

    def results():
        outputs = (
            reference.splat(*mixture, rotations, shifts, model, BOX, 3.0),
            reference.voxelise(*mixture, BOX, 3.0),
        )
        return *outputs, *torch.autograd.grad(sum((o**2).sum() for o in outputs), mixture)

    expected = results()
    monkeypatch.setattr(reference, "SAMPLES_AT_ONCE", 2 * BOX**2)
    for ours, whole in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, whole)


def test_no_views_no_models_and_no_gaussians_give_empty_or_zero_outputs_with_gradients():
    means, covariances, amplitudes = (t[:, :0].requires_grad_() for t in broad_mixture())
    rotations, shifts, model = poses(rotations_of(0, 2))
    images = reference.splat(means, covariances, amplitudes, rotations, shifts, model, 5, 3.0)
    volumes = reference.voxelise(means, covariances, amplitudes, 5, 3.0)
    assert images.shape == (2, 5, 5) and volumes.shape == (1, 5, 5, 5) and not images.any() and not volumes.any()
    (images.sum() + volumes.sum()).backward()
    assert means.grad.shape == means.shape
    assert reference.splat(*broad_mixture(), rotations[:0], shifts[:0], model[:0], 5, 3.0).shape == (0, 5, 5)
    assert reference.voxelise(means[:0], covariances[:0], amplitudes[:0], 5, 3.0).shape == (0, 5, 5, 5)


def test_derivatives_are_those_of_the_formula():
    mixture = tuple(t.requires_grad_() for t in broad_mixture(count=2))
    rotations, shifts, model = poses(rotations_of(0, 2))
    inputs = (*mixture, rotations.requires_grad_(), shifts.requires_grad_())
    assert torch.autograd.gradcheck(lambda *t: reference.splat(*t, model, 5, 2.34), inputs, fast_mode=True)
    assert torch.autograd.gradcheck(lambda *t: reference.voxelise(*t, 5, 2.34), mixture, fast_mode=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["means", "covariances", "amplitudes"])
def test_a_degenerate_gaussian_is_nan_in_its_own_view_alone(which, value):
    mixture = {n: t.repeat(2, 1, *[1] * (t.ndim - 2)) for n, t in zip(NAMES, broad_mixture(), strict=True)}
    mixture[which][1, 2, ...] = value
    rotations, shifts, _ = poses(rotations_of(0, 3))
    images = reference.splat(*mixture.values(), rotations, shifts, torch.tensor([1, 0, 1]), 5, 3.0)
    assert images.isnan().flatten(1).all(1).tolist() == [True, False, True] and images[1].isfinite().all()
    volumes = reference.voxelise(*mixture.values(), 5, 3.0)
    assert volumes[1].isnan().all() and volumes[0].isfinite().all()


def test_a_covariance_that_is_not_positive_definite_is_nan_and_so_are_its_gradients():
    means, covariances, amplitudes = broad_mixture()
    covariances[0, 1] = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])  # xx = xy = yy: flat along x = y
    inputs = tuple(t.requires_grad_() for t in (means, covariances, amplitudes))
    for output in (reference.splat(*inputs, *poses(IDENTITY), 5, 3.0), reference.voxelise(*inputs, 5, 3.0)):
        assert output.isnan().all()
        assert all(gradient[0, 1].isnan().all() for gradient in torch.autograd.grad(output.sum(), inputs))


NAMES = ("means", "covariances", "amplitudes")
