"""One run a folder: a lock that the operating system takes back when its holder dies."""

import fcntl
from pathlib import Path
from typing import IO

from modeling.errors import InputError


def lock_folder(folder: Path) -> IO[str]:
    """Lock a folder for this process until it ends; keep the returned file open.

    Raises InputError while another process holds it. A dead process holds nothing, whatever it
    left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")  # noqa: SIM115 - its lifetime is the lock's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise InputError(
            f"{folder} is in use by another run: wait for it, or give another experiment.output_dir"
        ) from e
    except OSError:
        pass  # a file system without locks
    return file
