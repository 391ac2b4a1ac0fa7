import subprocess
import sys
from pathlib import Path

from runtime.files import lock_folder
from tests.refusals import refusal

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
    refusal(lambda: lock_folder(tmp_path / "run"), tmp_path / "run", "in use")
    holder.kill()
    holder.communicate()
    lock_folder(tmp_path / "run").close()
