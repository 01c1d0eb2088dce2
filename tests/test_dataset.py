"""Images in memory: grey levels do not matter, halves share nothing, cropping is resampling, whitening flattens."""

import dataclasses

import numpy as np
import pytest
import torch
from stacks import load, make_ctf, make_poses, write_dataset, write_pickle, write_stack

from cryosplat.batches import Courier
from cryosplat.conventions import rescaled_pixel_size
from cryosplat.dataset import ParticleDataset, noise_weights
from cryosplat.errors import InputError
from cryosplat.imageprep import corner_mask, fourier_crop

COUNT, BOX = 40, 16


def stack_of(folder, images, **keys):
    """The particle table of given images (N, D, D), halves dealt in turn."""
    folder.mkdir(exist_ok=True)
    write_stack(folder / "particles.mrcs", images.astype(np.float32))
    write_pickle(folder / "poses.pkl", make_poses(len(images)))
    write_pickle(folder / "ctf.pkl", make_ctf(len(images)))
    write_pickle(folder / "halves.pkl", np.arange(len(images)) % 2)
    return load(folder, particles="particles.mrcs", poses="poses.pkl", ctf="ctf.pkl", halves="halves.pkl", **keys)


def dataset_of(table, *others, owned=None, normalise=True, **words):
    made = ParticleDataset(table, np.arange(len(table)) if owned is None else owned, *others, **words)
    if normalise:
        made.normalise(made.statistics.deviation)
    return made


def real_images(dataset, ids=None):
    """The images (N, D, D) that a data set holds."""
    spectra = dataset.batch(dataset.owned if ids is None else np.asarray(ids)).images
    return torch.fft.irfft2(spectra, s=(dataset.box, dataset.box), norm="ortho").numpy()


