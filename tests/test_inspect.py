"""``cryosplat inspect``: what it says of files, real ones and damaged ones, and that its suggestions work."""

import json

import numpy as np
import pytest
import training_set
import yaml
from scipy.spatial.transform import Rotation
from stacks import make_images, write_dataset, write_stack, write_star
from tables import BOX, COUNT, NAMES, PIXEL_SIZE_A, cs, microscope, relion30, save_cs, with_value, write_star31

from cryosplat import cli
from cryosplat.config import check_files, load_config
from cryosplat.imagesurvey import choose_sample
from cryosplat.particles import read_particles
from cryosplat.survey import ctf_facts, view_facts


@pytest.fixture
def inspect(capsys):
    """Exit code, and what is printed: as JSON, or as text with ``text=True``."""

    def inspected(path, *words, text=False):
        code = cli.main(["inspect", str(path), *([] if text else ["--json"]), *map(str, words)])
        output, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return code, (output if text else json.loads(output) if output else errors)

    return inspected


# Real files. What is expected was read from them with starfile, numpy and mrcfile.


REAL = {
    "readers/sample_particles_relion31.star": {
        "particles": (17, 17),
        "images": (200, 1.4),
        "optics": [(8, 300, 2.7, 0.1), (9, 200, 2.7, 0.1)],
        "halves": ("column", 10, 7),
        "stacks": (1, 0),
        "defocus": (21274.958, 21274.958, 21274.958),
        "usable": True,
    },
    "readers/relion31.star": {
        "particles": (5, 5),
        "images": (256, 2.806),
        "optics": [(5, 300, 0.01, 0.1)],
        "halves": ("column", 5, 0),
        "stacks": (1, 0),
        "defocus": (12374.792289, 12599.575404, 12976.832418),
        "problems": ["half b has no particles"],
    },
    "readers/empiar10017_images.star": {
        "particles": (6496, 6496),
        "images": (None, 3.54),
        "optics": [(6496, 300, 2.0, 0.1)],
        "halves": ("column", 3290, 3206),
        "stacks": (15, 15),
        "micrographs": 15,
        "defocus": (19894.120118, 28679.265625, 34079.740235),
        "problems": ["15 of 15 stacks do not exist, for 6496 of 6496 rows"],
    },
    "readers/empiar_10076_7.star": {
        "particles": (7, 7),
        "images": (320, 1.31),
        "optics": [(7, 300, 2.7, 0.07)],
        "stacks": (1, 0),
        "micrographs": 7,
        "defocus": (14958.35, 15108.75, 15174.5),
        "problems": ["no column _rlnAngleRot, _rlnAngleTilt, _rlnAnglePsi, so no poses"],
    },
    "readers/empiar_10076_7.cs": {
        "particles": (7, 7),
        "images": (320, 1.31),
        "optics": [(7, 300, 2.7, 0.07)],
        "stacks": (1, 0),
        "defocus": (14958.35, 15108.75, 15174.5),
        "problems": ["no column alignments3D/pose, alignments3D/shift, so no poses"],
    },
    "readers/cryosparc_P12_J24_001_particles.cs": {
        "particles": (2019, 2019),
        "images": (180, 2.95),
        "optics": [(2019, 200, 2.0, 0.07)],
        "halves": ("column", 1010, 1009),
        "stacks": (50, 50),
        "problems": ["50 of 50 stacks do not exist, for 2019 of 2019 rows"],
    },
    "empiar10025/cryosparc_P9_J209_000_particles.cs": {
        "particles": (11764, 11764),
        "images": (256, 1.027344),
        "optics": [(11764, 300, 2.7, 0.1)],
        "halves": ("column", 5882, 5882),
        "stacks": (196, 196),
        "problems": ["196 of 196 stacks do not exist, for 11764 of 11764 rows"],
    },
    "readers/sample.mrcs": {
        "particles": (17, 17),
        "images": (200, None),
        "stacks": (1, 0),
        "problems": ["A/px", "no poses"],
    },
    "readers/relion31.mrcs": {
        "particles": (5, 5),
        "images": (256, None),
        "stacks": (1, 0),
        "problems": ["A/px", "no poses"],
    },
    "readers/empiar_10076_7.mrc": {"particles": (7, 7), "images": (320, None), "problems": ["A/px", "no poses"]},
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile's, of old headers
@pytest.mark.parametrize("name", REAL)
def test_real_files_are_what_they_are(shared, inspect, name):
    code, found = inspect(shared / "data" / name)
    expected, facts = REAL[name], found["facts"]
    assert (facts["particles"]["listed"], facts["particles"]["used"]) == expected["particles"]
    box, size = expected["images"]
    assert facts["images"]["box"] == box and facts["images"]["pixel_size_a"] == (size and pytest.approx(size, rel=1e-4))
    assert code == (0 if expected.get("usable") else 2) and found["usable"] == (code == 0)
    assert len(found["problems"]) == len(expected.get("problems", ()))
    for problem, words in zip(found["problems"], expected.get("problems", ()), strict=True):
        assert words in problem
    if "optics" in expected:
        keys = ("particles", "kv", "cs_mm", "contrast")
        assert [tuple(group[key] for key in keys) for group in facts["optics"]] == [
            pytest.approx(group) for group in expected["optics"]
        ]
    if "halves" in expected:
        assert tuple(facts["halves"][key] for key in ("from", "a", "b")) == expected["halves"]
    if "stacks" in expected:
        assert (facts["stacks"]["count"], facts["stacks"]["missing"]) == expected["stacks"]
    if "micrographs" in expected:
        assert facts["micrographs"]["count"] == expected["micrographs"]
    if "defocus" in expected:
        assert list(facts["ctf"]["defocus_a"].values()) == pytest.approx(expected["defocus"], rel=1e-6)


def test_a_real_star_file_without_particles_is_refused(shared, inspect):
    code, found = inspect(shared / "data/readers/sample.star")
    assert code == 2 and "no table with a column _rlnImageName" in found["problems"][0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empiar10028/ctf.pkl", ["105,247 images", "360 to 360", "1.34 to 1.34"]),
        ("empiar10049/ctf.pkl", ["108,544 images", "192 to 192", "1.23 to 1.23"]),
        ("empiar10025/ctf.pkl", ["11,764 images", "256 to 256"]),
        ("empiar10025/poses.pkl", ["11,764 images", "0.1116 (largest)"]),
        ("readers/cryosparc_P12_J24_ctf.pkl", ["2,019 images", "2.95 to 2.95"]),
        ("readers/cryosparc_P12_J24_poses.pkl", ["2,019 images"]),
    ],
)
def test_real_pickles_of_poses_and_ctf(shared, inspect, name, words):
    code, output = inspect(shared / "data" / name, text=True)
    assert code == 0 and all(word in output for word in words)


