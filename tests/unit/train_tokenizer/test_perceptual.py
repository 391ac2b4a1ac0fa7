import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.models import ConvNeXt_Small_Weights, convnext_small
from torchvision.transforms.functional import gaussian_blur

from evaluation.lpips import LPIPS
from runtime.errors import InputError
from tests.unit.evaluation.test_real_network import EfficientNet
from train_tokenizer.perceptual import (
    CONVNEXT_FILE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ConvNeXtLogits,
)


# ---------------------------------------------------------------------- weight files
def test_pretrained_network_without_its_file_is_refused(nowhere):
    with torch.device("meta"), pytest.raises(InputError) as caught:
        ConvNeXtLogits(Path("weights"))
    message = str(caught.value)
    assert f"no {CONVNEXT_FILE} in weights/ or {nowhere}/hub/checkpoints" in message
    assert "weights/README.md" in message and "set the weight of its loss to 0" in message


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_pretrained_network_takes_torchvisions_file(nowhere):
    (nowhere / "weights").mkdir()
    with torch.device("meta"):
        state = {
            k: torch.zeros((), device="cpu").expand(v.shape)
            for k, v in convnext_small().state_dict().items()
        }
        torch.save(state, nowhere / "weights" / CONVNEXT_FILE)
        ConvNeXtLogits(Path("weights"))


def gradients_reach(network):
    """Whether images, targets and parameters get a gradient of their distance."""
    images, targets = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    images.requires_grad_(), targets.requires_grad_()
    network.distance(images, targets).backward()
    assert images.grad.isfinite().all()
    parameters = any(p.requires_grad for p in network.parameters())
    return bool(images.grad.any()), targets.grad is not None, parameters


# ---------------------------------------------------------------------- ConvNeXt
@pytest.fixture(scope="module")
def convnext():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.init, "trunc_normal_", lambda *_, **__: None
        )  # its slow start is not needed
        return ConvNeXtLogits(None)


def test_convnext_distance_of_equal_images_is_zero(convnext):
    images = torch.rand(1, 3, 32, 32)
    assert convnext.distance(images, images) == 0


def test_convnext_gradient_reaches_the_images_alone(convnext):
    assert gradients_reach(convnext) == (True, False, False)


def test_convnext_distance_is_the_mean_square_of_the_logits_difference(convnext):
    images, targets = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = (convnext(images) - convnext(targets)).square().mean()
        torch.testing.assert_close(convnext.distance(images, targets), expected)
    assert expected > 0


class RealNetwork(nn.Module):
    """A network with ImageNet's weights in the place of ConvNeXt-S."""

    def __init__(self):
        super().__init__()
        self.network = EfficientNet().network.requires_grad_(False)

    def forward(self, images):
        for name, values in (("std", IMAGENET_STD), ("mean", IMAGENET_MEAN)):
            values = torch.tensor(values).view(3, 1, 1)
            images = images * values if name == "std" else images + values
        return self.network((images - 0.5) / 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convnext", "lpips"])
def test_bfloat16_moves_a_loss_of_real_photos_by_a_few_per_cent(convnext, kind):
    """Of blurred and of noisy photos. The gradient in the pixels moves further, but keeps its way."""
    network, size = LPIPS(None), 48  # torch's own bfloat16 convolutions, without AVX-512, are slow
    if kind == "convnext":
        network, size = copy.copy(convnext), 224
        network._modules = {**convnext._modules, "network": RealNetwork()}
    photos = torch.stack(
        [
            torch.from_numpy(load_sample_image(name)).permute(2, 0, 1)[:, 100:][..., 200:] / 255
            for name in ("flower.jpg", "china.jpg")
        ]
    )
    photos = photos[..., :size, :size]
    for images in (gaussian_blur(photos, [9, 9]), (photos + 0.1 * torch.randn_like(photos)).clamp(0, 1)):  # fmt: skip
        values, gradients = [], []
        for bf16 in (False, True):
            x = images.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = network.distance(x, photos)
            assert loss.dtype == torch.float32
            gradients += torch.autograd.grad(loss, x)
            values.append(loss.item())
        assert values[0] > 0
        assert values[1] == pytest.approx(values[0], rel=0.06) and values[1] != values[0]
        exact, rough = (gradient.flatten() for gradient in gradients)
        assert F.cosine_similarity(exact, rough, 0) > 0.4


def test_convnext_reads_224_pixels_normalised_as_torchvisions_weights_want(convnext, monkeypatch):
    monkeypatch.setattr(convnext, "network", nn.Identity())
    wanted = ConvNeXt_Small_Weights.IMAGENET1K_V1.transforms(resize_size=224, crop_size=224)
    images = torch.rand(2, 3, 300, 300)
    torch.testing.assert_close(convnext(images), wanted(images))
