"""The spectral residual on GPUs: its source run on the host, thread by thread, against the formula in float64."""

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from cryosplat.ctf import RELATIVISTIC_PER_VOLT, WAVELENGTH_NUMERATOR_A, ctf_image

ROOT = Path(__file__).resolve().parents[1]
PIXEL_SIZE_A = 1.1

HOST_SOURCE = """
inline float sinpif(float x) { return float(std::sin(M_PI * double(x))); }

#include "cuda/residual.cu"

using namespace cryosplat;

template <class Number>
const char* residual(const std::int64_t* shape, const double* constants, const void* const* in, float* spectra,
                     float* losses, void* workspace, bool backwards) {
  shim::backwards = backwards;
  return cuda::residual<Number>({shape[0], shape[1], shape[2]},
                                {static_cast<const Number*>(in[0]), static_cast<const std::int64_t*>(in[1]),
                                 static_cast<const float*>(in[2]), static_cast<const float*>(in[3]),
                                 static_cast<const std::int64_t*>(in[4]), static_cast<const float*>(in[5]),
                                 {constants[0], constants[1], constants[2]}},
                                spectra, losses, workspace, {0, nullptr});
}

extern "C" std::int64_t residual_bytes(const std::int64_t* s) { return cuda::residual_bytes({s[0], s[1], s[2]}); }
extern "C" const char* residual_float16(const std::int64_t* s, const double* c, const void* const* in, float* x,
                                        float* l, void* w, bool b) {
  return residual<Half>(s, c, in, x, l, w, b);
}
extern "C" const char* residual_float32(const std::int64_t* s, const double* c, const void* const* in, float* x,
                                        float* l, void* w, bool b) {
  return residual<float>(s, c, in, x, l, w, b);
}
"""

PRECISIONS = ("float16", "float32")
SIZES = [(box, models) for box in (1, 2, 7, 16, 30, 34, 64) for models in (1, 2)]
WAYS = [pytest.param(ctf, white, id=f"{ctf=}-{white=}") for ctf in (True, False) for white in (True, False)]


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    """csrc/cuda/residual.cu, unchanged, behind a shim that runs blocks and threads in turns."""
    folder = tmp_path_factory.mktemp("host")
    source, library = folder / "host.cpp", folder / "host.so"
    source.write_text(HOST_SOURCE)
    flags = "-std=c++17 -O2 -Wall -Wextra -Wno-unknown-pragmas -Werror -fPIC -shared -include cuda_host_shim.h".split()
    command = ["g++", *flags, f"-I{ROOT / 'tests'}", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(library))
    library.residual_float16.restype = library.residual_float32.restype = ctypes.c_char_p
    library.residual_bytes.restype = ctypes.c_int64
    return library


class Case:
    """Random spectra, images, poses' numbers: more images in memory than the batch has, in another order."""

    def __init__(self, box, models, particles, ctf=True, whitened=True, precision="float16", seed=0):
        random = np.random.default_rng([seed, box, models, particles])
        size, held = (box, box // 2 + 1), particles + 3
        self.box, self.models, self.particles, self.precision = box, models, particles, precision
        self.spectra = random.normal(size=(models, particles, *size, 2)).astype(np.float32)
        self.images = random.normal(size=(held, *size, 2)).astype(precision)
        self.rows = random.permutation(held)[:particles]
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


def run(host: ctypes.CDLL, case: Case, backwards: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """f r, complex, and losses. Around what is written lies memory that must stay as it was."""
    margin = 1024
    sizes = case.spectra.size, case.models * case.particles
    written = [np.full(size + 2 * margin, np.float32(7)) for size in sizes]
    spectra, losses = (array[margin : margin + size] for array, size in zip(written, sizes, strict=True))
    spectra[:] = case.spectra.ravel()
    losses[:] = np.nan
    shape = (ctypes.c_int64 * 3)(case.models, case.particles, case.box)
    constants = (ctypes.c_double * 3)(WAVELENGTH_NUMERATOR_A, RELATIVISTIC_PER_VOLT, PIXEL_SIZE_A)
    size = host.residual_bytes(shape)
    workspace = np.full(size + 512, 0xFF, np.uint8)  # NaN: nothing in it is to be read before it was written
    at = -workspace.ctypes.data % 256
    inputs = (case.images, case.rows, case.gain, case.ctf, case.half, case.whitening)
    addresses = (ctypes.c_void_p * 6)(*(None if array is None else array.ctypes.data for array in inputs))
    message = getattr(host, f"residual_{case.precision}")(
        shape, constants, addresses, *(ctypes.c_void_p(array.ctypes.data) for array in (spectra, losses)),
        ctypes.c_void_p(workspace.ctypes.data + at), ctypes.c_bool(backwards),
    )  # fmt: skip
    assert message is None, message.decode()
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
    with pytest.raises(AssertionError, match="more than two models"):
        run(host, Case(4, 3, 1))
