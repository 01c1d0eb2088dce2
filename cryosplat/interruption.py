"""Being asked to go: by SIGUSR2 or SIGTERM, which clusters send before a time limit or for a job of more weight.

A handler only notes the signal. What follows waits for a place where every rank can do it with the others: between
two steps of training they agree, by a sum of three numbers about once a second, to go on, to save, or to save and go.
A fit in the volume meets no other rank on its way; there a rank that was asked tells the others through the store by
which they found each other, and each keeps its own fit. Where a rank works for long by itself and nothing is to be
saved, it goes at once, as from Ctrl-C; the others notice.
"""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator

import torch

from cryosplat import distributed
from cryosplat.errors import Interrupted

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)

PACE_S = 1.0
"""Between two agreements, about. Grace periods are tens of seconds; an agreement costs less than a millisecond."""


class Watch:
    """Whether this rank, or another, was asked to go.

    ``asked_by`` is the last signal's name, empty without. Who goes sets ``going``.

    Args:
        world: the ranks.
    """

    def __init__(self, world: distributed.World):
        self.world = world
        self.asked_by = ""
        self.going = False
        self._at_once: Callable[[], Interrupted] | None = None
        self._told, self._next_look = False, 0.0
        self._next_step, self._last = 0, (0, time.monotonic())

    def begin_at(self, step: int) -> None:
        """Training begins after ``step`` steps."""
        self._next_step, self._last = step, (step, time.monotonic())

    def is_due(self, step: int) -> bool:
        """Whether ranks agree after ``step`` steps; all say the same."""
        return step >= self._next_step

    def anybody(self) -> bool:
        """Whether any rank was asked to go; a collective."""
        return bool(distributed.sum_over_ranks(torch.tensor([float(bool(self.asked_by))]), self.world) > 0)

    def agree(self, step: int, save: bool) -> tuple[bool, bool]:
        """Find out what all ranks do after ``step`` steps; a collective.

        Args:
            step: steps done.
            save: this rank wants to save.

        Returns:
            Whether any rank was asked to go, and whether any wants to save.
        """
        last_step, last_time = self._last
        mine = torch.tensor([float(bool(self.asked_by)), float(save), time.monotonic() - last_time])
        asked, saving, seconds = distributed.sum_over_ranks(mine, self.world).tolist()
        # From the same numbers on every rank, so that they meet again at the same step.
        steps_a_second = max(step - last_step, 1) / max(seconds / self.world.size, 1e-6)
        self._next_step = step + max(1, int(PACE_S * steps_a_second))
        self._last = step, time.monotonic()
        return asked > 0, saving > 0

    def is_asked(self) -> bool:
        """Whether this rank was asked, or another has told it so; no collective, and no traffic but once a second."""
        if not self._told and (self.asked_by or time.monotonic() >= self._next_look):
            self._next_look = time.monotonic() + PACE_S
            if self.asked_by:
                distributed.tell_all("go", self.world)
            self._told = bool(self.asked_by) or distributed.is_told("go", self.world)
        return self._told

    @contextlib.contextmanager
    def going_at_once(self, error: Callable[[], Interrupted]) -> Iterator[None]:
        """Inside, which must hold no collective, a signal raises ``error()``, also one from before."""
        self._at_once = error
        try:
            if self.asked_by:
                raise error()
            yield
        finally:
            self._at_once = None

    def note(self, number: int, _frame=None) -> None:
        """The handler."""
        self.asked_by = signal.Signals(number).name
        error, self._at_once = self._at_once, None
        if error is not None:
            raise error()


@contextlib.contextmanager
def watch(world: distributed.World) -> Iterator[Watch]:
    """Inside, SIGUSR2 and SIGTERM are noted instead of ending the process.

    Handlers can be set in the main thread alone; elsewhere signals go on meaning what they did.
    """
    found = Watch(world)
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.signal(number, found.note) for number in SIGNALS}
    try:
        yield found
    finally:
        for number, handler in before.items():
            # A rank that goes is not to be hurried: its exit status must say why.
            signal.signal(number, signal.SIG_IGN if found.going or found.asked_by else handler)
