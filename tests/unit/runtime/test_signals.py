import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, signal, time
from datetime import timedelta
from runtime.signals import PATIENCE, StopSignal
stop = StopSignal(timedelta(minutes=1))
assert not stop.agreed()
os.kill(os.getpid(), signal.{name})
assert stop.agreed()
os.kill(os.getpid(), signal.{name})
print("still here", flush=True)  # the same request, passed on by someone else
time.sleep(PATIENCE + 0.1)
os.kill(os.getpid(), signal.{name})
print("never")
"""


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_first_signal_asks_and_the_second_ends(name, status):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "still here\n" and done.returncode == status, done.stderr
