"""Files that say what they are, through the real programs: no sizes, no numbers, no wrong pairs."""

import json

import numpy as np
import pytest

from modeling.pipeline import Pipeline
from modeling.weights.metadata import TOKENIZER
from modeling.weights.tensors import read_model
from tests.integration.conftest import execute
from tests.integration.test_bad_input import refused

BARE = "{model: {generator: {guidance_scale: 2.0}}, experiment: {per_proc_batch_size: 3}}"
FILES = ("experiment.num_fid_samples=4", "experiment.save_png=False", "experiment.grid=2")


@pytest.fixture
def sample(workspace, tmp_path):
    """Sample with a config that names no sizes."""
    (tmp_path / "bare.yaml").write_text(BARE)
    workspace.generator  # noqa: B018 - makes both runs

    def start(name, generator, tokenizer, *options, check=True):
        return execute(
            "sample_imagenet.py", f"config={tmp_path}/bare.yaml", f"experiment.output_dir={tmp_path}/{name}",
            f"experiment.generator_checkpoint={workspace.root}/{generator}",
            f"experiment.tokenizer_checkpoint={workspace.root}/{tokenizer}", *FILES, *options,
            check=check,
        )  # fmt: skip

    return start


@pytest.mark.slow
def test_files_of_runs_need_no_sizes_and_classes_go_by_name(workspace, sample, tmp_path):
    names = "experiment.classes=[class2, none, class0]"
    workspace.sample(tmp_path / "numbers", *FILES, "experiment.classes=[2,none,0]")
    expected = np.load(tmp_path / "numbers.npz")["arr_0"]
    for name, *files in (
        ("files", "run_ar/generator.safetensors", "run2/tokenizer.safetensors"),
        ("runs", "run_ar", "run2"),
    ):
        sample(name, *files, names)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npz")["arr_0"], expected)
    settings = json.loads((tmp_path / "files/sampling.json").read_text())
    assert settings["classes"] == [2, "none", 0]
    paths = workspace.root / "run_ar", workspace.root / "run2/tokenizer.safetensors"
    images = Pipeline(*paths, device="cpu")(
        ["class2", None, "class0", 2], seed=42, guidance_scale=2.0, guidance_scale_pow=1.8
    )
    np.testing.assert_array_equal(images.numpy(), expected)


@pytest.mark.slow
def test_the_tokenizer_of_other_codes_and_a_name_of_no_class_are_refused(
    workspace, sample, tmp_path
):
    files = "run_ar/generator.safetensors", "run1/checkpoints/step-00000003/tokenizer.safetensors"
    refused(
        sample("a", *files, check=False), "models the codes of another tokenizer", "step-00000003"
    )
    done = workspace.sample(tmp_path / "a", "experiment.classes=[klass1]", check=False)
    refused(done, "no class is called klass1: the nearest name is class1 (class 1)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.yaml"]


@pytest.mark.slow
def test_pretokenization_and_stage_2_read_what_the_file_states(workspace, tmp_path):
    tokenizer = workspace.tokenizer.with_suffix(".safetensors")
    arguments = ["--batch_size", 3, "--data_path", workspace.root / "train", "--num_workers", 1,
                 "--ten_crop", "--tokenizer_checkpoint", tokenizer]  # fmt: skip
    execute("pretokenization.py", *arguments, "--cached_path", tmp_path / "cache")
    for file in workspace.cache.glob("*.bin"):
        assert (tmp_path / "cache" / file.name).read_bytes() == file.read_bytes()
    wrong = [*arguments, "--cached_path", tmp_path / "wrong", "--img_size", 32]
    refused(execute("pretokenization.py", *wrong, check=False), "image_size=32 (the command line)")
    options = ["model.vq_model.encoder_heads=4"]
    done = workspace.stage2(tmp_path / "run", workspace.stage1_run, *options, check=False)
    refused(
        done, "model.vq_model.encoder_heads=4 contradicts", "whose weights have encoder_heads=2"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_tokenizers_of_both_stages_state_the_same_codes(workspace):
    first, second = (
        read_model(run / "tokenizer.pth", "tokenizer")[1]
        for run in (workspace.stage1_run, workspace.tokenizer.parent)
    )
    assert (first.kind, first.stage, second.stage) == (TOKENIZER, 1, 2)
    assert first.tokenizer == second.tokenizer
    assert first.config["causal"] and not second.config["causal"]
