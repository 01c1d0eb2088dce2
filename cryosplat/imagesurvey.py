"""What a sample of the images says: bad ones, grey levels, the sign; and what a run of all would need."""

import time
from typing import Any

import numpy as np
import torch

from cryosplat.backprojection import back_project
from cryosplat.dataset import ParticleDataset, radial_noise
from cryosplat.distributed import World
from cryosplat.errors import InputError
from cryosplat.imageprep import corner_mask
from cryosplat.images import ImageReader
from cryosplat.memory import Task
from cryosplat.particles import ParticleTable
from cryosplat.reconstruction import MODEL_NAMES
from cryosplat.settings import Config
from cryosplat.sign import certainty_of, decide, sums_of
from cryosplat.survey import Survey
from cryosplat.volumefit import MOST

MOST_IMAGES, MOST_BYTES = 1024, 2**28
"""Of a sample: images, and bytes of their pixels."""

RUN = 32
"""Neighbours on disk that are taken together, so that a sample takes few seeks."""

SIGN_BOX = 48
"""px that images are cropped to for the sign."""

PROBE_IMAGES, PROBE_BOX = 64, 128
"""What the time of a pass over all images is measured with: images, and px of the grid they go into, at most."""

WARMING = 8
"""Images of a first pass, which has costs that no later one has, and of a second, whose time is taken off: it is that
of what does not grow with their number."""

ODD_DEVIATION = 3.0
"""An image whose background deviates so many times more or less than the sample's median is odd."""

_ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none", "single", 1)


def survey_images(found: Survey) -> None:
    """Add to a survey what its images say, as far as they are there and have poses."""
    if found.images is None:
        return
    ids = choose_sample(found.images)
    good = _statistics(found, ids)
    if found.table is None:
        found.facts["sign"] = {"words": "not looked for: it takes poses and A/px, see the problems"}
        return
    good = good[~found.table.held_out[good]]
    if len(good):
        found.attempt(lambda: _sign(found, good))
        found.attempt(lambda: _pass(found, good[:PROBE_IMAGES]))
    found.facts["memory"] = memory_facts(found.config, found.table)


