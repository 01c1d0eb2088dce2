"""The forward model against an independent one in float64, its loss and gradient, and how ranks add up."""

import dataclasses

import numpy as np
import pytest
import torch
from views import holding

from cryosplat import reference
from cryosplat.batches import Batch
from cryosplat.gaussians import MEAN, GaussianMixture
from cryosplat.reconstruction import Reconstruction
from cryosplat.spectral import spectral_losses

PIXEL_SIZE_A, CUTOFF = 2.2, 8.0
"""A cut-off so wide that it makes no difference."""


def make_mixture(models, gaussians=9, amplitudes="signed", seed=0):
    mixture = GaussianMixture(models, gaussians, amplitudes, (0.004, 0.1))
    mixture.start_randomly(0.12, 0.05, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixture.mixtures:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter[:, MEAN] *= 0.4
        mixture.unit.copy_(torch.linspace(0.5, 2, models))
    return mixture


def make_batch(count=5, box=16, ctf=True, seed=1):
    """Particles of alternating halves whose images are noise.

    The CTF is astigmatic in odd boxes only: on the Nyquist lines of even ones, where k and -k are one sample, an
    astigmatic CTF has two values.
    """
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(seed)
    images = rng.standard_normal((count, box, box))
    defocus = rng.uniform(8000, 20000, (count, 1))
    fixed = np.tile([0.4, 300, 2.7, 0.1, 0.2], (count, 1))
    rotations = Rotation.random(count, random_state=seed).as_matrix() if count else np.zeros((0, 3, 3))
    return Batch(
        *holding(torch.fft.rfft2(torch.from_numpy(images).float(), norm="ortho")),
        rotations=torch.from_numpy(rotations.reshape(count, 3, 3)).float(),
        shifts=torch.from_numpy(rng.uniform(-2, 2, (count, 2))).float(),
        ctf=torch.from_numpy(np.hstack([defocus, defocus - 500 * (box % 2), fixed])).float() if ctf else None,
        half=torch.arange(count) % 2,
        ids=np.arange(count),
    )


def part(batch, places):
    """Some particles of a batch, as a rank would have them."""
    kept = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    chosen = {name: value[places] for name, value in kept.items() if name != "stored" and value is not None}
    return Batch(**kept | chosen)


def real(spectra, box):
    return np.fft.irfft2(spectra, s=(box, box), norm="ortho")


def independent(mixture, batch, model, box):
    """CTF-modulated real images (B, D, D) of one model: float64 twin of the splat, cryoDRGN's CTF, NumPy's FFT."""
    theta = mixture.theta[model].detach().double()
    softplus = torch.nn.functional.softplus
    covariances = reference.covariances(theta[:, 6:10], softplus(theta[:, 3:6]) * box)
    shape = softplus(theta[:, 10]) if mixture.positive else theta[:, 10] / (0.1 * mixture.gaussians)
    amplitudes = float(mixture.unit[model]) * shape * box**2
    images = reference.splat(
        (theta[:, :3] * box)[None], covariances[None], amplitudes[None], batch.rotations.double(),
        batch.shifts.double(), torch.zeros(len(batch.half), dtype=torch.long), box, None,
    ).numpy()  # fmt: skip
    return images if batch.ctf is None else with_ctf(images, batch.ctf.double(), box)


def with_ctf(images, parameters, box):
    compute_ctf = pytest.importorskip("cryodrgn.ctf").compute_ctf
    frequency = np.fft.fftfreq(box, PIXEL_SIZE_A)
    grid = torch.from_numpy(np.stack(np.meshgrid(frequency, frequency), -1).reshape(-1, 2))
    rows = parameters.clone()
    rows[:, [2, 6]] = torch.rad2deg(rows[:, [2, 6]])
    ctf = np.stack([compute_ctf(grid, *row).numpy().reshape(box, box) for row in rows])
    # cryoDRGN's CTF has the other sign than RELION's, and so than ours.
    return np.fft.ifft2(np.fft.fft2(images) * -ctf).real


def relative(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("amplitudes", ["signed", "positive"])
@pytest.mark.parametrize("models, box, ctf", [(1, 16, True), (3, 16, True), (3, 15, True), (3, 16, False)])
def test_predictions_are_those_of_an_independent_forward_model(models, box, ctf, amplitudes):
    batch = make_batch(box=box, ctf=ctf)
    mixture = make_mixture(models, amplitudes=amplitudes)
    found = Reconstruction(mixture, box, PIXEL_SIZE_A, cutoff=CUTOFF).predict(batch).detach().numpy()
    assert found.shape == (min(models, 2), 5, box, box // 2 + 1)
    assert relative(real(found[0], box), independent(mixture, batch, 0, box)) < 1e-4
    if models == 3:
        expected = [independent(mixture, batch, model, box) for model in (1, 2)]
        of_own_half = np.stack([expected[half][row] for row, half in enumerate(batch.half.tolist())])
        assert relative(real(found[1], box), of_own_half) < 1e-4


@pytest.mark.parametrize("box", [15, 16])
@pytest.mark.parametrize("ctf", [True, False])
def test_the_loss_is_the_mean_squared_difference_of_the_real_images(box, ctf):
    batch, mixture = make_batch(box=box, ctf=ctf), make_mixture(3)
    reconstruction = Reconstruction(mixture, box, PIXEL_SIZE_A, cutoff=CUTOFF)
    losses = reconstruction.view_losses(batch).detach().numpy()
    observed = real(batch.images.numpy(), box)
    for view in range(2):
        predicted = real(reconstruction.predict(batch)[view].detach().numpy(), box)
        np.testing.assert_allclose(losses[view], ((predicted - observed) ** 2).mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(
        losses[0], ((independent(mixture, batch, 0, box) - observed) ** 2).mean((1, 2)), rtol=1e-4
    )


def test_pure_noise_of_unit_variance_has_loss_1():
    mixture = make_mixture(1)
    mixture.unit.zero_()
    losses = Reconstruction(mixture, 32, PIXEL_SIZE_A).view_losses(make_batch(count=200, box=32))
    assert float(losses.detach().mean()) == pytest.approx(1, abs=0.01)


def test_weights_weigh_the_squared_difference_at_every_frequency_by_the_half_of_the_particle():
    box, batch, mixture = 16, make_batch(), make_mixture(3)
    weights = torch.rand(2, box, box // 2 + 1, generator=torch.Generator().manual_seed(0)) + 0.5
    weights[:, -torch.arange(box) % box, 0] = weights[:, :, 0].clone()  # Friedel mates alike
    weights[:, -torch.arange(box) % box, -1] = weights[:, :, -1].clone()
    reconstruction = Reconstruction(mixture, box, PIXEL_SIZE_A, weights, CUTOFF)
    found = reconstruction.view_losses(batch).detach().numpy()
    plain = Reconstruction(mixture, box, PIXEL_SIZE_A, cutoff=CUTOFF)
    difference = (plain.predict(batch) - batch.images).detach().numpy()
    mates = np.full(box // 2 + 1, 2.0)
    mates[[0, -1]] = 1
    expected = (mates * weights.numpy()[batch.half] * np.abs(difference) ** 2).sum((-2, -1)) / box**2
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("box", [7, 8])
def test_the_gradient_of_the_loss_is_its_derivative(box, whitened):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, box, box, dtype=torch.float64, generator=generator).requires_grad_()
    weights = torch.rand(2, box, box // 2 + 1, dtype=torch.float64, generator=generator)
    # A filter of real images is as good at -k as at k.
    weights = torch.fft.rfft2(torch.fft.irfft2(weights + 0j, s=(box, box))).real if whitened else None
    batch = make_batch(count=3, box=box, ctf=False)
    observed = torch.fft.rfft2(torch.randn(3, box, box, dtype=torch.float64, generator=generator), norm="ortho")
    batch = Batch(*holding(observed), batch.rotations, batch.shifts, None, batch.half, batch.ids)
    assert torch.autograd.gradcheck(lambda x: spectral_losses(x, batch, weights, PIXEL_SIZE_A), images)


def test_the_gradient_of_the_whole_objective_is_its_derivative():
    """In float64, through the compiled kernel: positions, scales, quaternions, amplitudes of all three models."""
    box, batch = 7, make_batch(count=3, box=7)
    as_doubles = {name: getattr(batch, name).double() for name in ("rotations", "shifts", "ctf")}
    batch = Batch(*holding(batch.images.to(torch.complex128)), **as_doubles, half=batch.half, ids=batch.ids)
    mixture = make_mixture(3, gaussians=2)
    reconstruction = Reconstruction(mixture, box, PIXEL_SIZE_A, cutoff=CUTOFF).double()
    counts = (3, 2, 1)

    def objective(*parameters):
        names = [f"mixture.mixtures.{m}" for m in range(3)]
        return torch.func.functional_call(reconstruction, dict(zip(names, parameters, strict=True)), (batch, counts))[0]

    assert torch.autograd.gradcheck(objective, [p.detach().clone().requires_grad_() for p in mixture.mixtures])


def test_projection_and_its_adjoint_are_adjoint():
    """<P a, y> = <a, P' y>: images are linear in amplitudes, and the backward pass is P'."""
    box, batch, mixture = 16, make_batch(), make_mixture(1)
    reconstruction = Reconstruction(mixture, box, PIXEL_SIZE_A)
    predicted = reconstruction.predict(batch)
    inner = (predicted * batch.images.conj()).real.sum()
    inner.backward()
    amplitudes, adjoint = mixture.mixtures[0].detach()[:, 10], mixture.mixtures[0].grad[:, 10]
    assert float((amplitudes * adjoint).sum()) == pytest.approx(float(inner.detach()), rel=1e-4)


def gradients(reconstruction, batch, counts):
    reconstruction.zero_grad(set_to_none=True)
    objective, losses = reconstruction(batch, counts)
    objective.backward()
    return torch.stack([p.grad.clone() for p in reconstruction.mixture.mixtures]), reconstruction.ledger.grad, losses


DEALS = ([[0, 1, 2, 3, 4]], [[0, 2], [1, 3, 4]], [[0, 1, 2, 3, 4], []], [[0], [1, 2], [], [4, 3]])


@pytest.mark.parametrize("deal", DEALS)
def test_the_mean_over_ranks_is_the_gradient_of_each_models_mean_loss(deal):
    """Also with a rank that has no particle, and one without any of a half."""
    batch, mixture = make_batch(), make_mixture(3)
    counts = (5, 3, 2)
    parts = [
        gradients(Reconstruction(mixture, 16, PIXEL_SIZE_A, ranks=len(deal)), part(batch, places), counts)
        for places in (torch.tensor(each, dtype=torch.long) for each in deal)
    ]
    gradient, ledger = (torch.stack(each).mean(0) for each in list(zip(*parts, strict=True))[:2])
    losses = Reconstruction(mixture, 16, PIXEL_SIZE_A).view_losses(batch)
    means = torch.stack([losses[0].mean(), losses[1][batch.half == 0].mean(), losses[1][batch.half == 1].mean()])
    torch.testing.assert_close(ledger, means.detach(), rtol=1e-5, atol=0)
    mixture.zero_grad(set_to_none=True)
    means.sum().backward()
    expected = torch.stack([p.grad for p in mixture.mixtures])
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5
    assert [tuple(of_rank[2].shape) for of_rank in parts] == [(2, len(places)) for places in deal]


def test_models_share_no_gradient():
    batch, mixture = make_batch(), make_mixture(3)
    changed = dataclasses.replace(batch, stored=batch.stored.clone())
    changed.stored[batch.half == 1] *= 3
    reconstruction = Reconstruction(mixture, 16, PIXEL_SIZE_A)
    before, after = (gradients(reconstruction, each, (5, 3, 2))[0] for each in (batch, changed))
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[2], after[2])


@pytest.mark.parametrize("models", [1, 3])
def test_the_unit_is_the_least_squares_scale_of_each_model(models):
    box, batch = 16, make_batch(count=12)
    mixture = make_mixture(models)
    mixture.unit.fill_(1.0)
    reconstruction = Reconstruction(mixture, box, PIXEL_SIZE_A, cutoff=CUTOFF)
    xy, xx = reconstruction.fit_unit(batch)
    observed = real(batch.images.numpy(), box)
    for model in range(models):
        mine = np.ones(12, bool) if model == 0 else batch.half.numpy() == model - 1
        predicted = independent(mixture, batch, model, box)
        products = (predicted * observed).sum((1, 2))[mine]
        assert float(xy[model]) == pytest.approx(products.sum(), rel=1e-3)
        assert float(xx[model]) == pytest.approx((predicted[mine] ** 2).sum(), rel=1e-3)
