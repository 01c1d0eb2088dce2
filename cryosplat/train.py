"""Training a run: ``python -m cryosplat.train --config demo.yaml key=value``, alone or under any launcher."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from cryosplat import checkpoint, distributed
from cryosplat.backprojection import LinearHalf, back_project, linear_half
from cryosplat.config import Config, check_files, load_config, save_config
from cryosplat.dataset import ParticleDataset, noise_weights, radial_noise
from cryosplat.ending import ending
from cryosplat.errors import InputError, is_first_rank, said_by_the_first
from cryosplat.evaluation import Evaluation, evaluate, particle_example, read_comparison
from cryosplat.fingerprints import images_in_both_halves, same_images
from cryosplat.fscsuite import FscSuite, fsc_suite
from cryosplat.gaussians import GaussianMixture
from cryosplat.holdout import HoldOut
from cryosplat.linearmaps import linear_maps, require_sign, require_signal
from cryosplat.memory import OUT_OF_MEMORY, free_bytes, plan_memory
from cryosplat.metrics import read_metrics, read_volume_fit
from cryosplat.monitor import Monitor, NullMonitor, peak_memory_gib
from cryosplat.outputs import write_run_outputs
from cryosplat.particles import ParticleTable, read_particles
from cryosplat.reconstruction import MODEL_NAMES, Reconstruction
from cryosplat.runs import RunState, begin_run, open_run
from cryosplat.sampling import BatchPlan
from cryosplat.trainer import Report, Trainer
from cryosplat.volumefit import Problem, fit_all, whole

logger = logging.getLogger("cryosplat.train")  # __name__ is __main__ under python -m


NARROWEST_PX = 0.5
"""Least standard deviation of a Gaussian. Images and maps are samples at pixel centres, and the sum over pixels of a
narrower one depends on where between them it lies (docs/physics.md): by 3 % at 0.5 px, several times at 0.25 px."""

_NULLS = {"noise": "pixels", "phases": "phases beyond data.null_shell_a"}


def train(config: Config) -> dict[str, Any]:
    """Train a run from beginning, or from where it stands, to its end.

    Every rank calls this with the same configuration.

    Returns:
        What summary.json says, on every rank.

    Raises:
        InputError: anything wrong with input or configuration, on all ranks.
    """
    with distributed.join(config) as world:
        run = distributed.together(lambda: open_run(config) if world.is_main else None, world)
        run = distributed.broadcast_object(run, world)
        if run.summary is not None:
            logger.info("%s: the run is complete; nothing to do", run.folder)
            return run.summary
        try:
            return Run(config, world, run).train()
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(f"rank {world.rank}: {OUT_OF_MEMORY} ({str(error).splitlines()[0]})") from error


class Run:
    """One training run on one rank: the parts, put together, and their order."""

    def __init__(self, config: Config, world: distributed.World, run: RunState):
        self.config, self.world, self.run = config, world, run
        self.began = time.perf_counter()
        self.before = run.state["seconds"] if run.state else {"wall": 0.0, "cpu": 0.0, "training": 0.0}
        self.images_trained, self.training_seconds, self.fit_seconds = 0, 0.0, self.before.get("fit", 0.0)
        self.fit_gains: dict[str, list[float]] = {}
        table = distributed.together(self._read_table, world)
        plan = BatchPlan(table.half, config.train.batch, config.train.seed, table.held_out)
        free = free_bytes(world)
        grids = 2 if config.maps.halves else int(config.volume.steps > 0)
        self.memory = distributed.together(lambda: plan_memory(config, table, plan, world, free, grids), world)
        dataset = distributed.together(lambda: self._read_images(table, plan), world)
        weights = self._share_statistics(dataset)
        self.comparison = distributed.together(
            lambda: read_comparison(config, dataset.box, dataset.pixel_size_a) if world.is_main else None, world
        )
        settings = replace(config.train, micro_batch=self.memory.micro_batch)
        if config.volume.steps:
            distributed.together(lambda: self._make_null(dataset), world)
            halves = self._back_project(dataset, plan)
            mixture = self._mixture(dataset, halves)
            self.trainer = Trainer(world, table, dataset, plan, self._see(mixture, dataset, weights), settings)
            self._resume()
        else:
            mixture = self._mixture(dataset, None)
            self.trainer = Trainer(world, table, dataset, plan, self._see(mixture, dataset, weights), settings)
            self._resume() or self.trainer.set_scale(config.data.check_sign)
            # After the grey scale was set: the null's mixtures then move as those of the real images do.
            distributed.together(lambda: self._make_null(dataset), world)
            halves = self._back_project(dataset, plan)
        self.holdout = HoldOut(plan, dataset, self.noise, world, config.train.seed) if plan.held_out.any() else None
        if not run.resumed:
            distributed.together(lambda: begin_run(config, run) if world.is_main else None, world)

    def train(self) -> dict[str, Any]:
        """Train, evaluate and save by epochs, then write the products; returns the summary."""
        trainer, config, evaluation = self.trainer, self.config, None
        with self._monitor() as monitor:
            self.next_checkpoint = time.monotonic() + 60 * config.checkpoint.every_minutes
            if self.fit_gains:
                monitor.volume_fit(self.fit_gains)
                self._save(monitor)  # what comes next may be cut short
            while not trainer.finished:
                trainer.run_epoch(lambda report: self._report(report, monitor))
                if trainer.progress.epoch % config.maps.every == 0 or trainer.finished:
                    evaluation = self._evaluate(monitor)
                self._save(monitor)
            if evaluation is None and self.images_trained == 0:  # nothing to train, or only the products are missing
                evaluation = self._evaluate(monitor)
            suite = self._half_map_curves(evaluation)
            summary = self._summary(evaluation, suite)
            if self.world.is_main:
                self._write(evaluation, suite, summary)
        return summary

    def _read_table(self) -> ParticleTable:
        check_files(self.config)
        halves = self.config.maps.halves
        return read_particles(self.config.data, self.config.data_root, self.config.train.seed, halves)

    def _read_images(self, table: ParticleTable, plan: BatchPlan) -> ParticleDataset:
        data, world = self.config.data, self.world
        owned = np.flatnonzero(plan.owner(world.size) == world.rank)
        if world.is_main:
            logger.info(
                "%d particles of %d px at %.4g A; %s", len(table), table.box, table.pixel_size_a, table.half_origin
            )
        where = {"device": world.device, "cache": self.memory.cache}
        dataset = ParticleDataset(table, owned, data.box, table.invert, data.precision, **where)
        logger.info("rank %d: read %d images, %.2f GiB", world.rank, len(owned), dataset.bytes_in_memory / 2**30)
        return dataset

    def _share_statistics(self, dataset: ParticleDataset) -> torch.Tensor | None:
        """Noise levels and spectra of all ranks' particles; the weights, if asked for."""
        mine = dataset.statistics
        # Every particle's numbers come from its one owner, so the sums are exact.
        numbers, deviation, power, count = distributed.sum_arrays(
            (mine.fingerprint, mine.deviation, mine.power, mine.count), self.world
        )
        self.same = same_images(numbers)
        self.shared_images = images_in_both_halves(self.same, dataset.half)
        if self.shared_images and self.world.is_main:
            logger.warning(
                "%d images have copies in both halves: the half maps are not independent", self.shared_images
            )
        dataset.normalise(deviation)
        self.noise = radial_noise(power, count)
        return noise_weights(power, count, dataset.box) if self.config.train.whiten else None

    def _make_null(self, dataset: ParticleDataset) -> None:
        data = self.config.data
        if data.null != "none":
            dataset.make_null(data.null, data.null_seed, self.same, self.noise, data.null_shell_a)
            logger.info("rank %d: null test: the images' %s are random", self.world.rank, _NULLS[data.null])

    def _back_project(self, dataset: ParticleDataset, plan: BatchPlan) -> tuple[LinearHalf, ...] | None:
        """The linear reconstruction of the images that are trained on, on rank 0: of both halves, or of all images.

        With halves ``self.linear`` is what becomes of them: they do not change while it trains.
        """
        self.linear, halves, fits = None, self.config.maps.halves, self.config.volume.steps > 0
        if not halves and not fits:
            return None
        world = self.world

        def reconstruct(ids: np.ndarray, halves: bool) -> tuple[LinearHalf, ...] | None:
            sums = back_project(dataset, dataset.owned[ids[dataset.owned]], self.noise, world, halves=halves)
            return None if sums is None else tuple(linear_half(one, dataset.box) for one in sums)

        found = reconstruct(~plan.held_out, halves)
        watched = fits and not self.run.resumed and plan.held_out.any()
        kept = reconstruct(plan.held_out, False) if watched else None
        self.held_out = kept[0].equations if kept else None
        distributed.together(lambda: self._look_at(found, dataset.pixel_size_a) if world.is_main else None, world)
        return found

    def _look_at(self, halves: tuple[LinearHalf, ...], pixel_size_a: float) -> None:
        """Make the linear maps of the halves, and see whether they are worth fitting anything to."""
        data, checked = self.config.data, self.config.data.null == "none" and not self.run.resumed
        if checked and data.check_sign and self.config.volume.steps:
            require_sign(halves)
        if self.config.maps.halves:
            self.linear = linear_maps(halves, pixel_size_a, self.comparison.mask, f"data.mask={data.mask}")
        if checked and data.check_signal and self.linear is not None:
            require_signal(self.linear)

    def _mixture(self, dataset: ParticleDataset, halves: tuple[LinearHalf, ...] | None) -> GaussianMixture:
        """The mixtures that images are going to train: as saved, fitted in the volume, or at random."""
        model, state = self.config.model, self.run.state
        models = len(MODEL_NAMES) if self.config.maps.halves else 1
        narrowest = NARROWEST_PX / dataset.box
        scale_range = max(model.scale_min, narrowest), max(model.scale_max, 4 * narrowest)
        start = max(model.scale, 1.5 * narrowest)
        if state is not None:
            counts = [len(saved) for saved in state["trainer"]["mixtures"]]
            return GaussianMixture(models, counts, model.amplitudes, scale_range)
        if not self.config.volume.steps:
            mixture = GaussianMixture(models, model.gaussians, model.amplitudes, scale_range)
            mixture.start_randomly(model.spread, start, self.config.train.seed)
            return mixture
        problems = None
        if halves is not None:
            halves = (whole(halves), *halves) if len(halves) == 2 else halves
            problems = [
                Problem(
                    half,
                    dataset.pixel_size_a,
                    name,
                    seed=self.config.train.seed * 1_000_003 + m,
                    share=1.0 if m == 0 else 0.5,
                    held_out=self.held_out,
                )
                for m, (half, name) in enumerate(zip(halves, MODEL_NAMES, strict=False))
            ]
        settings = replace(model, scale=start), self.config.volume, scale_range
        began = time.perf_counter()
        fitted = fit_all(problems, models, settings, self.world)
        self.fit_seconds = time.perf_counter() - began
        self.fit_gains = {name: one.gains for name, one in zip(MODEL_NAMES, fitted, strict=False)}
        if fitted[0].held_out_gains:
            self.fit_gains |= {
                f"{name}_held_out": one.held_out_gains for name, one in zip(MODEL_NAMES, fitted, strict=False)
            }
        if self.world.is_main:
            fitted[0].warn(MODEL_NAMES[0])
        mixture = GaussianMixture(models, [len(one.parameters) for one in fitted], model.amplitudes, scale_range)
        with torch.no_grad():
            for m, one in enumerate(fitted):
                mixture.mixtures[m].copy_(one.parameters)
                mixture.unit[m] = one.unit
        return mixture

    def _see(self, mixture: GaussianMixture, dataset: ParticleDataset, weights: torch.Tensor | None) -> Reconstruction:
        """The mixtures as images show them."""
        cutoff = self.config.model.cutoff
        return Reconstruction(mixture, dataset.box, dataset.pixel_size_a, weights, cutoff, self.world.size).to(
            self.world.device
        )

    def _resume(self) -> bool:
        """Go on from the saved state, if there is one; whether there was."""
        state = self.run.state
        if state is None:
            return False
        folder, plan = self.run.folder, self.trainer.plan
        problem = None
        if state["particles"] != plan.particles:
            problem = f"the run was trained on {state['particles']} particles, now there are {plan.particles}"
        elif not np.array_equal(state["half"].numpy(), plan.half):
            problem = "particles have moved from one half to the other since the run began; its half maps would be void"
        elif "held_out" in state and not np.array_equal(state["held_out"].numpy(), plan.held_out):
            problem = "other images are held out than when the run began"
        if problem:
            raise distributed.common_error(f"{folder}: {problem}; choose another run_dir", self.world)
        self.trainer.load_state(state["trainer"])
        return True

    def _monitor(self):
        if not self.world.is_main:
            return NullMonitor()
        step = self.trainer.progress.step
        monitor = Monitor(self.run.folder, self.trainer.total_steps, step, self.run.resumed)
        if not self.run.resumed:
            monitor.text("run/config", f"```yaml\n{OmegaConf.to_yaml(OmegaConf.structured(self.config))}```")
            monitor.text("run/hardware", _hardware(self.world))
        return monitor

    def _report(self, report: Report, monitor) -> None:
        self.images_trained += report.images
        self.training_seconds += report.seconds
        memory = peak_memory_gib(self.world.device)
        rate = report.images / max(report.seconds, 1e-9)
        monitor.step(report.step, report.epoch, report.losses, report.learning_rate, rate, memory)
        if time.monotonic() > self.next_checkpoint and not self.trainer.at_epoch_end:
            self._save(monitor)

    def _evaluate(self, monitor) -> Evaluation | None:
        """Rank 0 alone; the others go on to the next epoch and wait for it in their first all-reduce.

        Only held-out images are judged by all ranks, each by its own.
        """
        if self.holdout is not None:
            gains = self.holdout.measure(self.trainer.reconstruction)
            monitor.holdout(self.trainer.progress.step, self.trainer.progress.epoch, gains)
        if not self.world.is_main:
            return None
        trainer = self.trainer
        evaluation = evaluate(trainer.reconstruction, self.comparison, self.linear)
        example = trainer.dataset.batch(trainer.dataset.owned[:1])
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
            particle_example(trainer.reconstruction, example),
            trainer.reconstruction.pixel_size_a,
        )
        return evaluation

    def _save(self, monitor) -> None:
        """Every rank has the same state, so rank 0 saves alone, with no collective."""
        self.next_checkpoint = time.monotonic() + 60 * self.config.checkpoint.every_minutes
        if not self.world.is_main:
            return
        monitor.flush()
        state = {
            "trainer": self.trainer.state(),
            "particles": self.trainer.plan.particles,
            "half": torch.from_numpy(self.trainer.plan.half),
            "held_out": torch.from_numpy(self.trainer.plan.held_out),
            "config": OmegaConf.to_yaml(OmegaConf.structured(self.config)),
            "seconds": self._seconds(),
        }
        checkpoint.save(self.run.checkpoints, self.trainer.progress.step, state, self.config.checkpoint.keep)

    def _seconds(self) -> dict[str, float]:
        """Over all resumed parts: wall seconds of the run, its fit and its training, CPU seconds of this rank."""
        return {
            "fit": self.fit_seconds,
            "wall": self.before["wall"] + time.perf_counter() - self.began,
            "cpu": self.before["cpu"] + time.process_time(),
            "training": self.before["training"] + self.training_seconds,
        }

    def _half_map_curves(self, evaluation: Evaluation | None) -> FscSuite | None:
        """All curves of the linear half maps, on rank 0."""
        if self.linear is None:
            return None
        halves = evaluation.maps["half_a"], evaluation.maps["half_b"]
        suite = fsc_suite(*halves, self.trainer.reconstruction.pixel_size_a, self.linear.mask)
        for warning in suite.warnings:
            logger.warning("linear half maps: %s", warning)
        return suite

    def _summary(self, evaluation: Evaluation | None, suite: FscSuite | None) -> dict[str, Any]:
        trainer, seconds = self.trainer, self._seconds()
        ranks = distributed.gather_objects((time.process_time(), peak_memory_gib(self.world.device)), self.world)
        summary = {
            **(evaluation.summary() if evaluation else {}),
            "particles": trainer.plan.particles,
            "held_out": int(trainer.plan.held_out.sum()),
            "images_in_both_halves": self.shared_images,
            "gaussians": trainer.reconstruction.mixture.counts[0],
            "gaussians_by_model": dict(zip(MODEL_NAMES, trainer.reconstruction.mixture.counts, strict=False)),
            "box": trainer.reconstruction.box,
            "pixel_size_a": round(trainer.reconstruction.pixel_size_a, 6),  # what float32 files carry
            "world_size": self.world.size,
            "images_per_second": self.images_trained / self.training_seconds if self.training_seconds else None,
            "cpu_seconds": self.before["cpu"] + sum(cpu for cpu, _ in ranks),
            "wall_seconds": seconds["wall"],
            "peak_memory_gib": sum(memory["cpu_max_rss"] for _, memory in ranks),
            "peak_gpu_memory_gib": max((memory.get("gpu_max_reserved", 0.0) for _, memory in ranks), default=0.0),
            "volume_fit_seconds": seconds["fit"],
            "training_seconds": seconds["training"],
            "epochs": self.config.train.epochs,
            "steps": trainer.progress.step,
            "halves": trainer.table.half_origin if self.config.maps.halves else None,
            "run_dir": str(self.run.folder),
        }
        if suite is not None:
            summary |= {"warnings": suite.warnings, "anisotropy": suite.anisotropy}
        return distributed.broadcast_object(summary, self.world)

    def _write(self, evaluation: Evaluation, suite: FscSuite | None, summary: dict[str, Any]) -> None:
        reconstruction = self.trainer.reconstruction
        box, pixel_size_a = reconstruction.box, reconstruction.pixel_size_a
        mixtures = {
            name: {
                key: value.cpu().numpy() for key, value in reconstruction.mixture.export(m, box, pixel_size_a).items()
            }
            for m, name in enumerate(MODEL_NAMES[: reconstruction.mixture.models])
        }
        curves = dict(evaluation.curves)
        if suite is not None:
            curves |= {name: curve for name, curve in suite.curves.items() if name != "masked"}
        save_config(self.config, self.run.folder / "config.yaml")
        write_run_outputs(
            self.run.folder,
            maps=evaluation.maps,
            mixtures=mixtures,
            curves=curves,
            summary=summary,
            for_the_eye=evaluation.for_the_eye(),
            suite=suite,
            rotations=self.trainer.table.rotations,
            pixel_size_a=pixel_size_a,
            metrics=read_metrics(self.run.folder / "metrics.csv"),
            volume_fit=read_volume_fit(self.run.folder / "volume_fit.csv"),
            overwrite=True,
        )


def _hardware(world: distributed.World) -> str:
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    return (
        f"{world.size} ranks ({world.launcher}, {world.backend}), {world.threads} CPU threads each, on {device}; "
        f"PyTorch {torch.__version__}, Python {sys.version.split()[0]}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="YAML", help="differences from the defaults; bare names are looked up in configs/"
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="single settings, such as train.epochs=3")


def run(args: argparse.Namespace) -> None:
    """Load the configuration, train, and print the ending (rank 0)."""
    with said_by_the_first():
        config = load_config(args.config, args.settings)
    summary = train(config)
    if is_first_rank():
        print(ending(summary))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m cryosplat.train``; returns the exit code."""
    from cryosplat.cli import run_command

    parser = argparse.ArgumentParser(prog="python -m cryosplat.train", description=__doc__)
    add_arguments(parser)
    return run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
