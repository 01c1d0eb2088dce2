"""The ``cryosplat backproject`` command: linear maps straight from the images, without training anything."""

import argparse
import logging
import time
from pathlib import Path

import numpy as np

from cryosplat import distributed, symmetrycheck
from cryosplat.backprojection import back_project, linear_half
from cryosplat.config import check_files, load_config
from cryosplat.conventions import RESOLUTION_THRESHOLD_HALF_MAPS
from cryosplat.dataset import ParticleDataset, radial_noise
from cryosplat.errors import InputError, said_by_the_first
from cryosplat.evaluation import read_comparison
from cryosplat.fsc import resolution
from cryosplat.linearmaps import linear_maps
from cryosplat.memory import free_bytes, plan_memory
from cryosplat.nodeimages import read_images
from cryosplat.particles import read_particles
from cryosplat.posterior import deliver
from cryosplat.sampling import BatchPlan
from cryosplat.settings import Config
from cryosplat.sign import find_sign
from cryosplat.symmetry import operators
from cryosplat.volumes import write_map

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``cryosplat backproject`` takes."""
    parser.description = (
        "Linear (Fourier) reconstruction of a particle stack: unregularised maps of both halves and of all particles, "
        "and one that is Wiener-filtered by the halves' FSC. Alone, or under torchrun like training."
    )
    parser.add_argument("--config", metavar="YAML", help="as for train; the settings under data are what is used")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="such as data.particles=a.star")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="maps go there; replaces nothing")
    parser.add_argument(
        "--sym", metavar="GROUP", help="point group as RELION names it: C4, D7, T, O, I2; default: model.symmetry"
    )
    parser.add_argument(
        "--halves", action=argparse.BooleanOptionalAction, default=True, help="maps of the half sets too; default: yes"
    )


def run(args: argparse.Namespace) -> None:
    """Do what ``cryosplat backproject`` is asked to do.

    Raises:
        InputError: anything wrong with settings, input files or the point group, a null test, or a map that exists.
    """
    with said_by_the_first():
        config = load_config(args.config, args.settings)
        config.model.symmetry = args.sym or config.model.symmetry
        operators(config.model.symmetry)  # named wrongly, it is refused here
        if config.data.null != "none":
            raise InputError(
                f"data.null={config.data.null}: cryosplat backproject takes the images as they are; leave it out, or "
                "train a null run, which has its own linear half maps"
            )
    folder = Path(args.output)
    names = ("unregularised", "half_a", "half_b", "linear", "mask") if args.halves else ("unregularised",)
    paths = {name: folder / f"{name}.mrc" for name in names}
    with distributed.join(config) as world:
        distributed.together(lambda: _require_new(folder, paths) if world.is_main else None, world)
        began = time.perf_counter()
        maps, pixel_size_a, words = _reconstruct(config, world, args.halves)
        if not world.is_main:
            return
        for name, path in paths.items():
            write_map(path, maps[name], pixel_size_a)
    written = ", ".join(path.name for path in paths.values())
    print(f"{folder}: {written}, box {len(maps['unregularised'])} px, symmetry {config.model.symmetry}")
    for line in [*words, f"{time.perf_counter() - began:.1f} s"]:
        print(f"  {line}")


def _require_new(folder: Path, paths: dict[str, Path]) -> None:
    for path in paths.values():
        if path.exists():
            raise InputError(f"{path} exists already; choose another folder or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def _reconstruct(
    config: Config, world: distributed.World, halves: bool
) -> tuple[dict[str, np.ndarray], float, list[str]]:
    """Maps (D, D, D) by name on rank 0 (none on the others), A/px, and what to say of them."""
    data = config.data

    def table_of_particles():
        check_files(config)
        return read_particles(data, config.data_root, config.train.seed, halves)

    table = distributed.together(table_of_particles, world)
    plan = BatchPlan(table.half, config.train.batch, config.train.seed, table.held_out)
    mine = np.flatnonzero(plan.owner(world.size) == world.rank)
    free = free_bytes(world)

    grids = 2 if halves else 1
    memory = distributed.together(lambda: plan_memory(config, table, plan, world, free, grids, trains=False), world)
    dataset = read_images(config, world, table, plan, memory.cache)
    read = distributed.together(
        lambda: read_comparison(config, dataset.box, dataset.pixel_size_a) if world.is_main else None, world
    )
    noise = _share_noise(dataset, world)
    find_sign(dataset, table, noise, world, config.train.seed, data.check_sign)
    symmetry, used = operators(config.model.symmetry), dataset.in_file_order(mine[~plan.held_out[mine]])
    sums = back_project(dataset, used, noise, world, symmetry, halves)
    if sums is not None and not halves:
        return {"unregularised": linear_half(sums[0], dataset.box).map}, dataset.pixel_size_a, []
    both = None if sums is None else tuple(linear_half(one, dataset.box, symmetry) for one in sums)
    looks = halves and symmetry is not None
    seen = symmetrycheck.agreement(dataset, used, noise, world, both) if looks else None
    if sums is None:
        return {}, dataset.pixel_size_a, []
    found = linear_maps(both, dataset.pixel_size_a, read.mask, f"data.mask={data.mask}")
    wiener = deliver(found.halves, None, found.mask, found.calibration.sums).linear
    sums[0] += sums[1]
    maps = {
        "unregularised": linear_half(sums[0], dataset.box).map,
        "half_a": found.halves[0].map,
        "half_b": found.halves[1].map,
        "linear": wiener,
        "mask": found.mask,
    }
    crossing = resolution(found.curve, RESOLUTION_THRESHOLD_HALF_MAPS)
    words = [
        f"half-map FSC 0.143 under the mask: {crossing} (not corrected for the mask: cryosplat fsc does that)",
        f"mask: {found.mask_origin}",
    ]
    if seen is not None:
        logger.warning("%s", said) if (said := seen.warning(config.model.symmetry)) else words.append(str(seen))
    return maps, dataset.pixel_size_a, words


def _share_noise(dataset: ParticleDataset, world: distributed.World) -> np.ndarray:
    """Set the images' grey scale, and the radial noise power (2, S) of either half, over all ranks."""
    deviation, power, count = distributed.sum_arrays(
        (dataset.statistics.deviation, dataset.statistics.power, dataset.statistics.count), world
    )
    dataset.normalise(deviation)
    return radial_noise(power, count)
