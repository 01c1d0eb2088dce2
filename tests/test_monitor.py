"""What is logged can be read back, once and only once for every step, over any number of resumed parts."""

import logging
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from cryosplat import eventlog
from cryosplat.costs import peak_memory_gib
from cryosplat.errors import InputError
from cryosplat.eventlog import DESCRIPTIONS
from cryosplat.fsc import FscCurve
from cryosplat.metrics import COLUMNS, read_metrics, read_volume_fit
from cryosplat.monitor import Monitor, NullMonitor

BOX = 24


def log_step(monitor, step, loss=None, halves=True):
    loss = 1 / step if loss is None else loss
    losses = {"full": loss, "half_a": loss + 0.1, "half_b": loss + 0.2} if halves else {"full": loss}
    monitor.step(step, step // 10, losses, 1e-3, 812.5, {"cpu_max_rss": 1.5, "gpu_max_reserved": 0.25}, 0.125)


def log_evaluation(monitor, step, box=BOX, truth=True, names_of_maps=("map", "mixture")):
    rng = np.random.default_rng(step)
    names = ("calibrated_map", "half_maps", "truth") if truth else ("calibrated_map", "half_maps")
    curves = {name: FscCurve(np.linspace(1, 0, box // 2 + 1), box, 2.0) for name in names}
    resolutions = {"calibrated_0.5": 9.75, "naive_half_map_0.143": 7.25, "truth_0.5": 8.5 if truth else None}
    maps = {name: rng.standard_normal((box, box, box)) for name in names_of_maps}
    particle = tuple(rng.standard_normal((3, box, box)))
    return monitor.evaluation(step, step // 10, curves, resolutions, maps, particle, 2.0)


def events(run_dir):
    """Everything in the event files: loaders differ in what they purge, so there must be nothing to purge."""
    everything = {"scalars": 0, "images": 0, "tensors": 0}
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=everything, purge_orphaned_data=False)
    accumulator.Reload()
    return accumulator


def run(run_dir, steps, total=100, **how):
    with Monitor(run_dir, total, **how) as monitor:
        for step in steps:
            log_step(monitor, step)


def test_every_tag_is_in_the_event_file_with_its_unit(tmp_path):
    with Monitor(tmp_path, 20) as monitor:
        monitor.text("run/config", "    train:\n      lr: 0.003")
        monitor.text("run/hardware", "2 cores")
        log_step(monitor, 10)
        log_evaluation(monitor, 10)
    found = events(tmp_path)
    assert sorted(found.Tags()["scalars"]) == sorted(
        [
            "loss/full",
            "loss/half_a",
            "loss/half_b",
            "train/learning_rate",
            "throughput/images_per_second",
            "throughput/waiting",
            "memory/cpu_max_rss_GiB",
            "memory/gpu_max_reserved_GiB",
            "resolution/calibrated_0.5_A",
            "resolution/naive_half_map_0.143_A",
            "resolution/truth_0.5_A",
            "fsc/mean_calibrated_map",
            "fsc/mean_half_maps",
            "fsc/mean_truth",
        ]
    )
    assert sorted(found.Tags()["images"]) == [
        "fsc/curves", "map/projections", "map/projections_mixture", "map/sections", "map/sections_mixture",
        "particles/particle_projection_residual",
    ]  # fmt: skip
    texts = ["run/config/text_summary", "run/hardware/text_summary"]
    assert sorted(found.Tags()["tensors"]) == ["custom_scalars__config__", *texts]
    assert found.Scalars("resolution/truth_0.5_A")[0].value == 8.5
    assert found.Scalars("fsc/mean_truth")[0].value == pytest.approx(np.linspace(1, 0, BOX // 2 + 1)[1:].mean())
    assert b"lr: 0.003" in found.Tensors("run/config/text_summary")[0].tensor_proto.string_val[0]
    image = found.Images("map/sections")[0]
    assert image.step == 10 and image.width > image.height > 200
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_an_unknown_resolution_is_left_out_and_not_logged_as_nan(tmp_path):
    with Monitor(tmp_path, 20) as monitor:
        log_evaluation(monitor, 10, truth=False)
    tags = events(tmp_path).Tags()["scalars"]
    assert "resolution/truth_0.5_A" not in tags and "fsc/mean_truth" not in tags


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_calibrated_curve_of_which_nothing_is_known_is_left_out_without_a_warning(tmp_path):
    nothing = np.full(BOX // 2 + 1, np.nan)
    curves = {"calibrated_map": FscCurve(nothing, BOX, 2.0, nothing)}
    with Monitor(tmp_path, 20) as monitor:
        monitor.evaluation(10, 1, curves, {}, {"map": np.ones((BOX,) * 3)}, None, 2.0)
    assert events(tmp_path).Tags()["scalars"] == []


def test_an_evaluation_of_a_real_box_takes_no_more_than_a_few_megabytes(tmp_path):
    with Monitor(tmp_path, 20) as monitor:
        log_evaluation(monitor, 10, 128, names_of_maps=("map", "mixture", "mixture_half_a", "mixture_half_b"))
    assert sum(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir()) < 2.5e6  # of pure noise, the worst


def test_a_resumed_run_continues_its_curves_without_a_duplicate_or_a_gap(tmp_path):
    with Monitor(tmp_path, 100) as monitor:
        for step in (10, 20, 30, 40):
            log_step(monitor, step)
            if step in (20, 40):
                log_evaluation(monitor, step)
    with Monitor(tmp_path, 100, start_step=20, resumed=True) as monitor:
        for step in (30, 40):
            log_step(monitor, step, loss=9)
            if step == 40:
                log_evaluation(monitor, step)
    run(tmp_path, [50], start_step=40, resumed=True)
    found = events(tmp_path)
    # Files are read by name, where the tenth of one process and second comes before the ninth; runs have their own.
    losses = sorted(found.Scalars("loss/full"), key=lambda event: event.wall_time)
    assert [event.step for event in losses] == [10, 20, 30, 40, 50]
    assert [event.value for event in losses] == pytest.approx([0.1, 0.05, 9, 9, 0.02])
    assert [event.step for event in found.Images("map/sections")] == [20, 40]
    assert [event.step for event in found.Scalars("resolution/truth_0.5_A")] == [20, 40]
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["step"].tolist() == [10, 20, 30, 40, 50]
    assert metrics["loss_full"].tolist() == pytest.approx([0.1, 0.05, 9, 9, 0.02])
    assert (np.diff(metrics["seconds"]) >= 0).all()


@pytest.mark.parametrize(("total", "expected"), [(20, [20]), (30, [10, 20, 30])])
def test_the_last_evaluation_is_there_once_though_a_killed_run_repeats_it(tmp_path, total, expected):
    """A run that has done all its steps and lacks its products evaluates again; another goes on from there."""
    earlier = [step for step in expected if step < total]
    with Monitor(tmp_path, total) as monitor:
        for step in {*earlier, 20}:
            log_step(monitor, step)
            log_evaluation(monitor, step)
    with Monitor(tmp_path, total, start_step=20, resumed=True) as monitor:
        if total > 20:
            log_step(monitor, total)
        log_evaluation(monitor, total)
    found = events(tmp_path)
    for tag in ("resolution/truth_0.5_A", "fsc/mean_truth", "loss/full"):
        assert [event.step for event in found.Scalars(tag)] == expected, tag
    assert [event.step for event in found.Images("map/sections")] == expected


def test_seconds_go_on_where_the_resumed_run_stopped(tmp_path):
    run(tmp_path, [10])
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    lines[1] = lines[1].rpartition(",")[0] + ",5000.5"
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    run(tmp_path, [20], start_step=10, resumed=True)
    first, second = read_metrics(tmp_path / "metrics.csv")["seconds"]
    assert first == 5000.5 and 5000.5 <= second < 5060


@pytest.mark.parametrize("torn", ["30,3,0.0", "30,3,0.1,0.2,0.3,0.001,812.5,1.5,0.25,12.3", "\x00" * 40, "3"])
def test_a_line_that_a_kill_tore_is_not_read_and_is_gone_after_resuming(tmp_path, torn):
    run(tmp_path, [10, 20])
    with open(tmp_path / "metrics.csv", "a") as handle:
        handle.write(torn)
    assert read_metrics(tmp_path / "metrics.csv")["step"].tolist() == [10, 20]
    run(tmp_path, [30], start_step=20, resumed=True)
    text = (tmp_path / "metrics.csv").read_text()
    assert text.count("\n") == 4 and "\x00" not in text
    assert read_metrics(tmp_path / "metrics.csv")["step"].tolist() == [10, 20, 30]


def test_metrics_hold_every_column_and_nothing_for_what_there_is_not(tmp_path):
    with Monitor(tmp_path, 20) as monitor:
        monitor.step(10, 0, {"full": 0.5}, 1e-3, 100.0, {"cpu_max_rss": 1.5}, 0.0)
        line = (tmp_path / "metrics.csv").read_text().splitlines()[1]  # there while the run goes on
    assert line.startswith("10,0,0.5,,,0.001,100.0,0.0,1.5,,")
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert tuple(metrics) == COLUMNS
    assert np.isnan(metrics["loss_half_a"][0]) and np.isnan(metrics["gpu_max_reserved_gib"][0])


def test_metrics_of_a_run_without_a_step_are_empty(tmp_path):
    run(tmp_path, [])
    assert all(len(column) == 0 for column in read_metrics(tmp_path / "metrics.csv").values())


def test_a_damaged_metrics_file_is_named_with_its_line(tmp_path):
    run(tmp_path, [10, 20])
    whole = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(whole.replace("20,2,", "20,two,"))
    with pytest.raises(InputError, match=r"metrics\.csv, line 3: expected 11 numbers"):
        run(tmp_path, [30], start_step=20, resumed=True)
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="expected the columns step,epoch"):
        read_metrics(tmp_path / "metrics.csv")
    with pytest.raises(InputError, match="cannot read"):
        read_metrics(tmp_path / "none.csv")


def test_a_run_directory_in_use_is_refused_and_left_as_it_is(tmp_path):
    run(tmp_path, [10])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=r"metrics\.csv exists already; choose another run_dir, or resume"):
        Monitor(tmp_path, 100)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_log_file_has_all_messages_and_is_appended_to_on_resuming(tmp_path):
    with Monitor(tmp_path, 100) as monitor:
        logging.getLogger("cryosplat.trainer").info("three models of 2048 Gaussians")
        log_step(monitor, 10)
        log_evaluation(monitor, 10)
    run(tmp_path, [100], start_step=10, resumed=True)
    logging.getLogger("cryosplat").info("after the end")
    text = (tmp_path / "run.log").read_text()
    for part in (
        "INFO three models",
        "after epoch 1, step 10: resolution calibrated 0.5 9.75 A, resolution naive half map 0.143 7.25 A",
        "resumed after step 10 of 100",
    ):
        assert text.count(part) == 1, part
    assert "after the end" not in text


def test_closing_twice_and_leaving_by_an_error_leave_nothing_behind(tmp_path):
    handlers, hook, threads = (
        list(logging.getLogger("cryosplat").handlers),
        threading.excepthook,
        threading.active_count(),
    )
    with pytest.raises(KeyError), Monitor(tmp_path, 100) as monitor:
        log_step(monitor, 10)
        raise KeyError
    monitor.close()
    assert logging.getLogger("cryosplat").handlers == handlers
    assert threading.excepthook is hook and threading.active_count() == threads
    assert read_metrics(tmp_path / "metrics.csv")["step"].tolist() == [10]
    assert [event.step for event in events(tmp_path).Scalars("loss/full")] == [10]


FULL_DISK = """
import logging, pathlib, resource, sys
sys.path.insert(0, {tests!r})
from test_monitor import log_evaluation, log_step
from cryosplat.errors import InputError
from cryosplat.metrics import COLUMNS
from cryosplat.monitor import Monitor
logging.basicConfig(level=logging.INFO)
if {what!r} == "metrics.csv":  # it has to fill before the event file does
    rows = [",".join(COLUMNS)] + [f"{{step}},0,0.1234567890,,,,,,,,1" for step in range(1, 651)]
    pathlib.Path({run_dir!r}, "metrics.csv").write_text("\\n".join(rows) + "\\n")
try:
    with Monitor({run_dir!r}, 10000, 650, resumed=True) as monitor:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        for step in range(651, 10000):
            if {what!r} == "metrics.csv":
                log_step(monitor, step)
            elif {what!r} == "run.log":
                logging.getLogger("cryosplat").info("step %d", step)
            else:
                log_evaluation(monitor, step)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["metrics.csv", "run.log", "tensorboard"])
def test_a_full_disk_is_one_clear_error_without_a_traceback(tmp_path, what):
    # A limit on the size of files stands for a full disk: the same refusal, and no need for a file system of our own.
    script = FULL_DISK.format(tests=os.path.dirname(__file__), run_dir=str(tmp_path), what=what)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cannot write") and what in done.stdout and done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_a_resumed_run_survives_an_event_file_that_a_kill_tore(tmp_path):
    run(tmp_path, [10, 20, 30])
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-11])
    run(tmp_path, [30, 40], start_step=20, resumed=True)
    found = events(tmp_path)
    assert [event.step for event in found.Scalars("loss/full")] == [10, 20, 30, 40]


def test_the_monitor_of_other_ranks_does_nothing_and_takes_the_same_calls(tmp_path):
    public = {name for name in vars(Monitor) if not name.startswith("_")} | {"__enter__", "__exit__"}
    assert all(callable(getattr(NullMonitor, name)) for name in public)
    with NullMonitor(tmp_path, 100, start_step=0, resumed=False) as monitor:
        log_step(monitor, 10)
        log_evaluation(monitor, 10)
        monitor.text("run/config", "x")
        monitor.flush()
    monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_is_that_of_this_process_in_gib():
    before = peak_memory_gib("cpu")
    assert set(before) == {"cpu_max_rss"}
    assert 0.02 < before["cpu_max_rss"] < 64
    held = torch.ones(50_000_000)  # 0.19 GiB
    grown = peak_memory_gib("cpu")["cpu_max_rss"]
    assert grown >= max(before["cpu_max_rss"], held.numel() * 4 / 2**30)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_of_a_gpu_counts_what_was_reserved():
    held = torch.ones(50_000_000, device="cuda")
    assert peak_memory_gib("cuda")["gpu_max_reserved"] >= held.numel() * 4 / 2**30


def test_importing_the_monitor_does_not_import_tensorboard():
    code = "import sys, cryosplat.monitor; sys.exit('tensorboard' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(os.path.dirname(__file__))).returncode == 0


# Gaussians, ranks, and the meaning of it all


def mixture(count, seed=0):
    rng = np.random.default_rng(seed)
    return {"scales": rng.uniform(1, 3, (count, 3)), "amplitudes": rng.normal(2, 1, count)}


def test_numbers_widths_and_amplitudes_of_gaussians_are_logged_with_quantiles_and_histograms(tmp_path):
    mixtures = {"full": mixture(200), "half_a": mixture(100, 1), "half_b": mixture(90, 2)}
    with Monitor(tmp_path, 20) as monitor:
        monitor.mixtures(10, mixtures)
    found = events(tmp_path)
    numbers = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    assert {name: numbers[f"gaussians/number_{name}"] for name in mixtures} == {
        "full": 200,
        "half_a": 100,
        "half_b": 90,
    }
    for share in (10, 50, 90):
        expected = np.percentile(mixtures["full"]["scales"], share)
        assert numbers[f"gaussians/scale_full_p{share}_A"] == pytest.approx(expected, rel=1e-6)
        expected = np.percentile(mixtures["full"]["amplitudes"], share)
        assert numbers[f"gaussians/amplitude_full_p{share}"] == pytest.approx(expected, rel=1e-6)
    assert sorted(found.Tags()["histograms"]) == sorted(
        [*(f"gaussians/scale_{name}_A" for name in mixtures), *(f"gaussians/amplitude_{name}" for name in mixtures)]
    )
    histogram = found.Histograms("gaussians/scale_half_b_A")[0].histogram_value
    assert histogram.num == 270 and 1 <= histogram.min < histogram.max <= 3


def test_memory_is_logged_of_every_rank(tmp_path):
    with Monitor(tmp_path, 20) as monitor:
        monitor.rank_memory(10, [{"cpu_max_rss": 1.5}, {"cpu_max_rss": 2.5, "gpu_max_reserved": 8.0}])
    found = events(tmp_path)
    values = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    assert values == {
        "memory/rank_0_cpu_max_rss_GiB": 1.5,
        "memory/rank_1_cpu_max_rss_GiB": 2.5,
        "memory/rank_1_gpu_max_reserved_GiB": 8.0,
    }


def everything_logged(run_dir, **how):
    with Monitor(run_dir, 20, **how) as monitor:
        log_step(monitor, 10)
        log_evaluation(monitor, 10)
        monitor.mixtures(10, {"full": mixture(20)})
        monitor.rank_memory(10, [{"cpu_max_rss": 1.5}])
        monitor.holdout(10, 1, {"images": 5, "gain_full": 1.0, "trained_full": 2.0, "gain_half_a": 0.5})
        monitor.volume_fit(GAINS)


def test_every_number_has_its_meaning_and_a_chart_and_none_a_bracket(tmp_path):
    everything_logged(tmp_path)
    found = [events(tmp_path), EventAccumulator(str(tmp_path / "tensorboard/volume_fit")).Reload()]
    (config,) = found[0].Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    patterns = [tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag]
    for part in found:
        for tag in part.Tags()["scalars"]:
            assert part.SummaryMetadata(tag).summary_description == DESCRIPTIONS[tag.partition("/")[0]]
            assert any(re.match(pattern, tag) for pattern in patterns), tag
            assert "(" not in tag
    tags = [tag for part in found for tag in part.Tags()["scalars"]]
    assert all(any(re.match(pattern, tag) for tag in tags) for pattern in patterns)


def test_a_resumed_run_has_one_layout(tmp_path):
    run(tmp_path, [10])
    run(tmp_path, [20], start_step=10, resumed=True)
    assert len(events(tmp_path).Tensors("custom_scalars__config__")) == 1


# The bound on the event files


def log_files(run_dir):
    return sum(path.stat().st_size for path in (run_dir / "tensorboard").rglob("events*"))


def test_pictures_come_at_steps_ever_further_apart_and_at_the_end(tmp_path):
    with Monitor(tmp_path, 100) as monitor:
        for step in range(10, 101, 10):
            log_evaluation(monitor, step, names_of_maps=("map",))
    shown = [event.step for event in events(tmp_path).Images("map/sections")]
    assert shown == [10, 20, 30, 40, 60, 90, 100]
    assert len(events(tmp_path).Scalars("resolution/truth_0.5_A")) == 10


def test_event_files_stay_below_their_bound_however_long_a_run_is(tmp_path, monkeypatch):
    """At a sixteenth of the size, which the rows of this run would fill twice over."""
    monkeypatch.setattr(eventlog, "BYTES", 3e6)
    monkeypatch.setattr(eventlog, "LOOK_EVERY", 50)
    monkeypatch.setattr(eventlog, "FLUSH_SECONDS", 0.05)
    total, every = 60_000, 4
    with Monitor(tmp_path, total) as monitor:
        for step in range(every, total + 1, every):
            log_step(monitor, step)
            if step % 6000 == 0:
                log_evaluation(monitor, step, names_of_maps=("map",))
    assert 1.8e6 < log_files(tmp_path) < 3e6
    found = events(tmp_path)
    steps = [event.step for event in found.Scalars("loss/full")]
    # All of the first, fewer later, and the last.
    assert steps[:300] == list(range(every, 301 * every, every))
    assert steps[-1] == total and len(steps) < 0.6 * total / every and max(np.diff(steps)) > every
    assert found.Images("map/sections")[-1].step == total
    assert len(read_metrics(tmp_path / "metrics.csv")["step"]) == total / every


def test_a_resumed_run_counts_what_is_there_already(tmp_path, monkeypatch):
    with Monitor(tmp_path, 1000) as monitor:
        log_evaluation(monitor, 10)
    monkeypatch.setattr(eventlog, "BYTES", log_files(tmp_path))
    with Monitor(tmp_path, 1000, start_step=10, resumed=True) as monitor:
        log_evaluation(monitor, 500)
        log_evaluation(monitor, 1000)
    assert [event.step for event in events(tmp_path).Images("map/sections")] == [10, 1000]


def test_pictures_are_handed_back_whether_they_were_due_or_not(tmp_path):
    with Monitor(tmp_path, 100) as monitor:
        pictures = [log_evaluation(monitor, step) for step in (50, 51)]
    assert [event.step for event in events(tmp_path).Images("fsc/curves")] == [50]
    for drawn in pictures:
        assert {"fsc/curves", "map/sections", "map/projections"} <= set(drawn)
        assert all(pixels.dtype == np.uint8 and pixels.ndim == 3 for pixels in drawn.values())


# The fit in the volume

GAINS = {"full": [0.5, 1234567.25, 2e6], "half_a": [-1.0, 2.0, 3.0], "half_b": [0.0, 1e-3, 1e3]}


def test_a_fit_in_the_volume_is_in_a_file_of_its_own_and_a_tensorboard_run_of_its_own(tmp_path):
    with Monitor(tmp_path, 20) as monitor:
        monitor.volume_fit(GAINS)
        log_step(monitor, 10)
    found = read_volume_fit(tmp_path / "volume_fit.csv")
    assert list(found) == ["step", "gain_full", "gain_half_a", "gain_half_b"] and found["step"].tolist() == [0, 1, 2]
    for name, curve in GAINS.items():
        np.testing.assert_allclose(found[f"gain_{name}"], curve, rtol=1e-8)
    logged = EventAccumulator(str(tmp_path / "tensorboard" / "volume_fit")).Reload()
    assert sorted(logged.Tags()["scalars"]) == [f"volume_fit/gain_{name}" for name in GAINS]
    for name, curve in GAINS.items():
        scalars = logged.Scalars(f"volume_fit/gain_{name}")
        assert [event.step for event in scalars] == [0, 1, 2]
        assert [event.value for event in scalars] == pytest.approx(curve, rel=1e-6)
    assert [event.step for event in events_of_training(tmp_path).Scalars("loss/full")] == [10]


def events_of_training(run_dir):
    """What lies in the folder itself, not in that of the fit."""
    (path,) = (run_dir / "tensorboard").glob("events*")
    return EventAccumulator(str(path)).Reload()


def test_a_fit_that_is_done_again_takes_the_place_of_the_first(tmp_path):
    """As in a run that was killed before its fit was saved."""
    for factor in (1, 2):
        with Monitor(tmp_path, 20, resumed=factor > 1) as monitor:
            monitor.volume_fit({"full": [factor * gain for gain in GAINS["full"]]})
    assert read_volume_fit(tmp_path / "volume_fit.csv")["gain_full"].tolist() == [1.0, 2469134.5, 4e6]
    folder = tmp_path / "tensorboard" / "volume_fit"
    logged = EventAccumulator(str(folder), purge_orphaned_data=False).Reload()
    assert [event.value for event in logged.Scalars("volume_fit/gain_full")] == [1.0, 2469134.5, 4e6]


def test_without_a_fit_in_the_volume_there_is_nothing_to_read(tmp_path):
    assert read_volume_fit(tmp_path / "volume_fit.csv") is None
    assert NullMonitor().volume_fit(GAINS) is None and not list(tmp_path.iterdir())


def test_a_damaged_file_of_a_fit_is_refused_by_name(tmp_path):
    (tmp_path / "volume_fit.csv").write_text("step,gain_full\n0,1.5\n1,much\n")
    with pytest.raises(InputError, match=r"volume_fit\.csv"):
        read_volume_fit(tmp_path / "volume_fit.csv")
