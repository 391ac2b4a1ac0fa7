"""The patch discriminator of the adversarial phase, and its loss.

Attribute names are the keys of the published state dict.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlurDownsample(nn.Module):
    """Halve the image through the binomial kernel (1, 3, 3, 1): sizes ⌈H / 2⌉, ⌈W / 2⌉.

    Padded like TensorFlow's "same": one pixel on each side, and two at the end of an odd size.
    """

    def __init__(self):
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = line[:, None] * line[None, :]
        self.kernel = nn.Buffer((kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        odd = [0, x.shape[3] % 2, 0, x.shape[2] % 2]
        return F.conv2d(F.pad(x, odd) if any(odd) else x, kernel, None, 2, 1, groups=channels)


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, 1, 16, 16), high for real.

    `exact` computes in float32 under autocast too, as published.
    """

    def __init__(self, channels: int = 128, exact: bool = True):
        super().__init__()
        self.exact = exact
        self.block_in = nn.Sequential(nn.Conv2d(3, channels, 5, padding="same"), nn.LeakyReLU(0.1))
        widths = [channels, channels, 2 * channels, 4 * channels]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding="same"),
                BlurDownsample(),
                nn.GroupNorm(32, after),
                nn.LeakyReLU(0.1),
            )
            for before, after in itertools.pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d(16)
        self.to_logits = nn.Sequential(
            nn.Conv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(widths[-1], 1, 5, padding="same"),
        )

    def forward(self, images: Tensor) -> Tensor:
        # accelerate wraps `forward` in autocast, so only the module itself can leave it.
        if self.exact and torch.is_autocast_enabled(images.device.type):
            with torch.autocast(images.device.type, enabled=False):
                return self.logits(images.float())
        return self.logits(images)

    def logits(self, images: Tensor) -> Tensor:
        # The layout of tensor cores. Eager group norms lose it, compiled ones keep it.
        x = self.block_in(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.pool(x))


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator's loss: ½·mean(relu(1 - real)) + ½·mean(relu(1 + fake))."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
