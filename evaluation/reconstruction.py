"""Images through a tokenizer and back: one loop, and the figures computed from its batches.

`reconstruct` encodes and decodes every batch once and passes it to all consumers: means of PSNR, SSIM and LPIPS,
use of the codes, features for rFID, pictures.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data.images import CenterImages, ImagePath
from data.loader import batch_loader
from evaluation.metrics import summed
from evaluation.statistics import Collector
from modeling.modes import eval_mode
from modeling.pixels import to_float, to_uint8
from modeling.tokenizer import Tokenizer, TokenizerConfig
from runtime.errors import InputError
from runtime.parts import batches_of
from runtime.processes import matmul_precision

SSIM_WINDOW = 11  # pixels, height and width


@dataclass
class Batch:
    """Consecutive images of a set and their reconstructions, on the tokenizer's device."""

    first: int  # index of the first image in the set
    pixels: Tensor  # (B, 3, S, S), uint8, on the CPU or the device
    images: Tensor  # (B, 3, S, S), float32 in [0, 1]
    codes: Tensor  # (B, T), int64
    reconstructions: Tensor  # (B, 3, S, S) in [0, 1]


class Consumer(Protocol):
    def add(self, batch: Batch) -> None: ...

    def metrics(self) -> dict[str, float]:
        """Figures by name, if any, over all processes, which call this together."""
        return {}


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer, batches: Iterable[tuple[int, Tensor]], consumers: Sequence[Consumer]
) -> None:
    """Encode and decode all batches in eval mode and float32; the tokenizer's mode is restored.

    `batches` are (index of the first image, uint8 images (B, 3, S, S)), from `image_batches`. This talks to no
    other rank, so that none waits for one that fails. Call it outside autocast.
    """
    device = tokenizer.latent_tokens.device
    with eval_mode(tokenizer), matmul_precision("fp32"):
        for first, pixels in batches:
            images = to_float(pixels.to(device))
            codes = tokenizer.encode(images)
            batch = Batch(first, pixels, images, codes, tokenizer.decode(codes))
            for consumer in consumers:
                consumer.add(batch)


def image_batches(
    paths: Sequence[ImagePath], size: int, batch: int, workers: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """This rank's share of fixed batches of ADM's centre crops, for `reconstruct`."""
    batches = batches_of(len(paths), batch, rank, world)
    loader = batch_loader(CenterImages(paths, size), batches, workers, torch.device("cpu"))
    yield from zip((indices.start for indices in batches), loader)


def figures_of(consumers: Iterable[Consumer]) -> dict[str, float]:
    """The figures of all consumers over all processes, which call this together."""
    return {name: value for consumer in consumers for name, value in consumer.metrics().items()}


# ---------------------------------------------------------------------- use of the codes
def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Share of codes that occur, and perplexity exp(entropy), of counts (codebook_size,)."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


def count_codes(counts: Tensor, codes: Tensor) -> None:
    """Count the codes (B, T) of B images in `counts` (T, codebook_size), in place."""
    counts.scatter_add_(1, codes.T, torch.ones_like(codes.T, dtype=counts.dtype))


def code_agreement(counts: Tensor) -> float:
    """The share of pairs of images with the same code at a position, averaged over positions.

    `counts` (T, codebook_size) are those of all ranks (`count_codes`), of two images or more. 1: all images
    have the same codes; with independent codes it is the sum of their squared shares.
    """
    images = counts[0].sum()
    same = (counts * (counts - 1)).sum(1) / (images * (images - 1))
    return same.mean().item()


class CodeUse(Consumer):
    """`codebook_use`, `perplexity` and, for two images or more, `code_agreement`."""

    def __init__(self, config: TokenizerConfig, device: torch.device):
        shape = config.num_tokens, config.codebook_size
        self.counts = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, batch: Batch) -> None:
        count_codes(self.counts, batch.codes)

    def metrics(self) -> dict[str, float]:
        counts = summed(self.counts)
        use, perplexity = codebook_use(counts.sum(0))
        metrics = {"codebook_use": use, "perplexity": perplexity}
        if counts[0].sum() > 1:
            metrics["code_agreement"] = code_agreement(counts)
        return metrics


# ---------------------------------------------------------------------- figures of single images
class ImageMean(Consumer):
    """The mean over images of `figure(reconstructions, images)`: (B,), or the mean of the batch."""

    def __init__(self, name: str, figure: Callable[[Tensor, Tensor], Tensor], device: torch.device):
        self.name, self.figure = name, figure
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the figure; images

    def add(self, batch: Batch) -> None:
        values = self.figure(batch.reconstructions, batch.images).double()
        values = values.expand(len(batch.images))
        self.sums += torch.stack([values.sum(), torch.ones_like(values).sum()])

    def metrics(self) -> dict[str, float]:
        total, images = summed(self.sums).tolist()
        return {self.name: total / images}


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """10·log10(1 / MSE), in dB, of each pair of images (B, 3, H, W) in [0, 1]: (B,), float64."""
    mse = (images - others).double().square().mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [0, 1]: (B,), float64.

    Gaussian window of 11 pixels and σ = 1.5, per channel, at all positions where it fits. Raises InputError for
    images smaller than the window.
    """
    side = min(images.shape[2:])
    if side < SSIM_WINDOW:
        raise InputError(
            f"images of {side} px are smaller than SSIM's window of {SSIM_WINDOW} px: use a tokenizer of "
            f"larger images"
        )
    window = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=images.device).sub(5).div(1.5)
    window = window.square().mul(-0.5).softmax(0)  # exp(-d²/2σ²), normalised
    a, b = images.double(), others.double()
    maps = torch.cat([a, b, a * a, b * b, a * b], 1)  # (B, 15, H, W)
    kernel = window.expand(maps.shape[1], 1, 1, -1)
    maps = F.conv2d(maps, kernel, groups=maps.shape[1])
    maps = F.conv2d(maps, kernel.transpose(2, 3), groups=maps.shape[1])
    mean_a, mean_b, aa, bb, ab = maps.chunk(5, 1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * (ab - mean_a * mean_b) + c2) / (
        aa - mean_a.square() + bb - mean_b.square() + c2
    )
    return (luminance * structure).mean((1, 2, 3))


# ---------------------------------------------------------------------- features and pictures
class Features(Consumer):
    """Collects the statistics of the reconstructions, truncated to uint8 as published samples are, or
    of the original images."""

    def __init__(self, collector: Collector, originals: bool = False):
        self.collector, self.originals = collector, originals

    def add(self, batch: Batch) -> None:
        pixels = batch.pixels if self.originals else to_uint8(batch.reconstructions)
        self.collector.add(batch.first, pixels)


class Preview(Consumer):
    """Keeps the first `count` images of this process's first batch, before and after, in [0, 1]."""

    def __init__(self, count: int):
        self.count = count
        self.before, self.after = torch.empty(0), torch.empty(0)  # a rank may have no images

    def add(self, batch: Batch) -> None:
        if not len(self.before):
            self.before = batch.images[: self.count]
            self.after = batch.reconstructions[: self.count]

    def pairs(self) -> Tensor:
        """Before | after, image by image: (2N, 3, S, S)."""
        return torch.stack([self.before, self.after], 1).flatten(0, 1)
