"""Aberrations, magnification, mixed A/px and stacks with their CTF applied: the map comes out as without them."""

import logging
import shutil
import subprocess

import mrcfile
import numpy as np
import opticsets
import pytest
import torch
from opticsets import BOX, COUNT, PIXEL_SIZE_A, TRUTH, coma, even_to_fourth, images, trefoil, write, zernike
from stacks import load
from tables import cs, save_cs, write_star31
from views import WORLD

from cryosplat.aberrations import Aberrations, even_rest, fold_ctf, frequencies
from cryosplat.backprojection import back_project, linear_half
from cryosplat.ctf import ctf_image
from cryosplat.dataset import ParticleDataset, half_plane_weights, radial_noise
from cryosplat.errors import InputError
from cryosplat.fsc import fsc
from cryosplat.opticsnotes import optics_notes
from cryosplat.spectral import spectral_losses

NOISE = 0.05
MAGNIFICATION = np.array([[1.03, 0.02], [-0.01, 0.98]])
MATRIX = {f"MagMat{i}{j}": MAGNIFICATION[i, j] for i in (0, 1) for j in (0, 1)}

# Phases of some radians at the resolution of these images, 4 A.
TILT = {"BeamTiltX": 5.0, "BeamTiltY": -3.0}
ODD = {"OddZernike": zernike(0, 0, 160, 0, 0, 240)}
EVEN = {"EvenZernike": zernike(0, 0, 0, 20, 100, 0, 0, 200)}


def dataset_of(table, box=None):
    dataset = ParticleDataset(table, np.arange(len(table)), box, table.invert, "single")
    dataset.normalise(dataset.statistics.deviation)
    return dataset


