"""Images through a tokenizer and back: one loop, the figures computed from its batches, a tokenizer's score."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor

from data.classes import printable
from data.images import CenterImages, ImagePath, scan_images
from data.loader import batch_loader
from data.pictures import picture_grid, to_pixels, write_png
from evaluation.evaluator import describe_result
from evaluation.features import FeatureNetwork
from evaluation.lpips import LPIPS
from evaluation.metrics import FID, summed
from evaluation.statistics import Collector, SetStatistics
from modeling.modes import eval_mode
from modeling.pixels import to_float, to_uint8
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights.metadata import UNSEEN
from modeling.weights.tensors import tensors_hash
from runtime.errors import InputError
from runtime.parts import batches_of
from runtime.processes import matmul_precision, progress

SSIM_WINDOW = 11  # pixels, height and width
PREVIEW_IMAGES = 8
MAGNIFICATION = 4  # of the differences in the picture


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

    `batches` are (index of the first image, uint8 images (B, 3, S, S)), from `image_batches`. This uses no
    collectives, so a rank that fails cannot leave others waiting. Call it outside autocast.
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
def count_codes(counts: Tensor, codes: Tensor) -> None:
    """Count the codes (B, T) of B images in `counts` (T, codebook_size), in place."""
    counts.scatter_add_(1, codes.T, torch.ones_like(codes.T, dtype=counts.dtype))


def code_figures(counts: Tensor) -> dict[str, float]:
    """Figures of the counts (T, codebook_size) of all ranks (`count_codes`).

    codebook_use: the share of codes that occur. perplexity: exp(entropy) of their shares. code_agreement, for two
    images or more: the share of pairs of images with the same code at a position, averaged over positions. It is
    1 if all images have the same codes; with independent codes it is the sum of their squared shares.
    """
    of_codes, images = counts.sum(0).double(), counts[0].sum()
    entropy = torch.special.entr(of_codes / of_codes.sum()).sum()
    figures = {
        "codebook_use": (of_codes > 0).double().mean().item(), "perplexity": entropy.exp().item()
    }  # fmt: skip
    if images > 1:
        same = (counts * (counts - 1)).sum(1) / (images * (images - 1))
        figures["code_agreement"] = same.mean().item()
    return figures


class CodeUse(Consumer):
    """`code_figures` of all images."""

    def __init__(self, config: TokenizerConfig, device: torch.device):
        shape = config.num_tokens, config.codebook_size
        self.counts = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, batch: Batch) -> None:
        count_codes(self.counts, batch.codes)

    def metrics(self) -> dict[str, float]:
        return code_figures(summed(self.counts))


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
    """Keeps the first `count` images of this process's first batch, before | after, image by image:
    `pairs` (2N, 3, S, S), in [0, 1]."""

    def __init__(self, count: int):
        self.count, self.pairs = count, torch.empty(0)  # a rank may have no images

    def add(self, batch: Batch) -> None:
        if not len(self.pairs):
            before, after = batch.images[: self.count], batch.reconstructions[: self.count]
            self.pairs = torch.stack([before, after], 1).flatten(0, 1)


# ---------------------------------------------------------------------- a tokenizer's score
FIGURES = {"PSNR": psnr, "SSIM": ssim}  # of single images, by their names in a result


def weights_hash(tokenizer: Tokenizer) -> str:
    """Hash of the weights that reconstructions depend on."""
    state, spare = tokenizer.state_dict(), tokenizer.training_only
    return tensors_hash({name: state[name] for name in state if name not in spare})


def score_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    network: Optional[FeatureNetwork],
    lpips: Optional[LPIPS],
    batch: int,
    workers: int,
    index_folder: Path,
) -> tuple[dict[str, Any], SetStatistics, Preview]:
    """Reconstruct all images of a folder or tar (ADM's centre crop) once, in float32, and measure them.

    `network` is needed for rFID, `lpips` for LPIPS. Returns the result, empty except on the main process,
    the statistics of the originals and the first images for `draw_preview`. `index_folder` keeps the
    index of a tar.
    """
    size, device = tokenizer.config.image_size, tokenizer.latent_tokens.device
    processes = PartialState()
    listing = scan_images(folder, index_folder=index_folder)
    processes.print(f"{printable(folder)}: {listing.describe()}")
    count, left_out = len(listing.paths), []
    if network is not None and count < 2:
        network = None
        left_out = [
            "rFID is left out, and --save_stats writes nothing: a covariance needs 2 images or more"
        ]
    before, after = (
        Collector(name, count, (size, size), network)
        for name in (str(folder), "its reconstructions")
    )
    figures = FIGURES if lpips is None else {**FIGURES, "LPIPS": lpips.distance}
    means = [ImageMean(name, figure, device) for name, figure in figures.items()]
    scores, preview = [*means, CodeUse(tokenizer.config, device)], Preview(PREVIEW_IMAGES)
    consumers = [*scores, Features(before, originals=True), Features(after), preview]
    rank, world = processes.process_index, processes.num_processes
    batches = image_batches(listing.paths, size, batch, workers, rank, world)
    shown = progress(-(-count // batch // world), "batch", "reconstruct", batches)
    reconstruct(tokenizer, shown, consumers)
    metrics: dict[str, Optional[float]] = {**figures_of(scores)}
    originals, reconstructions = before.finish(), after.finish()
    if not processes.is_main_process:
        return {}, originals, preview
    if network is not None:
        ours, theirs = (side.parts[FID.part] for side in (reconstructions, originals))
        (rfid,) = FID.figures(ours, theirs, device, False)
        metrics = {"rFID": rfid, **metrics}
    result = describe_result(metrics, network, reconstructions, originals, count, batch)
    result["warnings"] = left_out + result["warnings"]
    # What no tensor's shape shows.
    unseen = {name: getattr(tokenizer.config, name) for name in UNSEEN}
    result["weights"] = {"tokenizer": weights_hash(tokenizer), **unseen}
    return result, originals, preview


def draw_preview(preview: Preview, path: Path) -> None:
    """A PNG with a row before | after | difference (magnified) per image."""
    before, after = preview.pairs[::2], preview.pairs[1::2]
    difference = (before - after).abs() * MAGNIFICATION
    rows = torch.stack([before, after, difference], 1).flatten(0, 1)
    write_png(picture_grid(to_pixels(rows), 3), path)
