"""The configuration: strict, typed, and clear about every mistake."""

import dataclasses
import re
from pathlib import Path

import pytest

from cryosplat import config as configuration
from cryosplat.config import check_files, config_differences, find_config, load_config, save_config, validate
from cryosplat.errors import InputError
from cryosplat.settings import Config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

NAMES_OTHERS_USE = (
    "data.particles data.poses data.ctf data.invert data.box data.truth data.mask model.gaussians train.epochs "
    "train.batch train.lr train.seed maps.halves run_dir resume"
).split()


def refused(*settings: str, path: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, settings)
    return str(caught.value)


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_defaults_alone_are_valid():
    assert load_config() == Config()


@pytest.mark.parametrize("key", NAMES_OTHERS_USE)
def test_keys_that_scripts_rely_on_keep_their_names(key):
    value = Config()
    for part in key.split("."):
        assert hasattr(value, part)
        value = getattr(value, part)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = yaml_file(tmp_path, "train: {epochs: 7, batch: 16}\nrun_dir: here\n")
    config = load_config(path, ["train.epochs=9"])
    assert (config.train.epochs, config.train.batch, config.run_dir, config.train.lr) == (
        9,
        16,
        "here",
        Config().train.lr,
    )


def test_values_on_the_command_line_are_taken_as_they_are_written(tmp_path):
    config = load_config(
        None,
        ["run_dir=0012", "data.particles=a b=c.star", "data.mask=null", "data.ctf=", "train.lr=1e-3", "data.box=64"],
    )
    assert (config.run_dir, config.data.particles, config.data.mask) == ("0012", "a b=c.star", None)
    assert (config.data.ctf, config.train.lr, config.data.box) == (None, 1e-3, 64)


