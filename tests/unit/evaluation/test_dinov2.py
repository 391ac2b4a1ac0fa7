import functools

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from evaluation.features import (
    ARCHITECTURE,
    DINOV2_FILE,
    MEAN,
    STD,
    DINOv2,
    prepare,
    resample_positions,
)
from evaluation.metrics import frechet_distance
from tests.dinov2 import random_state, write_random_dinov2
from tests.refusals import refusal

LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    write_random_dinov2(path / DINOV2_FILE, layers=LAYERS)
    return path


@pytest.fixture
def shallow(monkeypatch):
    """timm's network with two of its layers: as wide as the real one, in a second."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", functools.partial(create, depth=LAYERS))


@pytest.fixture
def network(folder, shallow):
    return DINOv2("cpu", folder)


# ---------------------------------------------------------------------- the rules, transcribed
def cubic(t):
    """Keys' kernel with a = -0.75, as PyTorch's bicubic."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resampling_matrix(old, new, scale):
    """Row i holds the weights of output i: its centre lies at (i + 0.5) / scale - 0.5 of the input."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) / scale - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    return matrix


def positions_by_the_rule(positions, grid):
    n = round((positions.shape[1] - 1) ** 0.5)
    matrix = resampling_matrix(n, grid, (grid + 0.1) / n)
    square = positions[0, 1:].double().numpy().reshape(n, n, -1)
    square = np.einsum("yi,ixd->yxd", matrix, np.einsum("xj,ijd->ixd", matrix, square))
    return np.concatenate([positions[0, :1].double().numpy(), square.reshape(grid * grid, -1)])


def resized_by_the_rule(images, size=224):
    """Bicubic (a = -0.5) with its support widened by the ratio of sizes where an image shrinks."""

    def keys(t):
        t, a = abs(t), -0.5
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    def matrix(old):
        ratio = old / size
        wide = max(ratio, 1.0)
        rows = np.zeros((size, old))
        for i in range(size):
            centre = (i + 0.5) * ratio
            first, last = int(centre - 2 * wide + 0.5), int(centre + 2 * wide + 0.5)
            for tap in range(max(first, 0), min(last, old)):
                rows[i, tap] = keys((tap + 0.5 - centre) / wide)
        return rows / rows.sum(1, keepdims=True)

    images = images.double().numpy()
    return matrix(images.shape[2]) @ images @ matrix(images.shape[3]).T


def features_by_the_rule(state, images, heads=16, layers=LAYERS):
    """The whole pipeline from the tensors of the file, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = resized_by_the_rule(images) / 255
    pixels = (pixels - mean[:, None, None]) / std[:, None, None]
    count, width = len(images), state["cls_token"].shape[-1]
    patches = pixels.reshape(count, 3, 16, 14, 16, 14).transpose(0, 2, 4, 1, 3, 5)
    patches = torch.from_numpy(patches.reshape(count, 256, -1).copy())
    x = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(count, 1, width), x], 1)
    x = x + torch.from_numpy(positions_by_the_rule(state["pos_embed"], 16))

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for i in range(layers):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(count, 257, 3, heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (width / heads) ** 0.5).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(count, 257, width)
        x = x + linear(y, f"{block}.attn.proj") * state[f"{block}.ls1.gamma"]
        y = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(y, f"{block}.mlp.fc2") * state[f"{block}.ls2.gamma"]
    return norm(x, "norm")[:, 0]


# ---------------------------------------------------------------------- tests
def test_positions_are_resampled_by_dinov2s_own_rule():
    positions = random_state(0)["pos_embed"][:, :, :32]
    expected = positions_by_the_rule(positions, 16)
    found = resample_positions(positions, 16)[0].double().numpy()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-5
    # The rules that are taken for it: without the offset, and timm's.
    from timm.layers import resample_abs_pos_embed

    for other in (
        F.interpolate(
            positions[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2), (16, 16), mode="bicubic"
        ).flatten(2).transpose(1, 2)[0],
        resample_abs_pos_embed(positions, [16, 16])[0, 1:],
    ):  # fmt: skip
        distance = np.linalg.norm(other.double().numpy() - expected[1:])
        assert distance / np.linalg.norm(expected[1:]) > 0.1


@pytest.mark.parametrize("size", [(256, 256), (32, 48), (300, 224)])
def test_resize_is_bicubic_with_antialias_in_float(size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    mean, std = (np.array(v)[:, None, None] for v in (MEAN, STD))
    expected = (resized_by_the_rule(images) / 255 - mean) / std
    np.testing.assert_allclose(
        prepare(images, torch.tensor([MEAN, STD]).view(2, 3, 1, 1)), expected, atol=2e-4
    )  # 0.01 grey levels


def test_the_distance_is_that_of_the_transcribed_pipeline(network, folder):
    state = torch.load(folder / DINOV2_FILE, weights_only=True)
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    images[3:] = images[3:] // 2
    expected, (found, *others) = features_by_the_rule(state, images), network(images)
    assert found.dtype == torch.float32 and found.shape == (6, 1024)
    assert [other.shape for other in others] == [(6, 0), (6, 0)]
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 1e-5
    reference = frechet_distance(expected[:3], expected[3:])
    assert frechet_distance(found[:3], found[3:]) == pytest.approx(reference, rel=1e-5)
    assert reference > 1


def test_names_of_the_whole_network_are_those_of_the_authors_file():
    with torch.device("meta"):
        network = timm.create_model(ARCHITECTURE, img_size=224, num_classes=0)
    names = {name.replace("blocks.1.", "blocks.23.") for name in random_state(2, 16)}
    own = {name for name in network.state_dict() if "blocks." not in name or ".0." in name or ".23." in name}  # fmt: skip
    assert own == names - {"mask_token"}
    assert len(network.state_dict()) == 24 * 14 + 6
    assert sum(p.numel() for p in network.parameters()) == 304_368_640 - (1369 - 256) * 1024 - 1024


def test_identity_is_the_files(network, folder, tmp_path, shallow):
    write_random_dinov2(tmp_path / DINOV2_FILE, layers=LAYERS, seed=1)
    other = DINOv2("cpu", tmp_path)
    assert other.identity != network.identity == DINOv2("cpu", folder).identity
    assert network.identity.startswith("dinov2-vitl14 ")


# ---------------------------------------------------------------------- bad input
def test_another_size_of_dinov2_is_refused(tmp_path):
    write_random_dinov2(tmp_path / DINOV2_FILE, layers=1, width=384)
    refusal(lambda: DINOv2("cpu", tmp_path), DINOV2_FILE, "ViT-L/14")


def test_a_missing_file_is_asked_for(tmp_path, nowhere):
    refusal(lambda: DINOv2("cpu", tmp_path), DINOV2_FILE, "weights/README.md")


@pytest.mark.parametrize(
    "changes, named",
    [
        (None, "ViT-L/14"),  # another network
        ({}, "blocks.1.norm1.weight"),  # one layer alone
        ({"register_tokens": (1, 4, 1024)}, "without registers"),
        ({"pos_embed": (257, 1024)}, "ViT-L/14"),
        ({"pos_embed": (1, 0, 1024)}, "ViT-L/14"),
        ({"cls_token": ()}, "cls_token ()"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, named):
    state = {"fc.weight": torch.zeros(3)}
    if changes is not None:
        state = random_state(1) | {name: torch.zeros(shape) for name, shape in changes.items()}
    torch.save(state, tmp_path / DINOV2_FILE)
    refusal(lambda: DINOv2("cpu", tmp_path), tmp_path / DINOV2_FILE, named)
