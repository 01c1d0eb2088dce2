"""Training a run: ``python -m cryosplat.train --config demo.yaml key=value``, alone or under any launcher."""

import argparse
import hashlib
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from cryosplat import checkpoint, distributed, findings, fitkeeping, interruption, progress, start
from cryosplat.backprojection import LinearHalf
from cryosplat.config import check_files, load_config
from cryosplat.costs import Costs, peak_memory_gib
from cryosplat.ending import ending
from cryosplat.errors import InputError, Interrupted, is_first_rank, said_by_the_first
from cryosplat.evaluation import Evaluation, evaluate, read_comparison
from cryosplat.fitkeeping import FitKeeper
from cryosplat.fscsuite import FscSuite
from cryosplat.gaussians import GaussianMixture
from cryosplat.halves import save_halves
from cryosplat.holdout import HoldOut
from cryosplat.memory import OUT_OF_MEMORY, free_bytes, plan_memory
from cryosplat.monitor import Monitor, NullMonitor
from cryosplat.particles import ParticleTable, read_particles
from cryosplat.particlescores import score_particles
from cryosplat.preparation import Preparation
from cryosplat.products import (
    circumstances,
    half_map_curves,
    hardware,
    log_evaluation,
    particle_file,
    write_products,
)
from cryosplat.reconstruction import MODEL_NAMES, Reconstruction
from cryosplat.report import write_report
from cryosplat.runlock import RunLock
from cryosplat.runs import HALVES, RunState, begin_run, changed_particles, give_up_run, open_run
from cryosplat.sampling import BatchPlan
from cryosplat.settings import Config
from cryosplat.trainer import Report, Trainer
from cryosplat.volumefit import Fitted, Problem, fit_all, make_problems

logger = logging.getLogger("cryosplat.train")  # __name__ is __main__ under python -m


def train(config: Config) -> dict[str, Any]:
    """Train a run from beginning, or from where it stands, to its end.

    Every rank calls this with the same configuration.

    Returns:
        What summary.json says, on every rank.

    Raises:
        InputError: anything wrong with input or configuration, on all ranks.
    """
    with distributed.join(config) as world, interruption.watch(world) as watch:
        lock = RunLock(Path(config.run_dir).expanduser())
        try:
            return _train(config, world, watch, lock)
        except torch.cuda.OutOfMemoryError as error:
            raise InputError(f"rank {world.rank}: {OUT_OF_MEMORY} ({str(error).splitlines()[0]})") from error
        except Interrupted as error:
            # Raised again where it holds on to nothing of the run, and the ranks have left each other in good order.
            interrupted, watch.going = Interrupted(str(error)), True
        finally:
            lock.release()
    raise interrupted


def _train(config: Config, world: distributed.World, watch: interruption.Watch, lock: RunLock) -> dict[str, Any]:
    run = distributed.together(lambda: open_run(config, lock) if world.is_main else None, world)
    run = distributed.broadcast_object(run, world)
    if run.summary is not None:
        logger.info("%s: the run is complete; nothing to do", run.folder)
        return run.summary
    with progress.shown(run.folder, listens=world.is_main):
        return Run(config, world, run, watch, lock).train()


