"""How every program begins and ends: its arguments, and errors in one line."""

import contextlib
import errno
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

SPACE, RIGHTS = "make room", "change its permissions or choose another place"
REMEDIES = {
    errno.ENOSPC: SPACE, errno.EDQUOT: SPACE, errno.EFBIG: SPACE,
    errno.ENAMETOOLONG: "choose a shorter name", errno.ENOTDIR: "choose another place",
    errno.EROFS: RIGHTS, errno.EACCES: RIGHTS, errno.EPERM: RIGHTS,
}  # fmt: skip
READER_GONE = 128 + signal.SIGPIPE  # as the shell reports other programs


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a program's `main(arguments)`; a user's mistake ends it with one line and status 2.

    So does a full disk or a closed folder, wherever the program meets it. A reader that closes the
    pipe (`| head`) ends it quietly.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except SystemExit:
        if reader_is_gone():
            leave(READER_GONE)
        raise
    except Exception as e:
        if isinstance(e, BrokenPipeError) and reader_is_gone():
            leave(READER_GONE)
        if isinstance(e, InputError):
            # A DataLoader's worker wraps the message into its traceback; the line itself comes last.
            message = str(e).rsplit("InputError: ")[-1].strip()
        elif isinstance(e, OSError) and e.errno in REMEDIES:
            message = f"{e.filename or 'a file'}: {e.strerror}; {REMEDIES[e.errno]}, then try again"
        else:
            traceback.print_exc()
            leave(1)
        # Every rank meets the same mistake. Rank 0 reports it first, and the launcher ends the
        # others while they wait; a mistake that only another rank met is reported all the same.
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a trainer only notes the launcher's
            time.sleep(3)
        report(f"error: {one_line(message)}")
        leave(2)
    except KeyboardInterrupt:
        report("stopped; the same command resumes from what is saved")
        leave(130)


def one_line(message: str) -> str:
    """A message in one readable line, whatever values of the user's it quotes."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    return re.sub(r"\S{300,}", lambda match: f"{match[0][:250]}…", line)


def report(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr)


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
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

    Other ranks may still wait in the collective. Data workers outlive the one signal that the
    interpreter sends them at its exit (`runtime.signals`), and it would wait for them forever.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
