"""The typed configuration: defaults here, differences in YAML, ``key=value`` last."""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cryosplat.errors import InputError
from cryosplat.files import atomic_path


@dataclass
class DataConfig:
    """Where the particles are and how they are read."""

    particles: str = ""  # .mrcs, .star, .cs or .txt
    passthrough: str | None = None  # second .cs file with further columns of the same particles
    poses: str | None = None  # cryoDRGN's poses.pkl; none: those of the .star or .cs file
    ctf: str | None = None  # cryoDRGN's ctf.pkl, or NO_CTF; none: that of the .star or .cs file, if it has one
    datadir: str | None = None  # folder of the stacks that a .star or .cs names
    indices: str | None = None  # subset of rows, .pkl or .npy of integers
    halves: str | None = None  # half set of every particle (0 or 1), .pkl or .npy; none: from the input or drawn
    first: int | None = None  # use only the first particles
    invert: bool | None = None  # true for particles white on dark; none: as a .cs file says, else true as in cryoDRGN
    check_sign: bool = True  # stop if the images are clearly of the other sign
    check_signal: bool = True  # stop after the first pass if the linear half maps agree on nothing
    box: int | None = None  # px, even; images are Fourier-cropped to it
    pixel_size: float | None = None  # A/px of the stored images; only without a CTF
    truth: str | None = None  # map to compare with, simulations only
    mask: str | None = None  # soft mask for FSC, 0 to 1; none: made from the linear half maps
    precision: str = "half"  # images in memory: half or single
    cache: str = "auto"  # where they are held: auto, device (a GPU's own memory) or host
    holdout: float = 0.0  # fraction of the images that nothing is trained on, to watch overfitting with
    null: str = "none"  # null test: phases (random beyond null_shell_a) or noise (no particle at all)
    null_shell_a: float | None = None  # A; null=phases: resolution from which on phases are random
    null_seed: int = 0  # of the random phases or noise


@dataclass
class ModelConfig:
    """The Gaussian mixtures and their start (lengths in fractions of the box)."""

    gaussians: int | None = None  # none: from each model's own volume and resolution (start=map only)
    start: str = "map"  # map: drawn from the density of its linear map; random: at random round the centre
    amplitudes: str = "signed"  # signed, or positive (the paper's softplus)
    spread: float = 0.075  # standard deviation of the initial positions (start=random only)
    scale: float = 0.0075  # initial standard deviation of a Gaussian (start=random only)
    scale_min: float = 0.004
    scale_max: float = 0.05
    cutoff: float = 3.5  # standard deviations drawn in images; relative L2 error of an image 2e-3


@dataclass
class VolumeConfig:
    """The fit in the volume, to the likelihood of all images at once, before any image by itself."""

    steps: int = 120  # 0: none
    step_px: float = 0.06  # first step of a position, px
    prior: float = 0.5  # nats; how firmly amplitudes are held to the mean one where images do not tell


@dataclass
class TrainConfig:
    """Training image by image, after the fit in the volume or instead of it; seed, device and threads of all."""

    epochs: int = 0  # passes over the images, image by image; none are needed after a fit in the volume
    batch: int = 64  # images a step, over all ranks
    micro_batch: int | None = None  # images of a rank at a time, gradients added up; none: as many as memory takes
    lr: float = 1e-4  # one rate for all parameters
    schedule: str = "cosine"  # cosine, exponential or constant
    lr_final: float = 0.01  # cosine: last rate as a fraction of the first
    lr_gamma: float = 0.1  # exponential: factor an epoch
    whiten: bool = False  # weigh frequencies by each half's noise spectrum
    seed: int = 0
    device: str = "auto"  # auto, cpu or cuda
    threads: int | None = None  # CPU threads a rank; none: cores / ranks on the host
    log_every: int = 20  # steps between looks at the losses
    cuda_graph: str = "auto"  # auto: on one GPU the step is recorded and replayed; off: never


@dataclass
class MapsConfig:
    halves: bool = True  # train half a and half b beside the full model
    every: int = 1  # epochs between FSC evaluations; the last epoch always is one


@dataclass
class CheckpointConfig:
    every_minutes: float = 10.0
    keep: int = 2


@dataclass
class DistributedConfig:
    backend: str = "auto"  # auto, gloo or nccl
    timeout_minutes: float = 30.0
    share_gpus: bool = False  # let several ranks compute on one GPU