def choose_sample(images: ImageReader) -> np.ndarray:
    """Particles, ascending: all, or runs of neighbours on disk, spread evenly over the stacks."""
    count, size = len(images), images.box**2 * 4
    wanted = min(MOST_IMAGES, max(RUN, MOST_BYTES // size))
    if count <= wanted:
        return np.arange(count)
    order = np.lexsort((images.slices, images.stack))
    starts = np.linspace(0, count - RUN, wanted // RUN).astype(np.int64)
    return np.sort(order[np.unique(starts[:, None] + np.arange(RUN))])


def _statistics(found: Survey, ids: np.ndarray) -> np.ndarray:
    """Facts on grey levels of the sample; those of its images (n,) that can be used."""
    images = found.images
    corners, levels, usable = corner_mask(images.box).numpy(), [], []
    for part in np.array_split(ids, -(-len(ids) // 128)):
        pixels = images.read(part)
        finite = np.isfinite(pixels.reshape(len(part), -1)).all(axis=1)
        background = np.where(finite[:, None], pixels[:, corners], 0).astype(np.float64)
        levels.append(np.stack([background.mean(1), background.std(1)], axis=1))
        usable.append(np.where(finite, np.where(levels[-1][:, 1] > 0, 1, 0), -1))
    levels, usable = np.concatenate(levels), np.concatenate(usable)
    for value, words in ((-1, "has pixels that are not finite numbers"), (0, "is constant outside its inner circle")):
        if (usable == value).any():
            first, count = ids[np.argmax(usable == value)], int((usable == value).sum())
            found.problem(
                f"{images.location(int(first))}: {words} ({count} of the {len(ids)} images of the sample); leave such "
                "images out with data.indices"
            )
    good = usable == 1
    facts: dict[str, Any] = {"images": len(ids), "not_finite": int((usable < 0).sum())}
    facts |= {"constant": int((usable == 0).sum()), "background_mean": None, "background_deviation": None, "odd": 0}
    if good.any():
        mean, deviation = levels[good].T
        typical = float(np.median(deviation))
        ratio = np.maximum(deviation / typical, typical / deviation)
        facts |= {"background_mean": float(np.median(mean)), "background_deviation": typical}
        facts |= {"odd": int((ratio > ODD_DEVIATION).sum()), "normalised": bool(is_normalised(mean, deviation))}
    found.facts["sample"] = facts
    return ids[good]


def is_normalised(mean: np.ndarray, deviation: np.ndarray) -> bool:
    """Whether backgrounds have mean 0 and deviation 1, as RELION leaves them, in nine of ten images.

    >>> is_normalised(np.zeros(5), np.ones(5)), is_normalised(np.full(5, 7.0), np.ones(5))
    (True, False)
    """
    return bool(np.mean((np.abs(mean) < 0.2) & (np.abs(deviation - 1) < 0.2)) >= 0.9)


def _read(table: ParticleTable, ids: np.ndarray, box: int) -> tuple[ParticleDataset, np.ndarray]:
    """Some particles, normalised as by themselves, and their radial noise power (2, S)."""
    dataset = ParticleDataset(table, ids, box, table.invert, "single")
    deviation = dataset.statistics.deviation.copy()
    known = np.zeros(len(table), dtype=bool)
    known[ids] = True
    for h in (0, 1):
        mine = table.half == h
        here = deviation[mine & known] if (mine & known).any() else deviation[known]
        deviation[mine & ~known] = np.sqrt(np.mean(here**2))
    dataset.normalise(deviation)
    power, count = dataset.statistics.power, dataset.statistics.count
    if not count.all():  # a half that the sample has nothing of
        power, count = np.tile(power.sum(0), (2, 1)), np.full(2, count.sum())
    return dataset, radial_noise(power, count)


def _sign(found: Survey, ids: np.ndarray) -> None:
    table = found.table
    dataset, noise = _read(table, ids, min(SIGN_BOX, table.box))
    certainty = certainty_of(sums_of(dataset, ids, noise)) * (1 if table.invert else -1)
    try:
        sign = decide(certainty, table, found.config.data.check_sign)
    except InputError as error:
        found.problem(str(error))
        sign = decide(certainty, table, False)
    found.facts["sign"] = {
        "invert": sign.invert,
        "certainty": round(certainty, 2),
        "images": len(ids),
        "words": f"{sign.words} (of {len(ids):,} images)",
    }


def _pass(found: Survey, ids: np.ndarray) -> None:
    """Time of the linear pass over all images by one process on this machine, from a few of them."""
    table, box = found.table, found.config.data.box or found.table.box
    if len(ids) < 2 * WARMING:
        return
    spent = np.zeros((3, 2))
    for number, some in enumerate((ids[:WARMING], ids[:WARMING], ids)):
        began = time.perf_counter()
        dataset, noise = _read(table, some, min(box, PROBE_BOX))
        read = time.perf_counter()
        back_project(dataset, some, noise, _ALONE, halves=False)
        spent[number] = read - began, time.perf_counter() - read
    more = (spent[2] - spent[1]) / (len(ids) - WARMING)
    # Where something else took the time of the second, that of all is at least an upper bound.
    reading, inserting = np.where(more > 0, more, spent[2] / len(ids))
    seconds = len(table) * float(reading + inserting * (box / dataset.box) ** 2)
    found.facts["time"] = {"pass_seconds": seconds, "images_probed": len(ids), "probe_box": dataset.box}


def memory_facts(config: Config, table: ParticleTable) -> dict[str, float]:
    """GiB that a run needs by the formulas of ``memory``: of one process with all images, as on one GPU."""
    data, train, halves = config.data, config.train, config.maps.halves
    task = Task(
        images=len(table),
        stored_box=table.box,
        box=data.box or table.box,
        number_bytes=2 if data.precision == "half" else 4,
        models=len(MODEL_NAMES) if halves else 1,
        gaussians=config.model.gaussians or MOST,
        grids=2 if halves else int(config.volume.steps > 0),
        solves=True,
        fits=config.volume.steps > 0,
        batch=train.batch if train.epochs else 0,
    )
    micro = train.micro_batch or train.batch
    gib = 2**30
    return {
        "images_gib": task.images * task.image_bytes / gib,
        "work_gib": task.need("host", micro) / gib,
        "gpu_gib": task.need("device", micro) / gib,
    }
