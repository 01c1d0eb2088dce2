"""The spectral residual on GPUs: its source run on the host, thread by thread, against the formula in float64."""

import hostcuda
import numpy as np
import pytest
import torch
from backends import needs_gpu

from cryosplat import spectral
from cryosplat.ctf import RELATIVISTIC_PER_VOLT, WAVELENGTH_NUMERATOR_A, ctf_image
from cryosplat.errors import InputError

PIXEL_SIZE_A = 1.1

PRECISIONS = ("float16", "float32")
SIZES = [(box, models) for box in (1, 2, 7, 16, 30, 34, 64) for models in (1, 2)]
WAYS = [pytest.param(ctf, white, id=f"{ctf=}-{white=}") for ctf in (True, False) for white in (True, False)]


@pytest.fixture(scope="module")
def host():
    return hostcuda.load()


class Case:
    """Random spectra, images, poses' numbers: more images in memory than the batch has, in another order."""

    def __init__(self, box, models, particles, ctf=True, whitened=True, precision="float16", seed=0):
        random = np.random.default_rng([seed, box, models, particles])
        size, held = (box, box // 2 + 1), particles + 3
        self.box, self.models, self.particles, self.precision = box, models, particles, precision
        self.spectra = random.normal(size=(models, particles, *size, 2)).astype(np.float32)
        self.images = random.normal(size=(held, *size, 2)).astype(precision)
        self.rows = random.permutation(held)[:particles].copy()
        self.gain = random.uniform(0.5, 2, particles).astype(np.float32)
        defocus = random.uniform(5000, 30000, (particles, 1))
        others = random.uniform([0, 100, 0, 0, 0], [np.pi, 300, 2.7, 0.2, np.pi], (particles, 5))
        parameters = np.hstack([defocus, defocus - random.uniform(0, 900, (particles, 1)), others])
        self.ctf = parameters.astype(np.float32) if ctf else None
        self.half = random.integers(0, 2, particles)
        self.whitening = random.uniform(0.3, 2, (2, *size)).astype(np.float32) if whitened else None

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """f r (W, B, D, D//2+1) and losses (W, B) in double precision."""
        shape = (self.particles, self.box, self.box // 2 + 1)
        ctf, weights = np.ones(shape), np.ones(shape)
        if self.ctf is not None:
            ctf = ctf_image(torch.from_numpy(self.ctf).double(), self.box, PIXEL_SIZE_A).numpy()
        if self.whitening is not None:
            weights = self.whitening.astype(float)[self.half]
        x, y = (array.astype(np.float64) @ [1, 1j] for array in (self.spectra, self.images[self.rows]))
        residual = weights * (ctf * x - self.gain.astype(float)[:, None, None] * y)
        mates = np.full(self.box // 2 + 1, 2.0)
        mates[0] = 1
        if self.box % 2 == 0:
            mates[-1] = 1
        return weights * ctf * residual, (mates * np.abs(residual) ** 2).sum((-2, -1)) / self.box**2


def run(host, case: Case, backwards: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """f r, complex, and losses. Around what is written lies memory that must stay as it was."""
    margin = 1024
    sizes = case.spectra.size, case.models * case.particles
    written = [np.full(size + 2 * margin, np.float32(7)) for size in sizes]
    spectra, losses = (array[margin : margin + size] for array, size in zip(written, sizes, strict=True))
    spectra[:] = case.spectra.ravel()
    losses[:] = np.nan
    shape = case.models, case.particles, case.box
    size = host.float32.residual_bytes(*shape)
    workspace = np.full(size + 512, 0xFF, np.uint8)  # NaN: nothing in it is to be read before it was written
    at = -workspace.ctypes.data % 256
    others = (case.rows, case.gain, case.ctf, case.half, case.whitening)
    host.turn_round(backwards)
    host.float32.residual(
        *shape,
        *(case.images.ctypes.data, case.precision == "float16"),
        *(0 if array is None else array.ctypes.data for array in others),
        *(WAVELENGTH_NUMERATOR_A, RELATIVISTIC_PER_VOLT, PIXEL_SIZE_A),
        *(spectra.ctypes.data, losses.ctypes.data, workspace.ctypes.data + at),
        *(0, 0),
    )
    assert all((array[:margin] == 7).all() and (array[-margin:] == 7).all() for array in written)
    assert (workspace[:at] == 0xFF).all() and (workspace[at + size :] == 0xFF).all()
    shape = (case.models, case.particles, case.box, case.box // 2 + 1)
    return spectra.view(np.complex64).reshape(shape), losses.reshape(shape[:2])


def check(found: tuple[np.ndarray, np.ndarray], case: Case) -> None:
    spectra, losses = case.truth()
    # ctf.py states 6e-4 for the largest error of a CTF and 2.5e-5 r.m.s.; without one only sums are rounded.
    worst, overall = (2e-3, 1e-4) if case.ctf is not None else (3e-6, 1e-6)
    np.testing.assert_allclose(found[0], spectra, atol=worst * np.abs(spectra).max(initial=1))
    assert np.linalg.norm(found[0] - spectra) <= overall * np.linalg.norm(spectra)
    np.testing.assert_allclose(found[1], losses, rtol=overall)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("ctf", "whitened"), WAYS)
@pytest.mark.parametrize(("box", "models"), SIZES)
def test_every_size_agrees_with_the_formula_in_double_precision(host, box, models, ctf, whitened, precision):
    case = Case(box, models, 5, ctf, whitened, precision)
    check(run(host, case), case)


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("particles", [0, 1, 31, 32, 33])
def test_every_number_of_particles_agrees(host, particles, models):
    case = Case(16, models, particles)
    check(run(host, case), case)


@pytest.mark.parametrize("box", [2, 34, 64])
def test_the_same_bits_in_any_order_of_threads_and_blocks(host, box):
    case = Case(box, 2, 3)
    for forwards, backwards in zip(run(host, case), run(host, case, backwards=True), strict=True):
        np.testing.assert_array_equal(forwards, backwards)


def test_phases_of_a_thousand_radians_are_as_good_as_those_of_ctf_py(host):
    """Of 360 px at 1 A/px; the images are zero, so the filter is seen alone. ctf.py in float32 is no better."""
    case = Case(360, 1, 1, whitened=False, precision="float32")
    case.images[...], case.spectra[...] = 0, [1, 0]
    case.ctf[:] = [50000, 49000, 0.3, 300, 2.7, 0.1, 0.2]
    exact = ctf_image(torch.from_numpy(case.ctf).double(), 360, PIXEL_SIZE_A).numpy()[0]
    single = ctf_image(torch.from_numpy(case.ctf), 360, PIXEL_SIZE_A).numpy()[0]
    found = run(host, case)[0][0, 0].real  # f^2
    assert np.abs(found - exact**2).max() < 2e-3
    errors = [np.sqrt(((squares - exact**2) ** 2).mean()) for squares in (found, single**2)]
    assert errors[0] < 1.5 * errors[1] and errors[0] < 1e-4


@pytest.mark.parametrize("spoil", ["spectra", "images", "gain", "ctf", "whitening"])
def test_what_is_not_finite_shows_in_its_view_and_in_no_other(host, spoil):
    case = Case(16, 2, 4)
    case.half[:] = [0, 1, 0, 0]
    spoiled = np.zeros((2, 4), bool)
    if spoil == "spectra":
        case.spectra[1, 2, 3, 4, 1] = np.nan
        spoiled[1, 2] = True
    elif spoil == "images":
        case.images[case.rows[2], 3, 4, 0] = np.inf
        spoiled[:, 2] = True
    elif spoil == "whitening":
        case.whitening[1, 3, 4] = np.nan
        spoiled[:, 1] = True
    else:
        getattr(case, spoil)[2] = np.nan
        spoiled[:, 2] = True
    spectra, losses = run(host, case)
    np.testing.assert_array_equal(~np.isfinite(losses), spoiled)
    np.testing.assert_array_equal(~np.isfinite(spectra).all((-2, -1)), spoiled)
    if spoil in ("spectra", "images", "whitening"):
        assert (~np.isfinite(spectra)).sum() == spoiled.sum()  # that coefficient alone


@pytest.mark.parametrize("number", [0.0, -0.0, 2.0**-24, -(2.0**-15), 2.0**-14, 1.0, -1.5, 65504.0, np.inf, -np.inf])
def test_half_precision_is_read_exactly(host, number):
    case = Case(1, 1, 1, ctf=False, whitened=False)
    case.images[...], case.spectra[...], case.gain[:] = number, 0, 1
    assert run(host, case)[0].real == -np.float32(number)
    case.images[...] = np.nan
    assert np.isnan(run(host, case)[0].real)


def test_three_models_are_refused_in_words(host):
    with pytest.raises(RuntimeError, match="the spectral residual did not start on the GPU: more than two models"):
        run(host, Case(4, 3, 1))


def operands(case: Case, device: str = "cpu") -> list:
    """Arguments of the operator ``spectral_residual``."""
    arrays = (case.images, case.rows, case.gain, case.ctf, case.half, case.whitening)
    spectra = torch.view_as_complex(torch.from_numpy(case.spectra.copy()))
    others = [None if array is None else torch.from_numpy(array).to(device) for array in arrays]
    return [spectra.to(device), *others, case.box, PIXEL_SIZE_A, True]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("ctf", "whitened"), WAYS)
def test_the_operator_on_the_cpu_and_that_on_a_gpu_agree_with_the_formula(ctf, whitened, precision):
    case = Case(18, 2, 6, ctf, whitened, precision)
    on_cpu, on_gpu = operands(case), operands(case)
    check((on_cpu[0].numpy(), torch.ops.cryosplat.spectral_residual(*on_cpu).numpy()), case)
    with hostcuda.on_host():
        check((on_gpu[0].numpy(), spectral.on_gpu(*on_gpu).numpy()), case)


def test_double_precision_is_refused_in_words():
    spectra, *others = operands(Case(8, 2, 3))
    with hostcuda.on_host(), pytest.raises(InputError, match="GPUs take single precision, got torch.complex128"):
        spectral.on_gpu(spectra.to(torch.complex128), *others)


def test_the_operator_is_what_pytorch_expects_of_one():
    for ctf, whitened in ((True, True), (False, False)):
        given = operands(Case(8, 2, 3, ctf, whitened))
        torch.library.opcheck(torch.ops.cryosplat.spectral_residual.default, given)


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("ctf", "whitened"), WAYS)
def test_a_gpu_agrees_with_the_formula_and_with_itself(ctf, whitened, precision):
    for box, models in [*SIZES, (256, 2)]:
        case = Case(box, models, 33, ctf, whitened, precision)
        found = []
        for _ in range(2):
            given = operands(case, "cuda")
            losses = torch.ops.cryosplat.spectral_residual(*given)
            found.append((given[0].cpu().numpy(), losses.cpu().numpy()))
        check(found[0], case)
        for first, second in zip(*found, strict=True):
            np.testing.assert_array_equal(first, second)