# Files of our own


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    return training_set.training_set(tmp_path_factory)


def test_a_good_file_is_usable_and_its_configuration_trains(inspect, stack, tmp_path):
    code, found = inspect(stack / "particles.star", "--write", tmp_path / "my.yaml", "train.threads=1")
    facts = found["facts"]
    assert code == 0 and found["usable"] and not found["problems"] and not found["notes"]
    assert facts["images"]["box"] == 32 and facts["images"]["pixel_size_a"] == 4 and facts["duplicates"] == {"rows": 0}
    assert facts["sign"]["invert"] is True and facts["sign"]["certainty"] > 6 and facts["sign"]["images"] == 301
    assert facts["sample"]["images"] == 301 and facts["sample"]["not_finite"] == facts["sample"]["constant"] == 0
    assert 0.9 < facts["poses"]["covered"] <= 1 and 0.9 < facts["poses"]["evenness"] <= 1
    assert (
        facts["memory"]["images_gib"] == pytest.approx(301 * 32 * 17 * 4 / 2**30) and facts["time"]["pass_seconds"] > 0
    )
    written = (tmp_path / "my.yaml").read_text()
    assert found["config"] == written
    assert yaml.safe_load(written) == {
        "data": {"particles": str(stack / "particles.star")},
        "train": {"threads": 1},
        "run_dir": "runs/particles",
    }
    config = load_config(tmp_path / "my.yaml")
    check_files(config)
    assert len(read_particles(config.data, config.data_root, 0)) == 301
    code, again = inspect(tmp_path / "my.yaml")
    assert code == 0 and again["facts"]["images"] == facts["images"]


def test_a_configuration_that_is_there_is_left_alone(inspect, stack, tmp_path):
    (tmp_path / "my.yaml").write_text("mine")
    code, errors = inspect(stack / "particles.star", "--write", tmp_path / "my.yaml")
    assert code == 2 and "my.yaml exists already" in errors and (tmp_path / "my.yaml").read_text() == "mine"


def test_the_sign_of_a_flipped_stack_and_one_that_is_set_wrong(inspect, stack, tmp_path):
    flipped = training_set.altered(stack, tmp_path / "stack", lambda images: -images)
    code, found = inspect(flipped / "particles.star")
    assert code == 0 and found["facts"]["sign"]["invert"] is False
    assert "the particles are dark on white" in found["facts"]["sign"]["words"]
    code, found = inspect(flipped / "particles.star", "data.invert=true")
    assert code == 2 and "the images look inverted" in found["problems"][0]


