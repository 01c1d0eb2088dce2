"""The exceptions that mean: the user can mend this."""


class InputError(ValueError):
    """Something the user supplied is wrong: a file, a value, a request.

    The message names the file or key, what was expected, what came, and the
    fix. Commands print it alone, without a traceback, and exit with code 2.
    """


class PeerError(InputError):
    """Another rank found what its message says, and reports it; this rank stops without a word."""


class PeerGone(PeerError):
    """Another rank has ended before its time. The process group is broken, and this process had best end too."""
