"""Resolution by direction finds the direction; viewing directions are those of the projection."""

import numpy as np
import pytest
from halfmaps import frequencies, halves, molecule, noise

from cryosplat import figures, fscfigures
from cryosplat.conventions import euler_to_rotation
from cryosplat.directional import directional_fsc, directions_on_half_sphere, view_evenness, viewing_directions
from cryosplat.errors import InputError
from cryosplat.fsc import fsc, masked_spectrum
from cryosplat.symmetry import point_group

BOX, PIXEL_SIZE_A = 40, 3.0
AXES = {"x": 2, "y": 1, "z": 0}


def along(axis):
    """Cosine of the angle between every voxel of the half-spectrum and an axis."""
    full, half = np.fft.fftfreq(BOX, 1 / BOX), np.fft.rfftfreq(BOX, 1 / BOX)
    component = np.broadcast_arrays(full[:, None, None], full[:, None], half)[AXES[axis]]
    return np.abs(component) / np.maximum(frequencies(BOX), 1e-9)


def directional(pair, **options):
    return directional_fsc(*(masked_spectrum(half) for half in pair), PIXEL_SIZE_A, **options)


@pytest.mark.parametrize("axis", AXES)
def test_the_worst_direction_is_the_one_with_the_noise(axis):
    truth = molecule(BOX)
    pair = [truth + 0.5 * truth.std() * noise(BOX, seed, weight=1 + 9 * (along(axis) > 0.85)) for seed in (1, 2)]
    found = directional(pair)
    assert abs(found.directions[found.worst]["xyz".index(axis)]) > 0.9
    assert abs(found.directions[found.best]["xyz".index(axis)]) < 0.8
    assert found.anisotropy < 0.6
    resolutions = np.array([resolution.angstrom for resolution in found.resolutions])
    assert resolutions[found.worst] > 1.3 * resolutions[found.best]


def test_noise_that_is_alike_in_all_directions_is_not_anisotropic():
    assert directional(halves(molecule(BOX), 1.0)).anisotropy > 0.7
    assert directional([molecule(BOX), 2 * molecule(BOX)]).anisotropy == pytest.approx(1, abs=1e-6)


def test_a_cone_of_all_directions_is_the_shell():
    pair = halves(molecule(BOX), 1.0)
    found = directional(pair, half_angle_deg=91.0, number=3)
    np.testing.assert_allclose(found.fsc[:, 1:], np.tile(fsc(*pair, PIXEL_SIZE_A).fsc[1:], (3, 1)), atol=1e-6)


def test_a_cone_holds_the_voxels_near_its_axis_and_no_other():
    """One direction, by the definition, on the full spectrum."""
    pair = halves(molecule(BOX), 1.0)
    found = directional(pair, half_angle_deg=25.0, number=5)
    first, second = (np.fft.fftn(half) for half in pair)
    f = np.fft.fftfreq(BOX, 1 / BOX)
    z, y, x = np.meshgrid(f, f, f, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    for direction, curve in zip(found.directions, found.fsc, strict=True):
        near = np.abs(np.stack([x, y, z], -1) @ direction) >= np.cos(np.radians(25)) * radius
        for shell in (8, 15, 20):
            inside = near & (np.rint(radius) == shell)
            a, b = first[inside], second[inside]
            expected = (a * b.conj()).real.sum() / np.sqrt((abs(a) ** 2).sum() * (abs(b) ** 2).sum())
            assert curve[shell] == pytest.approx(expected, abs=0.02)  # a voxel may lie on the rim


def test_directions_cover_the_half_sphere_evenly():
    directions = directions_on_half_sphere(100)
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    assert (directions[:, 2] > 0).all()
    np.testing.assert_allclose(directions.T @ directions / 100, np.eye(3) / 3, atol=0.02)
    cosine = np.abs(directions @ directions.T) - 2 * np.eye(100)
    assert np.degrees(np.arccos(cosine.max(1))).min() > 8


def test_a_viewing_direction_is_the_line_that_a_projection_sums_along():
    rotations = euler_to_rotation(rot_deg=[30.0, 0.0], tilt_deg=[60.0, 0.0], psi_deg=[10.0, 70.0])
    views = viewing_directions(rotations)
    for rotation, view in zip(rotations, views, strict=True):
        np.testing.assert_allclose(rotation @ view, [0, 0, 1], atol=1e-12)  # from R: x_image = R x_volume
    np.testing.assert_allclose(np.degrees(np.arctan2(views[0, 1], views[0, 0])), 30)
    np.testing.assert_allclose(np.degrees(np.arccos(views[:, 2])), [60, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (0, 3, 3)])
def test_what_are_no_rotations_is_refused(shape):
    with pytest.raises(InputError, match="expected rotations"):
        viewing_directions(np.zeros(shape))


def test_the_figures_are_drawn():
    found = directional(halves(molecule(BOX), 1.0), number=12)
    views = viewing_directions(euler_to_rotation(*np.random.default_rng(0).uniform(-180, 180, (3, 50))))
    for figure in (fscfigures.directional_figure(found), fscfigures.viewing_figure(views)):
        pixels = figures.rasterise(figure)
        assert pixels.std() > 20
    few = fscfigures.viewing_figure(views[:1])
    assert "1 particles; 100 % of bins empty" in few.axes[0].get_title()


def test_views_are_even_by_the_sampling_of_fourier_space():
    """1 for all directions alike, 0.81 for side views alone (Baldwin & Lyumkin 2020: 8 / pi^2), little for one axis."""
    rng = np.random.default_rng(0)
    number = 30_000
    tilts = {"all": np.degrees(np.arccos(rng.uniform(-1, 1, number))), "sides": np.full(number, 90.0)}
    tilts["top"] = np.abs(rng.normal(0, 5, number))
    even = {
        name: view_evenness(euler_to_rotation(rng.uniform(-180, 180, number), tilt, rng.uniform(-180, 180, number)))
        for name, tilt in tilts.items()
    }
    assert even["all"] == pytest.approx(1, abs=0.005)
    assert even["sides"] == pytest.approx(8 / np.pi**2, abs=0.01)
    assert even["top"] < 0.02
    # Turned as a whole they are as even.
    turned = euler_to_rotation(*rng.uniform(-180, 180, (3, 1)))
    sides = euler_to_rotation(rng.uniform(-180, 180, number), np.full(number, 90.0), rng.uniform(-180, 180, number))
    assert view_evenness(sides @ turned) == pytest.approx(even["sides"], abs=0.02)
    # Of a molecule like a cube, views from about one face are views from about all six.
    tilts = np.abs(rng.normal(0, 25, number))
    face = euler_to_rotation(rng.uniform(-180, 180, number), tilts, rng.uniform(-180, 180, number))
    assert view_evenness(face) < 0.2 and view_evenness(face, point_group("O")) > 0.75
