"""The patch discriminator of the adversarial phase, and the losses of both sides.

Attribute names are the keys of the published state dict.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad (B, C, H, W) as TensorFlow's "same" does: output = ⌈input / stride⌉, the odd pixel last."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class SameConv2d(nn.Conv2d):
    """A convolution of stride 1 that keeps the image size."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(same_padding(input, self.kernel_size[0], 1))


class BlurDownsample(nn.Module):
    """Halve the image through the binomial kernel (1, 3, 3, 1)."""

    kernel: Tensor

    def __init__(self):
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = line[:, None] * line[None, :]
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, -1, -1, -1)
        return F.conv2d(same_padding(x, 4, 2), kernel, stride=2, groups=channels)


class Discriminator(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, 1, 16, 16), high for real.

    `exact` computes in float32 whatever the autocast type, as published; otherwise convolutions
    run in that type.
    """

    def __init__(self, channels: int = 128, exact: bool = True):
        super().__init__()
        self.exact = exact
        self.block_in = nn.Sequential(SameConv2d(3, channels, 5), nn.LeakyReLU(0.1))
        widths = [channels, channels, 2 * channels, 4 * channels]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                SameConv2d(before, after, 3),
                BlurDownsample(),
                nn.GroupNorm(32, after),
                nn.LeakyReLU(0.1),
            )
            for before, after in itertools.pairwise(widths)
        )
        self.pool = nn.AdaptiveMaxPool2d(16)
        self.to_logits = nn.Sequential(
            SameConv2d(widths[-1], widths[-1], 1),
            nn.LeakyReLU(0.1),
            SameConv2d(widths[-1], 1, 5),
        )

    def forward(self, images: Tensor) -> Tensor:
        # accelerate puts autocast into the forward of the module that it prepares, so the loss of
        # the tokenizer and that of the discriminator both meet it, and only the module can leave it.
        if self.exact and torch.is_autocast_enabled(images.device.type):
            with torch.autocast(images.device.type, enabled=False):
                return self.logits(images.float())
        return self.logits(images)

    def logits(self, images: Tensor) -> Tensor:
        x = self.block_in(images)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.pool(x))


@contextmanager
def weights_frozen(module: nn.Module) -> Iterator[None]:
    """Around a forward pass whose gradient reaches the input, but no parameter of `module`.

    The backward pass may come later: which gradients it computes is decided by the forward pass.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Discriminator's loss: ½·mean(relu(1 - real)) + ½·mean(relu(1 + fake))."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """The tokenizer's adversarial loss: -mean(D(fake))."""
    return -fake_logits.mean()
