"""TensorBoard's event files: tags with their units and meanings, a layout of charts, pictures now and then, and a bound
on the bytes of it all.

A unit stands at the end of a tag, as in ``memory/cpu_max_rss_GiB``: not in brackets, for TensorBoard's custom scalars
take what is in brackets for the name of a run, and draw no curve.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cryosplat.errors import InputError
from cryosplat.metrics import cut_events

FLUSH_SECONDS = 10
"""How much of the TensorBoard log a killed run may lose, at most."""

BYTES = 48e6
"""That the event files of a run may have, however long it is: what TensorBoard opens at once, also through a tunnel."""

PICTURE_SHARE = 0.6
"""Of these, up to which pictures are added; numbers take the rest."""

PICTURE_GROWTH = 1.5
"""Pictures are logged when this many times as many steps are done as at the last ones, and at the end."""

_LAST_SHARE = 0.06
"""Of the bytes, kept for what is logged at the end."""

LOOK_EVERY = 500
"""Steps that are logged between looks at the size of the files."""

DESCRIPTIONS = {
    "loss": "Mean squared difference between images and the projections of the Gaussians, whitened if asked for; no "
    "unit. Nearly all of it is noise, so it falls by little.",
    "resolution": "Resolution in angstrom, at every evaluation: smaller is finer. **calibrated** (FSC 0.5 to the "
    "unknown truth) is the one to quote; **naive** (0.143, half maps of Gaussians) says too much.",
    "fsc": "Mean Fourier shell correlation over all shells: 1 is perfect agreement, 0 is chance.",
    "holdout": "Log likelihood over an empty map, nats an image: **gain** of images that were kept aside, **trained** "
    "of as many that were used. A gain that falls while the other rises is overfitting.",
    "train": "Learning rate of a step.",
    "throughput": "images_per_second: over all ranks, since the step logged before. waiting: share of the time in "
    "which a rank had no images to work on.",
    "memory": "Largest memory so far, GiB: of the first rank, and at evaluations of each rank.",
    "gaussians": "The Gaussians of each model: how many, and their standard deviations (A) and amplitudes (image units "
    "times A^2); p10, p50, p90 are the values that 10, 50 and 90 % of them do not exceed.",
    "volume_fit": "Log likelihood over an empty map in the fit in the volume, nats, by its own steps.",
    "map": "The delivered map, noise left out: white is density.",
    "particles": "An image, the projection of the Gaussians in its pose with its CTF, and what is left.",
}
"""What the tags of a group mean, by what stands before their first slash."""

LAYOUT = {
    "What to watch": {
        "resolution (Å): calibrated, naive, to a known truth": ["Multiline", ["resolution/.*"]],
        "held-out images (nats an image): gain, beside trained": [
            "Multiline",
            ["holdout/gain_full$", "holdout/trained_full$"],
        ],
        "loss of full, half a, half b": ["Multiline", ["loss/.*"]],
        "fit in the volume (nats)": ["Multiline", ["volume_fit/.*"]],
    },
    "The halves": {
        "held-out images under the halves' models (nats an image)": [
            "Multiline",
            ["holdout/(gain|trained)_half_[ab]$"],
        ],
        "mean FSC of each curve": ["Multiline", ["fsc/mean_.*"]],
    },
    "The Gaussians": {
        "number": ["Multiline", ["gaussians/number_.*"]],
        "standard deviations (Å), full model: 10, 50, 90 %": ["Multiline", [r"gaussians/scale_full_p.*"]],
        "amplitudes, full model: 10, 50, 90 %": ["Multiline", [r"gaussians/amplitude_full_p.*"]],
    },
    "The machine": {
        "images a second": ["Multiline", ["throughput/images_per_second"]],
        "share of the time waiting for images": ["Multiline", ["throughput/waiting.*"]],
        "memory (GiB)": ["Multiline", ["memory/.*"]],
        "learning rate": ["Multiline", ["train/learning_rate"]],
    },
}
"""Charts of TensorBoard's custom scalars, by page; what a run has no numbers of stays empty."""


