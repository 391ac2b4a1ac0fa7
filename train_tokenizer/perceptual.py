"""The frozen network of the perceptual term. Checkpoints do not hold its weights."""

from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.weights.tensors import load_tensors, read_state_dict
from runtime.published import find_published

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONVNEXT_FILE = "convnext_small-0c510722.pth"  # torchvision's name, ImageNet weights V1


class ConvNeXtLogits(nn.Module):
    """ConvNeXt-S logits (B, 1000) of images (B, 3, H, W) in [0, 1], resized to 224 px.

    `weights` is the folder of the published file (`find_published`); None leaves the network random, for
    tests. Raises InputError if the file is missing or damaged.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Optional[Path]):
        super().__init__()
        # Takes a third of a second, so imported on use.
        from torchvision.models import convnext_small

        self.network = convnext_small()
        if weights is not None:
            path = find_published(CONVNEXT_FILE, weights, ", or set the weight of its loss to 0")
            load_tensors(self.network, read_state_dict(path), str(path))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        images = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
        return self.network((images - self.mean) / self.std)

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """The logits (B, 1000) that `distance` compares with, float32."""
        return self(images).float()

    def distance(self, images: Tensor, targets: Tensor) -> Tensor:
        """Mean squared difference of the images' logits to `targets`, a float32 scalar."""
        return F.mse_loss(self(images).float(), targets)
