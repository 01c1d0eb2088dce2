"""The sign of the data: found where the images tell it, of any shape, and said to be unknown where they do not."""

import re

import numpy as np
import pytest
import torch
import training_set
from pytest import approx
from scipy.spatial.transform import Rotation
from training_set import last_checkpoint
from views import Views

from cryosplat import cli
from cryosplat.errors import InputError
from cryosplat.sign import BODIES, CERTAINTY, body_spectra, certainty_of, choose_images, decide, sums_of
from cryosplat.volumes import read_map

BOX, COUNT = 48, 120


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


def density(kind):
    """(D, D, D) of a particle: a lump off the centre, a capsid with nothing in it, or a ring."""
    z, y, x = (np.indices((BOX,) * 3) - BOX // 2) / BOX
    if kind == "lump":
        return np.exp(-(((x - 0.06) / 0.09) ** 2 + (y / 0.05) ** 2 + ((z + 0.04) / 0.13) ** 2))
    if kind == "capsid":
        return np.exp(-(((np.sqrt(x**2 + y**2 + z**2) - 0.3) / 0.03) ** 2))
    return np.exp(-(((np.hypot(x, y) - 0.2) / 0.05) ** 2) - (z / 0.05) ** 2)


def views(truth, noise, seed=0):
    random = np.random.default_rng(seed)
    ctf = np.tile([15000.0, 14000, 0.5, 300, 2.7, 0.1, 0], (COUNT, 1))
    ctf[:, :2] += random.uniform(-5000, 5000, (COUNT, 1))
    found = Views(truth, Rotation.random(COUNT, random_state=seed).as_matrix(), random.uniform(-4, 4, (COUNT, 2)), ctf)
    noises = np.random.default_rng(seed).normal(0, noise, (COUNT, BOX, BOX))
    found.images += torch.from_numpy(np.fft.rfft2(noises, norm="ortho")).to(found.images.dtype)
    found.device = torch.device("cpu")
    return found


def certainty(found, noise):
    return certainty_of(sums_of(found, np.arange(COUNT), np.full((2, BOX // 2 + 1), noise**2)))


@pytest.mark.parametrize("kind", ["lump", "capsid", "ring"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_any_shape_is_found_in_noise(kind, sign):
    truth = sign * density(kind)
    noise = 3 * float(views(truth, 0).images.abs().square().mean().sqrt())
    assert sign * certainty(views(truth, noise), noise) > CERTAINTY


def test_noise_alone_is_never_sure():
    found = np.array([certainty(views(np.zeros((BOX,) * 3), 1.0, seed), 1.0) for seed in range(60)])
    # The largest of some nine normal numbers that are partly the same.
    assert 0.5 < np.abs(found).mean() < 2 and np.abs(found).max() < 4.5 and 10 < (found > 0).sum() < 50


def test_one_image_outweighs_none_of_the_others():
    """A speck of dirt a hundred times as strong as the particles, in one image."""
    truth = density("lump")
    noise = 3 * float(views(truth, 0).images.abs().square().mean().sqrt())
    found = views(truth, noise)
    found.images[7] *= -100
    assert certainty(found, noise) > -2


def test_a_body_is_centred_where_shifts_say():
    """Its own projections are what is expected of it, to rounding, so that their product is the power."""
    truth = np.exp(-0.5 * (((np.indices((BOX,) * 3) - BOX // 2) / BOX / 0.075) ** 2).sum(0))
    products, squares, powers = sums_of(views(truth, 0), np.arange(COUNT), np.ones((2, BOX // 2 + 1)))
    body = BODIES.index((0.0, 0.075))
    # The unit is that of the spectrum at zero: the sum over an image of the body's projection.
    assert float(products[body] / powers[body]) == approx(truth.sum() / BOX, rel=1e-3)
    assert float(products[body] / squares[body].sqrt()) == approx(np.sqrt(COUNT), rel=0.05)  # their CTFs differ


def test_a_body_is_a_shell_or_a_ball():
    spectra = body_spectra(32)
    assert spectra.shape == (len(BODIES), 32, 17) and torch.equal(spectra[:, 0, 0], torch.ones(len(BODIES)))
    assert float(spectra[:, 16].abs().max()) < 5e-2 and float(spectra[1:, 16].abs().max()) < 5e-2
    shell = BODIES.index((0.25, 0.05))
    assert float(spectra[shell, 0, 2]) == approx(0, abs=1e-6)  # sin(2 pi k r) at k r = 1 / 2


def test_the_images_asked_are_of_both_halves_and_none_that_is_held_out():
    half = (np.arange(20000) % 5 == 0).astype(np.int8)
    usable = np.arange(20000) % 3 > 0
    chosen = choose_images(half, usable, 0)
    assert np.bincount(half[chosen]).tolist() == [2048, 2048] and usable[chosen].all()
    assert (np.diff(chosen) > 0).all() and np.array_equal(chosen, choose_images(half, usable, 0))
    assert choose_images(half[:10], usable[:10], 0).tolist() == np.flatnonzero(usable[:10]).tolist()


class Said:
    def __init__(self, invert, sign_origin):
        self.invert, self.sign_origin = invert, sign_origin


@pytest.mark.parametrize(
    ("certainty", "invert", "origin", "expected", "words"),
    [
        (12, True, "", True, "the particles are white on dark (+12.0 standard errors): data.invert=true"),
        (-12, True, "", False, "the particles are dark on white (-12.0 standard errors): data.invert=false"),
        (-12, False, "blob/sign of p.cs", False, "data.invert=false"),
        (12, False, "blob/sign of p.cs", True, "data.invert=true, although blob/sign of p.cs says the opposite"),
        (-3, True, "", True, "do not tell .* taken for white on dark, by cryoDRGN's default; data.invert=false is"),
        (3, False, "blob/sign of p.cs", False, "taken for dark on white, by blob/sign of p.cs; data.invert=true is"),
        (-3, True, "data.invert", True, "taken for white on dark, by data.invert"),
    ],
)
def test_the_decision_is_that_of_images_that_are_sure_and_else_of_the_input(certainty, invert, origin, expected, words):
    sign = decide(certainty, Said(invert, origin))
    assert sign.invert is expected and sign.certainty == certainty
    assert words in sign.words or re.search(words, sign.words)


def test_a_sign_that_was_set_wrong_is_refused_or_obeyed():
    with pytest.raises(
        InputError, match=r"inverted: .*dark on white .*but data\.invert=true is set.*data\.invert=false"
    ):
        decide(-20, Said(True, "data.invert"))
    sign = decide(-20, Said(True, "data.invert"), check=False)
    assert sign.invert and "they are taken as that says" in sign.words


def test_a_run_that_goes_on_keeps_its_sign(stack, tmp_path):
    """Even if the images, which it is not asked about again, would say otherwise."""
    flipped = training_set.altered(stack, tmp_path / "stack", lambda images: -images)
    run_dir = training_set.trained(flipped, tmp_path / "run", "train.epochs=1")
    state = last_checkpoint(run_dir)
    assert state["sign"]["invert"] is False and state["sign"]["certainty"] < -CERTAINTY
    expected = read_map(run_dir / "half_a.mrc")[0]
    for name in ("summary.json", "half_a.mrc"):
        (run_dir / name).unlink()
    (flipped / "particles.mrcs").write_bytes((stack / "particles.mrcs").read_bytes())
    training_set.trained(flipped, run_dir, "train.epochs=1")
    np.testing.assert_array_equal(read_map(run_dir / "half_a.mrc")[0], -expected)


def test_backproject_finds_the_sign_too(stack, tmp_path):
    flipped = training_set.altered(stack, tmp_path / "stack", lambda images: -images)
    for folder, name in ((stack, "white"), (flipped, "dark")):
        words = [f"data_root={folder}", "data.particles=particles.star", "train.threads=1", "-o", str(tmp_path / name)]
        assert cli.main(["backproject", *words]) == 0
    for name in ("half_a.mrc", "half_b.mrc", "linear.mrc"):
        np.testing.assert_array_equal(read_map(tmp_path / "dark" / name)[0], read_map(tmp_path / "white" / name)[0])