class EventLog:
    """Event files of one run, which go on where they were; ``stack`` closes them.

    Args:
        folder: made if it is not there.
        start_step: steps done already; what was logged after it goes.
        stack: of the run.
        evaluated: whether the evaluation after ``start_step`` stays.
        last_step: of the run, at which everything is logged; None: there is no such step.

    Raises:
        InputError (also from every method): a file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        stack: contextlib.ExitStack,
        evaluated: bool = True,
        last_step: int | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter  # a second to import, which only rank 0 needs to spend

        self._folder, self._last_step = folder, last_step
        cut_events(folder, start_step, evaluated)
        stack.enter_context(_quiet_writer_thread())
        with writing(folder):
            # purge_step is for a TensorBoard that runs and has the cut events in memory. It heeds it from the second
            # time on only (the first is the start of the run, not a restart), so a new run says it too.
            self._writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=FLUSH_SECONDS)
        stack.callback(self._close)
        self._described: set[str] = set()
        self._pictured = _level(start_step) if start_step > 0 else None
        self._rows, self._stride = 0, 1

    def layout(self) -> None:
        """Put the charts of ``LAYOUT`` into the log."""
        with writing(self._folder):
            self._writer.add_custom_scalars(LAYOUT)

    def often(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers of a step in training: of all steps, or of ever fewer as the files grow towards their bound."""
        if self._rows % LOOK_EVERY == 0:
            over = (self.size() - PICTURE_SHARE * BYTES) / ((1 - PICTURE_SHARE - _LAST_SHARE) * BYTES)
            self._stride = 1 if over <= 0 else 2 ** math.ceil(6 * over) if over < 1 else 0
        self._rows += 1
        if step == self._last_step or (self._stride and self._rows % self._stride == 0):
            self.scalars(values, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers, each with the meaning of its group."""
        with writing(self._folder):
            for tag, value in values.items():
                self._write(_scalar(tag, value, None if tag in self._described else _description(tag)), step)
                self._described.add(tag)

    def wants_pictures(self, step: int) -> bool:
        """Whether pictures of this step are to be logged: at steps ever further apart, while there is room; and at the
        end."""
        due = step == self._last_step or self._pictured is None or _level(step) > self._pictured
        return due and (step == self._last_step or self.size() < PICTURE_SHARE * BYTES)

    def pictures(self, drawn: Mapping[str, np.ndarray], step: int) -> None:
        """Log pictures: uint8 (height, width, 3) by tag."""
        self._pictured = _level(step)
        with writing(self._folder):
            for tag, pixels in drawn.items():
                self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        """Log how values are spread."""
        with writing(self._folder):
            for tag, array in values.items():
                self._writer.add_histogram(tag, array, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        with writing(self._folder):
            self._writer.add_text(tag, markdown, step)

    def flush(self) -> None:
        with writing(self._folder):
            self._writer.flush()

    def size(self) -> int:
        """Bytes of the event files, of runs in folders below too; what is not flushed yet is left out."""
        return sum(path.stat().st_size for path in self._folder.rglob("events.out.tfevents.*"))

    def _write(self, summary, step: int) -> None:
        # SummaryWriter.add_scalar writes no description.
        self._writer._get_file_writer().add_summary(summary, step)

    def _close(self) -> None:
        with writing(self._folder):
            self._writer.close()


def _level(step: int) -> int:
    """Number of the stretch of steps, each ``PICTURE_GROWTH`` times as long as the one before, that a step is in."""
    return math.floor(math.log(max(step, 1), PICTURE_GROWTH) + 1e-9)


def _description(tag: str) -> str | None:
    return DESCRIPTIONS.get(tag.partition("/")[0])


def _scalar(tag: str, value: float, description: str | None):
    """A number as TensorBoard stores it; its description is kept from the first time it comes."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

    metadata = None
    if description is not None:
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = SummaryMetadata(summary_description=description, plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=tag, simple_value=float(value), metadata=metadata)])


def quantiles(name: str, values: np.ndarray, unit: str = "") -> dict[str, float]:
    """The 10, 50 and 90 % quantiles of values, by tag."""
    found = np.percentile(values, [10, 50, 90])
    return {f"{name}_p{share}{unit}": float(value) for share, value in zip((10, 50, 90), found, strict=True)}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write into what the user can mend."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _quiet_writer_thread() -> Iterator[None]:
    """Keep TensorBoard's writer thread from printing the traceback of an OSError, which its next call raises anyway."""
    previous = threading.excepthook

    def hook(args) -> None:
        from_writer = type(args.thread).__module__.startswith("tensorboard.")
        if not (from_writer and issubclass(args.exc_type, OSError)):
            previous(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous


def of_mixtures(mixtures: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Numbers and values to show the spread of, by tag, of mixtures by model: scales (G, 3) in A, amplitudes (G,)."""
    numbers, spread = {}, {}
    for model, mixture in mixtures.items():
        scales, amplitudes = np.asarray(mixture["scales"]).ravel(), np.asarray(mixture["amplitudes"])
        numbers[f"gaussians/number_{model}"] = float(len(amplitudes))
        if model == "full":
            numbers |= quantiles("gaussians/scale_full", scales, "_A")
            numbers |= quantiles("gaussians/amplitude_full", amplitudes)
        spread |= {f"gaussians/scale_{model}_A": scales, f"gaussians/amplitude_{model}": amplitudes}
    return numbers, spread


def of_ranks(memory: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Memory of every rank by tag, from that of each by kind, GiB."""
    return {
        f"memory/rank_{rank}_{kind}_GiB": value
        for rank, of_rank in enumerate(memory)
        for kind, value in of_rank.items()
    }
