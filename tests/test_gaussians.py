"""Gaussian mixtures: covariance, activations, start, bounds, and that an exported mixture gives the same map."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryosplat import ops, reference
from cryosplat.gaussians import (
    AMPLITUDE,
    MEAN,
    QUATERNION,
    SCALE,
    GaussianMixture,
    mixture_to_map,
)
from cryosplat.symmetry import point_group

BOX, PIXEL_SIZE_A = 24, 2.5
RANGE = (0.004, 0.1)


def mixture(models=3, gaussians=17, amplitudes="positive", seed=0):
    """A mixture of trained appearance: nothing is round, centred or equal."""
    made = GaussianMixture(models, gaussians, amplitudes, RANGE)
    made.start_randomly(0.1, 0.04, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.mixtures:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter[:, MEAN] *= 0.3
        made.unit.copy_(torch.linspace(0.5, 2, models))
    made.stay_in_bounds()
    return made


def by_hand(made, model):
    """Means (px), covariances (px^2) and amplitudes of one mixture, by NumPy and SciPy in float64."""
    theta = made.theta[model].detach().double().numpy()
    softplus = np.logaddexp(0, theta)
    rotation = Rotation.from_quat(np.roll(theta[:, QUATERNION], -1, axis=1)).as_matrix()  # SciPy has w last
    scales = softplus[:, SCALE] * BOX
    covariances = rotation @ (scales[:, :, None] ** 2 * rotation.transpose(0, 2, 1))
    shape = softplus[:, AMPLITUDE] if made.positive else theta[:, AMPLITUDE] / (0.1 * made.gaussians)
    return theta[:, MEAN] * BOX, covariances, float(made.unit[model]) * shape * BOX**2


def test_rotations_are_those_of_the_quaternions_whatever_their_length():
    quaternions = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    expected = Rotation.from_quat(quaternions[:, [1, 2, 3, 0]].numpy()).as_matrix()
    np.testing.assert_allclose(reference.quaternion_to_rotation(quaternions), expected, atol=1e-12)


def test_covariances_are_r_s_squared_r_transposed():
    generator = torch.Generator().manual_seed(1)
    quaternions = torch.randn(30, 4, dtype=torch.float64, generator=generator)
    scales = torch.rand(30, 3, dtype=torch.float64, generator=generator) + 0.1
    rotation = Rotation.from_quat(quaternions[:, [1, 2, 3, 0]].numpy()).as_matrix()
    expected = rotation @ (scales.numpy()[:, :, None] ** 2 * rotation.transpose(0, 2, 1))
    found = reference.symmetric_matrices(ops.covariances(quaternions, scales))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("amplitudes", ["positive", "signed"])
def test_parameters_become_pixels_as_the_formulas_say(amplitudes):
    made = mixture(amplitudes=amplitudes)
    for model in range(3):
        means, covariances, integrals = (each[model].detach() for each in made.in_pixels(BOX))
        expected = by_hand(made, model)
        np.testing.assert_allclose(means, expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(reference.symmetric_matrices(covariances), expected[1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(integrals, expected[2], rtol=1e-4)
    assert bool((made.amplitudes() > 0).all()) is (amplitudes == "positive")


@pytest.mark.parametrize("amplitudes", ["positive", "signed"])
def test_at_the_start_all_gaussians_are_round_and_equal_and_sum_to_the_unit(amplitudes):
    made = GaussianMixture(2, 4000, amplitudes, RANGE)
    made.start_randomly(0.075, 0.0075, seed=0)
    torch.testing.assert_close(made.amplitudes().sum(1), torch.ones(2), rtol=1e-4, atol=0)
    assert made.amplitudes().std() < 1e-9
    torch.testing.assert_close(made.scales(), torch.full((2, 4000, 3), 0.0075), rtol=1e-5, atol=0)
    _, covariances, _ = made.in_pixels(BOX)
    expected = (0.0075 * BOX) ** 2 * torch.tensor([1.0, 0, 0, 1, 0, 1])
    torch.testing.assert_close(covariances, expected.expand(2, 4000, 6), rtol=1e-4, atol=1e-8)
    positions = made.theta[..., MEAN].detach()
    assert positions.mean().abs() < 0.002 and float(positions.std()) == pytest.approx(0.075, rel=0.02)
    made.unit.copy_(torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(made.amplitudes().sum(1), made.unit, rtol=1e-4, atol=0)


def test_each_model_starts_on_its_own_whatever_the_others():
    one, three = (GaussianMixture(models, 20, "positive", RANGE) for models in (1, 3))
    for made in (one, three):
        made.start_randomly(0.1, 0.02, seed=5)
    assert torch.equal(one.mixtures[0], three.mixtures[0])
    starts = [mixture[:, MEAN] for mixture in three.mixtures]
    assert all((starts[a] != starts[b]).all() for a, b in ((0, 1), (0, 2), (1, 2)))
    again = GaussianMixture(1, 20, "positive", RANGE)
    again.start_randomly(0.1, 0.02, seed=6)
    assert not torch.equal(again.mixtures[0], one.mixtures[0])


def test_bounds_hold_scales_and_positions_and_nothing_else():
    made = GaussianMixture(1, 4, "signed", RANGE)
    with torch.no_grad():
        made.mixtures[0].copy_(torch.tensor([-100.0, 100.0, -0.4, 0.2])[:, None].expand(4, 11))
    made.stay_in_bounds()
    expected = [[RANGE[0]] * 3, [RANGE[1]] * 3, [RANGE[1]] * 3, [RANGE[1]] * 3]
    torch.testing.assert_close(made.scales()[0], torch.tensor(expected), rtol=1e-5, atol=0)
    assert made.mixtures[0][:, 0].tolist() == pytest.approx([-0.5, 0.5, -0.4, 0.2])
    assert made.mixtures[0][:, AMPLITUDE].tolist() == pytest.approx([-100, 100, -0.4, 0.2])


def test_a_gaussian_at_its_bound_can_come_back():
    made = GaussianMixture(1, 1, "positive", RANGE)
    made.start_randomly(0.01, RANGE[1], seed=0)
    made.stay_in_bounds()
    made.scales().sum().backward()
    assert (made.mixtures[0].grad[:, SCALE] > 0).all()


@pytest.mark.parametrize("amplitudes", ["positive", "signed"])
def test_maps_are_the_sum_of_the_gaussians(amplitudes):
    made = mixture(amplitudes=amplitudes)
    maps = made.voxelise(BOX)
    assert maps.shape == (3, BOX, BOX, BOX)
    for model in range(3):
        means, covariances, integrals = (torch.from_numpy(each) for each in by_hand(made, model))
        entries = covariances[:, [0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 2]]
        expected = reference.voxelise(means[None], entries[None], integrals[None], BOX, None)[0]
        assert float((maps[model] - expected).norm() / expected.norm()) < 2e-5


def test_an_exported_mixture_gives_the_same_map_on_its_own_grid_and_the_same_density_on_a_finer_one():
    made = mixture()
    for model in range(3):
        exported = made.export(model, BOX, PIXEL_SIZE_A)
        assert {name: tuple(value.shape) for name, value in exported.items()} == {
            "means": (17, 3), "scales": (17, 3), "quaternions": (17, 4), "amplitudes": (17,),
        }  # fmt: skip
        expected = made.voxelise(BOX)[model]
        found = mixture_to_map(exported, BOX, PIXEL_SIZE_A)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        # Twice as fine: voxel 2 i - D of the fine grid is voxel i of the coarse one; each pixel of depth is half.
        fine = mixture_to_map(exported, 2 * BOX, PIXEL_SIZE_A / 2)
        assert float((2 * fine[::2, ::2, ::2] - expected).norm() / expected.norm()) < 1e-3


def test_an_exported_mixture_is_in_angstrom_from_the_origin_of_the_grid():
    made = GaussianMixture(1, 1, "positive", RANGE)
    with torch.no_grad():
        made.mixtures[0].copy_(torch.tensor([[0.25, -0.125, 0.0, *[math.log(math.expm1(0.05))] * 3, 2, 0, 0, 0, 0]]))
    exported = made.export(0, BOX, PIXEL_SIZE_A)
    assert exported["means"][0].tolist() == pytest.approx([15.0, -7.5, 0.0])
    assert exported["scales"][0].tolist() == pytest.approx([3.0] * 3)
    assert exported["quaternions"][0].tolist() == [1, 0, 0, 0]
    peak = np.unravel_index(int(made.voxelise(BOX)[0].argmax()), (BOX,) * 3)
    assert peak == (BOX // 2, BOX // 2 - 3, BOX // 2 + 6)  # z, y, x


# Mixtures of unequal size

COUNTS = (5, 17, 9)


def unequal(amplitudes):
    """Three mixtures of unequal size, and the same one by one."""
    together = mixture(3, COUNTS, amplitudes)
    alone = []
    for model, count in enumerate(COUNTS):
        one = GaussianMixture(1, count, amplitudes, RANGE)
        with torch.no_grad():
            one.mixtures[0].copy_(together.mixtures[model])
            one.unit[0] = together.unit[model]
        alone.append(one)
    return together, alone


@pytest.mark.parametrize("amplitudes", ["positive", "signed"])
def test_mixtures_of_unequal_size_are_filled_up_with_gaussians_of_no_amplitude(amplitudes):
    together, alone = unequal(amplitudes)
    assert together.counts == COUNTS and together.gaussians == 17 and together.models == 3
    assert together.theta.shape == (3, 17, 11) and together.amplitudes().shape == (3, 17)
    assert sum(parameter.numel() for parameter in together.parameters()) == sum(COUNTS) * 11
    for model, (count, one) in enumerate(zip(COUNTS, alone, strict=True)):
        assert torch.equal(together.theta[model, :count], one.theta[0])
        assert torch.equal(together.amplitudes()[model, :count], one.amplitudes()[0])
        assert not together.amplitudes()[model, count:].any()
        # As narrow as any may be, and with rotations that are some: nothing divides by zero.
        torch.testing.assert_close(
            together.scales()[model, count:], torch.full((17 - count, 3), RANGE[0]), rtol=1e-5, atol=0
        )
        assert together.in_pixels(BOX)[1][model].isfinite().all()


@pytest.mark.parametrize("amplitudes", ["positive", "signed"])
def test_maps_and_images_of_unequal_mixtures_are_those_of_each_alone(amplitudes):
    together, alone = unequal(amplitudes)
    maps = together.voxelise(BOX)
    drawn = together.draw(BOX, 16, 3.5)
    rotations = torch.from_numpy(Rotation.random(6, random_state=0).as_matrix()).float()
    shifts, shown_by = torch.zeros(6, 2), torch.arange(6) % 3
    images = together.project(rotations, shifts, shown_by, BOX, 3.5)
    for model, one in enumerate(alone):
        torch.testing.assert_close(maps[model], one.voxelise(BOX)[0], rtol=0, atol=1e-6 * float(maps.abs().max()))
        torch.testing.assert_close(drawn[model], one.draw(BOX, 16, 3.5)[0], rtol=0, atol=1e-6 * float(maps.abs().max()))
        views = shown_by == model
        expected = one.project(rotations[views], shifts[views], torch.zeros(2, dtype=torch.int64), BOX, 3.5)
        torch.testing.assert_close(images[views], expected, rtol=0, atol=1e-6 * float(images.detach().abs().max()))
        exported, of_one = together.export(model, BOX, PIXEL_SIZE_A), one.export(0, BOX, PIXEL_SIZE_A)
        for name, value in of_one.items():
            assert torch.equal(exported[name], value), name


@pytest.mark.parametrize("amplitudes", ["positive", "signed"])
def test_gradients_of_unequal_mixtures_are_those_of_each_alone(amplitudes):
    together, alone = unequal(amplitudes)
    weights = torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    (together.draw(BOX, 16, 3.5) * weights).sum().backward()
    for model, one in enumerate(alone):
        (one.draw(BOX, 16, 3.5)[0] * weights[model]).sum().backward()
        expected = one.mixtures[0].grad
        found = together.mixtures[model].grad
        assert found.shape == expected.shape == (COUNTS[model], 11)
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm()) > 0


def test_the_middle_of_a_grid_is_drawn_as_the_whole_is():
    made = mixture()
    whole, middle = made.draw(BOX, BOX, 4.8).detach(), made.draw(BOX, 16, 4.8).detach()
    first = BOX // 2 - 8
    inside = whole[:, first : first + 16, first : first + 16, first : first + 16]
    torch.testing.assert_close(middle, inside, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_the_start_of_unequal_mixtures_adds_up_to_the_unit_in_each():
    for amplitudes in ("positive", "signed"):
        made = GaussianMixture(3, COUNTS, amplitudes, RANGE)
        made.start_randomly(0.1, 0.02, seed=0)
        torch.testing.assert_close(made.amplitudes().sum(1), torch.ones(3), rtol=1e-4, atol=0)
        of_equals = made.mixtures[1][:, AMPLITUDE]
        assert bool((of_equals == made.raw_amplitude_of_equals(17)).all())


# Symmetry


@pytest.mark.parametrize("name", ["C7", "D2", "I"])
def test_what_is_drawn_is_the_unit_and_its_copies(name):
    group, made = point_group(name), GaussianMixture(2, (5, 3), "signed", RANGE, point_group(name))
    made.start_randomly(0.1, 0.03, 0)
    with torch.no_grad():
        for parameter in made.mixtures:
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    one = GaussianMixture(2, (5, 3), "signed", RANGE)
    one.load_state_dict(made.state_dict())
    drawn, unit = (each.in_pixels(BOX) for each in (made, one))
    assert made.drawn == (5 * len(group), 3 * len(group)) and drawn[0].shape == (2, 5 * len(group), 3)
    covariances = [reference.symmetric_matrices(each[1]).detach().double().numpy() for each in (drawn, unit)]
    for k, turn in enumerate(group):
        copy = slice(5 * k, 5 * k + 5)
        np.testing.assert_allclose(drawn[0][:, copy].detach(), unit[0].detach().numpy() @ turn.T, atol=1e-4)
        np.testing.assert_allclose(covariances[0][:, copy], turn @ covariances[1] @ turn.T, atol=1e-3)
        # All copies together have what the unit alone has without a symmetry.
        np.testing.assert_allclose(drawn[2][:, copy].detach(), unit[2].detach() / len(group), rtol=1e-5)


@pytest.mark.parametrize("amplitudes", ["signed", "positive"])
def test_a_symmetric_mixture_begins_with_its_unit_in_all_copies_together(amplitudes):
    made = GaussianMixture(1, 9, amplitudes, RANGE, point_group("D3"))
    made.start_randomly(0.1, 0.03, 0)
    with torch.no_grad():
        made.unit[:] = 2.5
    assert float(made.in_pixels(BOX)[2].detach().sum()) == pytest.approx(2.5 * BOX**2, rel=1e-4)


@pytest.mark.parametrize("name", ["C4", "D2", "O"])
def test_the_map_of_a_symmetric_mixture_has_the_symmetry_to_rounding(name):
    """Of groups that take voxels to voxels; without the first planes, which have no partner."""
    made = GaussianMixture(1, 6, "signed", RANGE, point_group(name))
    made.start_randomly(0.15, 0.04, 3)
    inner = made.voxelise(BOX)[0].numpy()[1:, 1:, 1:]
    rms = np.sqrt(np.mean(inner**2))
    quarter = np.rot90(inner, 1 if name != "D2" else 2, axes=(1, 2))
    assert np.abs(quarter - inner).max() < 1e-4 * rms
    if name == "O":
        assert np.abs(np.rot90(inner, axes=(0, 1)) - inner).max() < 1e-4 * rms
    assert np.abs(np.rot90(inner, 2, axes=(0, 1)) - inner).max() < 1e-4 * rms or name == "C4"
    assert np.abs(inner[::-1] - inner).max() > 0.1 * rms  # a mirror is no rotation


def test_gradients_of_a_symmetric_mixture_are_finite_differences_of_its_map():
    made = GaussianMixture(1, 3, "signed", RANGE, point_group("C3")).double()
    made.start_randomly(0.1, 0.06, 2)
    target = torch.randn(12, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def objective():
        return (made.draw(12, 12, 6.0)[0] * target).sum()

    objective().backward()
    parameters, gradient = made.mixtures[0], made.mixtures[0].grad.clone()
    with torch.no_grad():
        for place in ((0, 0), (1, 2), (2, 4), (0, 8), (1, AMPLITUDE)):
            value, sides = parameters[place].clone(), []
            for step in (1e-6, -1e-6):
                parameters[place] = value + step
                sides.append(float(objective()))
            parameters[place] = value
            assert float(gradient[place]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", ["C5", "I"])
def test_an_exported_symmetric_mixture_gives_its_map_and_begins_with_the_unit(name):
    made = GaussianMixture(2, (4, 2), "signed", RANGE, point_group(name))
    made.start_randomly(0.12, 0.03, 1)
    with torch.no_grad():
        for parameter in made.mixtures:
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    maps = made.voxelise(BOX)
    for model, count in enumerate(made.counts):
        found = made.export(model, BOX, PIXEL_SIZE_A)
        assert all(len(value) == made.drawn[model] for value in found.values())
        np.testing.assert_allclose(
            found["means"][:count], made.mixtures[model][:, MEAN].detach() * BOX * PIXEL_SIZE_A, rtol=1e-5
        )
        drawn = mixture_to_map({key: value.detach() for key, value in found.items()}, BOX, PIXEL_SIZE_A)
        np.testing.assert_allclose(drawn, maps[model], atol=1e-4 * float(maps[model].abs().max()))