def test_an_empty_file_changes_nothing(tmp_path):
    assert load_config(yaml_file(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize(
    ("setting", "suggestion"),
    [
        ("train.epoch=3", "train.epochs"),
        ("train.lrr=3", "train.lr"),
        ("--train.lr=3", "train.lr"),
        ("epochs=3", "train.epochs"),
        ("data.pariticles=x", "data.particles"),
        ("rundir=x", "run_dir"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(setting, suggestion):
    assert f"did you mean {suggestion}?" in refused(setting)


def test_an_unknown_key_in_a_file_is_refused_with_the_files_name(tmp_path):
    path = yaml_file(tmp_path, "train:\n  epoch: 3\n")
    message = refused(path=path)
    assert str(path) in message and "'train.epoch'" in message and "did you mean train.epochs?" in message


def test_a_key_like_no_other_is_refused_with_the_list():
    message = refused("zzzzzz=1")
    assert "train.lr" in message and "run_dir" in message


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.epochs=many", "expected a whole number, got 'many'"),
        ("train.epochs=2.5", "expected a whole number, got '2.5'"),
        ("train.lr=fast", "expected a number, got 'fast'"),
        ("train.lr=", "expected a number, got ''"),
        ("train.epochs=null", "expected a whole number, got None"),
        ("maps.halves=maybe", "expected true or false, got 'maybe'"),
        ("data.box=big", "expected a whole number or null, got 'big'"),
        ("train=3", "train is a section, with the settings epochs, batch"),
        ("train.lr", "expected key=value"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_was_expected(setting, expected):
    message = refused(setting)
    assert expected in message and setting.partition("=")[0] in message


@pytest.mark.parametrize("text", ["train: [", "- 1\n- 2\n", "just words", "train: {epochs: 1, epochs: 2}", "\x00"])
def test_a_file_that_is_not_settings_is_refused_by_name(tmp_path, text):
    path = yaml_file(tmp_path, text)
    assert str(path) in refused(path=path)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.epochs=-1", "0 or more"),
        ("volume.steps=-1", "0 or more"),
        ("volume.step_px=0", "more than 0 px"),
        ("volume.prior=-0.1", "0 or more nats"),
        ("volume.prior=inf", "finite"),
        ("model.start=linear", "map or random"),
        ("train.batch=0", "at least 1 image"),
        ("train.lr=0", "more than 0"),
        ("train.lr=nan", "finite"),
        ("train.lr=inf", "finite"),
        ("model.gaussians=0", "at least 1"),
        ("model.cutoff=1.9", "2 to 8"),
        ("model.scale=0.004", "more than model.scale_min"),
        ("model.scale=0.06", "at most model.scale_max"),
        ("data.box=127", "even"),
        ("data.box=6", "at least 8"),
        ("data.first=0", "at least 1"),
        ("data.precision=double", "half or single"),
        ("model.amplitudes=negative", "signed or positive"),
        ("train.schedule=cosin", "cosine or exponential or constant"),
        ("train.device=gpu", "auto or cpu or cuda"),
        ("distributed.backend=mpi", "auto or gloo or nccl"),
        ("resume=always", "auto or never"),
        ("train.threads=0", "at least 1"),
        ("checkpoint.keep=0", "at least 1"),
        ("run_dir=", "run_dir is empty"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(setting, expected):
    message = refused(setting)
    assert expected in message and setting.partition("=")[0] in message


def test_all_that_is_out_of_range_is_said_at_once():
    message = refused("train.epochs=-1", "data.box=7")
    assert "train.epochs" in message and "data.box" in message


def test_nccl_on_the_cpu_is_refused():
    assert "needs train.device" in refused("train.device=cpu", "distributed.backend=nccl")


def test_one_image_a_step_with_half_maps_is_allowed_because_the_paper_does_it():
    config = load_config(None, ["train.batch=1", "maps.halves=true"])
    validate(config)
    assert config.train.batch == 1 and config.maps.halves


def test_every_check_is_of_a_setting_that_exists():
    keys = set(configuration._types())
    assert set(configuration.RANGES) | set(configuration.CHOICES) <= keys
    assert {f"data.{name}" for name in configuration.INPUTS} <= keys


def test_a_saved_configuration_loads_back_equal(tmp_path):
    config = load_config(
        None, ["data.particles=0012", "data.mask=null", "train.lr=1e-7", "run_dir=a: b # c", "data.box=64"]
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_differences_name_key_and_both_values():
    before, after = load_config(), load_config(None, ["train.lr=0.5", "data.mask=m.mrc"])
    assert config_differences(before, after) == ["data.mask: None -> 'm.mrc'", f"train.lr: {before.train.lr} -> 0.5"]
    assert config_differences(before, before) == []


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "10049.yaml", "10180"])
def test_a_bare_name_is_found_in_configs_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).resolve() == CONFIGS / f"{name.removesuffix('.yaml')}.yaml"


def test_a_file_in_the_current_folder_comes_before_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("run_dir: mine")
    assert load_config("demo").run_dir == "mine"


def test_a_configuration_that_is_nowhere_is_refused_with_those_there_are(tmp_path):
    assert "10028, 10049, 10076, 10180, demo" in refused(path=Path("1028.yaml"))
    assert str(tmp_path / "no.yaml") in refused(path=tmp_path / "no.yaml")


def test_demo_is_made_of_what_the_simulator_writes():
    demo = load_config("demo")
    folder = "runs/demo-data"
    assert demo.run_dir == "runs/demo"
    names = [demo.data.particles, demo.data.poses, demo.data.ctf, demo.data.truth, demo.data.mask]
    assert names == [f"{folder}/{name}" for name in ("particles.star", "poses.pkl", "ctf.pkl", "truth.mrc", "mask.mrc")]


@pytest.mark.parametrize(("name", "box"), [("10028", 256), ("10049", 192), ("10076", 256), ("10180", 256)])
def test_the_papers_sets_leave_the_recipe_open(name, box):
    config = load_config(name)
    assert (config.data.box, config.maps.halves) == (box, True)
    assert (config.recipe, config.model, config.volume) == ("default", Config().model, Config().volume)
    assert config.train == Config().train
    # The one stack of the four whose particles are dark.
    assert (config.data.invert is False) == (name == "10076")
    files = (config.data.particles, config.data.poses, config.data.ctf)
    assert all(re.match(f"empiar{name}/inputs/", file) for file in files) and config.run_dir == f"runs/{name}"
    paper = load_config(name, ["recipe=paper"])
    assert (paper.model.gaussians, paper.train.batch, paper.data.box) == (30000, 1, box)


# Recipes


def test_the_recipe_of_the_paper_has_the_papers_settings():
    config = load_config(None, ["recipe=paper"])
    train, model = config.train, config.model
    assert (model.gaussians, model.amplitudes, model.start, config.volume.steps) == (30000, "positive", "random", 0)
    assert (train.epochs, train.batch, train.lr, train.schedule, train.lr_gamma) == (5, 1, 1e-3, "exponential", 0.1)


def test_the_default_recipe_changes_nothing():
    assert load_config(None, ["recipe=default"]) == Config() and not configuration.RECIPES["default"]


@pytest.mark.parametrize("recipe", configuration.RECIPES)
def test_every_recipe_is_valid_and_sets_what_it_says(recipe):
    values = configuration._flatten(dataclasses.asdict(load_config(None, [f"recipe={recipe}"])))
    defaults = configuration._flatten(dataclasses.asdict(Config()))
    assert values == defaults | configuration.RECIPES[recipe] | {"recipe": recipe}
    assert all(
        defaults[key] != value for key, value in configuration.RECIPES[recipe].items() if key != "train.lr_gamma"
    )


@pytest.mark.parametrize("words", [["recipe=paper", "train.batch=8"], ["train.batch=8", "recipe=paper"]])
def test_a_setting_wins_over_the_recipe_wherever_the_two_stand(words):
    config = load_config(None, words)
    assert (config.train.batch, config.train.epochs, config.model.gaussians) == (8, 5, 30000)


@pytest.mark.parametrize("text", ["recipe: paper\ntrain: {batch: 8}\n", "train: {batch: 8}\nrecipe: paper\n"])
def test_a_recipe_may_stand_in_a_file_and_be_changed_on_the_command_line(tmp_path, text):
    path = yaml_file(tmp_path, text)
    config = load_config(path)
    assert (config.recipe, config.train.batch, config.model.gaussians) == ("paper", 8, 30000)
    # Another recipe takes the place of the file's, and what the file sets stays.
    config = load_config(path, ["recipe=images", "train.epochs=2"])
    assert (config.recipe, config.train.batch, config.train.epochs) == ("images", 8, 2)
    assert (config.model.gaussians, config.train.schedule) == (8192, "cosine")
    config = load_config(path, ["recipe=default"])
    assert (config.recipe, config.train.batch, config.model.gaussians, config.train.epochs) == ("default", 8, None, 0)


@pytest.mark.parametrize("recipe", ["quick", "", "null", "Paper"])
def test_an_unknown_recipe_is_refused_with_those_there_are(recipe):
    message = refused(f"recipe={recipe}")
    assert "recipe" in message
    assert recipe == "null" or "expected default or random or images or paper" in message


def test_a_recipe_that_is_no_word_is_refused(tmp_path):
    assert "recipe" in refused(path=yaml_file(tmp_path, "recipe: [paper]\n"))


def test_a_random_start_needs_a_number_of_gaussians():
    assert "model.gaussians = null" in refused("model.start=random")
    assert "model.gaussians = null" in refused("recipe=images", "model.gaussians=null")
    assert load_config(None, ["model.start=random", "model.gaussians=99"]).model.gaussians == 99


@pytest.mark.parametrize(
    "settings",
    [
        ("volume.steps=0",),
        ("volume.steps=0", "train.epochs=3"),
        ("volume.steps=0", "model.start=random", "model.gaussians=99"),
        ("recipe=images", "train.epochs=0"),
        ("recipe=paper", "model.start=map"),
    ],
)
def test_without_a_fit_in_the_volume_there_must_be_a_random_start_and_training(settings):
    message = refused(*settings)
    assert "volume.steps = 0" in message and "recipe=images or recipe=paper" in message


def test_a_random_start_and_training_will_do_without_a_fit_in_the_volume():
    words = ["volume.steps=0", "model.start=random", "model.gaussians=99", "train.epochs=1"]
    assert load_config(None, words).volume.steps == 0


@pytest.mark.parametrize("recipe", configuration.RECIPES)
@pytest.mark.parametrize("words", [(), ("train.lr=0.3", "model.gaussians=99")])
def test_a_saved_configuration_of_any_recipe_loads_back_equal(tmp_path, recipe, words):
    config = load_config(None, [f"recipe={recipe}", *words])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_inputs_are_looked_for_under_data_root(tmp_path):
    (tmp_path / "stack.mrcs").touch()
    (tmp_path / "poses.pkl").touch()
    settings = [f"data_root={tmp_path}", "data.particles=stack.mrcs", f"data.poses={tmp_path / 'poses.pkl'}"]
    check_files(load_config(None, settings))
    with pytest.raises(InputError, match=f"data.truth: there is no file {tmp_path}/truth.mrc"):
        check_files(load_config(None, [*settings, "data.truth=truth.mrc"]))
    with pytest.raises(InputError, match="data.datadir: there is no folder"):
        check_files(load_config(None, [*settings, "data.datadir=stack.mrcs"]))


@pytest.mark.parametrize("name", ["p.star", "P.CS"])
def test_a_particle_file_that_may_have_poses_is_enough(tmp_path, name):
    (tmp_path / name).touch()
    settings = [f"data_root={tmp_path}", f"data.particles={name}"]
    check_files(load_config(None, [*settings, "data.ctf=none", "data.poses="]))
    for key in ("passthrough", "ctf"):
        with pytest.raises(InputError, match=rf"data\.{key}: there is no file {tmp_path}/q\.cs"):
            check_files(load_config(None, [*settings, f"data.{key}=q.cs"]))


@pytest.mark.parametrize("name", ["particles", "poses"])
def test_what_a_run_cannot_do_without_must_be_named(name, tmp_path):
    (tmp_path / "file").touch()
    settings = [f"data.{other}={tmp_path / 'file'}" for other in ("particles", "poses") if other != name]
    with pytest.raises(InputError, match=f"data.{name} is not set"):
        check_files(load_config(None, settings))
