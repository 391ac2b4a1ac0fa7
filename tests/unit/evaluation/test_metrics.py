import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluation import metrics
from evaluation.metrics import (
    InceptionScore,
    Moments,
    frechet_distance,
    frechet_distance_of_moments,
    precision_recall,
)
from tests.refusals import refusal

ROOT = Path(__file__).parents[3]


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def covariance(width, seed, rank=None):
    factor = random(width, rank or 2 * width, seed=seed)
    return factor @ factor.T / factor.shape[1]


# ---------------------------------------------------------------------- Fréchet distance
def test_distance_of_gaussians_on_a_line_by_hand():
    mean_a, mean_b = torch.tensor([1.0]), torch.tensor([4.0])
    found = frechet_distance_of_moments(
        mean_a, torch.tensor([[4.0]]), mean_b, torch.tensor([[9.0]])
    )
    assert found == pytest.approx(3**2 + (2 - 3) ** 2)


def test_distance_of_commuting_gaussians_is_that_of_their_deviations():
    axes = torch.linalg.qr(random(6, 6))[0]
    a, b = random(6, seed=1).square(), random(6, seed=2).square()
    mean_a, mean_b = random(6, seed=3), random(6, seed=4)
    found = frechet_distance_of_moments(
        mean_a, axes @ a.diag() @ axes.T, mean_b, axes @ b.diag() @ axes.T
    )
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-12)


def test_distance_is_scipys_where_covariances_are_well_conditioned():
    a, b, zero = covariance(40, 1), covariance(40, 2), torch.zeros(40)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    expected = np.trace(a.numpy() + b.numpy() - 2 * root.real)
    assert frechet_distance_of_moments(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_distance_to_itself_is_zero_at_any_rank(rank):
    sigma, zero = covariance(300, 1, rank) * 50, torch.zeros(300)
    assert frechet_distance_of_moments(zero, sigma, zero, sigma.clone()) < 1e-8


def test_distance_of_gaussians_in_different_planes_is_right():
    # No overlap at all: the roots' product is zero, and only the variances are left. What rounding
    # makes of the 397 empty dimensions counts by its square root.
    axes, zero = torch.linalg.qr(random(400, 6))[0], torch.zeros(400)
    a, b = covariance(3, 1), covariance(3, 2)
    found = frechet_distance_of_moments(
        zero, axes[:, :3] @ a @ axes[:, :3].T, zero, axes[:, 3:] @ b @ axes[:, 3:].T
    )
    assert found == pytest.approx((a.trace() + b.trace()).item(), rel=1e-10)


def test_distance_is_right_in_a_subspace_of_many_empty_dimensions():
    axes = torch.linalg.qr(random(400, 4))[0]
    a, b, zero = covariance(4, 1), covariance(4, 2), torch.zeros(400)
    small = frechet_distance_of_moments(zero[:4], a, zero[:4], b)
    found = frechet_distance_of_moments(zero, axes @ a @ axes.T, zero, axes @ b @ axes.T)
    assert found == pytest.approx(small, rel=1e-10)


def test_no_variance_at_all_leaves_the_means():
    zero = torch.zeros(3, 3)
    assert frechet_distance_of_moments(torch.zeros(3), zero, torch.ones(3), zero) == 3


def test_distance_of_features_is_that_of_their_moments():
    a, b = random(30, 5), random(20, 5, seed=1) + 1
    moments = [f(x) for x in (a, b) for f in (lambda x: x.mean(0), lambda x: torch.cov(x.T))]
    expected = frechet_distance_of_moments(*moments)
    assert frechet_distance(a.numpy(), b) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------- moments
@pytest.mark.parametrize("batch", [1, 7, 50])
def test_streamed_moments_are_numpys_far_from_the_origin(batch):
    features = random(50, 6) * 1e-3 + 1e4  # a plain sum of squares would leave nothing
    moments = Moments(6)
    for part in features.split(batch):
        moments.add(part)
    mean, sigma = moments.reduced()
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(features.T), rtol=1e-6, atol=1e-12)


def test_moments_of_two_processes_are_those_of_all(monkeypatch):
    features = random(31, 4) + 100
    halves = [Moments(4), Moments(4)]
    halves[0].add(features[:10])
    halves[1].add(features[10:])
    # What every process gets; the scatters are added up below.
    sums = (torch.tensor([31]), features.sum(0))
    monkeypatch.setattr(metrics, "reduce", lambda x, _: {1: sums[0], 4: sums[1]}.get(x.numel(), x))
    parts = [half.reduced() for half in halves]
    torch.testing.assert_close(parts[0][0], features.mean(0))
    torch.testing.assert_close(parts[0][1] + parts[1][1], torch.cov(features.T))


# ---------------------------------------------------------------------- Inception Score
def test_score_of_sure_and_evenly_spread_classes_is_their_number():
    score = InceptionScore(4, 12)
    score.add(torch.eye(4).repeat(3, 1) * 1e3, torch.arange(12))
    assert score.reduced() == pytest.approx((4.0, 0.0))


def test_score_of_one_answer_for_all_is_one():
    score = InceptionScore(4, 12)
    score.add(random(1, 4).repeat(12, 1), torch.arange(12))
    assert score.reduced()[0] == pytest.approx(1.0)


