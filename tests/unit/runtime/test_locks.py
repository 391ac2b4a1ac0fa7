import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import InputError
from runtime.files import lock_folder

ROOT = Path(__file__).parents[3]
HOLD = (
    "import sys; from pathlib import Path; from runtime.files import lock_folder;"
    "held = lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def test_a_folder_is_locked_by_the_living_and_free_after_the_dead(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="in use by another run"):
        lock_folder(tmp_path / "run")
    holder.kill()
    holder.communicate()
    lock_folder(tmp_path / "run").close()
