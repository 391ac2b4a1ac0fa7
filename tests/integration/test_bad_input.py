"""A user's mistakes: one line that names the thing and the remedy, status 2, nothing half-written."""

import shutil
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT, execute


def refused(done, *words):
    """The program said no in one line that holds these words."""
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for word in words:
        assert str(word) in lines[0]


@pytest.mark.parametrize("size", ["b", "l", "xl"])
def test_papers_sampling_command_asks_for_the_weights(size, tmp_path):
    done = execute(
        "sample_imagenet.py", f"config=configs/alitok_{size}.yaml",
        f"experiment.output_dir={tmp_path}/alitok_{size}",
        f"experiment.generator_checkpoint={tmp_path}/alitok_{size}.bin", check=False,
    )  # fmt: skip
    refused(done, f"no weights at {tmp_path}/alitok_{size}.bin", "weights/README.md")
    assert not list(tmp_path.iterdir())


def test_papers_pretokenization_command_asks_for_the_weights(workspace, tmp_path):
    done = execute(
        "pretokenization.py", "--img_size", "256", "--batch_size", "32", "--ten_crop",
        "--data_path", workspace.root / "train", "--cached_path", tmp_path / "cache",
        "--tokenizer_checkpoint", tmp_path / "AliTok.pth", check=False,
    )  # fmt: skip
    refused(done, f"no weights at {tmp_path}/AliTok.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train_tokenizer.py", "__main__.py", "."])
def test_published_tokenizer_command_names_ours(command):
    done = subprocess.run(
        [sys.executable, command, "--root", "x"], cwd=ROOT / "train_tokenizer",
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "`python -m train_tokenizer" in done.stderr


@pytest.mark.parametrize(
    "program, config, option, words",
    [
        ("train_ar.py", "generator", "experiment.generator_checkpoint=x", "does not use"),
        ("sample_imagenet.py", "generator", "training.compile=True", "set experiment.compile"),
        (
            "train_tokenizer",
            "stage1",
            "training.max_grad_norm=-1",
            "set at least 0 (the command line)",
        ),
        ("train_tokenizer", "stage1", "experiment.output_dir=.", "a folder of its own"),
    ],
)
def test_option_without_use_or_sense_stops_before_anything_is_written(
    workspace, tmp_path, program, config, option, words
):
    done = execute(
        program, f"config={workspace.root}/{config}.yaml",
        f"experiment.output_dir={tmp_path}/run", option, check=False,
    )  # fmt: skip
    refused(done, option.split("=")[0], words)
    assert not list(tmp_path.iterdir())


def test_environment_that_overrules_the_config_stops_before_anything_is_written(
    workspace, tmp_path
):
    done = execute(
        "train_tokenizer", f"config={workspace.root}/stage1.yaml",
        f"experiment.output_dir={tmp_path}/run", f"dataset.params.train_dir={workspace.root}/train",
        env={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, check=False,
    )  # fmt: skip
    refused(done, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4", "gradient_accumulation_steps=1")
    assert not (tmp_path / "run").exists()


def test_help_ends_quietly_when_its_reader_leaves(tmp_path):
    command = f"{sys.executable} train_ar.py --help 2> {tmp_path}/stderr | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1 and (tmp_path / "stderr").read_text() == ""


def test_stage2_without_a_stage1_checkpoint_stops(workspace, tmp_path):
    run = tmp_path / "run"
    done = execute(
        "train_tokenizer", f"config={workspace.root}/stage2.yaml", f"experiment.output_dir={run}",
        f"dataset.params.train_dir={workspace.root}/train", check=False,
    )  # fmt: skip
    refused(done, "stage 2 needs", "experiment.stage1_checkpoint")
    assert not run.exists()


def test_stage2_refuses_a_generator_as_its_stage1(workspace, tmp_path):
    done = workspace.stage2(tmp_path / "run", workspace.generator, check=False)
    refused(done, "is not a tokenizer but a generator (hidden_size=32, num_hidden_layers=2")
    assert not (tmp_path / "run").exists()


def test_misspelt_option_on_two_ranks_is_said_once(workspace, tmp_path):
    done = workspace.stage1(
        tmp_path / "run", "training.per_gpu_batchsize=2", ranks=2, launcher="torchrun", fresh=True,
        check=False,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "did you mean training.per_gpu_batch_size" in lines[0]
    assert done.returncode != 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_image_is_named(workspace, tmp_path, workers):
    shutil.copytree(workspace.root / "train", tmp_path / "train")
    bad = tmp_path / "train/class1/01.png"
    bad.write_bytes(bad.read_bytes()[:60])
    done = execute(
        "pretokenization.py", "--config", workspace.root / "generator.yaml", "--img_size", "16",
        "--data_path", tmp_path / "train", "--cached_path", tmp_path / "cache",
        "--tokenizer_checkpoint", workspace.tokenizer, "--num_workers", workers, check=False,
    )  # fmt: skip
    refused(done, f"unreadable image {bad}", "repair or remove")
    assert not (tmp_path / "cache").exists()


def test_image_size_that_the_patch_does_not_divide(workspace, tmp_path):
    done = workspace.pretokenize(tmp_path / "cache", "--img_size", "18", check=False)
    refused(done, "image_size=18", "patch_size=4")


def test_image_size_of_other_weights(workspace, tmp_path):
    done = workspace.pretokenize(tmp_path / "cache", "--img_size", "32", check=False)
    refused(done, "image_size=32 (the command line) contradicts", "weights have image_size=16")


def test_cache_of_another_tokenizer_is_refused_before_training(workspace, tmp_path):
    done = workspace.train_ar(
        tmp_path / "run",
        f"experiment.tokenizer_checkpoint={other_tokenizer(workspace, tmp_path)}",
        check=False,
    )
    refused(done, workspace.cache, "another tokenizer", "pretokenize")
    assert not (tmp_path / "run").exists()


def other_tokenizer(workspace, folder):
    from modeling.weights.tensors import read_state_dict, write_state_dict

    state = dict(read_state_dict(workspace.tokenizer))
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"] + 1
    write_state_dict(state, folder / "other.pth")
    return folder / "other.pth"


def test_more_images_in_a_batch_than_there_are(workspace, tmp_path):
    done = workspace.train_ar(tmp_path / "run", "training.per_gpu_batch_size=15", check=False)
    refused(done, "14 images are fewer than the 15")


def test_folder_without_images(workspace, tmp_path):
    (tmp_path / "flat").mkdir()
    shutil.copy(workspace.root / "stage1.yaml", tmp_path / "flat/00.yaml")
    done = workspace.pretokenize(tmp_path / "cache", "--data_path", tmp_path / "flat", check=False)
    refused(done, f"{tmp_path}/flat holds no images", ".jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["flat"]


def test_used_folder_is_refused_without_resume(workspace):
    before = sorted(p.name for p in workspace.stage1_run.iterdir())
    done = workspace.stage1(workspace.stage1_run, "experiment.resume=False", check=False)
    refused(done, "already holds step-00000006", "experiment.resume=True", "experiment.output_dir")
    assert sorted(p.name for p in workspace.stage1_run.iterdir()) == before