class Run:
    """One training run on one rank: the parts, put together, and their order."""

    def __init__(
        self,
        config: Config,
        world: distributed.World,
        run: RunState,
        watch: interruption.Watch,
        lock: RunLock,
    ):
        self.config, self.world, self.run, self.watch, self.lock = config, world, run, watch, lock
        self.costs = Costs(world, run.state["seconds"] if run.state else None)
        self.fit_gains: dict[str, list[float]] = {}
        self.begun = run.resumed
        table = distributed.together(self._read_table, world)
        plan = BatchPlan(table.half, config.train.batch, config.train.seed, table.held_out)
        free = free_bytes(world)
        grids = 2 if config.maps.halves else int(config.volume.steps > 0)
        self.memory = distributed.together(lambda: plan_memory(config, table, plan, world, free, grids), world)
        distributed.doing("reading images")
        self.images = images = distributed.together(lambda: self._read_images(table, plan), world)
        self._go_if_asked("nothing is to be saved yet")
        images.share_statistics()
        table, plan, dataset = images.table, images.plan, images.dataset
        images.find_sign(run.state)
        self.comparison = distributed.together(
            lambda: read_comparison(config, dataset.box, dataset.pixel_size_a) if world.is_main else None, world
        )
        settings = replace(config.train, micro_batch=self.memory.micro_batch)
        if config.volume.steps:
            distributed.together(images.make_null, world)
            mixture = self._mixture(self._back_project())
            self.trainer = Trainer(world, table, dataset, plan, self._see(mixture), settings)
            self._resume()
        else:
            self.trainer = Trainer(world, table, dataset, plan, self._see(self._mixture(None)), settings)
            self._resume() or self.trainer.set_scale()
            # After the grey scale was set: the null's mixtures then move as those of the real images do.
            distributed.together(images.make_null, world)
            self._back_project()
        self.holdout = HoldOut(plan, dataset, images.noise, world, config.train.seed) if plan.held_out.any() else None
        self._begin()

    def _begin(self) -> None:
        """Make the run directory of a new run, if it is not made yet."""
        begun, self.begun = self.begun, True
        if not begun:
            distributed.together(lambda: self._make_folder() if self.world.is_main else None, self.world)

    def _make_folder(self) -> None:
        begin_run(self.config, self.run, self.lock)
        table = self.images.table
        if self.config.maps.halves:
            save_halves(self.run.folder / HALVES, table.half, table.rows, table.listed)

    def train(self) -> dict[str, Any]:
        """Train, evaluate and save by epochs, then write the products; returns the summary."""
        trainer, config, evaluation = self.trainer, self.config, None
        with self._monitor() as monitor:
            self.watch.begin_at(trainer.progress.step)
            self.next_checkpoint = time.monotonic() + 60 * config.checkpoint.every_minutes
            if self.fit_gains:
                monitor.volume_fit(self.fit_gains)
                distributed.together(lambda: self._save(monitor), self.world)  # what comes next may be cut short
            self._say_training()
            while not trainer.finished:
                trainer.run_epoch(
                    lambda report: self._report(report, monitor), lambda looked: self._after_step(looked, monitor)
                )
                if trainer.progress.epoch % config.maps.every == 0 or trainer.finished:
                    self._measure(monitor)
                    evaluation = self._evaluate(monitor)
                    distributed.wait_for_main(self.world)
                    self._report_on_the_way(evaluation)
                    self._say_training()
                distributed.together(lambda: self._save(monitor), self.world)
                if not trainer.finished:  # then what is left takes no longer than to begin again
                    self._go_if_asked(self._saved())
            missing = evaluation is None and self.costs.images == 0  # nothing to train, or only products are missing
            if missing:
                self._measure(monitor)
            with self.watch.going_at_once(lambda: self._interrupted(self._saved())):
                if missing:
                    evaluation = self._evaluate(monitor)
                suite = half_map_curves(self.linear, evaluation, trainer.reconstruction.pixel_size_a)
            distributed.wait_for_main(self.world)
            scores = score_particles(config, trainer.reconstruction, trainer.table, self.images, self.world)
            summary = self._summary(evaluation, suite)
            if self.world.is_main:
                progress.stage("writing maps and figures")
                write_products(config, self.run.folder, trainer, evaluation, suite, summary, scores)
        return summary

    def _read_table(self) -> ParticleTable:
        check_files(self.config)
        halves = self.config.maps.halves
        return read_particles(self.config.data, self.config.data_root, self.config.train.seed, halves)

    def _read_images(self, table: ParticleTable, plan: BatchPlan) -> Preparation:
        with self.watch.going_at_once(lambda: self._interrupted("nothing is to be saved yet")):
            return Preparation(self.config, self.world, table, plan, self.memory.cache)

    def _back_project(self) -> tuple[LinearHalf, ...] | None:
        """The linear reconstruction of the images, and with halves ``self.linear``, which does not change any more."""
        checked = self.config.data.null == "none" and not self.run.resumed
        halves, self.linear = self.images.back_project(self.comparison, checked, watched=self.run.state is None)
        return halves

    def _mixture(self, halves: tuple[LinearHalf, ...] | None) -> GaussianMixture:
        """The mixtures that images are going to train: as saved, fitted in the volume, or at random."""
        config, state, dataset = self.config, self.run.state, self.images.dataset
        if state is not None:
            return start.as_saved(config, dataset.box, state["trainer"]["mixtures"])
        if not config.volume.steps:
            return start.at_random(config, dataset.box)
        began = time.perf_counter()
        problems = None
        if halves is not None:
            problems = make_problems(halves, dataset.pixel_size_a, MODEL_NAMES, config.train.seed, self.images.held_out)
        fitted = self._fit_all(problems, start.fit_settings(config, dataset.box))
        self.costs.fit_seconds = time.perf_counter() - began
        self.fit_gains = start.gains(fitted)
        if self.world.is_main:
            fitted[0].warn(MODEL_NAMES[0])
        return start.as_fitted(config, dataset.box, fitted)

    def _fit_all(self, problems: list[Problem] | None, settings: tuple) -> list[Fitted]:
        """Fit, with what is done so far kept in the run directory, which is there no longer if a fit is refused."""
        new = not self.begun
        self._go_if_asked("nothing is to be saved yet")
        self._begin()
        distributed.doing("fitting in the volume")
        plan = self.images.plan
        key = hashlib.sha256(plan.half.tobytes() + plan.held_out.tobytes()).hexdigest()
        every_s = 60 * self.config.checkpoint.every_minutes
        keeper = FitKeeper(self.run.checkpoints, key, every_s, self.watch)
        try:
            return fit_all(problems, start.models(self.config), settings, self.world, keeper)
        except Interrupted:
            raise self._interrupted("the fits in the volume are kept as they stand") from None
        except InputError:
            if new and self.world.is_main:
                give_up_run(self.run, self.lock)
            raise

    def _see(self, mixture: GaussianMixture) -> Reconstruction:
        """The mixtures as images show them."""
        dataset, weights, cutoff = self.images.dataset, self.images.weights, self.config.model.cutoff
        seen = Reconstruction(mixture, dataset.box, dataset.pixel_size_a, weights, cutoff, self.world.size)
        return seen.to(self.world.device)

    def _resume(self) -> bool:
        """Go on from the saved state, if there is one; whether there was."""
        state = self.run.state
        if state is None:
            return False
        problem = changed_particles(state, self.trainer.plan)
        if problem:
            raise distributed.common_error(f"{self.run.folder}: {problem}; choose another run_dir", self.world)
        self.trainer.load_state(state["trainer"])
        return True

    def _monitor(self):
        if not self.world.is_main:
            return NullMonitor()
        step = self.trainer.progress.step
        preface = () if self.run.resumed else (self.trainer.table.half_origin, self.images.sign.words)
        monitor = Monitor(self.run.folder, self.trainer.total_steps, step, self.run.resumed, preface=preface)
        if not self.run.resumed:
            monitor.text("run/config", f"```yaml\n{OmegaConf.to_yaml(OmegaConf.structured(self.config))}```")
            monitor.text("run/hardware", hardware(self.world))
        return monitor

    def _say_training(self) -> None:
        trainer = self.trainer
        if not trainer.finished:
            progress.stage("training", trainer.total_steps, "steps", trainer.progress.step)

    def _report(self, report: Report, monitor) -> None:
        self.costs.add(report)
        memory, seconds = peak_memory_gib(self.world.device), max(report.seconds, 1e-9)
        rate, waiting = report.images / seconds, report.waited / seconds
        monitor.step(report.step, report.epoch, report.losses, report.learning_rate, rate, memory, waiting)

    def _after_step(self, looked: bool, monitor) -> None:
        """Save if it is time, and go if a rank was asked to; all ranks do the same."""
        step = self.trainer.progress.step
        distributed.doing(f"step {step + 1} of {self.trainer.total_steps}")
        if not looked and not self.watch.is_due(step):
            return
        go, save = self.watch.agree(step, self.world.is_main and time.monotonic() > self.next_checkpoint)
        if go or save:
            self.trainer.require_finite()
            # Together also when rank 0 alone has something to do: one that has gone would have the others killed.
            distributed.together(lambda: self._save(monitor), self.world)
        if go:
            raise self._interrupted(self._saved())

    def _go_if_asked(self, saved: str) -> None:
        """Where nothing else is under way; a collective."""
        if self.watch.anybody():
            raise self._interrupted(saved)

    def _saved(self) -> str:
        return f"saved after step {self.trainer.progress.step} of {self.trainer.total_steps}"

    def _interrupted(self, what: str) -> Interrupted:
        asked_by = f"by {self.watch.asked_by}" if self.watch.asked_by else "through another rank"
        return Interrupted(f"asked to go {asked_by}, {what}; the same command goes on from there ({self.run.folder})")

    def _measure(self, monitor) -> None:
        """Judge held-out images, if there are any, and ask for memory; all ranks, each its own."""
        self.rank_memory = distributed.gather_objects(peak_memory_gib(self.world.device), self.world)
        if self.holdout is not None:
            gains = self.holdout.measure(self.trainer.reconstruction)
            monitor.holdout(self.trainer.progress.step, self.trainer.progress.epoch, gains)

    def _evaluate(self, monitor) -> Evaluation | None:
        """Rank 0 alone; the others wait for it."""
        if not self.world.is_main:
            return None
        progress.stage("evaluating")
        trainer = self.trainer
        evaluation = evaluate(trainer.reconstruction, self.comparison, self.linear)
        self.drawn = log_evaluation(monitor, trainer, evaluation, self.rank_memory)
        return evaluation

    def _report_on_the_way(self, evaluation: Evaluation | None) -> None:
        """Write report.html of a run that goes on; a collective."""
        if self.trainer.finished:
            return
        summary = self._summary(evaluation, None)
        done = f"{self.trainer.progress.step} of {self.trainer.total_steps} steps are done"
        distributed.together(
            lambda: write_report(self.run.folder, summary, self.drawn, done) if self.world.is_main else None, self.world
        )

    def _save(self, monitor) -> None:
        """Every rank has the same state, so rank 0 saves alone."""
        self.next_checkpoint = time.monotonic() + 60 * self.config.checkpoint.every_minutes
        if not self.world.is_main:
            return
        self.lock.require()
        monitor.flush()
        state = {
            "trainer": self.trainer.state(),
            "particles": self.trainer.plan.particles,
            "half": torch.from_numpy(self.trainer.plan.half),
            "held_out": torch.from_numpy(self.trainer.plan.held_out),
            "config": OmegaConf.to_yaml(OmegaConf.structured(self.config)),
            "sign": self.images.sign.state(),
            "seconds": self.costs.state(),
        }
        checkpoint.save(self.run.checkpoints, self.trainer.progress.step, state, self.config.checkpoint.keep)
        fitkeeping.remove(self.run.checkpoints)

    def _summary(self, evaluation: Evaluation | None, suite: FscSuite | None) -> dict[str, Any]:
        trainer, agreement = self.trainer, self.images.agreement
        summary = {
            **(evaluation.summary() if evaluation else {}),
            "particles": trainer.plan.particles,
            "held_out": int(trainer.plan.held_out.sum()),
            "images_in_both_halves": self.images.shared,
            "gaussians": trainer.reconstruction.mixture.drawn[0],
            "gaussians_by_model": dict(zip(MODEL_NAMES, trainer.reconstruction.mixture.drawn, strict=False)),
            "symmetry": self.config.model.symmetry,
            "symmetric_share": agreement.share if agreement else None,
            "box": trainer.reconstruction.box,
            "pixel_size_a": round(trainer.reconstruction.pixel_size_a, 6),  # what float32 files carry
            "world_size": self.world.size,
            **self.costs.summary(),
            "epochs": self.config.train.epochs,
            "steps": trainer.progress.step,
            **(particle_file(self.config) if self.world.is_main else {}),
            "invert": self.images.sign.invert,
            "sign_certainty": self.images.sign.certainty,
            "halves_from": trainer.table.half_from if self.config.maps.halves else None,
            "halves": trainer.table.half_origin if self.config.maps.halves else None,
            "run_dir": str(self.run.folder),
        }
        if suite is not None:
            said = agreement and agreement.warning(self.config.model.symmetry)
            summary |= {"warnings": [*suite.warnings, *([said] if said else [])], "anisotropy": suite.anisotropy}
        if self.world.is_main:
            summary |= circumstances(self.world, self.linear, trainer.table.rotations, self.config.model.symmetry)
            summary["findings"] = findings.as_records(findings.find(summary, self.run.folder, self.config.data.null))
        return distributed.broadcast_object(summary, self.world)


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
