"""Programs let OpenMP's threads spin only briefly, unless the user chose."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAMS = [
    "train_ar.py",
    "sample_imagenet.py",
    "pretokenization.py",
    "evaluate.py",
    "train_tokenizer/__main__.py",
    "evaluation/sweep.py",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_is_the_first_import_of_every_program(program):
    body = ast.parse((ROOT / program).read_text()).body
    first = next(node for node in body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert isinstance(first, ast.Import) and first.names[0].name == "runtime.openmp"


@pytest.mark.parametrize(
    "user, expected",
    [
        ({}, "10000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "passive"}, "None passive"),
    ],
    ids=["nothing", "spin count", "policy"],
)
def test_a_choice_of_the_user_stays(user, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in names}
    code = f"import runtime.openmp, os, sys; assert 'torch' not in sys.modules; print(*map(os.environ.get, {names}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env | user, text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == expected