@dataclass
class Config:
    """Everything a run depends on.

    Inputs whose paths are not absolute are relative to ``data_root``; ``data_root`` and ``run_dir`` themselves to the
    current folder.
    """

    recipe: str = "default"  # what the defaults below are: default, random, images or paper
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    volume: VolumeConfig = field(default_factory=VolumeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    maps: MapsConfig = field(default_factory=MapsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    data_root: str = "."  # folder that the paths under data start from
    run_dir: str = "runs/run"  # everything the run writes
    resume: str = "auto"  # auto: go on where the run directory stands; never: refuse a used one


RECIPES: dict[str, dict[str, Any]] = {
    # Drawn from each half's own linear map and fitted in the volume.
    "default": {},
    # No map to start from: Gaussians anywhere round the centre, fitted in the volume.
    "random": {
        "model.start": "random",
        "model.gaussians": 16384,
        "model.spread": 0.11,
        "model.scale": 0.016,
        "volume.steps": 200,
        "volume.step_px": 0.6,
    },
    # From random Gaussians image by image, as the paper does it, with the settings that did best.
    "images": {
        "model.start": "random",
        "model.gaussians": 8192,
        "model.amplitudes": "positive",
        "volume.steps": 0,
        "train.epochs": 5,
        "train.batch": 32,
        "train.lr": 1e-2,
    },
    # The settings of the CryoSplat paper.
    "paper": {
        "model.start": "random",
        "model.gaussians": 30000,
        "model.amplitudes": "positive",
        "volume.steps": 0,
        "train.epochs": 5,
        "train.batch": 1,
        "train.lr": 1e-3,
        "train.schedule": "exponential",
        "train.lr_gamma": 0.1,
    },
}
"""Defaults by ``recipe``, where they differ from those of the classes above. What is set explicitly comes on top."""

CHOICES = {
    "recipe": tuple(RECIPES),
    "data.precision": ("half", "single"),
    "data.cache": ("auto", "device", "host"),
    "data.null": ("none", "phases", "noise"),
    "model.amplitudes": ("signed", "positive"),
    "model.start": ("map", "random"),
    "train.schedule": ("cosine", "exponential", "constant"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.cuda_graph": ("auto", "off"),
    "distributed.backend": ("auto", "gloo", "nccl"),
    "resume": ("auto", "never"),
}

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data.first": (lambda value: value >= 1, "at least 1 particle"),
    "data.box": (lambda value: value >= 8 and value % 2 == 0, "an even number of pixels, at least 8"),
    "data.pixel_size": (lambda value: value > 0, "more than 0 A/px"),
    "data.holdout": (lambda value: 0 <= value <= 0.5, "a fraction of the images from 0 to 0.5"),
    "data.null_shell_a": (lambda value: value > 0, "a resolution above 0 A"),
    "data.null_seed": (lambda value: 0 <= value < 2**32, "0 to 4294967295"),
    "model.gaussians": (lambda value: value >= 1, "at least 1"),
    "model.spread": (lambda value: 0 < value <= 0.5, "a fraction of the box above 0 and at most 0.5"),
    "model.scale_min": (lambda value: value > 0, "a fraction of the box above 0"),
    "model.scale_max": (lambda value: value <= 0.5, "a fraction of the box, at most 0.5"),
    "model.cutoff": (lambda value: 2 <= value <= 8, "2 to 8 standard deviations"),
    "train.epochs": (lambda value: value >= 0, "0 or more"),
    "volume.steps": (lambda value: value >= 0, "0 or more"),
    "volume.step_px": (lambda value: value > 0, "more than 0 px"),
    "volume.prior": (lambda value: value >= 0, "0 or more nats"),
    "train.batch": (lambda value: value >= 1, "at least 1 image"),
    "train.micro_batch": (lambda value: value >= 1, "at least 1 image"),
    "train.lr": (lambda value: value > 0, "more than 0"),
    "train.lr_final": (lambda value: 0 <= value <= 1, "a fraction of train.lr, 0 to 1"),
    "train.lr_gamma": (lambda value: 0 < value <= 1, "a factor above 0 and at most 1"),
    "train.seed": (lambda value: 0 <= value < 2**32, "0 to 4294967295"),
    "train.threads": (lambda value: value >= 1, "at least 1"),
    "train.log_every": (lambda value: value >= 1, "at least 1 step"),
    "maps.every": (lambda value: value >= 1, "at least 1 epoch"),
    "checkpoint.every_minutes": (lambda value: value > 0, "more than 0 minutes"),
    "checkpoint.keep": (lambda value: value >= 1, "at least 1"),
    "distributed.timeout_minutes": (lambda value: value > 0, "more than 0 minutes"),
}
"""Key: (whether a value is allowed, in words). A setting that is null is not checked."""

NO_CTF = "none"
"""``data.ctf`` of images without a CTF whose file has one."""

INPUTS = ("particles", "passthrough", "poses", "ctf", "datadir", "indices", "halves", "truth", "mask")
"""The settings under ``data`` that are paths."""

WITH_POSES = (".star", ".cs")
"""Extensions of tables that may have poses of their own."""

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
    for name, path in input_paths(config).items():
        if name == "datadir" and not path.is_dir():
            raise InputError(f"data.{name}: there is no folder {path} (data_root is {config.data_root})")
        if name != "datadir" and not path.is_file():
            raise InputError(f"data.{name}: there is no file {path} (data_root is {config.data_root})")


def input_paths(config: Config) -> dict[str, Path]:
    """The files and folders under ``data`` that are set, by their settings, as ``resolve_path`` finds them."""
    named = {name: getattr(config.data, name) for name in INPUTS}
    return {
        name: resolve_path(config, value) for name, value in named.items() if value and (name, value) != ("ctf", NO_CTF)
    }


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
