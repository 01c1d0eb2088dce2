"""What makes a test of a run pass or fail, on curves made for it; the band of noise, on noise."""

from pathlib import Path

import numpy as np
import pytest

from cryosplat import verdicts
from cryosplat.errors import InputError
from cryosplat.fsc import FscCurve, fsc
from cryosplat.metrics import append_holdout, write_volume_fit
from cryosplat.records import Record, read_record
from cryosplat.validation import choose_null_shell
from cryosplat.verdicts import FAIL, INCONCLUSIVE, PASS

BOX, PIXEL = 64, 2.0
SHELLS = np.arange(BOX // 2 + 1)
ERROR = verdicts.noise_error(BOX)


def falling(shell, width=3.0):
    """A curve that falls through a half at a shell."""
    return 1 / (1 + np.exp((SHELLS - shell) / width))


def noise(seed, scale=1.0):
    return (
        scale
        * np.random.default_rng(seed).standard_normal(len(SHELLS))
        * verdicts.noise_error(BOX)
        * verdicts.INDEPENDENT_SHARE**0.5
    )


def angstrom(shell):
    return BOX * PIXEL / shell


def record(summary=None, **curves):
    known = {"box": BOX, "pixel_size_a": PIXEL, "resolution_a": None, "resolution_naive_a": None} | (summary or {})
    return Record(Path("run"), known, {name: FscCurve(np.asarray(y), BOX, PIXEL) for name, y in curves.items()})


def test_the_band_is_that_of_noise_and_wider_by_what_is_granted_to_insertion():
    rng = np.random.default_rng(0)
    z, y, x = np.indices((24, 24, 24)) - 12
    for mask in (None, np.exp(-(x**2 + y**2 + z**2) / 60.0)):
        pairs = [fsc(*rng.standard_normal((2, 24, 24, 24)), 1.0, mask).fsc for _ in range(120)]
        wider = verdicts.noise_error(24, mask)[3:] / np.std(pairs, axis=0)[3:]
        assert np.mean(wider) == pytest.approx(verdicts.INDEPENDENT_SHARE**-0.5, rel=0.1)


RUN = {"resolution_naive_a": angstrom(20)}
CALIBRATED = {"resolution_naive_a": angstrom(28), "resolution_a": angstrom(20)}


def calibrated_run(**others):
    halves = {"calibrated_half_a": falling(19) ** 0.5, "calibrated_half_b": falling(19) ** 0.5}
    curves = {"half_maps": falling(26), "calibrated_map": falling(20), "linear_half_maps": falling(15), **halves}
    return record(CALIBRATED, **(curves | others))


def null_of_phases(summary=None, linear=0.0, mixtures=0.0, first=12):
    """Nothing but noise beyond shell 12, and what is added to it."""
    there = SHELLS >= first
    curves = {"linear_half_maps": np.where(there, noise(1) + linear, 0.95)}
    return record(summary, **curves, half_maps=np.where(there, noise(2) + mixtures, 0.97))


def test_a_calibrated_run_whose_null_says_nothing_passes():
    null = null_of_phases({"resolution_a": angstrom(13)}, mixtures=0.4)
    check = verdicts.judge_phases(calibrated_run(), null, angstrom(12), ERROR)
    assert check.verdict == PASS, check.found
    assert check.numbers["mixtures_mean_fsc"] == pytest.approx(0.4, abs=0.02)


def test_the_correction_is_chens():
    run, null = record(RUN, half_maps=np.where(SHELLS > 10, 0.6, 1.0)), null_of_phases(mixtures=0.5)
    check = verdicts.judge_phases(run, null, angstrom(12), ERROR)
    line = check.panels[0].lines["mixtures, true"]
    expected = (0.6 - null.curves["half_maps"].fsc[14:]) / (1 - null.curves["half_maps"].fsc[14:])
    np.testing.assert_allclose(line[13:], expected)


def test_linear_halves_that_agree_on_random_phases_share_images():
    check = verdicts.judge_phases(calibrated_run(), null_of_phases(linear=0.05), angstrom(12), ERROR)
    assert check.verdict == FAIL and "The halves share images" in " ".join(check.found)


def test_what_leaks_over_the_null_shell_is_not_taken_for_shared_images():
    null = null_of_phases()
    null.curves["linear_half_maps"].fsc[12:17] += [0.6, 0.3, 0.2, 0.1, 0.1]
    assert verdicts.judge_phases(calibrated_run(), null, angstrom(12), ERROR).verdict == PASS


def test_a_calibration_that_finds_resolution_where_there_is_none_fails():
    check = verdicts.judge_phases(calibrated_run(), null_of_phases({"resolution_a": angstrom(18)}), angstrom(12), ERROR)
    assert check.verdict == FAIL and "cannot be trusted" in " ".join(check.found)


def test_calibrated_halves_finer_than_the_correction_fail():
    run = calibrated_run(calibrated_half_a=falling(30) ** 0.5, calibrated_half_b=falling(30) ** 0.5)
    check = verdicts.judge_phases(run, null_of_phases(mixtures=0.6), angstrom(12), ERROR)
    assert check.verdict == FAIL and "calibration says too much" in " ".join(check.found)


def test_a_naive_resolution_that_is_the_models_doing_fails_and_one_that_stands_passes():
    run = record({"resolution_naive_a": angstrom(31)}, half_maps=falling(26))
    assert verdicts.judge_phases(run, null_of_phases(mixtures=0.7), angstrom(12), ERROR).verdict == FAIL
    run = record({"resolution_naive_a": angstrom(21)}, half_maps=falling(16))
    assert verdicts.judge_phases(run, null_of_phases(), angstrom(12), ERROR).verdict == PASS


def test_a_run_that_was_calibrated_without_a_result_claims_nothing():
    run = calibrated_run()
    run.summary["resolution_a"] = None
    assert run.claim is None
    assert verdicts.judge_noise(run, noise_run(), ERROR).found[-1] == "INCONCLUSIVE: the run claims no resolution."


def test_without_shells_beyond_the_null_nothing_is_judged():
    assert verdicts.judge_phases(calibrated_run(), null_of_phases(), angstrom(31), ERROR).verdict == INCONCLUSIVE


def noise_run(summary=None, linear=0.0, mixtures=3.0):
    return record(summary, linear_half_maps=noise(3) + linear, half_maps=np.where(SHELLS < mixtures, 0.9, noise(4)))


@pytest.mark.parametrize(
    ("null", "verdict"),
    [
        (noise_run(), PASS),
        (noise_run({"resolution_a": angstrom(2), "resolution_naive_a": angstrom(31)}), PASS),
        (noise_run({"resolution_a": angstrom(20)}), FAIL),
        (noise_run(linear=0.05), FAIL),
    ],
)
def test_on_noise_calibration_says_nothing_and_halves_share_nothing(null, verdict):
    assert verdicts.judge_noise(calibrated_run(), null, ERROR).verdict == verdict


def test_a_naive_resolution_that_noise_gives_too_fails():
    run = record(RUN, half_maps=falling(16))
    assert verdicts.judge_noise(run, noise_run({"resolution_naive_a": angstrom(20)}), ERROR).verdict == FAIL
    assert verdicts.judge_noise(run, noise_run({"resolution_naive_a": angstrom(4)}), ERROR).verdict == PASS


def held_out_run(folder, gain, trained, error=0.1):
    for epoch, (held, seen) in enumerate(zip(gain, trained, strict=True), 1):
        row = {"step": epoch, "epoch": epoch, "images": 50, "gain_full_error": error, "trained_full_error": error}
        append_holdout(folder / "holdout.csv", row | {"gain_full": held, "trained_full": seen})
    return Record(folder, {"box": BOX, "pixel_size_a": PIXEL}, {})


@pytest.mark.parametrize(
    ("gain", "trained", "error", "verdict"),
    [
        ([10, 18, 20], [11, 20, 24], 0.1, PASS),
        ([10, 20, 17], [11, 22, 30], 0.1, FAIL),  # falls
        ([10, 20, 19.5], [11, 22, 30], 0.1, PASS),  # hardly
        ([4, 5, 6], [8, 11, 15], 0.1, FAIL),  # less than half
        ([4, 5, 6], [8, 11, 15], 1.0, PASS),  # not for certain
        ([-1, -2, -3], [1, 2, 4], 0.1, FAIL),
        ([-1, -2, -9], [1, 1, 1], 0.5, FAIL),
        ([0.1, 0.1, 0.2], [0.1, 0.2, 0.2], 0.5, INCONCLUSIVE),
    ],
)
def test_overfitting_is_told_by_a_fall_or_a_gap(tmp_path, gain, trained, error, verdict):
    check = verdicts.judge_holdout(held_out_run(tmp_path, gain, trained, error), 0.05)
    assert check.verdict == verdict, check.found


@pytest.mark.parametrize(("last", "verdict"), [(9.0, PASS), (7.0, FAIL)])
def test_overfitting_in_the_volume_is_told_by_the_full_models_fall(tmp_path, last, verdict):
    run = held_out_run(tmp_path, [5.0], [5.5], 0.1)
    curves = {
        "gain_full": [1, 20, 30],
        "gain_full_held_out": [1.0, 10.0, last],
        "gain_half_a_held_out": [1.0, 9.0, 3.0],
    }
    write_volume_fit(run.folder / "volume_fit.csv", curves)
    check = verdicts.judge_holdout(run, 0.05)
    assert check.verdict == verdict and check.numbers["fall_in_fit"] == pytest.approx(1 - last / 10)
    assert "after step 1 of the fit" in " ".join(check.found) and len(check.panels) == 2


@pytest.mark.parametrize(
    ("resolutions", "between", "verdict"),
    [((20, 21), (0.8, 0.9), PASS), ((20, 26), (0.8, 0.9), FAIL), ((20, 21), (0.9, 0.3), FAIL)],
)
def test_seeds_must_agree_in_resolution_and_map(resolutions, between, verdict):
    runs = [record({"resolution_naive_a": angstrom(shell)}) for shell in resolutions]
    curves = [FscCurve(np.full(len(SHELLS), level), BOX, PIXEL) for level in between]
    assert verdicts.judge_seeds(record(RUN), runs, curves).verdict == verdict


def test_halves_are_judged_by_the_counts_of_any_run_on_the_particles():
    assert [verdicts.judge_halves(counts).verdict for counts in ([], [0, 0], [0, 3])] == [INCONCLUSIVE, PASS, FAIL]


def test_the_null_shell_is_where_linear_halves_get_worse():
    assert choose_null_shell(calibrated_run()) == pytest.approx(angstrom(11))
    assert choose_null_shell(record(half_maps=np.ones(len(SHELLS)))) == pytest.approx(angstrom(24))
    assert choose_null_shell(record(half_maps=np.zeros(len(SHELLS)))) == pytest.approx(angstrom(2))


def test_a_record_reads_gaps_as_nan_and_refuses_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"summary\.json: no such file; only a complete run"):
        read_record(tmp_path)
    (tmp_path / "summary.json").write_text('{"box": 4, "pixel_size_a": 2.0}')
    (tmp_path / "fsc.csv").write_text("shell,resolution_a,half_maps,half_maps_error\n1,8,0.5,0.1\n2,4,,0.1\n")
    assert read_record(tmp_path).curves.keys() == {"half_maps"}
    np.testing.assert_array_equal(read_record(tmp_path).curves["half_maps"].fsc, [1, 0.5, np.nan])
    (tmp_path / "fsc.csv").write_text("shell,half_maps\n1,much\n")
    with pytest.raises(InputError, match="not as a run writes it"):
        read_record(tmp_path)
