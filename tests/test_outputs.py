"""What a run leaves behind can be read back, by us and by others, and is whole or not there at all."""

import csv
import gc
import json
import pickle
import resource
import shutil
import subprocess
import threading
from unittest import mock
from xml.etree import ElementTree

import matplotlib
import mrcfile
import numpy as np
import pytest
from matplotlib.figure import Figure
from plyfile import PlyData
from scipy.spatial.transform import Rotation

from cryosplat import figures
from cryosplat.errors import InputError
from cryosplat.fsc import fsc, mean_fsc
from cryosplat.fscsuite import fsc_suite
from cryosplat.masks import spherical_mask
from cryosplat.outputs import (
    SUMMARY_KEYS,
    read_mixture,
    write_mixture_npz,
    write_mixture_ply,
    write_run_outputs,
    write_summary,
)
from cryosplat.volumes import read_map

BOX, PIXEL_SIZE_A = 24, 3.1

MAPS = ("map", "mixture", "linear", "half_a", "half_b", "mixture_half_a", "mixture_half_b", "mask")


def mixture(count=33, seed=0):
    rng = np.random.default_rng(seed)
    quaternions = rng.standard_normal((count, 4))
    return {
        "means": rng.normal(0, 12, (count, 3)).astype(np.float32),
        "scales": rng.uniform(1, 9, (count, 3)).astype(np.float32),
        "quaternions": (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).astype(np.float32),
        "amplitudes": rng.normal(0, 1, count).astype(np.float32),  # of either sign
    }


