"""The one exception that a user, rather than a programmer, is meant to read."""


class InputError(Exception):
    """A mistake in what the user gave: a path, an option, a file.

    The message is one line that names the thing and the remedy. Every program prints it after
    `error:` and exits with status 2; any other exception is a bug and keeps its traceback.
    """
