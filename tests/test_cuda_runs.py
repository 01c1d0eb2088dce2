"""A training step and a fit in the volume with every kernel of the CUDA half, run on the host, against the CPU's."""

import contextlib
from collections.abc import Iterator

import hostcuda
import numpy as np
import pytest
import torch
import training_set
from mixtures import relative_l2
from test_reconstruction import PIXEL_SIZE_A, make_batch, make_mixture
from views import WORLD

from cryosplat import backprojection, cudaops, gaussians, spectral
from cryosplat.dataset import ParticleDataset, radial_noise
from cryosplat.reconstruction import Reconstruction
from cryosplat.settings import ModelConfig, VolumeConfig
from cryosplat.volumefit import Problem, fit, whole

BOX = training_set.BOX


class Called:
    """The host-run kernels in place of the operators; counts calls, so that a test knows that it has used them."""

    def __init__(self):
        self.names: set[str] = set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(hostcuda if hasattr(hostcuda, name) else cudaops, name)


@contextlib.contextmanager
def everything_on_host() -> Iterator[Called]:
    called = Called()

    def residual(*arguments):
        called.names.add("spectral_residual")
        return spectral.on_gpu(*arguments)

    with hostcuda.on_host(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussians, "ops", called)
        patch.setattr(backprojection, "ops", called)
        patch.setattr(torch.ops.cryosplat, "spectral_residual", residual)
        yield called


def step(models: int, box: int) -> tuple[torch.Tensor, ...]:
    """Losses of a batch, and gradients of all mixtures."""
    mixture = make_mixture(models, gaussians=30)
    reconstruction = Reconstruction(mixture, box, PIXEL_SIZE_A, torch.rand(2, box, box // 2 + 1) + 0.5)
    objective, losses = reconstruction(make_batch(7, box), torch.tensor([7, 4, 3][:models]))
    objective.backward()
    return (losses, *(parameter.grad for parameter in mixture.mixtures))


@pytest.mark.parametrize("models, box", [(1, 16), (3, 15), (3, 34)])
def test_a_training_step_is_that_of_the_cpu(models, box):
    torch.manual_seed(0)
    on_cpu = step(models, box)
    torch.manual_seed(0)
    with everything_on_host() as called:
        on_host = step(models, box)
    assert called.names == {"covariances", "splat", "spectral_residual"}
    for ours, expected in zip(on_host, on_cpu, strict=True):
        assert relative_l2(ours, expected) < 1e-4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return training_set.images(tmp_path_factory)


def linear_map_and_fit(dataset: ParticleDataset) -> tuple[np.ndarray, torch.Tensor]:
    noise = radial_noise(dataset.statistics.power, dataset.statistics.count)
    sums = backprojection.back_project(dataset, dataset.owned, noise, WORLD)
    both = whole(tuple(backprojection.linear_half(of_half, BOX) for of_half in sums))
    model, volume = ModelConfig(gaussians=150, scale=0.03), VolumeConfig(steps=12)
    found = fit(Problem(both, training_set.PIXEL_SIZE_A, "full", 0), model, volume, (0.5 / BOX, 0.1))
    return both.map, torch.tensor(found.gains, dtype=torch.float64)


def test_the_linear_map_and_a_fit_in_the_volume_are_those_of_the_cpu(images):
    linear, gains = linear_map_and_fit(images)
    with everything_on_host() as called:
        linear_on_host, gains_on_host = linear_map_and_fit(images)
    assert called.names == {"insert", "covariances", "voxelise"}
    assert relative_l2(torch.from_numpy(linear_on_host), torch.from_numpy(linear)) < 1e-4
    assert gains[-1] > gains[0] and relative_l2(gains_on_host, gains) < 1e-3
