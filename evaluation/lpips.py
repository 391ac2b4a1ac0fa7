"""LPIPS, the learned perceptual distance: a metric, and a term of the tokenizer's loss."""

from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from modeling.weights.tensors import load_tensors, read_state_dict
from runtime.published import find_published

VGG_FILE = "vgg16-397923af.pth"  # torchvision's name, ImageNet weights V1
LPIPS_FILE = "lpips_vgg.pth"  # weights/v0.1/vgg.pth of the LPIPS repository
# Channels of relu1_2 … relu5_3, by the number of torchvision's layers up to them.
TAPS = {4: 64, 9: 128, 16: 256, 23: 512, 30: 512}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
NOT_AS_A_LOSS = ", or (in training) set the weight of its loss to 0"


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 (Zhang et al. 2018, version 0.1), mean over the batch.

    `weights` is the folder of both published files (`find_published`); None leaves the network random,
    for tests. Raises MissingFile, before anything is built, or InputError for a damaged file.
    """

    def __init__(self, weights: Optional[Path]):
        super().__init__()
        files: list[Path] = []
        if weights is not None:
            names = VGG_FILE, LPIPS_FILE
            files = [find_published(name, weights, NOT_AS_A_LOSS) for name in names]
        # Takes a third of a second, so imported on use.
        from torchvision.models import vgg16

        vgg = vgg16()
        if files:
            load_tensors(vgg, read_state_dict(files[0]), str(files[0]))
        self.vgg = nn.Sequential(*list(vgg.features.children())[: max(TAPS)])
        # Weights of each tap's channels. Published keys: lin0.model.1.weight … (index 0 was a dropout).
        heads = [
            nn.ModuleDict({"model": nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))})
            for channels in TAPS.values()
        ]  # fmt: skip
        self.lin0, self.lin1, self.lin2, self.lin3, self.lin4 = heads
        if files:
            load_tensors(self, read_state_dict(files[1]), str(files[1]), keep=("vgg.",))
        else:
            for head in heads:  # distances are non-negative
                nn.init.uniform_(head.get_parameter("model.1.weight"), 0, 1)
        # VGG's normalisation, for images in [-1, 1]. Buffers, because a constant made in the step would be
        # a blocking copy to the device; not persistent, because no file holds them.
        self.shift = nn.Buffer(torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.scale = nn.Buffer(torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        x = (images - self.shift) / self.scale
        taps = []
        for number, layer in enumerate(self.vgg, 1):
            x = layer(x)
            if number in TAPS:
                tap = x.float()  # under autocast only the convolutions are in a smaller type
                taps.append(tap / (tap.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    def distance(self, images: Tensor, targets: Tensor) -> Tensor:
        """LPIPS of images and targets (B, 3, H, W) in [0, 1], a scalar."""
        with torch.no_grad():
            target_features = self.features(targets * 2 - 1)
        heads = (self.lin0, self.lin1, self.lin2, self.lin3, self.lin4)
        pairs = list(zip(heads, self.features(images * 2 - 1), target_features))
        with torch.autocast(images.device.type, enabled=False):
            distances = [head["model"]((a - b).square()).mean() for head, a, b in pairs]
        return sum(distances, images.new_zeros(()))
