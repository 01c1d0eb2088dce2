"""Reading files of strangers under watch: nothing in them may be run, and no file may take long or much memory."""

import contextlib
import resource
import signal
import sys
from collections.abc import Iterator

RUNNING = (
    "exec",
    "import",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "ctypes.dlopen",
)
"""Audit events of running something."""

MOST_S = 20
"""After which a file counts as hanging the program; none takes a second."""

_events: list[str] = []
_watching = False


def _watch(event, _arguments):
    if _watching and event in RUNNING:
        _events.append(event)


sys.addaudithook(_watch)


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Nothing that would run code may happen inside, and it may not take for ever."""
    global _watching

    def hang(_signal, _frame):
        raise TimeoutError(f"still at it after {MOST_S} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(MOST_S)
    _events.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert _events == []


@contextlib.contextmanager
def little_memory(most_mib: int) -> Iterator[None]:
    """The process's largest resident memory may not grow by more inside."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown <= most_mib, f"the process grew by {grown:.0f} MiB"
