"""The files of a job, resumed, refused and finished; the real program is in tests/integration."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState

from generation import folder as module
from generation.folder import SampleFolder
from modeling.sampling import NO_CLASS
from modeling.weights.class_names import ClassNames
from runtime import processes
from tests.refusals import refusal


@pytest.fixture
def fill_folder(models, job, tmp_path):
    """Run a job in a folder; returns the folder's object."""

    def start(name="a", codes=None, png=False, grid=0, names=None, **changed):
        used = replace(models, names=names)
        if codes is not None:
            changed |= dict(prefix=torch.from_numpy(codes.astype(np.int64)), count=len(codes))
            used = replace(models, generator=None)
        PartialState(cpu=True)
        made = SampleFolder(tmp_path / name, replace(job, **changed), used, png, grid)
        made.fill()
        return made

    return start


def array(path):
    return np.load(path)["arr_0"]


def test_files_are_those_of_the_docstring(fill_folder, tmp_path):
    made = fill_folder(png=True, grid=2, chunk=3)
    assert array(made.images_file).shape == (8, 16, 16, 3)
    assert array(made.codes_file).dtype == np.uint16
    names = sorted(p.name for p in made.output.iterdir())
    assert names == [".lock", *(f"{i:06d}.png" for i in range(8)), "sampling.json"]
    assert (tmp_path / "a_grid.png").exists()


def test_settings_keep_their_names(fill_folder):
    made = fill_folder(chunk=3)
    settings = json.loads(made.settings_file.read_text())
    assert settings == {
        "images": 8, "tokenizer": "t" * 16, "png": False, "grid": 0, "precision": "fp32",
        "classes": 3, "guidance_scale": 2.0, "guidance_scale_pow": 1.0,
        "guidance_schedule": "power-cosine", "randomize_temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "seed": 5, "compile": False, "generator": "g" * 16, "chunk": 3,
        "encoder_heads": 2, "decoder_heads": 2, "causal": False, "cache": "auto", "prefix": None,
        "engine": "auto",
    }  # fmt: skip


def test_images_of_a_grid_have_the_names_of_their_classes(fill_folder, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        module, "with_captions", lambda images, captions: written.append(captions) or images
    )
    names = ClassNames(3, {0: "ant", 1: "bee"})
    made = fill_folder(grid=2, names=names, classes=(1, 2, NO_CLASS))
    assert written == [["bee", "2", "no class", "bee"]]
    settings = json.loads(made.settings_file.read_text())
    assert settings["classes"] == [1, 2, "none"]
    fill_folder("b", grid=2)  # nothing names them
    fill_folder("c", array(made.codes_file), grid=2, names=names)  # codes without classes
    assert len(written) == 1


@pytest.mark.parametrize(
    "name, other", [("encoder_heads", 4), ("decoder_heads", 4), ("causal", True)]
)
def test_sizes_that_no_shape_shows_belong_to_the_job(fill_folder, models, name, other):
    made = fill_folder(chunk=3)
    made.images_file.unlink()
    models.tokenizer.config = replace(models.tokenizer.config, **{name: other})
    refusal(lambda: fill_folder(chunk=3), name, f"{other} now")


def test_only_missing_chunks_are_made(fill_folder, monkeypatch, tmp_path):
    whole = fill_folder("whole", chunk=3)
    made = []
    original = module.sample_images

    def stop_after_two(engine, tokenizer, job, batches):
        for i, batch in enumerate(original(engine, tokenizer, job, batches)):
            made.append(batch.indices.start)
            if len(made) == 2 and i == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(module, "sample_images", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        fill_folder(chunk=3)
    assert [p.name for p in sorted((tmp_path / "a/chunks").iterdir())] == ["000000.npz"]
    resumed = fill_folder(chunk=3)
    assert made == [0, 3, 3, 6]
    assert resumed.images_file.read_bytes() == whole.images_file.read_bytes()


def test_other_settings_are_refused(fill_folder):
    fill_folder(chunk=3)
    refusal(lambda: fill_folder(chunk=3, seed=6), "seed (5 there, 6 now)")
    refusal(lambda: fill_folder(chunk=3, engine="reference"), "engine (auto there, reference now)")


def test_chunks_of_unknown_settings_are_made_again(fill_folder, monkeypatch, tmp_path):
    """The message of other settings invites to remove sampling.json, without which chunks say nothing."""
    whole = fill_folder("whole", chunk=3, seed=6)
    monkeypatch.setattr(module.SampleFolder, "_assemble", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fill_folder(chunk=3)
    monkeypatch.undo()
    (tmp_path / "a/sampling.json").unlink()
    assert fill_folder(chunk=3, seed=6).images_file.read_bytes() == whole.images_file.read_bytes()


def test_a_process_of_other_weights_or_settings_is_refused(fill_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "on_main", lambda work: {**work(), "generator": "other"})
    refusal(fill_folder, "generator (other on the main process")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_origin_is_not_overwritten(fill_folder, tmp_path):
    (tmp_path / "a.npz").write_bytes(b"mine")
    refusal(fill_folder, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == b"mine"


# ---------------------------------------------------------------------- memory
def test_a_finished_run_needs_no_memory(fill_folder, monkeypatch, capsys):
    made = fill_folder(chunk=3)
    before = made.images_file.read_bytes()
    monkeypatch.setattr(module, "largest_batch", lambda *_: 0)
    fill_folder(chunk=3)
    fill_folder()  # with the size of the chunks left open, too
    assert made.images_file.read_bytes() == before
    assert capsys.readouterr().out.count("is complete: 8 images") == 2


def test_nothing_is_written_where_memory_is_too_low(fill_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "largest_batch", lambda *_: 2)
    refusal(lambda: fill_folder(chunk=3), "experiment.per_proc_batch_size=2")
    assert not list(tmp_path.iterdir())
    fill_folder(chunk=2)
    monkeypatch.setattr(module, "largest_batch", lambda *_: 0)
    refusal(lambda: fill_folder("b"), "memory")


def test_the_process_with_the_least_memory_decides(fill_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "gather_object", lambda mine: [*mine, 2])
    refusal(lambda: fill_folder(chunk=3), "experiment.per_proc_batch_size=2")
    assert not list(tmp_path.iterdir())
    assert json.loads(fill_folder().settings_file.read_text())["chunk"] <= 2


@pytest.mark.parametrize(
    "count, most, chunk, chunks",
    [(50_000, 1024, 893, 56), (50_000, 512, 481, 104), (1024, 1024, 1024, 1), (1025, 1024, 129, 8)],
)
def test_eight_processes_have_about_as_many_chunks_each(count, most, chunk, chunks):
    found = module.even_chunk(count, most)
    assert (found, -(-count // found)) == (chunk, chunks) and found <= most


def test_advice_for_a_folder_with_larger_chunks_can_be_followed(fill_folder, monkeypatch):
    made = fill_folder(chunk=3)
    made.images_file.unlink()  # as if killed at the end
    monkeypatch.setattr(module, "largest_batch", lambda *_: 2)
    for chunk in (None, 3):
        advice = refusal(lambda chunk=chunk: fill_folder(chunk=chunk), "experiment.output_dir")
        size = int(re.search(r"per_proc_batch_size=(\d+)", advice)[1])
    refusal(lambda: fill_folder(chunk=size), "chunk")  # in the same folder it would be refused
    assert fill_folder("another", chunk=size).images_file.exists()
    monkeypatch.undo()
    fill_folder()  # with memory again
    shutil.rmtree(made.output)
