"""What quickstart.sh and tests/run.sh set up before they start Python."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPIN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    "user, expected",
    [
        ({}, [None, "10000"]),
        ({"GOMP_SPINCOUNT": "7"}, [None, "7"]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", None]),
    ],
    ids=["nothing", "spin count", "policy"],
)
def test_openmp_spins_briefly_unless_the_user_chose(tmp_path, user, expected):
    requirements = (ROOT / "requirements.txt").read_text()
    (tmp_path / ".installed-requirements.txt").write_text(requirements * 2)  # nothing to install
    env = {name: value for name, value in os.environ.items() if name not in SPIN}
    done = subprocess.run(
        ["bash", "-euc", "source tests/environment.sh requirements.txt; env"],
        cwd=ROOT, env={**env, "VIRTUAL_ENV": str(tmp_path), **user}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    variables = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert [variables.get(name) for name in SPIN] == expected
