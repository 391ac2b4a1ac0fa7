"""How every program begins and ends: its arguments, and errors in one line."""

import contextlib
import errno
import io
import multiprocessing
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from runtime.errors import InputError

SPACE, RIGHTS = "free some space", "change its permissions or choose another place"
REMEDIES = {
    errno.ENOSPC: SPACE, errno.EDQUOT: SPACE, errno.EFBIG: SPACE,
    errno.ENAMETOOLONG: "choose a shorter name", errno.ENOTDIR: "choose another place",
    errno.EROFS: RIGHTS, errno.EACCES: RIGHTS, errno.EPERM: RIGHTS,
}  # fmt: skip
READER_GONE = 128 + signal.SIGPIPE  # as the shell reports other programs


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a program's `main(arguments)`; a user's mistake ends it with one line and status 2.

    A full disk or a missing permission does the same. A closed pipe (`| head`) ends it silently.
    """
    open_streams()
    if sys.platform == "linux":
        # From Python 3.14 on, data workers would come from a server, which a signal to the process group
        # ends, and which keeps workers alive after their rank.
        multiprocessing.set_start_method("fork", force=True)
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except SystemExit as e:
        if not e.code and reader_is_gone():  # another status says more
            leave(READER_GONE)
        raise
    except Exception as e:
        if isinstance(e, BrokenPipeError) and reader_is_gone():
            leave(READER_GONE)
        if isinstance(e, InputError):
            # A DataLoader's worker wraps the message into its traceback; the line itself comes last.
            message = str(e).rsplit("InputError: ")[-1].strip()
        elif out_of_shared_memory(e):
            message = (
                "/dev/shm is full; data workers pass batches through it: enlarge it (docker run "
                "--shm-size=1g) or use fewer workers (--num_workers, "
                "dataset.params.num_workers_per_gpu; 0: none)"
            )
        elif isinstance(e, OSError) and e.errno in REMEDIES:
            place = e.filename or ("standard output" if stdout_fails(e) else "a file")
            message = f"{place}: {e.strerror}; {REMEDIES[e.errno]}, then try again"
        else:
            traceback.print_exc()
            leave(1)
        # Most mistakes occur on every rank. Rank 0 reports first, and the launcher ends the waiting
        # others; a rank with a mistake of its own reports it after the wait.
        if os.environ.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a trainer would only record it
            time.sleep(3)
        report(f"error: {one_line(message)}")
        leave(2)
    except KeyboardInterrupt:
        report("stopped; finished work is kept")
        leave(130)


def open_streams() -> None:
    """Make printing safe: a closed stream discards its text, and no character fails to encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for good
        elif isinstance(stream, io.TextIOWrapper):
            # By line, so that a file shows what a run says at once, and a killed run loses nothing.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def stdout_fails(error: OSError) -> bool:
    """Whether writing an empty line to standard output fails with this error."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError as e:  # also of a stream that is no file
        return e.errno == error.errno
    return False


def out_of_shared_memory(error: Exception) -> bool:
    """Whether data workers failed because /dev/shm is full (containers have 64 MB by default)."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
        try:
            return os.statvfs("/dev/shm").f_bavail < 16  # pages
        except OSError:
            return False
    words = r"shared memory\(shm\)|out of shared memory"
    return isinstance(error, RuntimeError) and bool(re.search(words, str(error)))


def one_line(message: str) -> str:
    """A message in one printable line, whatever user input it quotes."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    return re.sub(r"\S{300,}", lambda match: f"{match[0][:250]}…", line)


def report(line: str) -> None:
    with contextlib.suppress(OSError):  # a pipe without a reader, a full disk
        print(line, file=sys.stderr)


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe whose reader has closed it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            poll = select.poll()
            poll.register(stream.fileno(), 0)
        except BrokenPipeError:
            return True
        except (OSError, ValueError):
            continue  # closed, or not a file
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            return True
    return False


def leave(status: int) -> NoReturn:
    """Exit at once, without waiting for a collective or for data workers.

    A normal exit would wait forever for data workers, which ignore the one signal that the interpreter
    sends them (`runtime.signals`).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
