"""The typed configuration: defaults here, differences in YAML, ``key=value`` last."""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cryosplat.errors import InputError
from cryosplat.files import atomic_path
from cryosplat.pointgroups import canonical
from cryosplat.settings import CHOICES, INPUTS, LISTS, NO_CTF, RANGES, RECIPES, WITH_POSES, Config, DataConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load_config(path: str | os.PathLike | None = None, overrides: Sequence[str] = ()) -> Config:
    """The defaults of a recipe, changed by a YAML file and then by ``key=value`` words, checked by ``validate``.

    Args:
        path: YAML file of differences, a bare name of one in ``configs/`` (see ``find_config``), or None.
        overrides: such as ``train.lr=1e-3``; ``data.mask=null`` takes a value away.

    Raises:
        InputError: unreadable YAML, an unknown key, a value of the wrong type or out of range.

    >>> load_config(None, ["train.lr=1e-3"]).train.lr
    0.001
    """
    settings, given = OmegaConf.structured(Config), []
    if path is not None:
        file = find_config(path)
        given += [(key, value, str(file)) for key, value in _flatten(_read_yaml(file)).items()]
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} on the command line: expected key=value, for example train.lr=1e-3")
        optional_text = text == "" and _types().get(key) == str | None
        given.append((key, None if text == "null" or optional_text else text, "the command line"))
    recipes = [value for key, value, _ in given if key == "recipe"]
    for key, value in RECIPES.get(recipes[-1], {}).items() if recipes and isinstance(recipes[-1], str) else ():
        _set(settings, key, value, "the recipe")
    for key, value, source in given:
        _set(settings, key, value, source)
    try:
        config = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        raise InputError(f"configuration: {str(error).splitlines()[0]} (key {error.full_key})") from error
    validate(config)
    config.model.symmetry = canonical(config.model.symmetry)
    return config


def find_config(name: str | os.PathLike) -> Path:
    """The file that ``name`` means: a path, or a bare name (``demo``, ``10049.yaml``) in this folder or in configs/.

    Raises:
        InputError: there is none, with the nearest name.
    """
    name = Path(name).expanduser()
    bare = name.parent == Path(".")
    folders = [Path("."), Path("configs"), CONFIGS] if bare and not name.is_absolute() else [Path(".")]
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    looked = " or ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
    hint = f"; configs/ has {', '.join(known)}" if bare and known else ""
    raise InputError(f"no configuration file {name} in {looked}{hint}")


def validate(config: Config) -> None:
    """Check every value against its range or list, all at once.

    Raises:
        InputError: names each key that is out of range, what is allowed and what it is.
    """
    values = _flatten(dataclasses.asdict(config))
    problems = []
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{key} = {value}: expected a finite number")
        elif value is not None and key in RANGES and not RANGES[key][0](value):
            problems.append(f"{key} = {value}: expected {RANGES[key][1]}")
        elif key in CHOICES and value not in CHOICES[key]:
            problems.append(f"{key} = {value!r}: expected {' or '.join(CHOICES[key])}")
    model = config.model
    if not problems and not model.scale_min < model.scale <= model.scale_max:
        problems.append(
            f"model.scale = {model.scale}: expected more than model.scale_min ({model.scale_min}) "
            f"and at most model.scale_max ({model.scale_max})"
        )
    if model.start == "random" and model.gaussians is None:
        problems.append(
            "model.gaussians = null: only a start from a map (model.start=map) tells how many; name a number"
        )
    if config.volume.steps == 0 and (model.start == "map" or config.train.epochs == 0):
        problems.append(
            "volume.steps = 0: then nothing is fitted in the volume, which needs model.start=random and train.epochs "
            "of at least 1 (recipe=images or recipe=paper have both)"
        )
    if (config.data.null == "phases") != (config.data.null_shell_a is not None):
        problems.append("data.null = 'phases' and data.null_shell_a go together: phases are random from there on")
    if config.train.device == "cpu" and config.distributed.backend == "nccl":
        problems.append("distributed.backend = 'nccl' needs train.device = 'cuda'; on CPUs it is 'gloo' (or 'auto')")
    if config.distributed.share_gpus and config.distributed.backend == "nccl":
        problems.append("distributed.share_gpus = True needs distributed.backend = 'gloo' (or 'auto'): NCCL cannot")
    if not config.run_dir.strip():
        problems.append("run_dir is empty: expected the folder that the run writes to")
    if problems:
        raise InputError("configuration: " + "\n  ".join(problems))


