"""Training despite a few unreadable images, which are replaced, listed and counted."""

import contextlib
import fcntl
from itertools import chain
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from data.classes import first_names
from runtime.errors import InputError
from runtime.files import writing

OPTION = "dataset.params.skip_unreadable"


class SkipUnreadable(Dataset):
    """`images` by (epoch, index), index < `items`, in which readable ones replace unreadable ones.

    `images` are TrainImages, TrainViews or a part of them, with their `paths`.
    The next readable image, wrapping around at `items`, takes the place of an unreadable one, with its
    own label and draws. So an item depends only on its key and the files, never on rank, worker or resume.

    All ranks and workers list unreadable images in the file `report`, one path per line, which also counts
    them; a resumed run continues it. Without `report`, as in a dry run, every worker counts its own. Raises
    InputError, naming the option, for more than `limit`.
    """

    def __init__(self, images: Any, items: int, limit: int, report: Path | None):
        self.images, self.items, self.limit, self.report = images, items, limit, report
        self._noted: set[int] = set()  # unreadable images that this worker has reported

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, first = key
        for index in chain(range(first, self.items), range(first)):
            if index in self._noted:
                continue
            try:
                return self.images[epoch, index]
            except InputError as e:
                self._note(index, e)
        raise InputError(f"none of the {self.items} images is readable: repair them, or use others")

    def _note(self, index: int, error: InputError) -> None:
        """Report an unreadable image. Raises InputError beyond the limit."""
        if self.limit == 0:
            raise InputError(f"{error}, or set {OPTION}=N to replace at most N images") from error
        path, others = str(self.images.paths[index]), None
        if self.report is not None:
            others = report_once(self.report, path, self.limit)
        elif len(self._noted) >= self.limit:
            others = [str(self.images.paths[i]) for i in self._noted]
        if others is not None:
            place = f", listed in {self.report}" if self.report is not None else ""
            raise InputError(
                f"more than {OPTION}={self.limit}: {error}. Others are {first_names(others)}{place}; "
                f"repair or remove them, or allow more"
            ) from error
        self._noted.add(index)


def report_once(report: Path, path: str, limit: int) -> list[str] | None:
    """Add a path to the list unless it is there; one process at a time.

    Returns the listed paths if there are `limit` of them without this one, and None otherwise.
    """
    line = path.replace("\n", " ")
    with writing(report):
        report.parent.mkdir(parents=True, exist_ok=True)
        # Only \n ends a line: names may hold \r.
        with open(report, "a+", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
            file.seek(0)  # not opened again: closing another descriptor would end the lock
            listed = file.read().split("\n")[:-1]
            if line not in listed:
                if len(listed) >= limit:
                    return listed
                file.write(line + "\n")
    return None
