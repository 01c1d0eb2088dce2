"""Site profiles: what a cluster wants to hear, said once in slurm/sites/NAME.yaml and not on every command line."""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cryosplat.errors import InputError

SITES = Path(__file__).resolve().parents[1] / "slurm" / "sites"


@dataclass
class Site:
    """What jobs ask of a cluster. What is not set is not asked for: an empty request is not the same as none."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None  # limit, as sbatch --time has it
    gpus_per_node: int | None = None  # one rank each
    gpu_type: str | None = None  # such as a100, where the cluster has several
    gpu_option: str = "gpus-per-node"  # how sbatch is asked for GPUs: gpus-per-node or gres
    tasks_per_node: int | None = None  # ranks a node where there are no GPUs
    cpus_per_task: int | None = None
    memory_gb: float | None = None  # GiB a node
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks start, such as module load
    container: str | None = None  # what stands before the interpreter, such as apptainer exec --nv image.sif
    python: str | None = None  # the interpreter on the nodes; none: the one that submits
    environment: dict[str, str] = field(default_factory=dict)  # variables of all ranks
    srun: list[str] = field(default_factory=list)  # further options of srun
    sbatch: dict[str, str] = field(default_factory=dict)  # any other options of sbatch


def load_site(name: str | None) -> Site:
    """A profile by path or by its name in slurm/sites/; without a name one that asks for nothing.

    Raises:
        InputError: there is none, with those there are; or a key or value that a profile does not have.

    >>> load_site(None).partition is None
    True
    """
    if name is None:
        return Site()
    file = _find(name)
    try:
        loaded = OmegaConf.load(file)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{file}: not readable as YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{file}: expected lines of 'key: value', found a list")
    known = [item.name for item in dataclasses.fields(Site)]
    for key in loaded:
        if key not in known:
            raise InputError(f"{file}: a site has no {key!r}; {_nearest(str(key), known)}")
    try:
        site = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Site), loaded))
    except OmegaConfBaseException as error:
        raise InputError(f"{file}: {error.full_key}: {str(error).splitlines()[0]}") from error
    check_site(site, str(file))
    return site


def check_site(site: Site, source: str) -> None:
    """Refuse values that sbatch could only refuse, or misunderstand, later.

    Raises:
        InputError: names the key, its value and what is allowed.
    """
    for key in ("tasks_per_node", "cpus_per_task", "memory_gb"):
        value = getattr(site, key)
        if value is not None and value <= 0:
            raise InputError(f"{source}: {key} = {value}: expected more than 0")
    if site.gpus_per_node is not None and site.gpus_per_node < 0:
        raise InputError(f"{source}: gpus_per_node = {site.gpus_per_node}: expected 0 or more")
    if site.gpu_option not in ("gpus-per-node", "gres"):
        raise InputError(f"{source}: gpu_option = {site.gpu_option!r}: expected gpus-per-node or gres")
    for name in site.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"{source}: environment: {name!r} is no name of a variable")
    minutes(site.time or "1", f"{source}: time =")


def minutes(text: str, source: str = "--time") -> int:
    """Slurm's time formats, as whole minutes.

    Raises:
        InputError: any other format, or no time at all.

    >>> minutes("90"), minutes("1:30:00"), minutes("2-12"), minutes("10:30")
    (90, 90, 3600, 11)
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise InputError(f"{source} {text}: expected minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    days, dash, clock = text.rpartition("-")
    numbers = [int(part) for part in clock.split(":")]
    if dash or len(numbers) == 3:
        hours, mins, seconds = (numbers + [0, 0])[:3]
    else:
        hours, (mins, seconds) = 0, (numbers + [0])[:2]
    total = int(days or 0) * 1440 + hours * 60 + mins + (seconds > 0)
    if total == 0:
        raise InputError(f"{source} {text}: expected some time; to Slurm 0 would mean no limit")
    return total


def _find(name: str) -> Path:
    for candidate in (Path(name).expanduser(), SITES / name, SITES / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in SITES.glob("*.yaml"))
    raise InputError(f"--site {name}: no such file, and none of that name in {SITES}; {_nearest(name, known)}")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