def check_files(config: Config) -> None:
    """Check that every input is named that must be, and exists.

    Raises:
        InputError: names the key and the path it resolves to.
    """
    if not config.data.particles:
        raise InputError("data.particles is not set: name the file, for example data.particles=PATH")
    if not config.data.poses and Path(config.data.particles).suffix.lower() not in WITH_POSES:
        raise InputError(
            "data.poses is not set: name the file, for example data.poses=PATH, or a file with poses of its own "
            f"({' or '.join(WITH_POSES)}) as data.particles"
        )
    for name, path in input_paths(config):
        if name == "datadir" and not path.is_dir():
            raise InputError(f"data.{name}: there is no folder {path} (data_root is {config.data_root})")
        if name != "datadir" and not path.is_file():
            raise InputError(f"data.{name}: there is no file {path} (data_root is {config.data_root})")


def input_paths(config: Config) -> list[tuple[str, Path]]:
    """The files and folders under ``data`` that are set, with their settings, as ``resolve_path`` finds them."""
    named = [(name, value) for name in INPUTS for value in path_names(config.data, name)]
    return [(name, resolve_path(config, value)) for name, value in named if (name, value) != ("ctf", NO_CTF)]


def path_names(data: DataConfig, name: str) -> list[str]:
    """What a setting under ``data`` names: nothing, a path, or several.

    >>> path_names(DataConfig(passthrough="a.cs, b.cs"), "passthrough")
    ['a.cs', 'b.cs']
    """
    words = (getattr(data, name) or "").split(",") if f"data.{name}" in LISTS else [getattr(data, name) or ""]
    return [word.strip() for word in words if word.strip()]


def resolve_path(config: Config, path: str | os.PathLike) -> Path:
    """An input's path: as it is if absolute, else under ``data_root``."""
    return Path(config.data_root).expanduser() / Path(path).expanduser()


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Write every setting, defaults included, as YAML that ``load_config`` reads back to an equal configuration."""
    with atomic_path(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def config_differences(old: Config, new: Config) -> list[str]:
    """One line a key whose value differs, such as ``train.lr: 0.001 -> 0.003``; empty if equal."""
    before, after = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]]


def _types() -> dict[str, Any]:
    """Full key -> type of every setting; a section -> its dataclass."""
    found: dict[str, Any] = {}

    def walk(section: type, prefix: str) -> None:
        for name, hint in typing.get_type_hints(section).items():
            found[prefix + name] = hint
            if dataclasses.is_dataclass(hint):
                walk(hint, f"{prefix}{name}.")

    walk(Config, "")
    return found


def _read_yaml(file: Path) -> dict:
    try:
        loaded = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file}: not readable as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{file}: expected lines of 'key: value', found a list")
    return OmegaConf.to_container(loaded, resolve=False)


def _flatten(values: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings by full key; what is inside a key that is no section stays as it is."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        section = dataclasses.is_dataclass(_types().get(key))
        flat.update(_flatten(value, f"{key}.") if isinstance(value, dict) and section else {key: value})
    return flat


def _set(settings: DictConfig, key: str, value: Any, source: str) -> None:
    """Put one value in, or raise InputError naming where it came from."""
    known = _types()
    if key not in known:
        settable = [name for name, hint in known.items() if not dataclasses.is_dataclass(hint)]
        raise InputError(f"{source}: there is no setting {key!r}; {_nearest(key, settable)}")
    if dataclasses.is_dataclass(known[key]):
        inside = ", ".join(item.name for item in dataclasses.fields(known[key]))
        raise InputError(f"{source}: {key} = {value!r}: {key} is a section, with the settings {inside}")
    if key in LISTS and isinstance(value, list):
        value = ",".join(map(str, value))
    try:
        OmegaConf.update(settings, key, value)
    except OmegaConfBaseException as error:
        raise InputError(f"{source}: {key}: expected {_in_words(known[key])}, got {value!r}") from error


def _in_words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_in_words(part) for part in typing.get_args(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}[hint]


def _nearest(key: str, known: Sequence[str]) -> str:
    """'did you mean X?', by the whole key, else by its last part; else all the keys."""
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    close += [by_leaf[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.7)]
    return f"did you mean {close[0]}?" if close else f"the settings are {', '.join(known)}"
