"""The tokenizer's loss: named terms, each computed only if its weight is not 0, and its frozen networks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Losses, Phase
from evaluation.lpips import LPIPS
from modeling.tokenizer import TokenizerConfig, TokenizerOutput, prefix_target
from modeling.weights.tensors import load_tensors, read_state_dict
from runtime.published import find_published

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONVNEXT_FILE = "convnext_small-0c510722.pth"  # torchvision's name, ImageNet weights V1


class ConvNeXtLogits(nn.Module):
    """ConvNeXt-S logits (B, 1000) of images (B, 3, H, W) in [0, 1], resized to 224 px.

    `weights` is the folder of the published file (`find_published`); None leaves the network random, for
    tests. Raises InputError if the file is missing or damaged.
    """

    def __init__(self, weights: Optional[Path]):
        super().__init__()
        # Takes a third of a second, so imported on use.
        from torchvision.models import convnext_small

        self.network = convnext_small()
        if weights is not None:
            path = find_published(CONVNEXT_FILE, weights, ", or set the weight of its loss to 0")
            load_tensors(self.network, read_state_dict(path), str(path))
        self.mean = nn.Buffer(torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.std = nn.Buffer(torch.tensor(IMAGENET_STD).view(3, 1, 1))
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


class FrozenNetworks:
    """The perceptual networks that the phases need, on `device`, in channels_last, the layout of tensor
    cores and of ConvNeXt's norms. Checkpoints do not hold their weights.

    `weights` is the folder of their published files; None leaves them random, for tests.
    """

    def __init__(self, phases: list[Phase], weights: Optional[Path], device: torch.device):
        self.convnext: Optional[ConvNeXtLogits] = None
        self.lpips: Optional[LPIPS] = None
        if any(p.perceptual_weight for p in phases):
            self.convnext = ConvNeXtLogits(weights).to(device).to(memory_format=torch.channels_last)
        if any(p.lpips_weight for p in phases):
            self.lpips = LPIPS(weights).to(device).to(memory_format=torch.channels_last)


def tokenizer_terms(
    out: TokenizerOutput,
    images: Tensor,
    config: TokenizerConfig,
    stage: int,
    phase: Phase,
    losses: Losses,
    networks: FrozenNetworks,
    discriminator: Optional[Callable[[Tensor], Tensor]],
) -> dict[str, tuple[float, Tensor]]:
    """(weight, value), in float32, of every term of one step on images (B, 3, S, S) in [0, 1].

    The terms are those of the paper's section on two-stage training. `networks` and `discriminator` are
    needed only for terms whose weight in this phase is not 0.
    """
    terms = {"mse": (1.0, F.mse_loss(out.images, images))}
    perceptual = None  # distance of images to the targets, whose logits are computed once
    if phase.perceptual_weight:
        assert networks.convnext is not None
        perceptual = partial(networks.convnext.distance, targets=networks.convnext.targets(images))
    if out.strip is not None and losses.aux == "strip":
        # The strip's mean counts in proportion to its K patches, the image's to its g².
        weight = losses.aux_weight * config.num_prefix_tokens / config.grid**2
        terms["aux"] = (weight, F.mse_loss(out.strip, prefix_target(images, config)))
    elif out.strip is not None:
        stitched = stitch(out)
        terms["aux"] = (losses.aux_weight, F.mse_loss(stitched, images))
        if perceptual is not None:
            weight = losses.aux_weight * phase.perceptual_weight
            terms["aux_perceptual"] = (weight, perceptual(stitched))
    if stage == 1:
        terms["quantizer"] = (1.0, out.quantizer_loss)
    if perceptual is not None:
        terms["perceptual"] = (phase.perceptual_weight, perceptual(out.images))
    if phase.lpips_weight:
        assert networks.lpips is not None
        value = networks.lpips.distance(out.images, images)
        terms["lpips"] = (phase.lpips_weight, value)
    # The published adversarial term is -mean(D(fake)) × 0.1 × 0.05; gan_weight is the product of both.
    if phase.gan_weight:
        assert discriminator is not None
        terms["gan"] = (phase.gan_weight, -discriminator(out.images).mean())
    return terms


def stitch(out: TokenizerOutput) -> Tensor:
    """The strip (K = g) above the other rows of the reconstruction, which are detached, so that the loss
    of the stitched image trains the strip alone: (B, 3, S, S)."""
    assert out.strip is not None
    below = out.images[:, :, out.strip.shape[2] :].detach()
    return torch.cat([out.strip, below], 2)