def products():
    """Arguments of write_run_outputs for a run with halves and a truth."""
    maps = {
        name: np.random.default_rng(seed).standard_normal((BOX, BOX, BOX)).astype(np.float32)
        for seed, name in enumerate(MAPS)
    }
    suite = fsc_suite(maps["half_a"], maps["half_b"], PIXEL_SIZE_A, spherical_mask(BOX))
    curves = {
        "half_maps": fsc(maps["mixture_half_a"], maps["mixture_half_b"], PIXEL_SIZE_A),
        "truth": fsc(maps["map"], maps["map"] + maps["half_a"], PIXEL_SIZE_A),
        "corrected": suite.curves["corrected"],
    }
    return {
        "maps": maps,
        "mixtures": {name: mixture(seed=seed) for seed, name in enumerate(("full", "half_a", "half_b"))},
        "curves": curves,
        "suite": suite,
        "rotations": Rotation.random(50, random_state=0).as_matrix(),
        "summary": {"particles": 100, "fsc_truth_mean": np.float64(mean_fsc(curves["truth"])), "note": "extra"},
        "pixel_size_a": PIXEL_SIZE_A,
        "metrics": {"step": np.arange(3.0), "loss_full": np.ones(3), "loss_half_a": np.full(3, np.nan)},
    }


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The products of one run, to be read only."""
    folder = tmp_path_factory.mktemp("run")
    write_run_outputs(folder, **products())
    return folder


def test_a_run_leaves_all_its_products_and_no_temporary_files(run_dir):
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "directional.png", "fsc.csv", "fsc.png", "fsc.xml", "fsc_half_maps.png", "gaussians.cif", "gaussians.npz",
        "gaussians.ply", "half_a.mrc", "half_b.mrc", "linear.mrc", "loss.png", "map.mrc", "mask.mrc", "mixture.mrc",
        "mixture_half_a.mrc", "mixture_half_b.mrc", "projections.png", "sections.png", "summary.json",
        "view.cxc", "viewing_directions.png",
    ]  # fmt: skip


def test_the_maps_are_valid_mrc_with_their_pixel_size(run_dir, capsys):
    for name in MAPS:
        assert mrcfile.validate(run_dir / f"{name}.mrc"), capsys.readouterr().out
        volume, pixel_size = read_map(run_dir / f"{name}.mrc")
        np.testing.assert_array_equal(volume, products()["maps"][name])
        assert pixel_size == pytest.approx(PIXEL_SIZE_A, rel=1e-6)


@pytest.mark.parametrize("suffix", [".npz", ".ply"])
def test_the_mixture_comes_back_bit_for_bit_with_its_grid(run_dir, suffix):
    found, expected = read_mixture(run_dir / f"gaussians{suffix}"), products()["mixtures"]["full"]
    for field, array in expected.items():
        assert found[field].dtype == np.float32
        np.testing.assert_array_equal(found[field], array)
    assert found["box"] == BOX and found["pixel_size_a"] == PIXEL_SIZE_A
    assert (found["amplitudes"] < 0).any()


def test_the_half_mixtures_are_in_the_npz(run_dir):
    for model in ("half_a", "half_b"):
        found = read_mixture(run_dir / "gaussians.npz", model)
        np.testing.assert_array_equal(found["means"], products()["mixtures"][model]["means"])
    with pytest.raises(InputError, match="a .ply holds the full model only"):
        read_mixture(run_dir / "gaussians.ply", "half_a")


def test_the_ply_says_its_units_and_its_origin(run_dir):
    ply = PlyData.read(run_dir / "gaussians.ply")
    names = ["x", "y", "z", "amplitude", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    assert [(item.name, item.val_dtype) for item in ply["vertex"].properties] == [(name, "f4") for name in names]
    text = "\n".join(ply.comments)
    assert "Angstrom" in text and "origin" in text and f"box {BOX}" in text


def test_a_mixture_of_one_gaussian_survives(tmp_path):
    write_mixture_ply(tmp_path / "one.ply", mixture(1), BOX, PIXEL_SIZE_A)
    write_mixture_npz(tmp_path / "one.npz", {"full": mixture(1)}, BOX, PIXEL_SIZE_A)
    for name in ("one.ply", "one.npz"):
        np.testing.assert_array_equal(read_mixture(tmp_path / name)["means"], mixture(1)["means"])


def test_a_ply_of_another_program_says_nothing_of_the_grid(tmp_path):
    write_mixture_ply(tmp_path / "a.ply", mixture(), BOX, PIXEL_SIZE_A)
    ply = PlyData.read(tmp_path / "a.ply")
    ply.comments = []
    ply.write(tmp_path / "b.ply")
    found = read_mixture(tmp_path / "b.ply")
    assert found["box"] is None and found["pixel_size_a"] is None


def spoil(field, value, row=7):
    bad = mixture()
    bad[field][row] = value
    return bad


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (spoil("means", np.nan), "means of Gaussian 7 .* not finite"),
        (spoil("amplitudes", np.inf), "amplitudes of Gaussian 7 .* not finite"),
        (spoil("scales", 0), "scales of Gaussian 7 .* not positive"),
        (spoil("quaternions", 0), "quaternions of Gaussian 7 .* length 0"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".ply"])
def test_a_mixture_that_is_none_is_refused_by_its_first_bad_row(tmp_path, suffix, bad, message):
    if suffix == ".npz":
        write_mixture_npz(tmp_path / "bad.npz", {"full": bad}, BOX, PIXEL_SIZE_A)
    else:
        write_mixture_ply(tmp_path / "bad.ply", bad, BOX, PIXEL_SIZE_A)
    with pytest.raises(InputError, match=message):
        read_mixture(tmp_path / f"bad{suffix}")


def test_files_that_hold_no_mixture_are_refused(tmp_path, run_dir):
    with pytest.raises(InputError, match="no such file"):
        read_mixture(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"expected a mixture in a \.npz or \.ply file, found \.mrc"):
        read_mixture(run_dir / "map.mrc")
    for suffix in (".npz", ".ply"):
        whole = (run_dir / f"gaussians{suffix}").read_bytes()
        for name, content in (("empty", b""), ("cut", whole[: len(whole) // 2]), ("noise", b"\x00\xff" * 500)):
            (tmp_path / (name + suffix)).write_bytes(content)
            with pytest.raises(InputError, match=f"{name}{suffix}: not a readable"):
                read_mixture(tmp_path / (name + suffix))
    np.savez(tmp_path / "other.npz", means=np.zeros((3, 3)))
    with pytest.raises(InputError, match="no array scales, quaternions, amplitudes; found means"):
        read_mixture(tmp_path / "other.npz")
    np.savez(tmp_path / "shape.npz", **{**mixture(), "scales": np.ones((33, 2))})
    with pytest.raises(InputError, match=r"scales: expected numbers of shape \(33, 3\), found float64 \(33, 2\)"):
        read_mixture(tmp_path / "shape.npz")
    np.savez(tmp_path / "nothing.npz", **mixture(0))
    with pytest.raises(InputError, match="at least 1"):
        read_mixture(tmp_path / "nothing.npz")


class Harm:
    """Leaves a mark if anything unpickles it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_a_pickle_in_disguise_is_refused_and_nothing_runs(tmp_path):
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Harm(tmp_path / "mark")))
    np.savez(tmp_path / "inside.npz", means=np.array([Harm(tmp_path / "mark")], dtype=object))
    for name in ("plain.npz", "inside.npz"):
        with pytest.raises(InputError, match="not a readable"):
            read_mixture(tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_the_summary_has_every_key_in_order_and_no_nan(run_dir, tmp_path):
    summary = json.loads((run_dir / "summary.json").read_text())
    assert list(summary) == [*SUMMARY_KEYS, "note"]
    assert summary["resolution_a"] is None and summary["resolution_naive_a"] is None
    assert summary["particles"] == 100 and summary["note"] == "extra"
    assert summary["fsc_truth_mean"] == mean_fsc(products()["curves"]["truth"])
    odd = {"resolution_naive_a": float("nan"), "box": np.int64(24), "peak_memory_gib": {"cpu": np.float32(0.5)}}
    odd |= {"list": np.array([1.0, np.inf]), "flag": True, "path": tmp_path}
    write_summary(tmp_path / "odd.json", odd)
    found = json.loads((tmp_path / "odd.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["resolution_naive_a"] is None and found["box"] == 24 and found["peak_memory_gib"] == {"cpu": 0.5}
    assert found["list"] == [1.0, None] and found["flag"] is True and found["path"] == str(tmp_path)


def test_fsc_csv_has_a_column_for_every_curve(run_dir):
    with open(run_dir / "fsc.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    expected = ["half_maps", "truth", "corrected", "corrected_error"]  # an error where one is known
    assert list(rows[0]) == ["shell", "resolution_a", "frequency_inv_a", *expected]
    assert [int(row["shell"]) for row in rows] == list(range(1, BOX // 2 + 1))
    np.testing.assert_allclose([float(row["truth"]) for row in rows], products()["curves"]["truth"].fsc[1:], atol=1e-6)
    corrected = products()["curves"]["corrected"]
    np.testing.assert_allclose([float(row["corrected_error"]) for row in rows], corrected.error[1:], atol=1e-6)
    assert float(rows[-1]["resolution_a"]) == pytest.approx(2 * PIXEL_SIZE_A, abs=1e-4)


def test_fsc_xml_has_the_curve_of_the_linear_half_maps(run_dir):
    points = [
        (float(point.findtext("x")), float(point.findtext("y")))
        for point in ElementTree.parse(run_dir / "fsc.xml").iter("coordinate")
    ]
    corrected = products()["curves"]["corrected"]
    expected = np.stack([corrected.frequency, corrected.fsc], 1)[-len(points) :]
    assert len(points) >= BOX // 2
    np.testing.assert_allclose(points, expected, atol=1e-5)


def test_figures_show_what_is_for_the_eye(tmp_path):
    """The delivered map is noisy beyond its resolution; its pictures are of another, weighted one."""
    seen = []
    with mock.patch.object(figures, "sections_figure", lambda volume, _: seen.append(volume) or Figure()):
        write_run_outputs(tmp_path, **products(), for_the_eye=np.ones((BOX,) * 3))
    assert len(seen) == 1 and (seen[0] == 1).all()
    np.testing.assert_array_equal(read_map(tmp_path / "map.mrc")[0], products()["maps"]["map"])


def test_a_run_without_halves_truth_or_metrics_writes_what_it_has(tmp_path):
    whole = products()
    only_full = {"maps": {"map": whole["maps"]["map"]}, "mixtures": {"full": whole["mixtures"]["full"]}}
    written = write_run_outputs(
        tmp_path, **{**whole, **only_full, "curves": {}, "suite": None, "metrics": None, "rotations": None}
    )
    assert sorted(path.name for path in written) == sorted(path.name for path in tmp_path.iterdir())
    assert {path.name for path in written} == {
        "map.mrc", "gaussians.cif", "gaussians.npz", "gaussians.ply", "sections.png", "projections.png",
        "summary.json", "view.cxc",
    }  # fmt: skip


@pytest.mark.parametrize("models", [("full",), ("full", "half_a", "half_b")])
def test_a_fit_in_the_volume_has_its_figure(tmp_path, models):
    curves = {f"gain_{name}": np.array([1.0, 5.0 + number, 6.0]) for number, name in enumerate(models)}
    columns = {"step": np.arange(3.0), **curves}
    written = write_run_outputs(tmp_path, **products(), volume_fit=columns)
    assert tmp_path / "volume_fit.png" in written and (tmp_path / "volume_fit.png").stat().st_size > 5000
    (axes,) = figures.volume_fit_figure(columns).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [curve.tolist() for curve in curves.values()]
    assert len({text.get_text() for text in axes.get_legend().get_texts()}) == len(models)
    assert "nats" in axes.get_ylabel() and "step" in axes.get_xlabel()


def test_products_that_are_there_are_kept_unless_the_run_asks(tmp_path):
    run_dir = tmp_path
    write_run_outputs(run_dir, **products())
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    other = products()
    other["maps"]["map"] = other["maps"]["map"] + 1
    with pytest.raises(InputError, match=r"map\.mrc exists already"):
        write_run_outputs(run_dir, **other)
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    write_run_outputs(run_dir, **other, overwrite=True)
    np.testing.assert_array_equal(read_map(run_dir / "map.mrc")[0], other["maps"]["map"])


def test_one_product_that_is_there_stops_all_before_the_first_is_written(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"summary\.json exists already"):
        write_run_outputs(tmp_path, **products())
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.fixture(params=["a small file system", "a limit on file sizes"])
def full_disk(request, tmp_path):
    """A folder with room for 40 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "a small file system":
        mount = shutil.which("mount") or pytest.skip("needs mount")
        done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("needs leave to mount a file system; the other parameter tests the same without")
        yield folder
        gc.collect()  # what a failed writer left open keeps the file system busy
        subprocess.run(["umount", str(folder)], check=True)
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # mrcfile, when it cannot finish a file
def test_a_full_disk_is_one_clear_error_and_leaves_no_part_of_a_file(full_disk):
    big = products()["maps"]["map"]  # 55 kB
    writers = {
        "map.mrc": lambda path: write_run_outputs(full_disk, **products()),
        "gaussians.npz": lambda path: write_mixture_npz(path, {"full": mixture(2000)}, BOX, PIXEL_SIZE_A),
        "gaussians.ply": lambda path: write_mixture_ply(path, mixture(2000), BOX, PIXEL_SIZE_A),
        "sections.png": lambda path: figures.save(figures.sections_figure(big, PIXEL_SIZE_A), path),
        "summary.json": lambda path: write_summary(path, {"long": "x" * 60_000}),
    }
    for name, write in writers.items():
        with pytest.raises(InputError, match=rf"cannot write .*{name}"):
            write(full_disk / name)
        assert list(full_disk.iterdir()) == []


def test_a_full_disk_leaves_the_file_that_was_there(full_disk):
    write_summary(full_disk / "summary.json", {"note": "before"})
    with pytest.raises(InputError, match="cannot write"):
        write_summary(full_disk / "summary.json", {"long": "x" * 60_000}, overwrite=True)
    assert json.loads((full_disk / "summary.json").read_text())["note"] == "before"
    assert [path.name for path in full_disk.iterdir()] == ["summary.json"]


def test_figures_need_no_display_and_share_nothing():
    rng = np.random.default_rng(0)
    volume, image = rng.standard_normal((16, 16, 16)), rng.standard_normal((16, 16))
    curves = products()["curves"]
    before = dict(matplotlib.rcParams)
    drawn = [
        figures.fsc_figure(curves),
        figures.fsc_figure({"fsc": fsc(volume, -volume, PIXEL_SIZE_A)}, [0.3]),
        figures.sections_figure(volume, PIXEL_SIZE_A),
        figures.projections_figure(np.zeros((15, 15, 15)), PIXEL_SIZE_A),
        figures.particle_figure(image, image, image, PIXEL_SIZE_A, "particle 3"),
        figures.loss_figure(products()["metrics"]),
        figures.loss_figure({"step": np.arange(2.0), "loss_full": np.full(2, np.nan)}),
    ]
    pixels = [figures.rasterise(figure, dpi=60) for figure in drawn]
    assert all(array.dtype == np.uint8 and array.shape[2] == 3 and array.std() > 0 for array in pixels)
    assert dict(matplotlib.rcParams) == before
    threads = [threading.Thread(target=figures.rasterise, args=(figures.fsc_figure(curves), 60)) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


def texts(figure):
    figure.canvas.draw()
    found = [figure.get_suptitle()] if figure.get_suptitle() else []
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        found += [text.get_text() for text in axes.texts]
        found += [text.get_text() for text in axes.get_xticklabels()]
        found += [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
    return found + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_fsc_figure_names_resolutions_in_angstrom_and_calls_the_naive_one_naive():
    curves = {key: figures.FscCurve(np.linspace(1, 0, 65), 128, 2.0) for key in ("half_maps", "truth")}
    found = " | ".join(texts(figures.fsc_figure(curves)))
    assert "half maps of mixtures (naive): 4.67 Å at 0.143" in found
    assert "delivered map to the known truth: 8.00 Å at 0.5" in found
    assert "1/10" in found and "1/4" in found  # Nyquist


def test_a_curve_that_ends_where_the_data_do_is_drawn_and_said_to_end_there():
    values = np.linspace(1, 0.6, 65)
    values[40:] = np.nan
    curve = figures.FscCurve(values, 128, 2.0, np.full(65, 0.02))
    found = " | ".join(texts(figures.fsc_figure({"calibrated_map": curve})))
    assert f"calibrated: {128 * 2.0 / 39:.2f} Å or better (data end) at 0.5" in found


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_legend_of_the_fsc_figure_covers_no_curve(count):
    names = ("calibrated_map", "half_maps", "truth", "linear_half_maps", "mixture_truth", "linear_truth", "a", "b")
    curves = {name: figures.FscCurve(np.linspace(1, 0, 65), 128, 2.0) for name in names[:count]}
    figure = figures.fsc_figure(curves)
    figure.canvas.draw()
    (axes,) = figure.axes
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == count
    assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)
    assert box.y1 <= axes.get_tightbbox().y0


def test_the_particle_figure_says_that_it_is_filtered():
    noise = np.random.default_rng(0).standard_normal((32, 32))
    assert "low-passed to 20 Å" in " ".join(texts(figures.particle_figure(noise, noise, noise, 3.0)))


def test_the_low_pass_keeps_the_mean_and_halves_a_wave_at_the_cut_off():
    x = np.arange(64)
    wave = np.broadcast_to(np.cos(2 * np.pi * 4 * x / 64), (64, 64))
    np.testing.assert_allclose(figures.low_pass(wave + 3, 64 * 2.0 / 4, 2.0), 0.5 * wave + 3, atol=1e-12)


def test_a_scale_bar_has_a_round_length_and_fits():
    for extent in np.geomspace(3, 3000, 50):
        length = figures.scale_bar_length(extent)
        assert 0.13 * extent < length <= extent / 3
        assert f"{length:.0e}"[0] in "125"