def curve_of(table, box=None):
    """FSC to the truth of the linear map of all images, shells 0 to D // 2."""
    dataset = dataset_of(table, box)
    radial = radial_noise(dataset.statistics.power, dataset.statistics.count)
    sums = back_project(dataset, dataset.owned, radial, WORLD, halves=False)
    found = linear_half(sums[0], dataset.box).map
    truth = TRUTH
    if box is not None:
        kept = np.r_[0 : box // 2, BOX - box // 2 : BOX]
        spectrum = np.fft.fftn(np.fft.ifftshift(TRUTH))[np.ix_(kept, kept, kept)]
        truth = np.fft.fftshift(np.fft.ifftn(spectrum).real)
    assert np.isfinite(found).all()
    return fsc(found, truth, dataset.pixel_size_a).fsc


@pytest.fixture(scope="module")
def plain_curve(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return curve_of(load(folder, particles=write(folder, images(noise=NOISE))))


ABERRATIONS = {
    "beam tilt": (TILT, {"odd": coma(5.0, -3.0)}),
    "odd Zernike": (ODD, {"odd": trefoil(240, 160)}),
    "both": (TILT | ODD, {"odd": lambda x, y: coma(5.0, -3.0)(x, y) + trefoil(240, 160)(x, y)}),
    "even Zernike": (EVEN, {"even": even_to_fourth(20, 200, 100)}),
    "magnification": (MATRIX, {"matrices": MAGNIFICATION}),
    "all": (
        TILT | ODD | EVEN | MATRIX,
        {
            "odd": lambda x, y: coma(5.0, -3.0)(x, y) + trefoil(240, 160)(x, y),
            "even": even_to_fourth(20, 200, 100),
            "matrices": MAGNIFICATION,
        },
    ),
}


@pytest.mark.parametrize("name", ABERRATIONS)
def test_aberrations_that_the_star_file_states_leave_no_trace_in_the_map(tmp_path, plain_curve, name):
    columns, what = ABERRATIONS[name]
    stack = images(**what, noise=NOISE)
    corrected = curve_of(load(tmp_path, particles=write(tmp_path, stack, **columns)))
    ignored = curve_of(load(tmp_path, particles=write(tmp_path, stack)))
    shells = slice(2, 18)
    assert np.abs(corrected - plain_curve)[shells].max() < 0.03
    assert ignored[shells].mean() < plain_curve[shells].mean() - 0.08


@pytest.mark.parametrize(("other", "lost"), [(1.01, 0.004), (1.06, 0.2)])
def test_optics_groups_of_other_a_per_px_give_the_map_of_one(tmp_path, plain_curve, other, lost):
    sizes = (PIXEL_SIZE_A, other * PIXEL_SIZE_A, PIXEL_SIZE_A / other)
    groups = np.arange(COUNT) * 7 // 5 % 3
    groups[:100] = 0
    stack = images(PIXEL_SIZE_A / np.array(sizes)[groups][:, None, None] * np.eye(2), noise=NOISE)
    table = load(tmp_path, particles=write(tmp_path, stack, groups, sizes))
    assert table.pixel_size_a == PIXEL_SIZE_A
    mixed = curve_of(table)
    assert np.abs(mixed - plain_curve)[2:18].max() < 0.01
    as_one = curve_of(load(tmp_path, particles=write(tmp_path, stack, groups, (PIXEL_SIZE_A,) * 3)))
    assert as_one[8:18].mean() < mixed[8:18].mean() - lost


def test_optics_groups_of_two_microscopes_and_phase_shifts_of_each_particle_make_one_map(tmp_path, plain_curve):
    groups, shift_deg = np.arange(COUNT) // 2 % 2, np.linspace(0, 120, COUNT)
    constants = {"Voltage": [300, 200], "SphericalAberration": [2.7, 1.4], "AmplitudeContrast": [0.1, 0.07]}
    microscope = *(np.array(values)[groups] for values in constants.values()), shift_deg
    # Phase shifts raise the signal of low frequencies, of which noise is a fraction.
    stack, two = images(noise=NOISE / 2, microscope=microscope), (PIXEL_SIZE_A,) * 2
    found = curve_of(load(tmp_path, particles=write(tmp_path, stack, groups, two, shift_deg=shift_deg, **constants)))
    as_one = curve_of(load(tmp_path, particles=write(tmp_path, stack, groups, two, shift_deg=shift_deg)))
    assert (found - plain_curve)[2:18].min() > -0.01
    assert as_one[2:18].mean() < found[2:18].mean() - 0.08


def test_one_a_per_px_cannot_stand_for_several(tmp_path):
    name = write(tmp_path, images(), np.arange(COUNT) % 2, (PIXEL_SIZE_A, 2.05))
    with pytest.raises(InputError, match=r"A/px from 2 to 2\.05, so that data.pixel_size=2 cannot stand for all"):
        load(tmp_path, particles=name, pixel_size=2.0)


def test_aberrations_in_a_smaller_training_box_are_those_of_the_stored_one(tmp_path):
    columns, what = ABERRATIONS["all"]
    whole = curve_of(load(tmp_path, particles=write(tmp_path, images(noise=NOISE))), 32)
    found = curve_of(load(tmp_path, particles=write(tmp_path, images(**what, noise=NOISE), **columns)), 32)
    assert np.abs(found - whole)[2:14].max() < 0.02


RECORDED = {
    "flipped": ({"CtfDataArePhaseFlipped": 1}, lambda ctf: np.where(ctf < 0, -1, 1)),
    "multiplied": ({"CtfDataAreCtfPremultiplied": 1}, lambda ctf: ctf),
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("aberrant", [False, True], ids=["plain", "aberrant"])
def test_stacks_that_had_their_ctf_applied_give_the_map_of_the_raw_one(tmp_path, name, aberrant):
    columns, what = ABERRATIONS["all"] if aberrant else ({}, {})
    flags, recorded = RECORDED[name]
    raw = curve_of(load(tmp_path, particles=write(tmp_path, images(**what, noise=NOISE), **columns)))
    applied = images(**what, noise=NOISE, recorded=recorded)
    found = curve_of(load(tmp_path, particles=write(tmp_path, applied, **columns, **flags)))
    assert np.abs(found - raw)[2:18].max() < 0.005
    ignored = curve_of(load(tmp_path, particles=write(tmp_path, applied, **columns)))
    # A product with the CTF leaves every sign wrong where it is negative.
    assert ignored[4:18].mean() < raw[4:18].mean() - 0.1


def test_images_that_were_flipped_or_multiplied_by_their_ctf_are_as_they_were(tmp_path):
    """But for the 3 % of coefficients with next to no signal, whose noise is gone."""
    raw = dataset_of(load(tmp_path, particles=write(tmp_path, images(noise=NOISE))))
    for name, worst in (("flipped", 1e-4), ("multiplied", 0.05)):
        flags, recorded = RECORDED[name]
        found = dataset_of(load(tmp_path, particles=write(tmp_path, images(noise=NOISE, recorded=recorded), **flags)))
        pair = [dataset.batch(np.arange(COUNT)).images for dataset in (found, raw)]
        inside = torch.from_numpy(opticsets.KX**2 + opticsets.KY**2 < 19**2)
        pair = [images[:, inside] for images in pair]
        error = (pair[0] - pair[1]).abs().square().sum() / pair[1].abs().square().sum()
        assert error < worst
        power = radial_noise(found.statistics.power, found.statistics.count)
        assert 0.9 < (power / radial_noise(raw.statistics.power, raw.statistics.count))[:, 2:19].mean() < 1.02


def test_half_of_a_stack_may_be_flipped(tmp_path, plain_curve):
    groups = np.arange(COUNT) // 2 % 2
    stack = images(noise=NOISE)
    stack[groups == 1] = images(noise=NOISE, recorded=RECORDED["flipped"][1])[groups == 1]
    name = write(tmp_path, stack, groups, (PIXEL_SIZE_A,) * 2, CtfDataArePhaseFlipped=[0, 1])
    assert np.abs(curve_of(load(tmp_path, particles=name)) - plain_curve)[2:18].max() < 0.005


def test_columns_that_say_nothing_change_no_bit(tmp_path):
    stack = images(noise=NOISE)
    before = load(tmp_path, particles=write(tmp_path, stack))
    nothing = {f"MagMat{i}{j}": int(i == j) for i in (0, 1) for j in (0, 1)}
    nothing |= {"BeamTiltX": 0, "BeamTiltY": 0, "OddZernike": zernike(*[0] * 6), "EvenZernike": "[]"}
    nothing |= {"CtfDataArePhaseFlipped": 0, "CtfDataAreCtfPremultiplied": 0}
    after = load(tmp_path, particles=write(tmp_path, stack, **nothing))
    assert before.optics is None and after.optics is None
    batches = [dataset_of(table).batch(np.arange(COUNT)) for table in (before, after)]
    for name in ("images", "rotations", "shifts", "ctf"):
        assert torch.equal(*(getattr(batch, name) for batch in batches))


def test_an_optics_group_without_aberrations_is_not_touched_by_the_others(tmp_path):
    groups, stack = np.arange(COUNT) % 2, images(noise=NOISE)
    plain = dataset_of(load(tmp_path, particles=write(tmp_path, stack)))
    columns = {"BeamTiltX": [0, 2], "BeamTiltY": [0, 1], "MagMat00": [1, 1.02], "MagMat01": [0, 0]}
    columns |= {"MagMat10": [0, 0], "MagMat11": [1, 1], "EvenZernike": [zernike(0), zernike(0.3)]}
    mixed = dataset_of(load(tmp_path, particles=write(tmp_path, stack, groups, (PIXEL_SIZE_A,) * 2, **columns)))
    for parity, same in ((0, True), (1, False)):
        batches = [dataset.batch(np.flatnonzero(groups == parity)) for dataset in (plain, mixed)]
        for name in ("images", "rotations", "ctf"):
            assert torch.equal(*(getattr(batch, name) for batch in batches)) == same


def test_prepared_images_are_others_where_what_they_are_corrected_for_is_another(tmp_path):
    def digest(**columns):
        table = load(tmp_path, particles=write(tmp_path, stack, **columns))
        return table.optics.digest(table.ctf)

    stack = images()
    assert digest(MagMat00=1.01, MagMat01=0, MagMat10=0, MagMat11=1) == "" == digest(EvenZernike="[0.1]")
    different = [TILT, TILT | {"BeamTiltX": 5.01}, ODD, {"CtfDataArePhaseFlipped": 1}]
    different += [{"CtfDataArePhaseFlipped": 1, "EvenZernike": "[0.1]"}, {"CtfDataAreCtfPremultiplied": 1}]
    digests = [digest(**columns) for columns in different]
    assert len({"", *digests}) == len(different) + 1 and digest(**TILT) == digests[0]


# Formulas


def test_even_aberrations_and_magnification_are_in_the_ctf_exactly():
    group = Aberrations(
        tuple(map(tuple, MAGNIFICATION.tolist())), (0, 0), (), (0.3, 0, 0, 20, 100, 0, 50, 200), 2.7, 300.0
    )
    x, y = frequencies(BOX, PIXEL_SIZE_A, group.magnification)
    squared = x**2 + y**2

    def even(x, y):
        return 0.3 + even_to_fourth(20, 200, 100)(x, y) + 50 * (6 * squared**2 - 6 * squared + 1)

    expected = opticsets.contrast_transfer(x, y, even)
    rows = np.column_stack([opticsets.DEFOCUS_A, opticsets.ANGLE, np.tile([300.0, 2.7, 0.1, 0.0], (COUNT, 1))])
    rest = torch.from_numpy(even_rest(group, BOX, PIXEL_SIZE_A))
    found = ctf_image(torch.from_numpy(fold_ctf(rows, group)), BOX, PIXEL_SIZE_A, rest)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)
    without = ctf_image(torch.from_numpy(fold_ctf(rows, group)), BOX, PIXEL_SIZE_A)
    assert (found - without).abs().max() > 0.5


def test_losses_and_gradients_take_phases_of_aberrations(tmp_path):
    columns, what = ABERRATIONS["even Zernike"]
    dataset = dataset_of(load(tmp_path, particles=write(tmp_path, images(**what, noise=NOISE), **columns)))
    batch = dataset.batch(np.arange(4))
    assert batch.phases is not None and batch.part(slice(1, 3)).phases.shape[0] == 2
    torch.manual_seed(0)
    shown = torch.randn(1, 4, BOX, BOX, requires_grad=True)
    losses = spectral_losses(shown, batch, None, PIXEL_SIZE_A)
    losses.sum().backward()
    gradient, shown.grad = shown.grad, None
    filters = ctf_image(batch.ctf, BOX, PIXEL_SIZE_A, batch.phases)
    difference = torch.fft.rfft2(shown, norm="ortho") * filters - batch.images
    expected = (difference.abs().square() * half_plane_weights(BOX)).sum((-2, -1)) / BOX**2
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    torch.testing.assert_close(gradient, shown.grad, rtol=1e-3, atol=1e-6)


# RELION


needs_reconstruct = pytest.mark.skipif(not shutil.which("relion_reconstruct"), reason="needs RELION's programs")


@needs_reconstruct
@pytest.mark.parametrize("name", ABERRATIONS)
def test_relion_reconstruct_takes_the_same_columns_for_the_same_aberrations(tmp_path, name):
    columns, what = ABERRATIONS[name]
    write(tmp_path, images(**what), **columns)
    words = "relion_reconstruct --i particles.star --o map.mrc --ctf --maxres 4.2"
    subprocess.run(words.split(), cwd=tmp_path, check=True, capture_output=True)
    found = mrcfile.read(tmp_path / "map.mrc")
    assert fsc(found, TRUTH, PIXEL_SIZE_A).fsc[2:18].min() > 0.98


# Words


def test_what_is_corrected_is_said_with_what_it_would_limit(tmp_path, caplog):
    columns = {"BeamTiltX": [2.5, 0], "BeamTiltY": [-1.5, 0], **{key: [value] * 2 for key, value in EVEN.items()}}
    name = write(tmp_path, images(), np.arange(COUNT) % 2, (PIXEL_SIZE_A, 2.02), **columns, CtfDataArePhaseFlipped=1)
    with caplog.at_level(logging.INFO, logger="cryosplat"):
        load(tmp_path, particles=name)
    for words in (
        "beam tilt, 2.9 mrad in optics group 1 g0, is corrected; left in, this would limit to about ",
        "even aberrations to order 4 in 2 groups",
        "another scale than the map's 2 A/px, by 0.99% in optics group 2 g1",
        "240 of 240 images were phase-flipped: flipped back",
    ):
        assert words in caplog.text


def test_aberrations_of_cryosparc_are_warned_of(tmp_path, caplog):
    write(tmp_path, images()[:6])
    pairs = np.ones((6, 2))
    columns = cs(ctf__tilt_A=3e4 * pairs, ctf__trefoil_A=0 * pairs, ctf__anisomag=np.tile([0.02, 0, 0, 0], (6, 1)))
    save_cs(tmp_path / "p.cs", columns)
    with caplog.at_level(logging.WARNING, logger="cryosplat"):
        table = load(tmp_path, particles="p.cs")
    assert table.optics is None
    # 3e4 A over Cs are 1.6 mrad; pi/4 = 2 pi lambda^2 42426 A s^3 at 5.1 A.
    assert "ctf/tilt_A: beam tilt, 4.24e+04 A, is not modelled: limits the resolution to about 5.1 A" in caplog.text
    assert "ctf/anisomag: uneven magnification, 2.00%" in caplog.text and "trefoil" not in caplog.text


def test_the_ewald_sphere_is_warned_of_where_nyquist_is_finer(tmp_path):
    from cryosplat.listing import read_listing

    write_star31(tmp_path / "p.star")
    listing, ctf = read_listing(tmp_path / "p.star", []), np.tile([1e4, 1e4, 0, 300, 2.7, 0.1, 0], (6, 1))
    (note,) = optics_notes(listing, np.arange(6), 512, 0.7, ctf, None)
    assert "Ewald" in note and note.endswith("239 A thick (2/3 of the box) to about 2.2 A")
    assert optics_notes(listing, np.arange(6), 256, 1.1, ctf, None) == []


BAD = {
    "tilt in rad": ({"BeamTiltX": 1e4, "BeamTiltY": 0}, "row 0: a beam tilt of more than 100 mrad"),
    "tilt in words": ({"BeamTiltX": "x", "BeamTiltY": 0}, "row 0: _rlnBeamTiltX is 'x', expected a number"),
    "no list": ({"OddZernike": "0.5"}, "row 0: _rlnOddZernike is '0.5', expected a list such as"),
    "words in a list": ({"EvenZernike": "[0,x]"}, r"row 0: _rlnEvenZernike is '\[0,x\]', expected a list"),
    "a huge coefficient": ({"OddZernike": "[0,1e9]"}, "row 0: _rlnOddZernike has a coefficient above 1e.06"),
    "half a matrix": ({"MagMat00": 1.01}, "of the magnification matrix it has _rlnMagMat00 alone"),
    "no matrix": (
        {"MagMat00": 0, "MagMat01": 0, "MagMat10": 0, "MagMat11": 0},
        r"row 0: _rlnMagMat00 to 11 stretch .* \(6 of 6 rows\)",
    ),
    "flag": ({"CtfDataArePhaseFlipped": 2}, "row 0: _rlnCtfDataArePhaseFlipped is neither 0 nor 1"),
    "both flags": ({"CtfDataArePhaseFlipped": 1, "CtfDataAreCtfPremultiplied": 1}, "row 0: .* are both 1; which is it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_columns_of_optics_are_named(tmp_path, name):
    columns, message = BAD[name]
    write(tmp_path, images()[:6])
    write_star31(tmp_path / "p.star", **{key: [value] * 6 for key, value in columns.items()})
    with pytest.raises(InputError, match=rf"p\.star: {message}"):
        load(tmp_path, particles="p.star")
