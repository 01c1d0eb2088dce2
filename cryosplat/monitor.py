"""What one sees of a run: TensorBoard, metrics.csv and run.log. Rank 0 has a Monitor.

The number of a step is the number of optimiser steps done. A run resumed from a checkpoint of step s goes on with
s + 1: whatever was logged after s, and is going to be logged again, is taken out of metrics.csv and TensorBoard.
"""

import contextlib
import csv
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cryosplat import figures, progress
from cryosplat.errors import InputError
from cryosplat.eventlog import EventLog, of_mixtures, of_ranks, writing
from cryosplat.fsc import FscCurve, mean_fsc
from cryosplat.metrics import COLUMNS, append_holdout, cut_metrics, write_volume_fit

logger = logging.getLogger(__name__)
_PACKAGE_LOGGER = logging.getLogger("cryosplat")


class NullMonitor:
    """The monitor of every rank but the first: it has a Monitor's methods, and they do nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def step(self, *args, **kwargs) -> None:
        pass

    def evaluation(self, *args, **kwargs) -> dict:
        return {}

    def mixtures(self, *args, **kwargs) -> None:
        pass

    def rank_memory(self, *args, **kwargs) -> None:
        pass

    def holdout(self, *args, **kwargs) -> None:
        pass

    def volume_fit(self, *args, **kwargs) -> None:
        pass

    def text(self, *args, **kwargs) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass


class Monitor:
    """Writes <run_dir>/tensorboard/, metrics.csv and run.log, and says how far training is; use it in a ``with``.

    Messages of all loggers under "cryosplat" go to run.log too.

    Args:
        run_dir: exists.
        total_steps: steps of the whole run.
        start_step: steps done already, 0 for a new run.
        resumed: go on with the files that are there. Without it, a run directory with metrics is refused.
        preface: what was said before there was a run.log, and is to be in it.

    Raises:
        InputError (also from every method): a file cannot be written (full disk), or is there and not ``resumed``.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        total_steps: int,
        start_step: int = 0,
        resumed: bool = False,
        preface: Sequence[str] = (),
    ):
        self._run_dir, self._start_step = Path(run_dir), start_step
        metrics, events = self._run_dir / "metrics.csv", self._run_dir / "tensorboard"
        for path in () if resumed else (metrics, events):
            if path.exists():
                raise InputError(f"{path} exists already; choose another run_dir, or resume the run that is there")
        with contextlib.ExitStack() as stack:
            seconds_before = cut_metrics(metrics, start_step)
            log_file = stack.enter_context(_log_to(self._run_dir / "run.log"))
            self._metrics = _open_for_append(metrics, stack)
            # A run that has done all its steps is evaluated again, whether or not it was before.
            self._events = EventLog(events, start_step, stack, start_step < total_steps, total_steps)
            self._stack = stack.pop_all()
        self._clock_zero = time.monotonic() - seconds_before
        for line in preface:
            log_file.handle(logging.makeLogRecord({"msg": line, "levelno": logging.INFO, "levelname": "INFO"}))
        if resumed:
            logger.info("resumed after step %d of %d", start_step, total_steps)
        else:
            self._events.layout()

    def step(
        self,
        step: int,
        epoch: int,
        losses: Mapping[str, float],
        learning_rate: float,
        images_per_second: float,
        memory: Mapping[str, float],
        waiting: float,
    ) -> None:
        """Log a step.

        Args:
            step: steps done, this one included.
            epoch: epoch it belongs to.
            losses: by model: "full", "half_a", "half_b".
            learning_rate: of this step.
            images_per_second: over all ranks, since the last logged step.
            memory: GiB, as ``costs.peak_memory_gib`` gives it.
            waiting: share of the time since the last logged step in which rank 0 waited for images.
        """
        row = {"step": step, "epoch": epoch, "learning_rate": learning_rate, "images_per_second": images_per_second}
        row["waiting"] = round(waiting, 4)
        row |= {f"loss_{name}": value for name, value in losses.items()}
        row |= {f"{name}_gib": value for name, value in memory.items()}
        row["seconds"] = round(time.monotonic() - self._clock_zero, 3)
        with writing(self._run_dir / "metrics.csv"):
            csv.DictWriter(self._metrics, COLUMNS, restval="", lineterminator="\n").writerow(row)
            self._metrics.flush()
        scalars = {f"loss/{name}": value for name, value in losses.items()}
        scalars |= {"train/learning_rate": learning_rate, "throughput/images_per_second": images_per_second}
        scalars["throughput/waiting"] = waiting
        scalars |= {f"memory/{name}_GiB": value for name, value in memory.items()}
        self._events.often(scalars, step)
        loss = losses.get("full", next(iter(losses.values()), float("nan")))
        progress.know(step=f"{step}, epoch {epoch}, loss {loss:.6g}", images_per_second=f"{images_per_second:.4g}")
        progress.at(step, f"epoch {epoch}, loss {loss:.6g}, {images_per_second:.4g} images/s")

    def evaluation(
        self,
        step: int,
        epoch: int,
        curves: Mapping[str, FscCurve],
        resolutions: Mapping[str, float | None],
        maps: Mapping[str, np.ndarray],
        particle_example: tuple | None,
        pixel_size_a: float,
    ) -> dict[str, np.ndarray]:
        """Log maps and what they are worth. Call it before the checkpoint of its step, or a resumed run repeats it.

        Args:
            step, epoch: as in ``step``.
            curves: FSC curves by name, as ``evaluation.Evaluation`` has them.
            resolutions: A, by name, such as "naive_half_map_0.143" and "truth_0.5"; None is not logged.
            maps: (D, D, D) by name, "map" first of all.
            particle_example: arguments of ``figures.particle_figure`` up to the residual, and a name if there is one.
            pixel_size_a: A/px.

        Returns:
            The pictures, by tag, whether they were due in TensorBoard or not: uint8 (height, width, 3).
        """
        known = {name: value for name, value in resolutions.items() if value is not None}
        means = {name: mean_fsc(curve) for name, curve in curves.items() if np.isfinite(curve.fsc[1:]).any()}
        self._events.scalars({f"resolution/{name}_A": value for name, value in known.items()}, step)
        self._events.scalars({f"fsc/mean_{name}": value for name, value in means.items()}, step)
        drawn = {"fsc/curves": figures.fsc_figure(curves)} if curves else {}
        for name, volume in maps.items():
            suffix = "" if name == "map" else f"_{name}"
            drawn[f"map/sections{suffix}"] = figures.sections_figure(volume, pixel_size_a)
            drawn[f"map/projections{suffix}"] = figures.projections_figure(volume, pixel_size_a)
        if particle_example is not None:
            particle, projection, residual, *name = particle_example
            figure = figures.particle_figure(particle, projection, residual, pixel_size_a, *name)
            drawn["particles/particle_projection_residual"] = figure
        pixels = {tag: figures.rasterise(figure) for tag, figure in drawn.items()}
        if self._events.wants_pictures(step):
            self._events.pictures(pixels, step)
        if known:
            name, value = next(iter(known.items()))
            progress.know(resolution=f"{value:.2f} A ({name.replace('_', ' ')})")
        self.flush()
        words = [f"resolution {name.replace('_', ' ')} {value:.2f} A" for name, value in known.items()]
        words += [f"mean FSC {name.replace('_', ' ')} {value:.4f}" for name, value in means.items()]
        when = f"after epoch {epoch}, step {step}" if step else "after the fit in the volume"
        logger.info("%s: %s", when, ", ".join(words) or "no half maps, no truth")
        return pixels

    def mixtures(self, step: int, mixtures: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Log how many Gaussians there are, how wide and how strong: by model, as they are exported."""
        numbers, spread = of_mixtures(mixtures)
        self._events.scalars(numbers, step)
        if self._events.wants_pictures(step):
            self._events.histograms(spread, step)

    def rank_memory(self, step: int, memory: Sequence[Mapping[str, float]]) -> None:
        """Log the memory of every rank, in their order, each as ``costs.peak_memory_gib`` gives it."""
        self._events.scalars(of_ranks(memory), step)

    def holdout(self, step: int, epoch: int, gains: Mapping[str, float]) -> None:
        """Log what held-out and trained images say of the models, in holdout.csv too.

        Args:
            step, epoch: both done.
            gains: by column of holdout.csv, as ``holdout.HoldOut.measure`` gives them.
        """
        append_holdout(self._run_dir / "holdout.csv", {"step": step, "epoch": epoch, **gains})
        self._events.scalars({f"holdout/{name}": value for name, value in gains.items() if name != "images"}, step)
        logger.info(
            "after epoch %d, step %d: nats an image gained over an empty map: %.4g held out, %.4g trained on",
            *(epoch, step, gains["gain_full"], gains["trained_full"]),
        )

    def volume_fit(self, gains: Mapping[str, Sequence[float]]) -> None:
        """Log a fit in the volume: volume_fit.csv, and a TensorBoard run of its own, for its steps are not training's.

        Args:
            gains: by model, the log likelihood over an empty map before every step, nats.
        """
        columns = {f"gain_{name}": curve for name, curve in gains.items()}
        said = ", ".join(f"{name.replace('_', ' ')} {curve[-1]:.5g}" for name, curve in gains.items())
        logger.info("fitted in the volume; nats gained over an empty map: %s", said)
        write_volume_fit(self._run_dir / "volume_fit.csv", columns)
        with contextlib.ExitStack() as stack:
            events = EventLog(self._run_dir / "tensorboard" / "volume_fit", -1, stack)  # step 0 is one of its own
            for name, curve in columns.items():
                for step, gain in enumerate(curve):
                    events.scalars({f"volume_fit/{name}": gain}, step)

    def text(self, tag: str, markdown: str) -> None:
        """Log a text, such as "run/config", in TensorBoard."""
        self._events.text(tag, markdown, self._start_step)

    def flush(self) -> None:
        """Have all that was logged on disk; call it before a checkpoint, and a kill leaves no gap in the curves."""
        self._events.flush()

    def close(self) -> None:
        """Finish all files; calling it again does nothing."""
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback) -> None:
        # What went wrong first is what the user must see, not that a full disk cannot be closed upon either.
        with contextlib.suppress(*([InputError] if kind else [])):
            self.close()


def _open_for_append(path: Path, stack: contextlib.ExitStack):
    """An open text file; ``stack`` closes it."""
    with writing(path):
        handle = open(path, "a", newline="")
    stack.callback(_close, handle, path)
    return handle


def _close(handle, path: Path) -> None:
    with writing(path):
        handle.close()


class _RunLog(logging.FileHandler):
    """A log file whose failure is an error: logging would print a traceback for every message and go on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            raise InputError(f"cannot write {self.baseFilename}: {error.strerror or error}") from error
        super().handleError(record)


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[_RunLog]:
    """Append what cryosplat logs, from level INFO, to a file."""
    with writing(path):
        handler = _RunLog(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = _PACKAGE_LOGGER.level
    if not _PACKAGE_LOGGER.isEnabledFor(logging.INFO):
        _PACKAGE_LOGGER.setLevel(logging.INFO)
    _PACKAGE_LOGGER.addHandler(handler)
    try:
        yield handler
    finally:
        _PACKAGE_LOGGER.removeHandler(handler)
        _PACKAGE_LOGGER.setLevel(level)
        _close(handler, path)
