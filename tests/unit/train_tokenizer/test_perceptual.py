from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import ConvNeXt_Small_Weights, convnext_small

from tests.refusals import refusal
from train_tokenizer.losses import CONVNEXT_FILE, ConvNeXtLogits


# ---------------------------------------------------------------------- weight files
def test_pretrained_network_without_its_file_is_refused(nowhere):
    places = f"weights/ or {nowhere}/hub/checkpoints", "weights/README.md"
    with torch.device("meta"):
        refusal(lambda: ConvNeXtLogits(Path("weights")), CONVNEXT_FILE, *places)


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
    network.distance(images, network.targets(targets)).backward()
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
    assert convnext.distance(images, convnext.targets(images)) == 0


def test_convnext_gradient_reaches_the_images_alone(convnext):
    assert gradients_reach(convnext) == (True, False, False)


def test_convnext_distance_is_the_mean_square_of_the_logits_difference(convnext):
    images, targets = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = (convnext(images) - convnext(targets)).square().mean()
        found = convnext.distance(images, convnext.targets(targets))
        torch.testing.assert_close(found, expected)
    assert expected > 0


def test_convnext_reads_224_pixels_normalised_as_torchvisions_weights_want(convnext, monkeypatch):
    monkeypatch.setattr(convnext, "network", nn.Identity())
    wanted = ConvNeXt_Small_Weights.IMAGENET1K_V1.transforms(resize_size=224, crop_size=224)
    images = torch.rand(2, 3, 300, 300)
    torch.testing.assert_close(convnext(images), wanted(images))
