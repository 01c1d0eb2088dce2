"""What a run is at, told while it goes on: on a terminal one status line, elsewhere a line of the log now and then, and
status.json in the run directory.

Like logging, this is one for the whole process: whoever works says ``stage`` and ``at``, and where nobody listens
(other ranks than the first, other commands) nothing happens.
"""

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cryosplat import status
from cryosplat.errors import InputError, Interrupted
from cryosplat.files import atomic_path
from cryosplat.runlock import Holder

logger = logging.getLogger(__name__)
_PACKAGE_LOGGER = logging.getLogger("cryosplat")

FIRST_LINE_S, LINES, SELDOM_S = 30.0, 50, 600.0
"""The log's first line of a stage after so many seconds; as many lines as that for the whole stage, but none in less
than the first nor more than the last number of seconds: 30 s apart in the first half hour, 7 min in a stage of 6 h."""

LONG_S = 10.0
"""From so many seconds on, the end of a stage is a line too."""

WRITE_S, TICK_S = 5.0, 1.0
"""Between two writings of status.json, at least; between two looks of the thread that shows time passing."""

_WITH_TOTAL = "{desc} {percentage:3.0f}%|{bar}| {n:,}/{total:,} [{elapsed}, {remaining} to go, {rate_fmt}{postfix}]"
_WITHOUT_TOTAL = "{desc} [{elapsed}{postfix}]"


class Reporter:
    """Tells what a process is at; use it by ``shown``.

    Args:
        folder: of status.json, made if it is not there; None: nothing is written.
        terminal: whether standard error is one that can show a status line.
    """

    def __init__(self, folder: Path | None, terminal: bool):
        self._folder, self._terminal = folder, terminal
        self._made = _missing(folder) if folder else []
        self._bar: tqdm | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._facts: dict[str, str] = {}
        self._stage, self._note = "", ""
        self._done = self._first = self._total = 0
        self._unit, self._began, self._at = "", time.time(), time.time()
        self._clock = self._next_line = time.monotonic()
        self._written = float("-inf")
        self._holder = asdict(Holder.this_process())

    def stage(self, name: str, total: int = 0, unit: str = "", first: int = 0) -> None:
        """Begin a stage: ``total`` of ``unit`` to do (0: not known), ``first`` of them done already."""
        self._end_of_stage()
        self._stage, self._total, self._unit, self._done, self._first = name, total, unit, first, first
        self._note, self._began, self._at = "", time.time(), time.time()
        self._clock = time.monotonic()
        self._next_line = self._clock + FIRST_LINE_S
        if self._terminal:
            shape = {"total": total, "initial": first, "unit": unit[:-1] if unit.endswith("s") else unit}
            form = {"bar_format": _WITH_TOTAL if total else _WITHOUT_TOTAL, "dynamic_ncols": True, "leave": False}
            self._bar = tqdm(desc=name, file=sys.stderr, **shape, **form)
        self._write("running", always=True)

    def at(self, done: int, note: str = "") -> None:
        """So many of the stage's units are done."""
        self._done, self._note, self._at = done, note, time.time()
        if self._bar is not None:
            self._bar.set_postfix_str(self._words(), refresh=False)
            self._bar.update(done - self._bar.n)
        now = time.monotonic()
        if now >= self._next_line:
            taken = now - self._clock
            left = taken / max(done - self._first, 1) * (self._total - done) if self._total else 0.0
            self._next_line = now + min(max((taken + left) / LINES, FIRST_LINE_S), SELDOM_S)
            counted = f"{self._unit} {done:,} of {self._total:,}" if self._total else f"{self._unit} {done:,}"
            words = [counted, *filter(None, [self._words()]), f"{status.duration(left)} to go" if self._total else ""]
            # The terminal has its status line; the log file is for those who look later.
            logger.info("%s: %s", self._stage, ", ".join(filter(None, words)), extra={"for_files": True})
        self._write("running")

    def know(self, facts: dict[str, str]) -> None:
        self._facts |= facts
        self._write("running")

    def begin(self) -> None:
        """Show time passing, and that this process lives, from a thread of its own."""
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def end(self, state: str, message: str = "") -> None:
        """The last word: "complete" leaves nothing behind; what never became a run neither."""
        self._end_of_stage()
        self._over.set()
        self._thread.join(timeout=TICK_S)
        if self._folder is None:
            return
        if state == "complete" or not (self._folder / "config.yaml").is_file():
            with self._lock, contextlib.suppress(OSError):
                (self._folder / status.NAME).unlink(missing_ok=True)
            for folder in self._made:
                with contextlib.suppress(OSError):  # something else is in it
                    folder.rmdir()
        else:
            self._write(state, message, always=True)

    def _words(self) -> str:
        """The note, and the resolution as soon as there is one."""
        known = self._facts.get("resolution")
        return ", ".join(filter(None, [self._note, known and f"resolution so far {known}"]))

    def _end_of_stage(self) -> None:
        if self._bar is not None:
            with self._lock:
                self._bar.close()
                self._bar = None
        taken = time.monotonic() - self._clock
        if self._stage and taken >= LONG_S:
            count = f" {self._done - self._first:,} {self._unit} in" if self._total else ""
            logger.info("%s:%s %s", self._stage, count, status.duration(taken))
        self._stage = ""

    def _tick(self) -> None:
        while not self._over.wait(TICK_S):
            with self._lock:
                if self._bar is not None:
                    self._bar.refresh()
            if time.monotonic() - self._written > status.SIGN_S:
                self._write("running", always=True)

    def _write(self, state: str, message: str = "", always: bool = False) -> None:
        """Write status.json, if it is time; that it cannot be written stops no run."""
        if self._folder is None or not (always or time.monotonic() - self._written > WRITE_S):
            return
        told: dict[str, Any] = {"state": state, "stage": self._stage, "done": self._done, "total": self._total}
        told |= {"first": self._first, "unit": self._unit, "stage_began": self._began, "updated": self._at}
        told |= {"facts": dict(self._facts), "message": message, "holder": self._holder}
        with self._lock, contextlib.suppress(InputError, OSError):
            if self._over.is_set() and state == "running":
                return
            self._written = time.monotonic()
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._folder / status.NAME) as temporary:
                temporary.write_text(json.dumps(told, indent=1) + "\n")


