"""How every program begins and ends: its arguments, and errors in one line."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from runtime.errors import InputError

NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a program's `main(arguments)`; a user's mistake ends it with one line and status 2.

    So does a full disk or a closed folder, wherever the program meets it.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except Exception as e:
        if isinstance(e, InputError):
            # A DataLoader's worker wraps the message into its traceback; the line itself comes last.
            message = str(e).rsplit("InputError: ")[-1].strip()
        elif isinstance(e, OSError) and e.errno in NO_PLACE:
            message = f"{e.filename or 'a file'}: {e.strerror}; make room or rights, and try again"
        else:
            traceback.print_exc()
            leave(1)
        # Every rank finds the same mistake. Rank 0 says it first, and the launcher ends the others
        # while they wait; a mistake that only another rank found is still said.
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a trainer only notes the launcher's
            time.sleep(3)
        print(f"error: {message}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
        leave(130)


def leave(status: int) -> NoReturn:
    """Exit at once: neither for a collective that others still wait in, nor for data workers.

    These outlive the one signal that the interpreter sends them on its own way out
    (`runtime.signals`), and it would wait for them for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
