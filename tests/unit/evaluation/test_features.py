"""The real network on random weights: against torch-fidelity's own metrics, and the definitions."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch_fidelity import calculate_metrics
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_isc import isc_features_to_metric

import evaluation.metrics
from evaluation.evaluator import compare
from evaluation.features import INCEPTION_FILE, Inception
from evaluation.metrics import frechet_distance_of_moments
from evaluation.sources import ArrayImages
from evaluation.statistics import load_statistics, measure, save_statistics
from tests.inception import write_random_inception
from tests.payload import Payload
from tests.refusals import refusal

CPU = torch.device("cpu")
WEIGHTS = Path("weights")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A torch hub folder with the weight file in it."""
    hub = tmp_path_factory.mktemp("hub")
    (hub / "checkpoints").mkdir()
    write_random_inception(hub / "checkpoints" / INCEPTION_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(hub))
        yield hub / "checkpoints" / INCEPTION_FILE


@pytest.fixture(scope="module")
def inception(weights):
    return Inception(CPU, weights.parent)


def pictures(count, seed, contrast, brightest):
    """Patches around a colour for each picture: (count, 20, 24, 3), uint8."""
    rng = np.random.default_rng(seed)
    patches = rng.uniform(0, brightest, (count, 1, 1, 3)) + contrast * rng.normal(
        size=(count, 5, 6, 3)
    )
    return patches.clip(0, 255).astype(np.uint8).repeat(4, 1).repeat(4, 2)


# Far apart: the package takes unsymmetric eigenvalues of a singular product, and is itself off by
# 5e-5 with so few images, which must stay below 1e-5 of the distance.
SAMPLES, REFERENCE = pictures(14, 0, 40, 255), pictures(18, 1, 60, 90)


@pytest.fixture(scope="module")
def sides(inception):
    PartialState(cpu=True)
    sets = (ArrayImages("samples", SAMPLES), ArrayImages("reference", REFERENCE))
    with pytest.MonkeyPatch.context() as patch:  # a covariance's eigenvalues take seconds
        patch.setattr(evaluation.metrics, "factor", cache(evaluation.metrics.factor))
        yield [measure(images, inception, 4, 2) for images in sets]


@pytest.fixture(scope="module")
def metrics(sides):
    return compare(*sides, CPU)


@pytest.fixture(scope="module")
def features(inception):
    """All features of both sets at once: (pool, spatial, logits) of samples and of reference."""
    pixels = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (SAMPLES, REFERENCE))
    return [tuple(x.numpy() for x in inception(images)) for images in pixels]


def test_features_are_the_named_places_of_the_network(inception, features):
    pool, spatial, logits = features[0]
    assert (pool.shape, spatial.shape, logits.shape) == ((14, 2048), (14, 2023), (14, 1008))
    weight = inception.network.fc.weight.numpy()
    np.testing.assert_allclose(logits, pool @ weight.T, rtol=1e-4, atol=1e-4)
    # TensorFlow's order: rows, columns, channels.
    places = {}
    branch = inception.network.Mixed_6d.branch1x1
    hook = branch.register_forward_hook(lambda *args: places.update(seen=args[2].numpy()))
    inception(torch.from_numpy(SAMPLES[:1]).permute(0, 3, 1, 2))
    hook.remove()
    assert places["seen"].shape == (1, 192, 17, 17)
    ordered = spatial[0].reshape(17, 17, 7)
    np.testing.assert_allclose(ordered[3, 5], places["seen"][0, :7, 3, 5], rtol=1e-4, atol=1e-6)


def numpy_frechet(a, b):
    mean, sigma = zip(*((x.mean(0), np.cov(x, rowvar=False)) for x in map(np.float64, (a, b))))
    # tr (Σa Σb)^½ on the samples' side: the eigenvalues that are not 0 are those of (B A')(B A')'.
    centred = [(np.float64(x) - m) / np.sqrt(len(x) - 1) for x, m in zip((a, b), mean)]
    products = centred[1] @ centred[0].T
    trace = np.sqrt(np.linalg.eigvalsh(products.T @ products).clip(0)).sum()
    return ((mean[0] - mean[1]) ** 2).sum() + np.trace(sigma[0]) + np.trace(sigma[1]) - 2 * trace


def numpy_score(logits, split=5000):
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return np.mean(scores)


def numpy_share(points, centres):
    def distances(a, b):
        return np.linalg.norm(np.float64(a)[:, None] - np.float64(b)[None], axis=2)

    limits = np.sort(distances(centres, centres), axis=1)[:, 3]
    return (distances(points, centres) <= limits).any(1).mean()


def test_all_five_are_those_of_the_definitions_in_numpy(metrics, features):
    (pool, spatial, logits), (pool_r, spatial_r, _) = features
    assert metrics["FID"] == pytest.approx(numpy_frechet(pool, pool_r), rel=1e-5)
    assert metrics["sFID"] == pytest.approx(numpy_frechet(spatial, spatial_r), rel=1e-5)
    assert metrics["IS"] == pytest.approx(numpy_score(logits), rel=1e-5)
    assert metrics["IS"] > 1.01
    assert metrics["precision"] == pytest.approx(numpy_share(pool, pool_r), rel=1e-5)
    assert metrics["recall"] == pytest.approx(numpy_share(pool_r, pool), rel=1e-5)
    assert metrics["precision"] != metrics["recall"]


