import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# Without what Windows lacks.
AS_ON_WINDOWS = """
import signal, sys
del signal.SIGPIPE, signal.SIGUSR1
sys.modules["fcntl"] = None
sys.platform = "win32"
import train_ar
"""


def test_windows_is_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_WINDOWS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: the programs run on Linux or macOS, not on Windows: use WSL 2\n"
