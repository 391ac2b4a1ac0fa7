"""README's commands for a user's own images, in tiny form: the presets as they are, smaller weights."""

import numpy as np

from data.tokens import open_tokens
from modeling.weights.metadata import GENERATOR
from modeling.weights.opened import open_weights
from tests.tars import flattened


def test_images_without_classes_are_encoded_trained_on_scored_and_sampled(
    workspace, warm, tmp_path
):
    """The user counts no classes and states no sizes."""
    for split in ("train", "val"):
        flattened(workspace.root / split, tmp_path / "photos" / split)
        warm.ok(
            "pretokenization.py", "--ten_crop", "--data_path", tmp_path / "photos" / split,
            "--cached_path", tmp_path / split, "--tokenizer_checkpoint", workspace.tokenizer,
            "--num_workers", 0,
        )  # fmt: skip
    assert open_tokens(tmp_path / "train").classes == ["images"]
    tokenizer = f"experiment.tokenizer_checkpoint={workspace.tokenizer}"
    generator = f"experiment.output_dir={tmp_path}/generator"
    said = warm.ok(
        "train_ar.py", "config=configs/finetune_generator.yaml", generator, tokenizer,
        f"experiment.init_weights={workspace.generator}",
        f"dataset.params.pretokenization={tmp_path}/train",
        f"dataset.params.val_pretokenization={tmp_path}/val", "dataset.params.num_workers_per_gpu=0",
        "training.max_train_steps=2", "training.per_gpu_batch_size=4", "experiment.generate_every=2",
    )  # fmt: skip
    assert "1 class of 1 configured (images)" in said and "1 instead of 3 classes" in said
    about = open_weights(tmp_path / "generator", GENERATOR).about
    assert about.classes == ["images"] and about.config["hidden_size"] == 32
    best = tmp_path / "generator/generator_best.bin"
    warm.ok("evaluate.py", "--generator", best, "--cache", tmp_path / "val")
    decoder = f"experiment.output_dir={tmp_path}/decoder"
    warm.ok(
        "train_tokenizer", "config=configs/finetune_decoder.yaml", decoder,
        f"experiment.init_weights={workspace.tokenizer}",
        f"dataset.params.train_dir={tmp_path}/photos/train",
        f"dataset.params.val_dir={tmp_path}/photos/val", "dataset.params.num_workers_per_gpu=0",
        "training.per_gpu_batch_size=4", "phases=[{steps: 2, learning_rate: 1.0e-5}]",
    )  # fmt: skip
    warm.ok(
        "sample_imagenet.py", f"config={tmp_path}/generator",
        f"experiment.output_dir={tmp_path}/samples", f"experiment.generator_checkpoint={best}",
        f"experiment.tokenizer_checkpoint={tmp_path}/decoder", "experiment.num_fid_samples=4",
        "experiment.grid=2",
    )  # fmt: skip
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].shape == (4, 16, 16, 3)
