"""What shows the quickstart's models, on small models of the same layout: the notebook and the pictures."""

import ast
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.conftest import execute
from tests.integration.test_bad_input import refused

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/tour.ipynb"


@pytest.fixture(scope="module")
def models(workspace, tmp_path_factory):
    """A folder as quickstart.sh leaves it."""
    folder = tmp_path_factory.mktemp("quickstart")
    parts = {
        "stage1": workspace.stage1_run, "stage2": workspace.tokenizer.parent,
        "cache_val": workspace.cache, "generator": workspace.generator.parent,
    }  # fmt: skip
    for name, made in parts.items():
        (folder / name).symlink_to(made)
    for path in workspace.root.glob("val/*/*.png"):
        target = folder / "data" / path.relative_to(workspace.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((16, 16)).save(target)  # of the tokenizer's size, as the digits are
    return folder


# ---------------------------------------------------------------------- the notebook
def code_cells(models):
    """The source of the notebook's code cells, which find their models in this folder."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    place = 'CHECKOUT / "output/quickstart"'
    assert sources[0].count(place) == 1
    return [sources[0].replace(place, f"Path({str(models)!r})"), *sources[1:]]


def shown_by(source, namespace):
    """Execute a cell as a notebook does: what it displays, and the value of its last line."""
    shown, tree = [], ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    namespace["display"] = shown.append
    exec(compile(tree, "cell", "exec"), namespace)
    if last is not None:
        shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), namespace))
    return [value for value in shown if value is not None]


@pytest.mark.slow
def test_every_cell_of_the_tour_runs(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "docs")  # as Jupyter starts it
    namespace, shown = {}, []
    for source in code_cells(models):
        shown += shown_by(source, namespace)
    assert len(shown) == 11 and all(isinstance(value, Image.Image) for value in shown)
    said = capsys.readouterr().out
    # A causal decoder makes the same pixels of the first codes as of all.
    assert "stage 1: pixels of the upper half change by up to 0.0 of 255" in said
    assert "blindly: 3.47 nats per code" in said and " row 4, 4 codes: " in said


def test_without_models_the_tour_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=r"no finished models: run `bash quickstart\.sh` first"):
        shown_by(code_cells(tmp_path)[0], {})


def test_the_tour_is_small():
    assert NOTEBOOK.stat().st_size < 300_000


# ---------------------------------------------------------------------- the pictures
@pytest.mark.slow
def test_digits_are_completed(models, tmp_path):
    execute("quickstart.completion", models, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").format == "PNG"


@pytest.mark.slow
def test_digits_are_edited(models, tmp_path):
    said = execute("quickstart.editing", models, tmp_path / "a.png").stdout
    assert said.startswith("5 digits, 4 of 16 patches drawn\n")
    rows = [line.split() for line in said.splitlines() if "before the region" in line]
    # A causal decoder cannot change what comes before the first drawn code.
    assert rows[0][:2] == ["stage", "1,"] and rows[0][-3:] == ["100.0%"] * 3
    assert Image.open(tmp_path / "a.png").format == "PNG"


@pytest.mark.parametrize("program", ["completion", "editing"])
def test_a_picture_without_a_place_is_refused(program):
    refused(
        execute(f"quickstart.{program}", check=False), "arguments are required: folder, picture"
    )
