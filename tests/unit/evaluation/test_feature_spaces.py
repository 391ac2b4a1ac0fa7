"""evaluate.py --features: Inception's and DINOv2's spaces through one collector and one reference."""

import json
from functools import partial

import numpy as np
import pytest
import torch

import evaluate
from evaluation import evaluator, statistics
from evaluation.features import DINOV2_FILE, DINOv2
from evaluation.metrics import frechet_distance, precision_recall
from tests.dinov2 import write_random_dinov2
from tests.inception import TinyFeatures
from tests.refusals import refusal


class TinyDINOv2(TinyFeatures):
    """Only pooled features, of other tiles, as DINOv2's network has them."""

    name, file, package = "dinov2", DINOV2_FILE, "timm"
    widths = (9, 0, 0)
    published = None

    def __init__(self, device="cpu", weights=None, identity="dinov2-tiny 1"):
        super().__init__(device, weights, identity)


@pytest.fixture
def score(nowhere, monkeypatch, capsys):
    """Run evaluate.py on 9 and 12 small images; returns the JSON result and all that it said."""
    rng = np.random.default_rng(0)
    for name, count in (("samples", 9), ("reference", 12)):
        np.savez(nowhere / f"{name}.npz", rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8))
    monkeypatch.setitem(evaluator.NETWORKS, "inception", TinyFeatures)
    monkeypatch.setitem(evaluator.NETWORKS, "dinov2", TinyDINOv2)

    def start(*argv, reference="reference.npz"):
        common = ["--samples=samples.npz", "--num_samples=9", "--batch_size=4", "--device=cpu"]
        evaluate.main([*common, f"--reference={reference}", *argv])
        said = capsys.readouterr().out
        return json.loads(said.strip().splitlines()[-1]), said

    return start


def features_of(path, network):
    pixels = torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)
    return network(pixels)[0]


def test_both_spaces_give_their_figures(score):
    result, said = score("--features=inception,dinov2")
    (other,) = result["other_features"]
    ours, theirs = (features_of(f"{n}.npz", TinyDINOv2()) for n in ("samples", "reference"))
    metrics = other["metrics"]
    assert metrics["FD_DINOv2"] == pytest.approx(frechet_distance(ours, theirs), rel=1e-6)
    precision, recall = precision_recall(theirs, ours)
    assert (metrics["precision_DINOv2"], metrics["recall_DINOv2"]) == (precision, recall)
    assert metrics.keys() == {"FD_DINOv2", "precision_DINOv2", "recall_DINOv2"}
    assert result["metrics"]["gFID"] > 0 and result["metrics"]["sFID"] is not None
    assert other["protocol"]["network"] == "dinov2-tiny 1"
    assert "FD_DINOv2" in said and "gFID" in said
    alone, _ = score("--features=dinov2")
    assert alone["metrics"] == metrics and "other_features" not in alone
    assert score()[0]["metrics"] == result["metrics"]  # Inception's alone, as ever


def test_a_saved_reference_stands_for_the_images(score, monkeypatch):
    images, _ = score("--features=dinov2", "--save_stats=stats.npz")
    stored, _ = score("--features=dinov2", reference="stats.npz")
    assert stored["metrics"] == images["metrics"]
    calls = []
    monkeypatch.setattr(evaluator.Evaluator, "evaluate", lambda *_: calls.append(1))
    for features in ("inception", "dinov2,inception"):
        call = partial(score, f"--features={features}", reference="stats.npz")
        refusal(call, "stats.npz", "dinov2-tiny 1", "here tiny", "--save_stats")
    assert not calls  # before minutes go into the samples
    refusal(lambda: score("--features=inception,dinov2", "--save_stats=s.npz"), "--save_stats")


def test_moments_of_an_unnamed_space_are_inceptions(score, nowhere):
    # As ADM's file: moments of a larger set, and images.
    images = np.load("reference.npz")["arr_0"]
    moments = {"mu": np.zeros(12), "sigma": np.eye(12), "mu_s": np.zeros(6), "sigma_s": np.eye(6)}
    np.savez("adm.npz", arr_0=images, **moments)
    expected, _ = score("--features=dinov2")
    assert score("--features=dinov2", reference="adm.npz")[0]["metrics"] == expected["metrics"]
    np.savez("moments.npz", mu=np.zeros(9), sigma=np.eye(9))
    call = partial(score, "--features=dinov2", reference="moments.npz")
    refusal(call, "moments.npz", "inception, here dinov2")


def test_features_without_weights_leave_the_others_and_fail(score, nowhere, monkeypatch, capsys):
    monkeypatch.setitem(evaluator.NETWORKS, "dinov2", DINOv2)
    # The program ends with it: status 2.
    refusal(lambda: score("--features=inception,dinov2"), "dinov2 features", DINOV2_FILE)
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["metrics"]["gFID"] > 0
    refusal(lambda: score("--features=dinov2"), "dinov2 features", DINOV2_FILE)
    (nowhere / "weights").mkdir()
    write_random_dinov2(nowhere / "weights" / DINOV2_FILE, layers=1, width=384)
    # A file that is there and wrong is refused before anything is computed.
    refusal(lambda: score("--features=inception,dinov2"), DINOV2_FILE, "ViT-L/14")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("features", ["clip", "inception,inception", ""])
def test_unknown_features_are_refused(score, features):
    refusal(lambda: score(f"--features={features}"), f"--features {features}", "inception, dinov2")


def test_infinite_features_name_their_own_file(score, monkeypatch):
    monkeypatch.setattr(
        TinyDINOv2, "__call__", lambda self, x: (x.new_full((len(x), 9), torch.nan, dtype=torch.float32), x[:, :0, 0, 0], x[:, :0, 0, 0])
    )  # fmt: skip
    refusal(lambda: score("--features=dinov2"), "reference.npz", DINOV2_FILE)


def test_no_statistics_are_kept_of_what_the_space_has_not(score):
    collector = statistics.Collector("x", 5, (8, 8), TinyDINOv2())
    collector.add(0, torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8))
    side = collector.finish()
    assert side.parts.keys() == {"pool", "manifold"}
