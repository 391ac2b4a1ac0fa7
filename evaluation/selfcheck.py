"""`evaluate.py --selfcheck`: the evaluator's figures in cases with known results.

Moments summed up on this machine's devices and processes need no files. With ADM's reference and a sample
batch, figures are compared with those that the authors published.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import PartialState

from evaluation.evaluator import Evaluator
from evaluation.metrics import Moments
from evaluation.report import table_of
from evaluation.sources import open_images
from runtime.processes import on_main
from runtime.published import WEIGHTS, MissingFile


@dataclass
class Check:
    """A figure, its expected value and tolerance."""

    name: str
    found: float
    expected: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return abs(self.found - self.expected) <= self.tolerance  # False for NaN


def moment_check() -> Check:
    """Streamed moments on this device over all processes, which call this together."""
    # Points at ±√(D - ½) along each of D axes, far from the origin: the covariance is the identity.
    width = 8
    points = torch.eye(width).double() * math.sqrt(width - 0.5)
    points = torch.cat([points, -points]) + 1000
    processes = PartialState()
    device = processes.device or "cpu"
    moments = Moments(width, device)
    parts = list(points.split(3))
    for part in parts[processes.process_index :: processes.num_processes]:
        moments.add(part.to(device))
    mean, covariance = (moment.cpu() for moment in moments.reduced())
    error = (mean - 1000).abs().max() + (covariance - torch.eye(width).double()).abs().max()
    return Check("streamed mean and covariance, largest error", error.item(), 0.0, 1e-9)


# ---------------------------------------------------------------------- ADM's published batches
ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
# The authors' figures (Dhariwal and Nichol 2021, as their script prints them), to two decimals.
ADM_BATCHES = {
    "admnet_guided_imagenet256.npz": {
        "gFID": 4.59, "sFID": 5.25, "IS": 186.70, "precision": 0.82, "recall": 0.52,
    },
    "admnet_guided_upsampled_imagenet256.npz": {
        "gFID": 3.94, "sFID": 6.14, "IS": 215.84, "precision": 0.83, "recall": 0.53,
    },
}  # fmt: skip
# Half of the last printed digit, plus differences of the network's port and of arithmetic.
ADM_TOLERANCES = {"gFID": 0.03, "sFID": 0.05, "IS": 0.5, "precision": 0.01, "recall": 0.01}


def published_checks(batch: int, workers: int) -> Iterator[Check]:
    """The figures of ADM's sample batches in `WEIGHTS`, if their reference is there too.

    All processes call this; only the main process yields checks.
    """
    files = (ADM_REFERENCE, *ADM_BATCHES)
    there = on_main(lambda: [name for name in files if (WEIGHTS / name).is_file()])
    batches = [name for name in ADM_BATCHES if name in there]
    if not batches or ADM_REFERENCE not in there:
        return
    evaluator = Evaluator(WEIGHTS / ADM_REFERENCE, batch, workers, half_manifold=True)
    for name in batches:
        images = open_images(WEIGHTS / name)
        metrics = evaluator.evaluate(images, images.shape[0]).get("metrics", {})
        for metric, expected in ADM_BATCHES[name].items():
            if metric in metrics:
                found = metrics[metric]
                yield Check(f"{name}: {metric}", found, expected, ADM_TOLERANCES[metric])


def selfcheck(batch: int, workers: int) -> bool:
    """Print all checks and, as the last line, JSON; returns whether all passed, on the main process. All
    processes call this."""
    checks = [moment_check()]
    missing = f"put {ADM_REFERENCE} and {' or '.join(ADM_BATCHES)} into {WEIGHTS}/"
    try:
        published = list(published_checks(batch, workers))
    except MissingFile as e:
        published, missing = [], str(e)
    checks += published
    passed = all(check.passed for check in checks)
    if PartialState().is_main_process:
        rows = [
            [check.name, f"{check.found:.6g}", f"expected {check.expected:.6g} ± {check.tolerance:g}",
             "passed" if check.passed else "FAILED"]
            for check in checks
        ]  # fmt: skip
        print(table_of(rows, align="left"))
        if not published:
            print(f"not compared with ADM's figures: {missing}")
        result = [{**vars(check), "passed": check.passed} for check in checks]
        print(json.dumps({"passed": passed, "checks": result}, ensure_ascii=False))
    return passed