def test_splits_are_of_consecutive_images_whatever_the_order_of_batches(monkeypatch):
    monkeypatch.setattr(metrics, "IS_SPLIT", 5)
    logits = random(13, 4) * 2
    score = InceptionScore(4, 13)
    for start in (8, 0, 4, 12):
        score.add(logits[start : start + 4], torch.arange(start, min(start + 4, 13)))
    scores = []
    for part in logits.softmax(1).split(5):
        divergence = part * (part.log() - part.mean(0, keepdim=True).log())
        scores.append(divergence.sum(1).mean().exp().item())
    assert len(scores) == 3
    assert score.reduced() == pytest.approx((np.mean(scores), np.std(scores)))


# ---------------------------------------------------------------------- precision and recall
def test_points_in_and_out_of_reach_by_hand():
    # Neighbours three places off: every radius is 2 or 3 on the line, and 100 is out of reach.
    reference = torch.arange(6.0).view(-1, 1)
    samples = torch.tensor([[0.5], [8.0], [8.1], [100.0]])
    # Radii: 3 2 2 2 2 3 squared; 8 is just within reach of 5, 8.1 is not.
    precision, recall = precision_recall(reference, samples)
    assert precision == 2 / 4
    assert recall == 1.0  # the samples' own radii are huge
    assert precision_recall(samples, reference) == (recall, precision)


@pytest.mark.parametrize("block", [3, 8, 100])
def test_blocks_change_nothing(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    a, b = random(20, 3), random(31, 3, seed=1) * 1.5 + 0.5
    distances = torch.cdist(torch.cat([a, b]), torch.cat([a, b]))
    radius_a = distances[:20, :20].sort(1).values[:, 3]
    radius_b = distances[20:, 20:].sort(1).values[:, 3]
    precision = (distances[20:, :20] <= radius_a).any(1).double().mean().item()
    recall = (distances[:20, 20:] <= radius_b).any(1).double().mean().item()
    assert 0 < precision < 1 and 0 < recall <= 1
    assert precision_recall(a, b) == pytest.approx((precision, recall))


PEAK = """
import torch
from benchmarks.evaluation import peak_mb
from evaluation import metrics

metrics.BLOCK = 1024

def measure(half):
    a, b = torch.randn(2, 4096, 64)
    metrics.precision_recall(a[:2048], b[:2048], half=half)  # first, for what is allocated once
    before = peak_mb(restart=True)
    metrics.precision_recall(a, b, half=half)
    return peak_mb() - before

print(measure(False), measure(True))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs the peak memory that Linux tells"
)
def test_memory_is_that_of_blocks_whatever_the_number_of_images():
    """At most three blocks of distances and four of rows as float64, in numbers of 8 bytes.

    With the published width and the default block these are 0.7 GB: 50,000 x 50,000 fits into 4 GB.
    """
    # Blocks are mapped one by one and returned to the system: a fragmented heap would count as in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-c", PEAK]
    found = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    double, half = map(float, found.stdout.split())
    bound = 8 * (3 * 1024**2 + 4 * 1024 * 64) / 2**20
    # The distances of one block of rows to all would be 32 MB more in float64, 16 MB in float32.
    assert 0 < double < bound + 8 and 0 < half < bound / 2 + 8
    assert 8 * (3 * metrics.BLOCK**2 + 4 * metrics.BLOCK * 2048) < 0.7 * 2**30


def test_identical_sets_cover_each_other(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 16)
    a = random(50, 8).float()
    assert precision_recall(a, a.clone()) == (1.0, 1.0)


def test_distant_sets_cover_nothing():
    a = random(50, 8)
    assert precision_recall(a, a + 100) == (0.0, 0.0)


def test_as_many_images_as_neighbours_are_too_few():
    call = partial(precision_recall, random(3, 2), random(5, 2))
    refusal(call, "more than 3 images", "5 samples", "3 reference")


def test_half_precision_is_that_of_adms_script():
    """Norms, product and sums in float16; float32 where float16 overflows."""
    reference, samples = random(40, 16).float(), random(30, 16, seed=1).float()

    def by_numpy(a, b):
        a, b = a.numpy().astype(np.float16), b.numpy().astype(np.float16)
        norms = [np.square(x).sum(1, dtype=np.float16) for x in (a, b)]
        return np.maximum(norms[0][:, None] - 2 * (a @ b.T) + norms[1], 0).astype(np.float32)

    def share(points, centres):
        limits = np.sort(by_numpy(centres, centres), 1)[:, 3]
        return (by_numpy(points, centres) <= limits).any(1).mean()

    expected = share(samples, reference), share(reference, samples)
    found = precision_recall(reference, samples, half=True)
    assert found == pytest.approx(expected, abs=0.07)  # two images: float16 sums round differently
    assert 0.2 < expected[0] < 1
    large = metrics.squared_distances(300 * reference, 300 * samples, half=True)
    exact = metrics.squared_distances(300 * reference, 300 * samples)
    torch.testing.assert_close(large.double(), exact, rtol=1e-3, atol=1e3)
    rough = metrics.squared_distances(reference, samples, half=True)
    assert 1e-4 < (rough.double() - metrics.squared_distances(reference, samples)).abs().max() < 0.1
