"""The one exception whose message is written for users, and how to name any other in a line."""

import logging

log = logging.getLogger(__name__)


class InputError(Exception):
    """A mistake in what the user passed: a path, an option, a file.

    The message is one line that names the thing and the remedy. Every program prints it after
    `error:` and exits with status 2; any other exception is a bug and keeps its traceback.

    `option` names the refused option of a config class. The message then begins with this name, and
    `configs.load` prefixes its path in the config.
    """

    def __init__(self, message: str, option: str = ""):
        super().__init__(message)
        self.option = option


def describe(error: Exception) -> str:
    """The type and the first line of an exception; its traceback goes to the log, at debug level."""
    log.debug("%s", error, exc_info=error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
