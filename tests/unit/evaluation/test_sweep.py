import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluation.evaluator
import generation.job
from evaluation import sweep
from modeling.generator import GeneratorConfig
from modeling.tokenizer import TokenizerConfig
from modeling.weights.metadata import GENERATOR, about_model
from tests.inception import TinyFeatures
from tests.refusals import refusal

CONFIG = """
experiment: {{name: {name}, generator_checkpoint: {name}.bin}}
model:
  vq_model: {{image_size: 8, patch_size: 4}}
  generator: {{image_seq_len: 7}}
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """An empty folder with a reference, and a sampler whose images grow paler with the scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(evaluation.evaluator.NETWORKS, "inception", TinyFeatures)
    for name in "cd":
        (tmp_path / f"{name}.yaml").write_text(CONFIG.format(name=name))
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 100, (16, 8, 8, 3), dtype=np.uint8)
    np.savez("reference.npz", noise)
    sampled = []

    class Folder(sweep.SampleFolder):
        def fill(self):
            sampled.append(self.job)
            self.output.mkdir(parents=True)
            shift = self.job.sampling.guidance_scale * 10 + self.job.sampling.guidance_scale_pow
            np.savez(self.images_file, (noise[: self.count] + shift).astype(np.uint8))
            return self.images_file

    monkeypatch.setattr(sweep, "SampleFolder", Folder)
    sampled_from = {"tokenizer": "t", "generator": "g"}
    models = generation.job.Models(
        hashes=sampled_from,
        tokenizer=SimpleNamespace(config=TokenizerConfig(image_size=8, patch_size=4)),
        generator=SimpleNamespace(config=GeneratorConfig()),
        device=torch.device("cpu"),
    )
    monkeypatch.setattr(generation.job, "load_models", lambda *_: models)
    about = about_model(GENERATOR, GeneratorConfig())
    opened = SimpleNamespace(about=about)
    monkeypatch.setattr(generation.job, "open_models", lambda options: (options, opened, opened))
    return SimpleNamespace(sampled=sampled, models=models)


ARGUMENTS = ["--reference=reference.npz", "--num_samples=16", "--output=out", "config=c.yaml"]
GRID = ["--scales=2,0.5", "--powers=1,3"]


def test_every_cell_is_sampled_scored_and_shown(jobs, tmp_path, capsys):
    sweep.main([*ARGUMENTS, *GRID])
    assert [job.sampling.guidance_scale for job in jobs.sampled] == [2.0, 2.0, 0.5, 0.5]
    assert [job.sampling.guidance_scale_pow for job in jobs.sampled] == [1.0, 3.0] * 2
    assert {job.count for job in jobs.sampled} == {16}
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if " / " in line][1:]
    assert [row[0] for row in rows] == ["2", "0.5"]
    assert said.count("*") == 2 and rows[1][3].endswith("*")  # the legend, and the palest shift
    result = json.loads((tmp_path / "out/scale2_power3.json").read_text())
    assert f"{result['metrics']['gFID']:.2f}" == rows[0][4]
    assert result["samples"]["images"] == 16
    assert result["weights"] == {"tokenizer": "t", "generator": "g"}
    assert not list(tmp_path.glob("out/*.npz")) and not (tmp_path / "out/scale2_power3").exists()


def test_a_config_that_was_edited_is_another_sweep(jobs, tmp_path):
    sweep.main([*ARGUMENTS, *GRID])
    config = tmp_path / "c.yaml"
    config.write_text(config.read_text().replace("image_seq_len: 7", "image_seq_len: 7, top_k: 3"))
    refusal(lambda: sweep.main([*ARGUMENTS, *GRID]), "top_k", "--output")


def test_finished_cells_are_not_sampled_again(jobs, capsys):
    sweep.main([*ARGUMENTS, "--scales=2", "--powers=1"])
    sweep.main([*ARGUMENTS, *GRID])
    assert len(jobs.sampled) == 4  # one, and the three that were missing
    sweep.main([*ARGUMENTS, *GRID])
    assert len(jobs.sampled) == 4


@pytest.mark.parametrize("other", ["--num_samples=12", "config=d.yaml"])
def test_results_of_other_settings_are_not_mixed_in(jobs, other):
    sweep.main([*ARGUMENTS, "--scales=2", "--powers=1"])
    arguments = [a for a in ARGUMENTS if a.split("=")[0] != other.split("=")[0]]
    refusal(lambda: sweep.main([*arguments, other, "--scales=2", "--powers=1"]), "--output")
    assert len(jobs.sampled) == 1


@pytest.mark.parametrize("part", ["tokenizer", "generator"])
def test_results_of_other_weights_behind_the_same_path_are_not_mixed_in(jobs, part):
    sweep.main([*ARGUMENTS, "--scales=2", "--powers=1"])
    jobs.models.hashes = {**jobs.models.hashes, part: "another"}
    refusal(lambda: sweep.main([*ARGUMENTS, *GRID]), part, "another", "--output")
    assert len(jobs.sampled) == 1


@pytest.mark.parametrize(
    "argument, named",
    [
        ("--scales=2,x", "2,x"),
        ("model.generator.guidance_scale=3", "the sweep"),  # which sets it itself
        ("model.generator.guidance_scale_pow=3", "the sweep"),
        ("experiment.output_dir=x", "the sweep"),
        ("experiment.codes=x.npz", "experiment.codes=x.npz"),
        ("model.generator.guidance_schedule=steep", "steep"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(jobs, argument, named):
    refusal(lambda: sweep.main([*ARGUMENTS, *GRID, argument]), argument.split("=")[0], named)
    assert not jobs.sampled


@pytest.mark.parametrize("given", ["codes: x.npz", "edit: x.png, mask: '0,0,4,4'"])
def test_codes_in_the_config_are_refused_too(jobs, tmp_path, given):
    text = (tmp_path / "c.yaml").read_text().replace("{name", f"{{{given}, name")
    (tmp_path / "c.yaml").write_text(text)
    refusal(lambda: sweep.main([*ARGUMENTS, *GRID]), f"experiment.{given[:4]}")


def test_a_damaged_cell_is_named_with_its_remedy(jobs, tmp_path):
    sweep.main([*ARGUMENTS, *GRID])
    cell = tmp_path / "out/scale2_power1.json"
    for damage in (cell.read_text()[:100], "{}"):
        cell.write_text(damage)
        refusal(lambda: sweep.main([*ARGUMENTS, *GRID]), "out/scale2_power1.json", "remove it")
