"""covariances of quaternions and scales: the compiled operator against reference.py, with its gradients."""

import pytest
import torch

from cryosplat import ops, reference
from cryosplat.errors import InputError


def drawn(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quaternions of any length and scales from thin to round."""
    generator = torch.Generator().manual_seed(seed)
    quaternions = 3 * torch.randn(count, 4, generator=generator, dtype=torch.float64)
    scales = 0.1 + 5 * torch.rand(count, 3, generator=generator, dtype=torch.float64)
    return quaternions.to(dtype), scales.to(dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 15, 16, 17, 33, 5000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_covariances_and_gradients_agree_with_the_reference(backend, count, dtype, tolerance):
    inputs = [t.requires_grad_() for t in drawn(count, dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found, expected = backend.covariances(*inputs), reference.covariances(*exact)
    weights = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(found, inputs, weights.to(dtype))
    expected_gradients = torch.autograd.grad(expected, exact, weights.to(dtype).double())
    for ours, theirs in zip((found, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).detach().norm()) <= tolerance * float(theirs.detach().norm())


def test_gradcheck_in_double_precision(backend):
    assert torch.autograd.gradcheck(backend.covariances, [t.requires_grad_() for t in drawn(9, torch.float64)])


def test_turns_of_round_gaussians_have_a_gradient_of_exactly_zero(backend):
    """Adam would make a full step of rounding noise: at the round start, and another one on another number of ranks."""
    quaternions, scales = drawn(100, torch.float32)
    quaternions.requires_grad_()
    covariances = backend.covariances(quaternions, scales[:, :1].expand(100, 3).contiguous())
    weights = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    assert not torch.autograd.grad(covariances, quaternions, weights)[0].any()


def test_opcheck():
    torch.library.opcheck(
        torch.ops.cryosplat.covariances.default, [t.requires_grad_() for t in drawn(9, torch.float32)]
    )


def test_threads_and_leading_axes_change_nothing():
    quaternions, scales = drawn(6000, torch.float32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.covariances(quaternions.unflatten(0, (3, 2000)), scales.unflatten(0, (3, 2000))))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0].flatten(0, 1), ops.covariances(quaternions, scales))


def test_a_quaternion_of_zeros_gives_nan_and_spares_its_neighbours(backend):
    quaternions, scales = drawn(20, torch.float32)
    quaternions[4] = 0
    bad = backend.covariances(quaternions, scales).isnan().any(1)
    assert bad[4] and int(bad.sum()) == 1


@pytest.mark.parametrize(
    "quaternions, scales, words",
    [
        (torch.zeros(3, 3), torch.zeros(3, 3), r"quaternions: expected shape \(..., 4\), got \(3, 3\)"),
        (torch.zeros(3, 4), torch.zeros(2, 3), r"scales: expected shape \(3, 3\), got \(2, 3\)"),
        (torch.zeros(3, 4), torch.zeros(3, 3).double(), "scales: expected torch.float32, got torch.float64"),
        (torch.zeros(3, 4).half(), torch.zeros(3, 3).half(), "quaternions: expected float32 or float64"),
    ],
)
def test_bad_arguments_are_named(quaternions, scales, words):
    with pytest.raises(InputError, match=words):
        ops.covariances(quaternions, scales)
