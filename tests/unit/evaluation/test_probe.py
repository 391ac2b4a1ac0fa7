"""A linear probe on an encoder's tokens and latents."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

from evaluation import probe
from evaluation.probe import fit, probe_features
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import TOKENIZER, about_model
from modeling.weights.tensors import write_state_dict
from tests.refusals import refusal
from tests.tiny import tiny_tokenizer

SIZES = tiny_tokenizer(encoder_layers=2)


def clusters(count, classes=3, width=5, seed=0):
    """Points (count, width) around one centre per class, too close to be told apart always, and labels."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    return centres[labels] + torch.randn(count, width, generator=rng), labels


def test_the_probe_is_the_logistic_regression_of_scikit_learn():
    x, y = clusters(90)
    for penalty in (1e-1, 1e-3):
        ours = torch.nn.Linear(5, 3)
        fit(ours, x, y, penalty)
        theirs = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=10_000).fit(x, y)
        logits = x.double().numpy() @ theirs.coef_.T + theirs.intercept_
        expected = torch.from_numpy(logits).softmax(1).float()
        torch.testing.assert_close(ours(x).softmax(1), expected, atol=2e-3, rtol=0)


def test_scale_and_place_of_the_features_do_not_matter():
    (x, y), (val, val_y) = clusters(90), clusters(300, seed=1)
    scale, shift = torch.tensor([1e-3, 1, 30, 1e3, 1]), torch.tensor([5.0, 0, -3, 4e3, 1])
    plain = probe_features(x, y, val, val_y, 3)
    scaled = probe_features(x * scale + shift, y, val * scale + shift, val_y, 3)
    assert scaled["top1"] == pytest.approx(plain["top1"], abs=0.011)
    assert scaled["penalty"] == plain["penalty"] and 0.5 < plain["top1"] < 1


def test_noise_gets_a_strong_penalty_and_a_constant_feature_no_harm():
    (x, y), (val, val_y) = clusters(300), clusters(300, seed=1)
    noise = torch.randn(600, 150, generator=torch.Generator().manual_seed(3))
    found = probe_features(
        torch.cat([x, noise[:300], torch.ones(300, 1)], 1), y,
        torch.cat([val, noise[300:], torch.ones(300, 1)], 1), val_y, 3,
    )  # fmt: skip
    assert found["penalty"] >= 0.1 and found["top1"] > 0.5


# ---------------------------------------------------------------------- the program
def write_images(folder, count, classes=("a", "b"), size=(16, 16)):
    """Images of two classes that differ in brightness, with noise."""
    rng = np.random.default_rng(count)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = 60 + 130 * label + rng.integers(-40, 40, (*size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture
def start(fill, tmp_path, capsys):
    write_images(tmp_path / "data/train", 12)
    write_images(tmp_path / "data/val", 5)
    state = fill(Tokenizer(SIZES)).state_dict()
    write_state_dict(state, tmp_path / "t.safetensors", about_model(TOKENIZER, SIZES, stage=2))

    def run(*flags, tokenizer="t.safetensors"):
        probe.main([
            f"--tokenizer={tmp_path / tokenizer}", f"--data_path={tmp_path}/data", "--num_workers=0",
            "--device=cpu", "--batch_size=5", *flags,
        ])  # fmt: skip
        return capsys.readouterr().out

    return run


def test_brightness_is_read_from_tokens_and_from_latents(start):
    said = start()
    result = json.loads(said.splitlines()[-1])
    assert result["layer"] == 2 and result["images"] == [24, 10] and result["classes"] == 2
    widths = {"tokens after block 2, mean": 16, "latents, mean": 4, "latents, all": 28}
    assert list(result["probes"]) == list(widths)
    for name, width in widths.items():
        one = result["probes"][name]
        assert one["top1"] == 1.0
        row = next(line for line in said.splitlines() if line.lstrip().startswith(name))
        assert row.split()[-4:] == [str(width), f"{one['penalty']:g}", "100.0%", "100.0%"]
    assert "24 training and 10 validation images of 2 classes" in said


def test_labels_of_the_validation_images_are_those_of_the_classes_names(start, tmp_path):
    (tmp_path / "data/val/a").rename(tmp_path / "a")  # b alone is left: label 0 in its own listing
    assert json.loads(start().splitlines()[-1])["probes"]["latents, all"]["top1"] == 1.0
    write_images(tmp_path / "data/val", 1, ("c",))
    refusal(start, "data/val", "c")


def test_the_layer_is_the_one_asked_for(start, monkeypatch):
    asked, features = [], Tokenizer.features
    monkeypatch.setattr(
        Tokenizer, "features", lambda *args: asked.append(args[2]) or features(*args)
    )
    assert "tokens after block 1, mean" in start("--layer=1") and set(asked) == {1}
    refusal(lambda: start("--layer=3"), "layer=3", "1…2")


def test_what_cannot_be_probed_is_refused(start, tmp_path):
    refusal(lambda: start(tokenizer="none.pth"), tmp_path / "none.pth")
    (tmp_path / "data/train/b").rename(tmp_path / "b")
    refusal(start, tmp_path / "data/train", "two classes")
    (tmp_path / "data/train/a").rename(tmp_path / "a")
    refusal(start, tmp_path / "data/train")