def test_text_fits_the_page_and_has_no_colours(inspect, stack, tmp_path):
    code, output = inspect(stack / "particles.star", text=True)
    assert code == 0 and "\x1b" not in output and max(map(len, output.splitlines())) <= 100
    for words in (
        "particles     301",
        "32 px",
        "4 A/px",
        "evenness 0.9",
        "white on dark (+",
        "usable: cryosplat train",
    ):
        assert words in output


def test_every_problem_is_listed_not_only_the_first(inspect, tmp_path):
    images = make_images()
    images[1, 0, 0], images[3] = np.nan, 7
    write_stack(tmp_path / "particles.mrcs", images)
    changes = {"AngleTilt": with_value([0.5] * COUNT, "x"), "Voltage": with_value([300] * COUNT, 3e5)}
    write_star(tmp_path / "p.star", NAMES, **relion30(**changes), RandomSubset=[1] * COUNT)
    code, found = inspect(tmp_path / "p.star")
    problems = "\n".join(found["problems"])
    assert code == 2
    for words in (
        "row 4: _rlnAngleTilt is 'x'",
        "row 4: voltage of 300000 kV",
        "half b has no particles",
        "image 1 (row 1 of p.star): has pixels that are not finite numbers (1 of the 6 images",
        "image 3 (row 3 of p.star): is constant outside its inner circle (1 of the 6 images",
    ):
        assert words in problems
    assert len(found["problems"]) == 5


@pytest.mark.parametrize("name", ["Extract/job1/a.mrcs", "/nowhere/Extract/job1/a.mrcs", "S1/J2/a.mrcs"])
def test_stacks_that_are_elsewhere_are_found_and_the_configuration_says_where(inspect, tmp_path, name):
    there = name.removeprefix("/nowhere/").removeprefix("S1/")
    write_stack(tmp_path / "project" / there, make_images())
    (tmp_path / "jobs" / "run").mkdir(parents=True)
    # Above the file, so that its parents are walked up.
    folder = tmp_path / "project" / "Refine3D" / "job2"
    folder.mkdir(parents=True)
    write_star(folder / "run_data.star", [f"{image + 1}@{name}" for image in range(COUNT)], **relion30())
    code, found = inspect(folder / "run_data.star", "--write", tmp_path / "my.yaml")
    assert code == 2 and len(found["problems"]) == 1 and found["facts"]["stacks"]["missing"] == 1
    assert f"{tmp_path}/project" in found["problems"][0] and found["facts"]["sample"]["images"] == COUNT
    code, found = inspect(tmp_path / "my.yaml")
    assert code == 0, found["problems"]
    _, text = inspect(folder / "run_data.star", text=True)
    assert "usable with what is added there" in text


