"""The tokenizer's loss: named terms, each computed only if its weight is not 0."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import Losses, Phase
from evaluation.lpips import LPIPS
from modeling.tokenizer import TokenizerConfig, TokenizerOutput, prefix_target
from train_tokenizer.perceptual import ConvNeXtLogits


class FrozenNetworks:
    """The perceptual networks that the phases need, on `device`, in channels_last, the layout of tensor
    cores and of ConvNeXt's norms.

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
