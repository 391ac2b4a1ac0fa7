"""`evaluate.py --selfcheck`: the evaluator's figures in cases with known results.

Moments summed up on this machine's devices and processes need no files. With ADM's reference and a sample
batch, figures are compared with those that the authors published.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState

from evaluation.evaluator import Evaluator
from evaluation.metrics import Moments
from evaluation.report import show, table_of
from evaluation.sources import open_images
from runtime.processes import on_main
from runtime.published import WEIGHTS, MissingFile


def check(name: str, found: float, expected: float, tolerance: float) -> dict[str, Any]:
    """A figure beside its expected value, for the table and the JSON. NaN does not pass."""
    passed = abs(found - expected) <= tolerance
    return {
        "name": name, "found": found, "expected": expected, "tolerance": tolerance, "passed": passed
    }  # fmt: skip


def moment_check() -> dict[str, Any]:
    """Streamed moments on this device over all processes, which call this together."""
    # Points at ±√(D - ½) along each of D axes, far from the origin: the covariance is the identity.
    width = 8
    points = torch.eye(width).double() * math.sqrt(width - 0.5)
    points = torch.cat([points, -points]) + 1000
    processes = PartialState()
    device = processes.device or "cpu"
    moments = Moments(width, device)
    for part in points.split(3)[processes.process_index :: processes.num_processes]:
        moments.add(part.to(device))
    mean, covariance = (moment.cpu() for moment in moments.reduced())
    error = (mean - 1000).abs().max() + (covariance - torch.eye(width).double()).abs().max()
    return check("streamed mean and covariance, largest error", error.item(), 0.0, 1e-9)


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


def published_checks(batch: int, workers: int) -> Iterator[dict[str, Any]]:
    """The figures of ADM's sample batches in `WEIGHTS`, if their reference is there too.

    All processes call this; only the main process yields checks.
    """
    reference = WEIGHTS / ADM_REFERENCE
    batches = on_main(lambda: [name for name in ADM_BATCHES if (WEIGHTS / name).is_file()])
    if not batches or not on_main(reference.is_file):
        return
    evaluator = Evaluator(reference, batch, workers, half_manifold=True)
    for name in batches:
        images = open_images(WEIGHTS / name)
        metrics = evaluator.evaluate(images, images.shape[0]).get("metrics", {})
        for metric, expected in ADM_BATCHES[name].items():
            if metric in metrics:
                found = metrics[metric]
                yield check(f"{name}: {metric}", found, expected, ADM_TOLERANCES[metric])


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
    passed = all(one["passed"] for one in checks)
    if PartialState().is_main_process:
        rows = [
            [one["name"], f"{one['found']:.6g}", f"expected {one['expected']:.6g} ± {one['tolerance']:g}",
             "passed" if one["passed"] else "FAILED"]
            for one in checks
        ]  # fmt: skip
        warnings = [] if published else [f"not compared with ADM's figures: {missing}"]
        result = {"passed": passed, "checks": checks, "warnings": warnings}
        show(result, table_of(rows, align="left"))
    return passed
