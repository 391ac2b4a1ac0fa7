"""A weight file of the real Inception network, with random weights that keep its signals alive."""

import torch
from torch import nn


def write_random_inception(path):
    """Deterministic weights under the published names and shapes."""
    from torch_fidelity import feature_extractor_inceptionv3 as package

    class Unfilled(package.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    with torch.random.fork_rng():
        torch.manual_seed(0)
        with open(path, "wb") as file:
            torch.save({}, file)
        network = Unfilled("random", ["2048"], str(path))
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
        nn.init.normal_(network.fc.weight, std=0.1)  # no class is sure
    torch.save(network.state_dict(), path)
    return path


class TinyFeatures:
    """In the place of Inception where only the way to and from it is tested: grey tiles, rotated."""

    name, file, package = "inception", "tiny.pth", "torch-fidelity"
    resize = "to 4x4 tiles, where Inception resizes to 299x299"
    features, widths = ("pool", "spatial", "logits"), (12, 6, 5)
    published = True

    def __init__(self, device="cpu", weights=None, identity="tiny"):
        self.device, self.identity = torch.device(device), identity
        generator = torch.Generator().manual_seed(1)
        self.bases = [torch.randn(16, width, generator=generator) for width in self.widths]

    def __call__(self, images):
        tiles = nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 4)
        return tuple((tiles.flatten(1) / 255) @ basis for basis in self.bases)