def some_images(seed=0, count=COUNT, box=BOX):
    """Noise of another level and background in every image, with something bright in the middle."""
    rng = np.random.default_rng(seed)
    levels, backgrounds = rng.uniform(0.5, 2, (count, 1, 1)), rng.uniform(-3, 3, (count, 1, 1))
    images = rng.standard_normal((count, box, box)) * levels + backgrounds
    images[:, box // 2 - 2 : box // 2 + 2, box // 2 - 2 : box // 2 + 2] += 5
    return images


def test_images_keep_their_shape_and_lose_background_and_noise_level(tmp_path):
    images = some_images()
    held = real_images(dataset_of(stack_of(tmp_path, images), precision="single"))
    corners = corner_mask(BOX).numpy()
    for half in (0, 1):
        mine = np.arange(COUNT) % 2 == half
        level = np.sqrt((images[mine][:, corners].std(1, ddof=1) ** 2).mean())
        expected = (images[mine] - images[mine][:, corners].mean(1)[:, None, None]) / level
        np.testing.assert_allclose(held[mine], expected, atol=1e-5)


def test_the_corners_lie_outside_the_circle_that_touches_the_edges():
    corners = corner_mask(BOX)
    assert corners[0, 0] and corners[1, 1] and not corners[BOX // 2, 0] and not corners[BOX // 2, BOX // 2]
    assert 0.2 < float(corners.float().mean()) < 0.3


@pytest.mark.parametrize("precision, tolerance", [("single", 2e-6), ("half", 1e-3)])
def test_a_stack_times_100_plus_50_is_the_same_data_set(tmp_path, precision, tolerance):
    images = some_images()
    first, second = (
        dataset_of(stack_of(tmp_path / name, each), precision=precision)
        for name, each in (("plain", images), ("scaled", 100 * images + 50))
    )
    difference = (first.batch(first.owned).images - second.batch(second.owned).images).norm()
    assert difference / first.batch(first.owned).images.norm() < tolerance


def test_invert_false_turns_the_sign_and_nothing_else(tmp_path):
    table = stack_of(tmp_path, some_images())
    white, black = (dataset_of(table, invert=invert).batch(np.arange(COUNT)).images for invert in (True, False))
    assert torch.equal(white, -black)


def test_half_precision_costs_less_than_a_thousandth_and_halves_the_memory(tmp_path):
    table = stack_of(tmp_path, some_images())
    half, single = (dataset_of(table, precision=precision) for precision in ("half", "single"))
    exact = single.batch(single.owned).images
    assert (half.batch(half.owned).images - exact).norm() / exact.norm() < 1e-3
    assert single.bytes_in_memory == 2 * half.bytes_in_memory == COUNT * BOX * (BOX // 2 + 1) * 8


def test_halves_share_no_statistic(tmp_path):
    images = some_images()
    changed = images.copy()
    changed[1::2] = np.random.default_rng(1).normal(7, 30, changed[1::2].shape)
    first, second = (
        dataset_of(stack_of(tmp_path / name, each)) for name, each in (("plain", images), ("changed", changed))
    )
    a, b = np.arange(0, COUNT, 2), np.arange(1, COUNT, 2)
    assert torch.equal(first.batch(a).images, second.batch(a).images)
    assert not torch.equal(first.batch(b).images, second.batch(b).images)
    weights = [noise_weights(each.statistics.power, each.statistics.count, BOX) for each in (first, second)]
    assert torch.equal(weights[0][0], weights[1][0]) and not torch.equal(weights[0][1], weights[1][1])


def test_ranks_hold_their_own_particles_as_one_process_holds_them_all(tmp_path):
    table = stack_of(tmp_path, some_images())
    whole = dataset_of(table)
    owners = [np.array([0, 3, 4, 11, 30]), np.setdiff1d(np.arange(COUNT), [0, 3, 4, 11, 30])]
    parts = [dataset_of(table, owned=owned, normalise=False) for owned in owners]
    deviation = sum(part.statistics.deviation for part in parts)
    np.testing.assert_array_equal(deviation, whole.statistics.deviation)
    for part in parts:
        part.normalise(deviation)
        assert torch.equal(part.batch(part.owned[::-1].copy()).images, whole.batch(part.owned[::-1].copy()).images)
    for name in ("power", "count"):
        total = sum(getattr(part.statistics, name) for part in parts)
        np.testing.assert_allclose(total, getattr(whole.statistics, name), rtol=1e-12)


def test_a_batch_has_poses_ctf_and_halves_of_its_particles(tmp_path):
    table = stack_of(tmp_path, some_images())
    ids = np.array([7, 2, 31])
    batch = dataset_of(table, 8).batch(ids)
    np.testing.assert_allclose(batch.rotations, table.rotations[ids], atol=1e-6)
    np.testing.assert_allclose(batch.shifts, table.shifts[ids] * 8, rtol=1e-6)
    np.testing.assert_allclose(batch.ctf, table.ctf[ids], rtol=1e-6)
    assert batch.half.tolist() == [1, 0, 1] and batch.ids.tolist() == [7, 2, 31]
    assert batch.images.shape == (3, 8, 5) and batch.images.dtype == torch.complex64
    empty = dataset_of(table).batch(np.array([], dtype=np.int64))
    assert empty.images.shape == (0, BOX, BOX // 2 + 1) and empty.ctf.shape == (0, 7)


def test_images_without_a_ctf_have_none(tmp_path):
    keys = write_dataset(tmp_path)
    table = load(tmp_path, particles=keys["particles"], poses=keys["poses"])
    assert dataset_of(table).batch(np.arange(3)).ctf is None


@pytest.mark.parametrize("small", [24, 16, 10])
def test_cropping_is_sampling_a_band_limited_image_more_coarsely(small):
    """Cosines below the new Nyquist frequency, drawn on either grid over one field of view about its centre."""
    box = 32
    rng = np.random.default_rng(0)
    waves = [(*rng.integers(-small // 2 + 1, small // 2, 2), *rng.normal(size=2)) for _ in range(12)]

    def draw(size):
        y, x = (np.indices((size, size)) - size // 2) / size
        return sum(np.real((c + 1j * s) * np.exp(2j * np.pi * (kx * x + ky * y))) for kx, ky, c, s in waves)

    spectrum = torch.fft.rfft2(torch.from_numpy(draw(box)), norm="ortho")
    found = torch.fft.irfft2(fourier_crop(spectrum, small), s=(small, small), norm="ortho")
    # The orthonormal scale makes signal grow by the ratio of the boxes, so that white noise keeps its variance.
    np.testing.assert_allclose(found, box / small * draw(small), atol=1e-12)


def test_cropping_leaves_white_noise_white_and_of_unit_variance():
    noise = torch.randn(200, 32, 32, generator=torch.Generator().manual_seed(0))
    cropped = fourier_crop(torch.fft.rfft2(noise, norm="ortho"), 20)
    inner = cropped.abs().square().mean(0)[:10, 1:10]
    assert float(inner.mean()) == pytest.approx(1, abs=0.02)
    assert not cropped[:, 10].any() and not cropped[:, :, 10].any()
    spectrum = torch.fft.rfft2(noise, norm="ortho")
    assert fourier_crop(spectrum, 32) is spectrum


def test_a_smaller_box_takes_pixel_size_and_shifts_with_it(tmp_path):
    table = stack_of(tmp_path, some_images())
    dataset = dataset_of(table, 10)
    assert dataset.box == 10 and dataset.pixel_size_a == table.pixel_size_a * 1.6
    assert dataset.pixel_size_a == rescaled_pixel_size(table.pixel_size_a, BOX, 10)
    assert real_images(dataset).shape == (COUNT, 10, 10)


@pytest.mark.parametrize("box", [None, 20])
def test_weights_flatten_the_spectrum_of_coloured_noise_of_each_half(tmp_path, box):
    count, size = 400, 32
    ky, kx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    radius = np.hypot(ky, kx)
    power = [1 + 4 * np.exp(-((radius / 0.15) ** 2)), 0.5 + 2 * radius]  # of half a and b
    white = np.random.default_rng(0).standard_normal((count, size, size))
    spectra = np.fft.rfft2(white) * np.sqrt(np.stack(power))[np.arange(count) % 2]
    dataset = dataset_of(stack_of(tmp_path, np.fft.irfft2(spectra, s=(size, size))), box)
    weights = noise_weights(dataset.statistics.power, dataset.statistics.count, dataset.box).numpy()
    assert weights.shape == (2, dataset.box, dataset.box // 2 + 1)
    held = dataset.batch(dataset.owned).images.abs().square().numpy()
    rows = np.abs(np.fft.fftfreq(dataset.box) * dataset.box)
    used = np.hypot(rows[:, None], np.arange(dataset.box // 2 + 1)) < dataset.box // 2
    used &= np.hypot(rows[:, None], np.arange(dataset.box // 2 + 1)) > 2
    for half in (0, 1):
        assert float(weights[half].mean()) == pytest.approx(1)
        true = held[half::2].mean(0)
        assert true[used].std() / true[used].mean() > 0.15
        whitened = (weights[half] * true)[used]
        assert whitened.std() / whitened.mean() < 0.12  # of which the scatter of 200 images is 0.07
        low = (weights[half] * true)[(rows[:, None] < 2) & (np.arange(dataset.box // 2 + 1) < 2)]
        assert 0 < low.mean() < 3 * whitened.mean()


def test_a_constant_image_is_refused_by_name(tmp_path):
    images = some_images()
    images[13] = 4.0
    images[13, 8, 8] = 9.0  # what is in the middle does not help
    with pytest.raises(InputError, match=r"particles\.mrcs, image 13.* constant outside its inner circle"):
        dataset_of(stack_of(tmp_path, images))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:mrcfile", "ignore::RuntimeWarning:numpy")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pixel_that_is_not_finite_is_refused_by_name(tmp_path, value):
    images = some_images()
    images[21, 3, 4] = value
    with pytest.raises(InputError, match=r"particles\.mrcs, image 21: 1 of 256 pixels are not finite"):
        dataset_of(stack_of(tmp_path, images))


def test_a_pixel_too_bright_for_half_precision_is_refused_by_name_with_the_way_out(tmp_path):
    images = some_images()
    images[21, 8, 8] = 1e7
    table = stack_of(tmp_path, images)
    with pytest.raises(InputError, match=r"image 21.*too large for half precision.*data\.precision=single"):
        dataset_of(table)
    assert real_images(dataset_of(table, precision="single"))[21].max() > 1e6


def test_a_box_larger_than_the_images_is_refused(tmp_path):
    table = stack_of(tmp_path, some_images())
    with pytest.raises(InputError, match=r"data\.box=18: larger than the images, which are 16 px"):
        dataset_of(table, 18)


def test_reading_in_pieces_changes_nothing(tmp_path, monkeypatch):
    table = stack_of(tmp_path, some_images())
    expected = dataset_of(table).batch(np.arange(COUNT)).images
    done = []
    monkeypatch.setattr("cryosplat.dataset.IMAGES_PER_READ", 7)
    found = dataset_of(table, progress=done.append).batch(np.arange(COUNT)).images
    assert torch.equal(found, expected) and done == [7, 14, 21, 28, 35, 40]


# Where images are held


def test_images_that_the_host_holds_make_the_same_batches_sent_one_ahead(tmp_path, monkeypatch):
    table = stack_of(tmp_path, some_images())
    device, host = (dataset_of(table, cache=cache) for cache in ("device", "host"))
    sent, send = [], Courier.send
    monkeypatch.setattr(Courier, "send", lambda self, rows: sent.append(len(rows)) or send(self, rows))
    order = [np.array([7, 2, 31]), np.array([], dtype=np.int64), np.arange(5), np.array([39])]
    ahead = [2, 3, 4, 4]
    for ours, theirs, begun in zip(host.batches(order), device.batches(order), ahead, strict=True):
        assert len(sent) == begun
        assert len(ours.stored) == len(ours) and len(theirs.stored) == COUNT
        assert torch.equal(ours.images, theirs.images)
        for name in ("gain", "rotations", "shifts", "ctf", "half"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert ours.ids.tolist() == theirs.ids.tolist()
    assert sent == [3, 0, 5, 1] and list(host.batches([])) == []


def test_a_part_of_a_batch_has_its_particles(tmp_path):
    ids = np.array([7, 2, 31, 0])
    whole = dataset_of(stack_of(tmp_path, some_images())).batch(ids)
    part = whole.part(slice(1, 3))
    assert len(part) == 2 and part.ids.tolist() == [2, 31] and torch.equal(part.images, whole.images[1:3])
    for name in ("rotations", "shifts", "ctf", "half"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[1:3])
    assert dataclasses.replace(whole, ctf=None).part(slice(0, 0)).images.shape == (0, BOX, BOX // 2 + 1)


def test_a_particle_of_another_rank_is_never_in_a_batch(tmp_path):
    dataset = dataset_of(stack_of(tmp_path, some_images()), owned=np.arange(10), normalise=False)
    with pytest.raises(AssertionError, match="a particle of another rank"):
        dataset.batch(np.array([3, 10]))
