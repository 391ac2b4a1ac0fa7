"""The study of the ablation in miniature: the real commands, a few steps, sixty images."""

import json
import shutil

import pytest

from quickstart.digits import write_digits
from tests.integration.conftest import execute
from tests.integration.test_bad_input import refused
from training.plot import run_records


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "all")
    for split, count in (("train", 6), ("val", 3)):
        for digit in range(10):
            target = root / "few" / split / str(digit)
            target.mkdir(parents=True)
            for file in sorted((root / "all" / split / str(digit)).iterdir())[:count]:
                shutil.copy(file, target)
    return root / "few"


def study(output, images, *arguments, **kwargs):
    return execute(
        "experiments.alignment.ablation", f"--output={output}", "--jobs=2", "--seeds=42",
        f"--vary=data={images},steps=0.003", *arguments, timeout=1200, **kwargs,
    )  # fmt: skip


@pytest.mark.slow
def test_the_study_in_miniature(tmp_path, images):
    first = study(tmp_path, images, "--rows", "aux", "stage2").stdout
    [root] = (tmp_path / "vary").iterdir()
    found = json.loads((root / "results.json").read_text())
    rows = {row["row"]: row["figures"] for row in found["rows"]}
    assert list(rows) == ["aux", "stage2"]
    assert [row["tokens"]["mean"] for row in rows.values()] == [73, 73]
    assert rows["aux"]["nats"] == rows["stage2"]["nats"]
    assert rows["aux"]["psnr"] != rows["stage2"]["psnr"]
    for figures in rows.values():
        assert 0 < figures["nats"]["mean"] < 10 and 5 < figures["psnr"]["mean"] < 40
        assert 0 <= figures["recognised"]["mean"] <= 1 and figures["fid"]["mean"] > 0
    # The generator's own validation is the likelihood of the same weights and views.
    validation = run_records(root / "seed_42/aux/generator")[-1]["val/loss"]
    assert rows["aux"]["nats"]["mean"] == pytest.approx(validation, rel=1e-4)
    assert "seed 42 aux: stage2 took" in first
    # With stage 2 the folder has the layout of a quickstart.
    folder = root / "seed_42/aux"
    assert sorted(p.parent.name for p in folder.glob("*/metrics.jsonl")) == [
        "generator", "stage1", "stage2"
    ]  # fmt: skip
    execute("quickstart.reference", folder, f"--output={tmp_path / 'reference'}")

    inside = json.loads((root / "inside/seed_42/inside.json").read_text())
    assert [row["name"] for row in inside["rows"]] == ["aux"]

    # Once more: only what is missing is made, and the figures are the same.
    (folder / "scores_stage2.json").unlink()
    again = study(tmp_path, images, "--rows", "aux", "stage2").stdout
    assert again.splitlines()[-1].startswith("1 commands in")
    assert json.loads((root / "results.json").read_text())["rows"] == found["rows"]


@pytest.mark.slow
def test_the_mistake_of_a_command_is_the_last_word(tmp_path, images):
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    shutil.rmtree(broken / "val")
    (broken / "val").mkdir()
    done = study(tmp_path / "out", broken, "--rows", "causal", check=False)
    refused(done, "seed 42 causal: stage1 failed:")


@pytest.mark.parametrize(
    "vary, said",
    [
        ("depth=3", "--vary depth=3: pass NAME=VALUE with one of position_init"),
        ("data=configs", "no train/ in configs: pass a folder"),
    ],
)
def test_a_variation_that_cannot_be_ends_in_one_line(tmp_path, vary, said):
    done = execute(
        "experiments.alignment.ablation", f"--output={tmp_path / 'out'}", f"--vary={vary}", check=False
    )  # fmt: skip
    refused(done, said)
    assert not list(tmp_path.glob("out/vary"))
