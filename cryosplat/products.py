"""What comes out of a run, from its trained mixtures and their evaluation: figures, curves, files."""

import datetime
import logging
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosplat import __version__, distributed, figures, findings, report
from cryosplat.config import resolve_path, save_config
from cryosplat.directional import view_evenness
from cryosplat.evaluation import Evaluation, particle_example
from cryosplat.files import sha256_of
from cryosplat.fscsuite import FscSuite, fsc_suite
from cryosplat.linearmaps import LinearMaps
from cryosplat.metrics import read_metrics, read_volume_fit
from cryosplat.outputs import write_run_outputs
from cryosplat.reconstruction import MODEL_NAMES, Reconstruction
from cryosplat.scores import Scores
from cryosplat.settings import Config
from cryosplat.symmetry import point_group
from cryosplat.trainer import Trainer

logger = logging.getLogger(__name__)

_PICTURES = {"fsc/curves": "fsc.png", "map/sections": "sections.png", "map/projections": "projections.png"}
"""Pictures of an evaluation by tag, and the files that a complete run has instead."""

_PACKAGES = ("torch", "numpy", "scipy", "mrcfile", "starfile")


def log_evaluation(
    monitor, trainer: Trainer, evaluation: Evaluation, memory: Sequence[Mapping[str, float]]
) -> dict[str, bytes]:
    """Have the monitor log an evaluation at the trainer's step, and the ``memory`` of every rank.

    Returns:
        The pictures that were drawn, as PNG files, by the file that a complete run has instead.
    """
    step, reconstruction = trainer.progress.step, trainer.reconstruction
    monitor.mixtures(step, _mixtures(reconstruction))
    monitor.rank_memory(step, memory)
    resolutions = {
        name: found.angstrom
        for name, found in (
            ("calibrated_0.5", evaluation.calibrated and evaluation.calibrated.resolution),
            ("naive_half_map_0.143", evaluation.naive),
            ("truth_0.5", evaluation.truth),
        )
        if found is not None
    }
    drawn = monitor.evaluation(
        step,
        trainer.progress.epoch,
        evaluation.curves,
        resolutions,
        {"map": evaluation.for_the_eye()} | {n: v for n, v in evaluation.maps.items() if n.startswith("mixture")},
        particle_example(reconstruction, trainer.dataset.batch(trainer.dataset.owned[:1])),
        reconstruction.pixel_size_a,
    )
    return {file: figures.as_png(drawn[tag]) for tag, file in _PICTURES.items() if tag in drawn}


def _mixtures(reconstruction: Reconstruction) -> dict[str, dict[str, np.ndarray]]:
    """The Gaussians of every model, as they are exported: in A."""
    mixture, grid = reconstruction.mixture, (reconstruction.box, reconstruction.pixel_size_a)
    return {
        name: {key: value.cpu().numpy() for key, value in mixture.export(m, *grid).items()}
        for m, name in enumerate(MODEL_NAMES[: mixture.models])
    }


def circumstances(
    world: distributed.World, linear: LinearMaps | None, rotations: np.ndarray, symmetry: str
) -> dict[str, Any]:
    """Entries of summary.json: what the images and their poses say by themselves, and where and how a run was made.

    Args:
        linear: of a run with halves.
        rotations: (N, 3, 3) of all particles.
        symmetry: their point group.
    """
    seen: dict[str, Any] = {"view_evenness": round(view_evenness(rotations, point_group(symmetry)), 4)}
    if linear is not None:
        seen |= {"shells_of_signal": linear.agreed_shells, "empty_share": linear.empty_share}
    return seen | {
        "version": __version__,
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "hardware": hardware(world),
        "host": platform.node(),
        "launcher": world.launcher,
        "command": shlex.join(sys.orig_argv),
        "started_in": os.getcwd(),
        "ended": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def half_map_curves(linear: LinearMaps | None, evaluation: Evaluation | None, pixel_size_a: float) -> FscSuite | None:
    """All curves of the linear half maps; None without such maps, and on other ranks than the first."""
    if linear is None:
        return None
    halves, copies = (evaluation.maps["half_a"], evaluation.maps["half_b"]), linear.halves[0].copies
    suite = fsc_suite(*halves, pixel_size_a, linear.mask, copies=copies)
    for warning in suite.warnings:
        logger.warning("linear half maps: %s", warning)
    return suite


def write_products(
    config: Config,
    folder: Path,
    trainer: Trainer,
    evaluation: Evaluation,
    suite: FscSuite | None,
    summary: dict[str, Any],
    scores: Scores | None = None,
) -> None:
    """Write all that a complete run has, and the settings it was completed with, over what is there.

    Raises:
        InputError: the disk is full or not writable.
    """
    curves = dict(evaluation.curves)
    if suite is not None:
        curves |= {name: curve for name, curve in suite.curves.items() if name != "masked"}
    check = findings.of_holdout(summary, folder)
    save_config(config, folder / "config.yaml")
    write_run_outputs(
        folder,
        maps=evaluation.maps,
        mixtures=_mixtures(trainer.reconstruction),
        curves=curves,
        summary=summary,
        for_the_eye=evaluation.for_the_eye(),
        suite=suite,
        rotations=trainer.table.rotations,
        pixel_size_a=trainer.reconstruction.pixel_size_a,
        metrics=read_metrics(folder / "metrics.csv"),
        volume_fit=read_volume_fit(folder / "volume_fit.csv"),
        held_out=check.panels if check else (),
        symmetry=config.model.symmetry,
        scores=scores,
        overwrite=True,
    )
    report.write_report(folder, summary)


def particle_file(config: Config) -> dict[str, str]:
    """The entries of summary.json by which ``cryosplat export`` finds the particles again, and knows them."""
    path = resolve_path(config, config.data.particles).absolute()
    return {"particle_file": str(path), "particle_file_sha256": sha256_of(path)}


def hardware(world: distributed.World) -> str:
    """What a run computes on, in a line."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    return (
        f"{world.size} ranks ({world.launcher}, {world.backend}), {world.threads} CPU threads each, on {device}; "
        f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
    )
