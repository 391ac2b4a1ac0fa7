"""Rooms import one way. An arrow that is not in the table is a decision: change the table with it."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("pretokenization.py", "train_ar.py", "sample_imagenet.py", "evaluate.py")
BELOW = ("data", "configs", "runtime", "modeling")
# Room -> the rooms that it may import; every room may import itself.
ARROWS = {
    "modeling": (),
    "runtime": ("modeling",),
    "configs": ("runtime", "modeling"),
    "data": ("configs", "runtime", "modeling"),
    "training": BELOW,
    "encoding": BELOW,
    "generation": BELOW,
    "evaluation": ("generation", "training", *BELOW),
    "train_tokenizer": ("evaluation", "training", *BELOW),
    "programs": ("evaluation", "encoding", "generation", "training", *BELOW),
    "quickstart": ("evaluation", "generation", "training", *BELOW),
}
# What `modeling` may import from outside the project and the standard library.
MODELING_NEEDS = {"torch", "einops", "numpy", "safetensors"}
# Triton comes with torch on Linux. One file needs it, which is loaded only where it can run.
TRITON_FILES = {"fused_attention.py"}
# What one function needs and everybody else can do without: imported inside it.
OPTIONAL = {
    "hub.py": {"huggingface_hub"},
    "class_names.py": {"torchvision"},
    "photos.py": {"PIL"},
    "pixels.py": {"PIL"},
}


def room_of(file: Path) -> str:
    first = file.relative_to(ROOT).parts[0]
    return "programs" if first in PROGRAMS else first


def imports_of(file: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in it; relative imports are its own room."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


def files_of(room: str) -> list[Path]:
    if room == "programs":
        return [ROOT / name for name in PROGRAMS]
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_the_rooms_below_it(room):
    programs = {name.removesuffix(".py") for name in PROGRAMS}
    for file in files_of(room):
        free = {"benchmarks", "experiments", "tests"}  # may import any room; none imports them
        arrows = (imports_of(file) & (ARROWS.keys() | programs | free)) - {room}
        assert arrows <= set(ARROWS[room]), f"{file.relative_to(ROOT)} imports {arrows}"


def test_every_folder_of_code_is_a_room():
    folders = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("*/*.py")}
    assert folders - {"tests", "benchmarks", "experiments"} == ARROWS.keys() - {"programs"}


def test_the_arrows_make_no_circle():
    done = []
    while len(done) < len(ARROWS):
        ready = [r for r in ARROWS if r not in done and set(ARROWS[r]) & ARROWS.keys() <= set(done)]
        assert ready, f"a circle among {ARROWS.keys() - set(done)}"
        done += ready


def test_modeling_needs_four_packages_alone():
    for file in files_of("modeling"):
        outside = imports_of(file) - sys.stdlib_module_names
        if file.name in TRITON_FILES:
            outside -= {"triton"}
        outside -= OPTIONAL.get(file.name, set())
        assert outside <= MODELING_NEEDS, f"{file.name} imports {outside - MODELING_NEEDS}"


# Each takes from a third of a second to two seconds: as long as torch itself.
SLOW = {"torch._dynamo", "sympy", "torchvision", "torch_fidelity", "timm", "wandb"}


UNLOADED = {
    "modeling": {"torch", "numpy", "modeling.pipeline"},
    "data.tokens": {"accelerate", "omegaconf", "modeling.generator"},
    "modeling.pipeline": {
        "accelerate", "omegaconf", "numpy.testing", "torchvision", "huggingface_hub", "PIL"
    },
    "modeling.engine": {"modeling.fused_attention"},
    "sample_imagenet, pretokenization, evaluate": SLOW,
    "train_ar, train_tokenizer.__main__": SLOW - {"sympy"},  # for sharded weights
    # A borrowed GPU's machine may lack these.
    "benchmarks.evaluation, benchmarks.likelihood, benchmarks.tokenizer_training": {
        "torch_fidelity", "lpips"
    },
}  # fmt: skip
# Each import in a fork of one interpreter: the first before torch, the others after it. What only plots, the
# quickstart and studies need is not there.
SCRIPT = """
import json, os, sys, traceback

def loaded(modules):
    reader, writer = os.pipe()
    if not os.fork():
        try:
            sys.modules.update(dict.fromkeys(["scipy", "sklearn", "matplotlib"]))
            exec(f"import {modules}")
            os.write(writer, json.dumps(sorted(name for name in sys.modules if sys.modules[name])).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if os.wait()[1]:
        sys.exit(1)
    return json.loads(text)

first, *others = json.loads(sys.argv[1])
found = {first: loaded(first)}
import torch
print(json.dumps(found | {modules: loaded(modules) for modules in others}))
"""


@pytest.fixture(scope="module")
def loaded():
    command = [sys.executable, "-c", SCRIPT, json.dumps([*UNLOADED])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("modules", UNLOADED)
def test_an_import_loads_nothing_that_it_does_not_need(loaded, modules):
    assert set(modules.split(", ")) <= set(loaded[modules])
    assert not UNLOADED[modules] & set(loaded[modules])


def test_every_module_that_must_not_load_exists():
    assert all(importlib.util.find_spec(name) for names in UNLOADED.values() for name in names)
