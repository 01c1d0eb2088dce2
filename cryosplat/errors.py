"""The one exception that means: the user can mend this."""


class InputError(ValueError):
    """Something the user supplied is wrong: a file, a value, a request.

    The message names the file or key, what was expected, what came, and the
    fix. Commands print it alone, without a traceback, and exit with code 2.
    """
