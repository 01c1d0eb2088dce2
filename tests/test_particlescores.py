"""Every particle is measured against the other half's model, alike on any number of ranks; what is wrong stands out."""

import mrcfile
import numpy as np
import pytest
import training_set
from ranks import Job, run_jobs
from scipy.fft import rfft2

from cryosplat.checkpoint import load
from cryosplat.config import load_config
from cryosplat.dataset import ParticleDataset, radial_noise
from cryosplat.errors import InputError
from cryosplat.particles import read_particles
from cryosplat.scores import COLUMNS, NUMBERS, Scores, read_scores, write_scores
from cryosplat.slices import FourierSlicer, project
from cryosplat.unpickle import read_pickle

BAD = 7
"""Every so manieth particle of the damaged stack has its image mirrored."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


@pytest.fixture(scope="module")
def run_dir(stack, tmp_path_factory):
    return training_set.fitted(stack, tmp_path_factory.mktemp("scores") / "run", "data.holdout=0.05")


def test_scores_are_what_their_formulas_say_of_the_other_half_s_mixture(stack, run_dir):
    scores = read_scores(run_dir / "particles.csv")
    config = load_config(run_dir / "config.yaml")
    table = read_particles(config.data, config.data_root, 0)
    dataset = ParticleDataset(table, np.arange(len(table)), precision="single")
    dataset.normalise(dataset.statistics.deviation)
    noise = radial_noise(dataset.statistics.power, dataset.statistics.count)
    np.testing.assert_array_equal(scores.half, training_set.halves(stack))
    np.testing.assert_array_equal(scores.held_out, table.held_out)
    maps = [mrcfile.read(run_dir / f"mixture_half_{half}.mrc") for half in "ab"]
    rotations, shifts = read_pickle(stack / "poses.pkl")
    box = dataset.box
    ky, kx = np.fft.fftfreq(box) * box, np.arange(box // 2 + 1)
    shells = np.rint(np.hypot(ky[:, None], kx)).astype(int)
    often = np.where((kx == 0) | (kx == box // 2), 1, 2) * ((shells >= 1) & (shells < box // 2))
    for particle in (0, 1, 100, 299):
        half = scores.half[particle]
        image = dataset.batch(np.array([particle])).images[0].numpy()
        where = rotations[particle : particle + 1], shifts[particle : particle + 1], table.ctf[particle : particle + 1]
        predicted = rfft2(project(FourierSlicer(maps[1 - half]), *where, dataset.pixel_size_a)[0], norm="ortho")
        weight = often / noise[half][shells]
        xy, xx, yy = (
            float((weight * (one * two.conj()).real).sum())
            for one, two in ((predicted, image), (predicted, predicted), (image, image))
        )
        expected = (yy - 2 * xy + xx) / often.sum(), xy / xx, xy / (xx * yy) ** 0.5, xy - xx / 2
        np.testing.assert_allclose(scores.values[particle], expected, rtol=2e-3, atol=2e-3)


def test_good_particles_leave_noise_and_have_the_contrast_of_the_model(run_dir):
    values = read_scores(run_dir / "particles.csv").values
    assert np.mean(values, axis=0)[:3] == pytest.approx([1.0, 1.0, 0.75], rel=0.05)
    assert (values[:, NUMBERS.index("gain")] > 0).mean() > 0.99


def test_particles_that_are_not_what_the_table_says_have_the_lowest_gain(stack, tmp_path):
    def mirror(images):
        images[::BAD] = images[::BAD, :, ::-1]
        return images

    damaged = training_set.altered(stack, tmp_path / "damaged", mirror)
    scores = read_scores(training_set.fitted(damaged, tmp_path / "run") / "particles.csv")
    bad = np.arange(len(scores)) % BAD == 0
    for name in ("gain", "correlation"):
        order = np.argsort(scores.column(name))
        assert bad[order[: bad.sum()]].mean() > 0.8, name
    assert np.median(scores.column("residual")[bad]) > np.median(scores.column("residual")[~bad])


def test_scores_are_the_same_on_any_number_of_ranks(stack, tmp_path):
    words = {
        ranks: training_set.settings(stack, tmp_path / str(ranks), of=training_set.VOLUME_SETTINGS) for ranks in (1, 3)
    }
    jobs = [Job("plain", ranks, str(tmp_path / f"job{ranks}"), words[ranks]) for ranks in words]
    assert all(set(outcome.codes) == {0} for outcome in run_jobs(tmp_path, jobs))
    one, three = (read_scores(tmp_path / str(ranks) / "particles.csv") for ranks in (1, 3))
    np.testing.assert_allclose(one.values, three.values, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("setting", ["maps.particles=false", "data.null=noise"])
def test_a_run_without_particles_to_measure_has_no_such_file(stack, tmp_path, setting):
    run = training_set.fitted(stack, tmp_path / "run", setting, "volume.steps=2", "data.check_signal=false")
    assert (run / "summary.json").is_file() and not (run / "particles.csv").exists()


def test_without_halves_particles_are_measured_against_the_only_model(stack, tmp_path):
    run = training_set.fitted(stack, tmp_path / "run", "maps.halves=false", "data.box=24", "data.truth=null")
    scores = read_scores(run / "particles.csv")
    assert len(load(run / "checkpoints")["trainer"]["mixtures"]) == 1
    assert np.mean(scores.values, axis=0)[:2] == pytest.approx([1.0, 1.0], rel=0.1)


def some_scores(count=5):
    rows = np.arange(count, dtype=np.int64)
    return Scores(rows, rows % 2, rows == 3, np.random.default_rng(0).normal(size=(count, 4)) * 1e5)


def test_what_is_written_is_read_back(tmp_path):
    for count in (5, 1):
        path = tmp_path / f"{count}.csv"
        write_scores(path, some_scores(count))
        found, expected = read_scores(path), some_scores(count)
        for name in COLUMNS:
            np.testing.assert_allclose(found.column(name), expected.column(name), rtol=1e-5)
    with pytest.raises(InputError, match="exists already"):
        write_scores(path, some_scores())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; a run that is complete has it, unless maps.particles was false"),
        ("", "the columns are , expected row, half"),
        ("a,b\n1,2\n", "the columns are a, b, expected row, half"),
        (",".join(COLUMNS) + "\n", "expected 7 numbers a row"),
        (",".join(COLUMNS) + "\n1,2,x,4,5,6,7\n", "not readable as a run writes it"),
        (",".join(COLUMNS) + "\n1,2,3\n", "expected 7 numbers a row"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_a_damaged_table_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "particles.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="particles.csv") as caught:
        read_scores(path)
    assert message in str(caught.value)