_current: Reporter | None = None


def stage(name: str, total: int = 0, unit: str = "", first: int = 0) -> None:
    """Say what is done now, which ends what was done before.

    Args:
        name: "reading images".
        total: how many there are to do, 0 if nobody can tell.
        unit: of what, in the plural.
        first: how many of them were done before.
    """
    if _current is not None:
        _current.stage(name, total, unit, first)


def at(done: int, note: str = "") -> None:
    """Say how many are done, and what else is to be seen beside it."""
    if _current is not None:
        _current.at(done, note)


def know(**facts: str) -> None:
    """Keep what was found out, such as ``resolution="4.2 A (calibrated)"``, for everything that is said from now on."""
    if _current is not None:
        _current.know(facts)


@contextlib.contextmanager
def shown(folder: Path | None, listens: bool = True) -> Iterator[None]:
    """Listen to what is said inside, and tell it; the first rank alone does.

    Args:
        folder: of status.json; None: none is written.
        listens: whether this process does.
    """
    global _current
    if not listens:
        yield
        return
    terminal = sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"
    with contextlib.ExitStack() as stack:
        if terminal:
            stack.enter_context(_above_the_line())
        reporter = _current = Reporter(folder, terminal)
        reporter.begin()
        try:
            yield
        except BaseException as error:
            _current = None
            stopped = isinstance(error, Interrupted | KeyboardInterrupt)
            words = str(error).splitlines() or [type(error).__name__]
            reporter.end("interrupted" if stopped else "failed", words[0])
            raise
        _current = None
        reporter.end("complete")


@contextlib.contextmanager
def _above_the_line() -> Iterator[None]:
    """Print log messages above the status line, and leave those out that say what it says."""
    loggers = [log for log in (logging.getLogger(), _PACKAGE_LOGGER) if any(map(_is_console, log.handlers))]
    with logging_redirect_tqdm(loggers):
        shown_by = [handler for log in loggers for handler in log.handlers if _is_console(handler)]
        for handler in shown_by:
            handler.addFilter(_not_for_files)
        try:
            yield
        finally:
            for handler in shown_by:
                handler.removeFilter(_not_for_files)


def _is_console(handler: logging.Handler) -> bool:
    return getattr(handler, "stream", None) in (sys.stdout, sys.stderr)


def _not_for_files(record: logging.LogRecord) -> bool:
    return not getattr(record, "for_files", False)


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there, deepest first."""
    folder = folder.absolute()
    return [path for path in (folder, *folder.parents) if not path.exists()]
