"""One run a folder: a lock that the operating system takes back when its holder dies."""

import fcntl
from pathlib import Path
from typing import IO

from modeling.errors import InputError
from modeling.files import writing


def lock_folder(folder: Path) -> IO[str]:
    """Lock a folder, made if need be, for this process; keep the returned file open.

    Raises InputError while another process holds it, or where nothing can be written. A dead
    process holds nothing, whatever it left behind: neither a file nor data workers, which would
    inherit the lock of `flock` and live some seconds longer.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - its lifetime is the lock's
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # POSIX leaves the choice
        file.close()
        raise InputError(
            f"{folder} is in use by another run: wait for it, or give another folder"
        ) from e
    except OSError:
        pass  # a file system without locks
    return file
