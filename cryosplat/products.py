"""What comes out of a run, from its trained mixtures and their evaluation: figures, curves, files."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch

from cryosplat import distributed
from cryosplat.config import resolve_path, save_config
from cryosplat.evaluation import Evaluation, particle_example
from cryosplat.files import sha256_of
from cryosplat.fscsuite import FscSuite, fsc_suite
from cryosplat.linearmaps import LinearMaps
from cryosplat.metrics import read_metrics, read_volume_fit
from cryosplat.outputs import write_run_outputs
from cryosplat.reconstruction import MODEL_NAMES
from cryosplat.scores import Scores
from cryosplat.settings import Config
from cryosplat.trainer import Trainer

logger = logging.getLogger(__name__)


def log_evaluation(monitor, trainer: Trainer, evaluation: Evaluation) -> None:
    """Have the monitor log an evaluation at the trainer's step."""
    resolutions = {
        name: found.angstrom
        for name, found in (
            ("calibrated_0.5", evaluation.calibrated and evaluation.calibrated.resolution),
            ("naive_half_map_0.143", evaluation.naive),
            ("truth_0.5", evaluation.truth),
        )
        if found is not None
    }
    monitor.evaluation(
        trainer.progress.step,
        trainer.progress.epoch,
        evaluation.curves,
        resolutions,
        {"map": evaluation.for_the_eye()} | {n: v for n, v in evaluation.maps.items() if n.startswith("mixture")},
        particle_example(trainer.reconstruction, trainer.dataset.batch(trainer.dataset.owned[:1])),
        trainer.reconstruction.pixel_size_a,
    )


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
    reconstruction = trainer.reconstruction
    box, pixel_size_a = reconstruction.box, reconstruction.pixel_size_a
    mixtures = {
        name: {key: value.cpu().numpy() for key, value in reconstruction.mixture.export(m, box, pixel_size_a).items()}
        for m, name in enumerate(MODEL_NAMES[: reconstruction.mixture.models])
    }
    curves = dict(evaluation.curves)
    if suite is not None:
        curves |= {name: curve for name, curve in suite.curves.items() if name != "masked"}
    save_config(config, folder / "config.yaml")
    write_run_outputs(
        folder,
        maps=evaluation.maps,
        mixtures=mixtures,
        curves=curves,
        summary=summary,
        for_the_eye=evaluation.for_the_eye(),
        suite=suite,
        rotations=trainer.table.rotations,
        pixel_size_a=pixel_size_a,
        metrics=read_metrics(folder / "metrics.csv"),
        volume_fit=read_volume_fit(folder / "volume_fit.csv"),
        symmetry=config.model.symmetry,
        scores=scores,
        overwrite=True,
    )


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
