"""LPIPS, the learned perceptual distance: a metric, and a term of the tokenizer's loss."""

import itertools

import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from modeling.weights import find_weights, load_tensors, read_state_dict
from runtime.errors import InputError

VGG_FILE = "vgg16-397923af.pth"  # torchvision's name, ImageNet weights V1
LPIPS_FILE = "lpips_vgg.pth"  # weights/v0.1/vgg.pth of the LPIPS repository
NOT_AS_A_LOSS = " (in training: or set the weight of its loss to 0)"


def lpips_is_here() -> bool:
    """Whether both files of the pretrained LPIPS are there."""
    try:
        return bool(find_weights(VGG_FILE) and find_weights(LPIPS_FILE))
    except InputError:
        return False


class LPIPS(nn.Module):
    """Learned perceptual distance on VGG16 (Zhang et al. 2018, version 0.1), mean over the batch."""

    # Indices in torchvision's VGG16 after which relu1_2 … relu5_3 are read, with their channels.
    TAPS = ((4, 64), (9, 128), (16, 256), (23, 512), (30, 512))

    def __init__(self, pretrained: bool):
        super().__init__()
        vgg = vgg16()
        if pretrained:
            path = find_weights(VGG_FILE, NOT_AS_A_LOSS)
            load_tensors(vgg, read_state_dict(path), str(path))
        bounds = [0] + [end for end, _ in self.TAPS]
        self.stages = nn.ModuleList(vgg.features[a:b] for a, b in itertools.pairwise(bounds))
        # Published keys: lin0.model.1.weight … (index 0 was a dropout).
        for i, (_, channels) in enumerate(self.TAPS):
            head = nn.Module()
            head.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{i}", head)
        if pretrained:
            path = find_weights(LPIPS_FILE, NOT_AS_A_LOSS)
            load_tensors(self, read_state_dict(path), str(path), keep=("stages.",))
        else:
            for i in range(len(self.TAPS)):  # distances are non-negative
                nn.init.uniform_(getattr(self, f"lin{i}").model[1].weight, 0, 1)
        # VGG's normalisation, for images in [-1, 1].
        self.shift = (-0.030, -0.088, -0.188)
        self.scale = (0.458, 0.448, 0.450)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        x = (images - images.new_tensor(self.shift).view(3, 1, 1)) / images.new_tensor(
            self.scale
        ).view(3, 1, 1)
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    def distance(self, images: Tensor, targets: Tensor) -> Tensor:
        """LPIPS of images and targets (B, 3, H, W) in [0, 1], a scalar."""
        with torch.no_grad():
            wanted = self.features(targets * 2 - 1)
        total = images.new_zeros(())
        for i, (a, b) in enumerate(zip(self.features(images * 2 - 1), wanted)):
            total = total + getattr(self, f"lin{i}").model((a - b).square()).mean()
        return total
