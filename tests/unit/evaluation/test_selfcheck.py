import json

import numpy as np
import pytest
from accelerate import PartialState

import evaluate
from evaluation import evaluator, metrics
from evaluation.features import INCEPTION_FILE
from evaluation.selfcheck import ADM_BATCHES, ADM_REFERENCE, moment_check
from tests.inception import TinyFeatures


# ---------------------------------------------------------------------- what it is there for
def test_moments_that_cancel_are_found(monkeypatch):
    def add(self, features, indices=None):  # E[x²] - E[x]² in float32
        features = features.float()
        self.count += len(features)
        self.mean += features.sum(0)
        self.scatter += features.T @ features

    def reduced(self):
        mean = self.mean / self.count
        return mean, (self.scatter - self.count * mean[:, None] * mean) / (self.count - 1)

    monkeypatch.setattr(metrics.Moments, "add", add)
    monkeypatch.setattr(metrics.Moments, "reduced", reduced)
    assert not moment_check()["passed"]


# ---------------------------------------------------------------------- the program
@pytest.fixture
def run(nowhere, capsys):
    """Run `evaluate.py --selfcheck`; returns its status, its JSON and all that it said."""

    def start():
        status = 0
        try:
            evaluate.main(["--selfcheck", "--device=cpu"])
        except SystemExit as e:
            status = e.code
        said = capsys.readouterr().out
        return status, json.loads(said.strip().splitlines()[-1]), said

    return start


def test_program_says_what_it_checked_and_what_it_could_not(run):
    status, result, said = run()
    assert status == 0 and result["passed"] and said.count("  passed") == 1
    assert f"not compared with ADM's figures: put {ADM_REFERENCE}" in said


def test_a_failure_is_the_exit_status(run, monkeypatch):
    monkeypatch.setattr(metrics.Moments, "reduced", lambda self: (self.mean, self.scatter))
    status, result, said = run()
    assert status == 1 and not result["passed"] and "FAILED" in said


def test_without_inceptions_weights_the_other_checks_are_made(run, nowhere):
    (nowhere / "weights").mkdir()
    for name in (ADM_REFERENCE, "admnet_guided_imagenet256.npz"):
        np.savez(nowhere / "weights" / name, np.zeros((2, 8, 8, 3), np.uint8))
    status, _, said = run()
    assert status == 0 and said.count("  passed") == 1
    assert f"not compared with ADM's figures: no {INCEPTION_FILE} in weights/" in said


def test_adms_batches_are_compared_where_they_are(run, nowhere, monkeypatch):
    (nowhere / "weights").mkdir()
    rng = np.random.default_rng(0)
    for name in (ADM_REFERENCE, "admnet_guided_imagenet256.npz"):
        np.savez(nowhere / "weights" / name, rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8))
    monkeypatch.setitem(evaluator.NETWORKS, "inception", TinyFeatures)
    status, result, said = run()
    checked = {check["name"]: check for check in result["checks"]}
    fid = checked["admnet_guided_imagenet256.npz: gFID"]
    assert status == 1 and not fid["passed"] and fid["expected"] == 4.59  # these are other images
    # With what they give as the authors' figures, all pass.
    for metric in ADM_BATCHES["admnet_guided_imagenet256.npz"]:
        found = checked[f"admnet_guided_imagenet256.npz: {metric}"]["found"]
        monkeypatch.setitem(ADM_BATCHES["admnet_guided_imagenet256.npz"], metric, found)
    status, result, said = run()
    assert status == 0 and result["passed"] and "not compared" not in said
    assert PartialState().num_processes == 1
