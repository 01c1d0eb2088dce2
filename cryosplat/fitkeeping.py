"""Fits in the volume kept on disk while they go on, each by the rank that does it, without a word to the others."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryosplat import checkpoint
from cryosplat.errors import InputError, Interrupted
from cryosplat.interruption import Watch

logger = logging.getLogger(__name__)

_FILE = "fit_{}.pt"


class FitKeeper:
    """Keeps this rank's fits.

    Args:
        folder: of the run's checkpoints.
        key: of what is fitted to; a fit that was kept under another is not gone on with.
        every_s: seconds between two savings of a fit.
        watch: whether the run is to go.
    """

    def __init__(self, folder: Path, key: str, every_s: float, watch: Watch):
        self._folder, self._key, self._every_s, self._watch = folder, key, every_s, watch
        self._next = time.monotonic() + every_s

    def load(self, name: str) -> dict[str, Any] | None:
        """Where the fit of a model stands; None if it has not begun, or its file is damaged, which the log says."""
        path = self._folder / _FILE.format(name)
        if not path.exists():
            return None
        try:
            kept = checkpoint.load(path)
        except InputError as error:
            logger.warning("%s; this fit begins anew", error)
            return None
        if kept["key"] != self._key:
            logger.warning("%s: other particles or halves than now; this fit begins anew", path)
            return None
        return kept["fit"]

    def after_step(self, name: str, state: Callable[[], dict[str, Any]], last: bool) -> None:
        """Save the fit of a model if it is time, and after its ``last`` step: others may take long yet.

        Raises:
            InputError: the disk is full or not writable.
            Interrupted: the run is to go; the fit is saved.
        """
        go = self._watch.is_asked()
        if go or last or time.monotonic() >= self._next:
            checkpoint.write(self._folder / _FILE.format(name), {"key": self._key, "fit": state()})
            self._next = time.monotonic() + self._every_s
        if go and not last:
            raise Interrupted(f"{name}: its fit in the volume is kept")


def remove(folder: Path) -> None:
    """Take away what was kept, when all of it is in a checkpoint."""
    for path in folder.glob(_FILE.format("*")):
        path.unlink(missing_ok=True)
