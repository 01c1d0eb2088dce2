"""The CTF: its sign, its formula against cryoDRGN's and an independent one, its axes, its float32 error."""

import importlib.util

import numpy as np
import pytest
import torch

from cryosplat.ctf import ctf_image


def random_parameters(count, seed=0):
    """(count, 7) float64 rows with astigmatism, phase plates and three kinds of microscope."""
    rng = np.random.default_rng(seed)
    defocus = rng.uniform(3000, 50000, count)
    return torch.tensor(
        np.stack(
            [
                defocus,
                defocus + rng.uniform(-2000, 2000, count),
                rng.uniform(-4, 4, count),
                rng.choice([100, 200, 300], count),
                rng.uniform(0, 2.7, count),
                rng.uniform(0, 0.2, count),
                rng.choice([0, 1], count) * rng.uniform(0, np.pi, count),
            ],
            axis=1,
        )
    )


def cryodrgn_ctf(parameters, box, pixel_size_a):
    compute_ctf = pytest.importorskip("cryodrgn.ctf").compute_ctf
    dtype = parameters.dtype
    kx, ky = torch.fft.rfftfreq(box, pixel_size_a, dtype=dtype), torch.fft.fftfreq(box, pixel_size_a, dtype=dtype)
    grid = torch.stack(torch.meshgrid(ky, kx, indexing="ij")[::-1], dim=-1).reshape(-1, 2)
    rows = parameters.clone()
    rows[:, [2, 6]] = torch.rad2deg(rows[:, [2, 6]])
    return torch.stack([compute_ctf(grid, *row).reshape(box, box // 2 + 1) for row in rows])


@pytest.mark.parametrize("box", [15, 16, 64])
def test_it_is_minus_the_ctf_of_cryodrgn(box):
    parameters = random_parameters(40)
    ours = ctf_image(parameters, box, 1.3)
    assert ours.dtype == torch.float64 and ours.shape == (40, box, box // 2 + 1)
    torch.testing.assert_close(ours, -cryodrgn_ctf(parameters, box, 1.3), rtol=0, atol=1e-9)


def test_in_single_precision_it_is_within_one_thousandth():
    parameters = random_parameters(60, seed=1)
    exact, single = ctf_image(parameters, 128, 1.0), ctf_image(parameters.float(), 128, 1.0)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 1e-3
    assert (single - exact).square().mean().sqrt() < 5e-5


def test_it_agrees_with_the_benchmarks_formula_up_to_the_constants_of_the_wavelength(shared):
    pytest.importorskip("finufft")
    spec = importlib.util.spec_from_file_location("fwd", shared / "bench" / "fwd.py")
    fwd = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fwd)
    box, pixel_size_a = 64, 2.0
    kx, ky = np.meshgrid(np.fft.rfftfreq(box) * box, np.fft.fftfreq(box) * box)
    rows = random_parameters(20, seed=2)
    for row, ours in zip(rows.numpy(), ctf_image(rows, box, pixel_size_a).numpy(), strict=True):
        u, v, angle, voltage, cs, contrast, shift = row
        theirs = fwd.ctf(kx, ky, box * pixel_size_a, u, v, np.degrees(angle), voltage, cs, contrast, np.degrees(shift))
        # RELION's wavelength is longer by 3.5e-5, and the phase at the corner of the grid grows in proportion.
        assert np.abs(ours - theirs).max() < 3.6e-5 * np.pi * 0.04 * 52000 * (0.25**2 * 2)


def test_at_zero_frequency_it_is_plus_the_amplitude_contrast():
    parameters = random_parameters(5)
    parameters[:, 6] = 0
    torch.testing.assert_close(ctf_image(parameters, 32, 2.0)[:, 0, 0], parameters[:, 5])


def test_underfocus_makes_low_frequencies_positive():
    parameters = torch.tensor([[15000.0, 15000.0, 0.0, 300.0, 2.7, 0.1, 0.0]])
    assert (ctf_image(parameters, 64, 2.0)[0, :4, :4] > 0).all()


def test_defocus_u_lies_along_the_astigmatism_angle_from_x_towards_y():
    def rows(u, v, angle):
        return torch.tensor([[u, v, angle, 300.0, 2.7, 0.1, 0.0]], dtype=torch.float64)

    box = 32
    along_x = ctf_image(rows(20000.0, 10000.0, 0.0), box, 2.0)[0]
    torch.testing.assert_close(along_x[0], ctf_image(rows(20000.0, 20000.0, 0.0), box, 2.0)[0, 0])
    torch.testing.assert_close(along_x[:, 0], ctf_image(rows(10000.0, 10000.0, 0.0), box, 2.0)[0, :, 0])
    diagonal = ctf_image(rows(20000.0, 10000.0, np.pi / 4), box, 2.0)[0]
    steps = torch.arange(1, box // 2)
    rounds = [ctf_image(rows(defocus, defocus, 0.0), box, 2.0)[0, steps, steps] for defocus in (20000.0, 10000.0)]
    torch.testing.assert_close(diagonal[steps, steps], rounds[0])
    torch.testing.assert_close(diagonal[-steps, steps], rounds[1])


def test_every_particle_can_have_its_own_pixel_size():
    parameters = random_parameters(3)
    sizes = torch.tensor([1.0, 1.5, 2.05])
    together = ctf_image(parameters, 24, sizes.double())
    for row, size, image in zip(parameters, sizes, together, strict=True):
        torch.testing.assert_close(image, ctf_image(row[None], 24, float(size))[0], rtol=0, atol=1e-6)


def test_it_can_be_differentiated_after_a_first_use_in_inference_mode():
    with torch.inference_mode():
        ctf_image(random_parameters(2), 18, 1.7)
    parameters = random_parameters(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: ctf_image(rows, 18, 1.7)[:, 1:4, 1:4], parameters)
