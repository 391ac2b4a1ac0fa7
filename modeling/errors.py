"""The one exception whose message is written for users."""


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
