"""Command lines with flags: every refusal is one line that names the flag (`runtime.program`)."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from runtime.errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError, in one line, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; --help lists the arguments")


def number(lowest: int, highest: int) -> Callable[[str], int]:
    """An argparse type: an integer from `lowest` to `highest`."""

    def integer(text: str) -> int:
        value = int(text)
        if not lowest <= value <= highest:
            shown = text if len(text) < 40 else text[:36] + " …"
            raise argparse.ArgumentTypeError(f"{shown}: choose {lowest} to {highest}")
        return value

    return integer


def path(text: str) -> str:
    """A path with `~` expanded."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: a path cannot contain a NUL character")
    return os.path.expanduser(text)


def as_path(text: str) -> Path:
    """`path` as a Path."""
    return Path(path(text))


def new_file(*suffixes: str) -> Callable[[str], str]:
    """An argparse type: the path of a file to write, whose suffix selects its format."""

    def file(text: str) -> str:
        if os.path.splitext(path(text))[1].lower() not in suffixes:
            raise argparse.ArgumentTypeError(
                f"{text}: use a name that ends in {' or '.join(suffixes)}"
            )
        if os.path.isdir(path(text)):
            raise argparse.ArgumentTypeError(f"{text} is a folder: choose the name of a file")
        return path(text)

    return file
