"""The exceptions that mean: the user can mend this."""

import contextlib
import os
from collections.abc import Iterator


class InputError(ValueError):
    """Something the user supplied is wrong: a file, a value, a request.

    The message names the file or key, what was expected, what came, and the
    fix. Commands print it alone, without a traceback, and exit with code 2.
    """


class PeerError(InputError):
    """Another rank found what its message says, and reports it; this rank stops without a word."""


class PeerGone(PeerError):
    """Another rank has ended before its time. The process group is broken, and this process had best end too."""


class Interrupted(Exception):
    """The run was asked to go, as its message says, and can go on later. Nothing is wrong."""


def is_first_rank() -> bool:
    """Whether this is rank 0, or alone, as launchers say it before ranks have joined."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


@contextlib.contextmanager
def said_by_the_first() -> Iterator[None]:
    """What all ranks find alike, before they have joined, is an InputError of the first rank alone."""
    try:
        yield
    except InputError as error:
        if is_first_rank():
            raise
        raise PeerError(str(error)) from error
