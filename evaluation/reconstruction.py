"""Images through a tokenizer and back: one loop, and the figures computed from its batches.

`reconstruct` encodes and decodes every batch once and passes it to all consumers: sums of PSNR and code
use, LPIPS, SSIM, features for rFID, pictures.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Optional, Protocol, Self

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.images import CenterImages, ImagePath
from evaluation.lpips import LPIPS
from evaluation.metrics import summed
from evaluation.statistics import Collector
from modeling.pixels import to_float, to_uint8
from modeling.tokenizer import Tokenizer
from runtime.parts import share_of
from runtime.signals import outlive_first_signal

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
    tokenizer: Tokenizer,
    batches: Iterable[tuple[int, Tensor]],
    device: torch.device,
    consumers: Sequence[Consumer],
) -> None:
    """Encode and decode all batches in eval mode; the tokenizer's mode is restored.

    `batches` are (index of the first image, uint8 images (B, 3, S, S)), from `image_batches`.
    """
    was_training = tokenizer.training
    tokenizer.eval()
    for first, pixels in batches:
        images = to_float(pixels.to(device))
        codes = tokenizer.encode(images)
        batch = Batch(first, pixels, images, codes, tokenizer.decode(codes))
        for consumer in consumers:
            consumer.add(batch)
    tokenizer.train(was_training)


def image_batches(
    paths: Sequence[ImagePath], size: int, batch: int, workers: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """This rank's share of fixed batches of ADM's centre crops, for `reconstruct`."""
    starts = share_of(range(0, len(paths), batch), rank, world)
    indices = [list(range(start, min(start + batch, len(paths)))) for start in starts]
    loader = DataLoader(
        CenterImages(paths, size), batch_sampler=indices, num_workers=workers,
        worker_init_fn=outlive_first_signal,
    )  # fmt: skip
    yield from zip(starts, loader)


class Scores:
    """Figures of the reconstructions of the images at `paths` (ADM's centre crop), from one pass.

    `measure` reads this rank's share without talking to others, so that no rank waits for one that fails;
    `reduced` adds up over all ranks. Call both outside autocast, in float32. `consumers` see every batch.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        paths: Sequence[ImagePath],
        processes: PartialState,
        lpips: Optional[LPIPS] = None,
        *consumers: Consumer,
    ):
        self.tokenizer, self.paths, self.processes = tokenizer, paths, processes
        self.device, config = tokenizer.latent_tokens.device, tokenizer.config
        sums = ReconstructionSums(config.codebook_size, config.num_tokens, self.device)
        self.consumers = [sums, *consumers]
        if lpips is not None:
            self.consumers.append(PerceptualDistance(lpips, self.device))

    def measure(self, batch: int, workers: int, bar: bool = False) -> Self:
        """Reconstruct this rank's share, `batch` images at once, read by `workers` processes."""
        rank, world = self.processes.process_index, self.processes.num_processes
        size = self.tokenizer.config.image_size
        batches = image_batches(self.paths, size, batch, workers, rank, world)
        if bar:
            share = -(-len(self.paths) // batch // world)
            hidden = None if self.processes.is_main_process else True  # None: without a terminal
            batches = tqdm(batches, "reconstruct", share, unit="batch", disable=hidden)
        reconstruct(self.tokenizer, batches, self.device, self.consumers)
        return self

    def reduced(self) -> dict[str, float]:
        """The figures of all consumers over all ranks, which call this together."""
        return {k: v for consumer in self.consumers for k, v in consumer.metrics().items()}


# ---------------------------------------------------------------------- PSNR and code use
def psnr(images: Tensor, others: Tensor) -> Tensor:
    """10·log10(1 / MSE), in dB, of each pair of images (B, 3, H, W) in [0, 1]: (B,), float64."""
    mse = (images - others).double().square().mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Share of codes that occur, and perplexity exp(entropy), of counts (codebook_size,)."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


class PositionCounts:
    """How often each code was chosen at each position of an image, on the device."""

    def __init__(self, tokens: int, codebook_size: int, device: torch.device):
        self.counts = torch.zeros(tokens, codebook_size, dtype=torch.float64, device=device)

    def add(self, codes: Tensor) -> None:
        """Codes (B, T) of B images."""
        codes = codes.T
        ones = torch.ones_like(codes, dtype=self.counts.dtype)
        self.counts.scatter_add_(1, codes, ones)


def code_agreement(counts: Tensor) -> float:
    """The share of pairs of images with the same code at a position, averaged over positions.

    `counts` (T, codebook_size) are `PositionCounts` of all ranks, of two images or more. 1: all images
    have the same codes; with independent codes it is the sum of their squared shares.
    """
    images = counts[0].sum()
    same = (counts * (counts - 1)).sum(1) / (images * (images - 1))
    return same.mean().item()


class ReconstructionSums(Consumer):
    """Sums over images, on the device, that add up over ranks: PSNR, images, codes by position."""

    def __init__(self, codebook_size: int, tokens: int, device: torch.device):
        self.values = torch.zeros(2, dtype=torch.float64, device=device)  # PSNR sum, images
        self.codes = PositionCounts(tokens, codebook_size, device)

    def add(self, batch: Batch) -> None:
        self.values[0] += psnr(batch.images, batch.reconstructions).sum()
        self.values[1] += len(batch.images)
        self.codes.add(batch.codes)

    def metrics(self) -> dict[str, float]:
        """`psnr` (mean over images, dB), `codebook_use`, `perplexity` and, for two images or more,
        `code_agreement`."""
        values, counts = summed(self.values), summed(self.codes.counts)
        use, perplexity = codebook_use(counts.sum(0))
        metrics = {
            "psnr": (values[0] / values[1]).item(), "codebook_use": use, "perplexity": perplexity
        }  # fmt: skip
        if values[1] > 1:
            metrics["code_agreement"] = code_agreement(counts)
        return metrics


# ---------------------------------------------------------------------- LPIPS and SSIM
class ImageMean(Consumer):
    """The mean over images of a figure, over all processes."""

    name: str

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the figure; images

    def update(self, total: Tensor, images: int) -> None:
        """Add the sum of the figure over `images` images."""
        self.sums += torch.stack([total.double(), self.sums.new_tensor(images)])

    def metrics(self) -> dict[str, float]:
        total, images = summed(self.sums).tolist()
        return {self.name: total / images}


class PerceptualDistance(ImageMean):
    """Mean LPIPS, in float32 whatever autocast says."""

    name = "lpips"

    def __init__(self, lpips: LPIPS, device: torch.device):
        super().__init__(device)
        self.lpips = lpips

    def add(self, batch: Batch) -> None:
        with torch.autocast(batch.images.device.type, enabled=False):
            distance = self.lpips.distance(batch.reconstructions.float(), batch.images)
        self.update(distance * len(batch.images), len(batch.images))


class StructuralSimilarity(ImageMean):
    """Mean SSIM."""

    name = "ssim"

    def add(self, batch: Batch) -> None:
        self.update(ssim(batch.images, batch.reconstructions).sum(), len(batch.images))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [0, 1]: (B,), float64.

    Gaussian window of 11 pixels and σ = 1.5, per channel, at all positions where it fits.
    """
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