def test_poses_and_other_inputs_on_the_command_line_are_named_by_whole_paths(inspect, tmp_path, monkeypatch):
    write_dataset(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ("data.poses=poses.pkl", "data.ctf=ctf.pkl", "--write", "my.yaml")
    code, found = inspect("particles.mrcs", *words)
    assert code == 0, found["problems"]
    written = yaml.safe_load((tmp_path / "my.yaml").read_text())["data"]
    assert written == {name: str(tmp_path / f"{name}{end}") for name, end in PATHS.items()}
    code, found = inspect("particles.mrcs", "data.ctf=none")
    assert code == 2 and "no poses" in found["problems"][0] and len(found["problems"]) == 1


PATHS = {"particles": ".mrcs", "poses": ".pkl", "ctf": ".pkl"}


def test_copies_and_halves_and_resampling_are_told(inspect, tmp_path):
    write_stack(tmp_path / "particles.mrcs", make_images(COUNT, BOX // 2))
    write_star31(tmp_path / "p.star")
    code, found = inspect(tmp_path / "p.star")
    assert code == 0 and found["facts"]["images"]["pixel_size_a"] == 2 * PIXEL_SIZE_A
    assert "they are taken for resampled" in found["notes"][0]
    assert found["facts"]["halves"]["from"] == "particle" and "not gold standard" in found["facts"]["halves"]["words"]
    write_star(tmp_path / "p.star", [NAMES[0], *NAMES[:5]], **relion30())
    assert inspect(tmp_path / "p.star")[1]["facts"]["duplicates"] == {"rows": 1}


def test_what_a_cs_file_lacks_is_pointed_to(inspect, tmp_path):
    write_stack(tmp_path / "particles.mrcs", make_images())
    save_cs(tmp_path / "p.cs", cs(alignments3D__pose=None, alignments3D__shift=None))
    save_cs(tmp_path / "J7_passthrough_particles.cs", cs())
    code, found = inspect(tmp_path / "p.cs")
    assert code == 2 and f"data.passthrough={tmp_path}/J7_passthrough_particles.cs" in found["problems"][0]
    code, found = inspect(tmp_path / "p.cs", f"data.passthrough={tmp_path}/J7_passthrough_particles.cs")
    assert code == 0, found["problems"]


def test_nothing_there_is_said(inspect, tmp_path):
    code, errors = inspect(tmp_path / "none.star")
    assert code == 2 and "none.star: nothing there" in errors


# Figures


def test_views_all_round_have_no_gaps_and_side_views_one_at_the_pole():
    even = view_facts(Rotation.random(3000, random_state=0).as_matrix())
    assert even["covered"] == 1 and even["largest_gap_deg"] < 8 and even["evenness"] > 0.95
    random = np.random.default_rng(0)
    turns = np.stack([random.uniform(0, 360, 3000), np.full(3000, 90), random.uniform(0, 360, 3000)], axis=1)
    side = view_facts(Rotation.from_euler("zyz", turns, degrees=True).as_matrix())
    assert side["largest_gap_deg"] == pytest.approx(90, abs=3) and side["evenness"] == pytest.approx(0.81, abs=0.04)
    # Within 10 degrees of the equator lies sin 10 of the sphere.
    assert side["covered"] == pytest.approx(np.sin(np.radians(10)), abs=0.02)
    turns[:, 1] = 0
    assert view_facts(Rotation.from_euler("zyz", turns, degrees=True).as_matrix())["evenness"] < 0.1


def test_defocus_far_from_the_others_is_counted():
    ctf = np.tile([15000.0, 14800, 0, 300, 2.7, 0.1, 0], (100, 1))
    ctf[:, :2] += np.linspace(-3000, 3000, 100)[:, None]
    assert ctf_facts(ctf)["defocus_outliers"] == 0 and ctf_facts(ctf)["phase_shift_deg"] is None
    ctf[40, :2], ctf[70, :2], ctf[:, 6] = 150000, -15000, np.pi / 2
    found = ctf_facts(ctf)
    assert (found["defocus_outliers"], found["first_outlier"], found["overfocus"]) == (2, 40, 1)
    assert found["astigmatism_a"]["median"] == pytest.approx(200)
    assert found["phase_shift_deg"]["median"] == pytest.approx(90)


def test_a_sample_is_spread_over_the_stacks_in_runs_of_neighbours():
    class Images:
        box = 64
        stack = np.repeat(np.arange(100), 200)
        slices = np.tile(np.arange(200), 100)

        def __len__(self):
            return len(self.stack)

    ids = choose_sample(Images())
    assert 512 <= len(ids) <= 1024 and (np.diff(ids) > 0).all() and len(np.unique(Images.stack[ids])) >= 30
    assert (np.diff(ids) == 1).mean() > 0.9 and ids[0] == 0 and ids[-1] == 19999


def test_no_more_is_read_than_fits():
    class Images:
        box, stack, slices = 1024, np.zeros(5000, int), np.arange(5000)

        def __len__(self):
            return 5000

    assert len(choose_sample(Images())) * 1024**2 * 4 <= 2**28


def test_a_stack_whose_header_breaks_off_is_named(inspect, tmp_path):
    write_dataset(tmp_path)
    write_star31(tmp_path / "p.star")
    content = (tmp_path / "particles.mrcs").read_bytes()
    (tmp_path / "particles.mrcs").write_bytes(content[:-300])
    code, found = inspect(tmp_path / "p.star")
    assert (
        code == 2 and "truncated: the header promises 6 images" in found["problems"][0] and len(found["problems"]) == 1
    )


def test_aberrations_are_told_whether_they_are_corrected_or_not(inspect, tmp_path):
    write_stack(tmp_path / "particles.mrcs", make_images())
    write_star31(tmp_path / "p.star")
    assert inspect(tmp_path / "p.star")[1]["facts"]["aberrations"] == []
    optics = {"OpticsGroup": [1], "ImagePixelSize": [PIXEL_SIZE_A], "ImageSize": [BOX], **microscope(1)}
    write_star31(tmp_path / "p.star", optics=optics | {"CtfDataArePhaseFlipped": [1]})
    code, found = inspect(tmp_path / "p.star")
    assert code == 0 and "6 of 6 images were phase-flipped: flipped back" in found["facts"]["aberrations"]