def bilinear(size, to=299):
    """Weights (to, size) along one side in TensorFlow 1: pixels (0, 0) aligned, no antialiasing."""
    matrix = np.zeros((to, size))
    for i in range(to):
        low, rest = divmod(i * size / to, 1)
        matrix[i, int(low)] += 1 - rest
        matrix[i, min(int(low) + 1, size - 1)] += rest
    return matrix


@pytest.mark.parametrize("size", [64, 256, 512])
def test_images_are_resized_as_inceptions_authors_do(size):
    rows, columns = np.indices((size, size))
    picture = (rows * rows + 3 * columns + 41 * rows * columns) % 256
    pixels = torch.from_numpy(picture).float().expand(1, 3, size, size)
    found = interpolate_bilinear_2d_like_tensorflow1x(pixels, (299, 299), align_corners=False)
    expected = bilinear(size) @ picture @ bilinear(size).T
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=0.02)


@pytest.mark.slow
def test_fid_and_score_are_those_of_torch_fidelity(metrics, weights):
    class Tensors(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    found = calculate_metrics(
        input1=Tensors(SAMPLES), input2=Tensors(REFERENCE), fid=True, isc=True, isc_splits=1,
        samples_shuffle=False, cuda=False, cache=False, verbose=False, batch_size=7,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True,
    )  # fmt: skip
    assert metrics["FID"] == pytest.approx(found["frechet_inception_distance"], rel=1e-5)
    assert metrics["IS"] == pytest.approx(found["inception_score_mean"], rel=1e-5)


def test_score_is_torch_fidelitys_over_several_splits(monkeypatch):
    from evaluation import metrics as module

    monkeypatch.setattr(module, "IS_SPLIT", 5)
    logits = torch.randn(15, 8)
    score = module.InceptionScore(8, 15)
    score.add(logits, torch.arange(15))
    expected = isc_features_to_metric(logits, splits=3, shuffle=False)
    assert score.reduced() == pytest.approx(tuple(expected.values()), rel=1e-6)


def test_identical_sets_have_no_distance(sides):
    found = frechet_distance_of_moments(*sides[0].parts["pool"] * 2)
    assert abs(found) < 1e-6


def test_batch_size_changes_nothing(sides, features):
    # Measured above in batches of 4; here all at once.
    np.testing.assert_allclose(sides[0].parts["manifold"][0], features[0][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        sides[0].parts["pool"][0], features[0][0].mean(0), rtol=1e-5, atol=1e-7
    )
    sigma = np.cov(np.float64(features[0][1]), rowvar=False)
    np.testing.assert_allclose(sides[0].parts["spatial"][1], sigma, rtol=1e-4, atol=1e-6)


def test_missing_weights_are_asked_for_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    refusal(lambda: Inception(CPU, WEIGHTS), INCEPTION_FILE, "weights/README.md")


@pytest.mark.parametrize("name, shape", [("head.weight", (3,)), ("fc.weight", (1008, 2048))])
def test_another_or_incomplete_file_under_that_name_is_refused(tmp_path, name, shape):
    torch.save({name: torch.zeros(shape)}, tmp_path / INCEPTION_FILE)
    file = tmp_path / INCEPTION_FILE
    refusal(lambda: Inception(CPU, tmp_path), file, "TF-2015 Inception", "weights/README.md")


def test_pickled_code_under_that_name_is_not_run(tmp_path):
    torch.save({"fc.weight": Payload(tmp_path / "ran")}, tmp_path / INCEPTION_FILE)
    refusal(lambda: Inception(CPU, tmp_path), tmp_path / INCEPTION_FILE)
    assert not (tmp_path / "ran").exists()


def test_tf32_and_autocast_stay_out_of_the_features(inception, features, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    handle = inception.network.AvgPool.register_forward_hook(
        lambda module, inputs, output: seen.append(torch.backends.cudnn.allow_tf32)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pool, _, _ = inception(torch.from_numpy(SAMPLES[:2]).permute(0, 3, 1, 2))
    handle.remove()
    assert seen == [False] and torch.backends.cudnn.allow_tf32
    np.testing.assert_allclose(pool, features[0][0][:2], rtol=1e-5, atol=1e-6)


def test_another_job_may_write_the_same_statistics(sides, tmp_path):
    """The file that it has begun is left alone."""
    (tmp_path / "stats.npz.partial").write_bytes(b"half")
    save_statistics(sides[1], tmp_path / "stats.npz", "features")
    assert (tmp_path / "stats.npz.partial").read_bytes() == b"half"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats.npz", "stats.npz.partial"]


def test_statistics_of_other_weights_are_refused(sides, inception, tmp_path):
    save_statistics(sides[1], tmp_path / "stats.npz", "inception-v3-compat 6726825d00000000")
    file, own = tmp_path / "stats.npz", inception.identity
    refusal(lambda: load_statistics(file, inception), file, own, "--save_stats")
