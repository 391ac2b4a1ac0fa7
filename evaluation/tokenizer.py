"""A tokenizer's score on an image folder: rFID, PSNR, SSIM, LPIPS, use of the codebook."""

from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs.load import tokenizer_config
from data.images import CenterImages, list_images, to_float
from evaluation.compare import Collector, Side, compare, terms, warnings_of
from evaluation.features import Inception, full_float32
from evaluation.lpips import LPIPS
from evaluation.reconstruction import ReconstructionSums
from modeling.tokenizer import Tokenizer
from modeling.weights import load_tensors
from runtime.errors import InputError
from training.checkpoint import read_weights

PICTURED = 8  # images in the picture
SSIM_WINDOW = 11  # pixels a side
MAGNIFIED = 4  # how much brighter its differences are


def load_tokenizer(given: str, config: Optional[str] = None) -> Tokenizer:
    """A tokenizer of either stage, in eval mode, from a weights file or a run's folder.

    Its sizes are those of `model.vq_model` in the config, by default the run's own, else the
    published ones with the decoder of the stage that the weights are of.
    """
    state = read_weights(given, "tokenizer")
    own = Path(given) / "config.yaml"
    if config is None and own.is_file():
        config = str(own)
    known = {}
    if config is None and "decoder.ffn_aux.0.weight" in state:
        known = {"causal": True, "prefix_head": True, "num_buffer_tokens": 1}
    with torch.device("meta"):  # no time for a random start
        tokenizer = Tokenizer(tokenizer_config(config, **known))
    tokenizer.to_empty(device="cpu")
    # The clustering's running mean says nothing about images.
    buffer = ("quantize.embed_prob",)
    load_tensors(tokenizer, state, given, ignore=buffer, keep=buffer)
    return tokenizer.eval()


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    inception: Inception,
    processes: PartialState,
    batch: int,
    workers: int,
    picture: str,
) -> tuple[dict[str, Any], Side]:
    """The result over all images of a folder (ADM's centre crop), empty but on the main process,
    and the originals' side. Draws before | after | difference of the first images."""
    size, device = tokenizer.config.image_size, processes.device
    if size < SSIM_WINDOW:
        raise InputError(
            f"images of {size} px are smaller than the window of SSIM, {SSIM_WINDOW} px: give a "
            f"tokenizer of larger images"
        )
    lpips = LPIPS(pretrained=True).to(device)
    paths = [path for path, _ in list_images(folder)[0]]
    sides = [
        Collector(name, len(paths), (size, size), inception)
        for name in (str(folder), "its reconstructions")
    ]
    sums = ReconstructionSums(tokenizer.config.codebook_size, device)
    similar = torch.zeros(2, dtype=torch.float64, device=device)  # sums of SSIM and LPIPS
    starts = range(0, len(paths), batch)[processes.process_index :: processes.num_processes]
    batches = [list(range(start, min(start + batch, len(paths)))) for start in starts]
    loader = DataLoader(CenterImages(paths, size), batch_sampler=batches, num_workers=workers)
    bar = tqdm(
        total=sum(map(len, batches)), unit="img", desc="reconstruct",
        disable=not processes.is_main_process,
    )  # fmt: skip
    for start, pixels in zip(starts, loader):
        images = to_float(pixels.to(device))
        with full_float32():
            codes = tokenizer.encode(images)
            after = tokenizer.decode(codes)
            distance = lpips.distance(after, images)
        sums.add(images, after, codes)
        similar += torch.stack([ssim(images, after).sum(), distance.double() * len(images)])
        sides[0].add(start, pixels)
        sides[1].add(start, (after * 255).to(torch.uint8))  # truncated, as published samples are
        if start == 0:
            draw(images[:PICTURED], after[:PICTURED], picture)
        bar.update(len(images))
    bar.close()
    originals, reconstructions = (side.finish() for side in sides)
    sums.values = reduce(sums.values, "sum")
    ssim_mean, lpips_mean = (reduce(similar, "sum") / len(paths)).tolist()
    if not processes.is_main_process:
        return {}, originals
    found, metrics = compare(reconstructions, originals, device), sums.metrics()
    result = {
        "metrics": {
            "rFID": found["FID"], "PSNR": metrics["psnr"], "SSIM": ssim_mean, "LPIPS": lpips_mean,
            "codebook_use": metrics["codebook_use"], "perplexity": metrics["perplexity"],
        },
        "images_asked": len(paths),
        "partial": False,
        "samples": reconstructions.about(),
        "reference": originals.about(),
        "picture": picture,
        **terms(inception, batch),
        "warnings": warnings_of(inception, originals, reconstructions),
    }  # fmt: skip
    return result, originals


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [0, 1]: (B,), float64.

    Gaussian window of 11 pixels and σ 1.5, by colour channel, where the window lies within.
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


def draw(before: Tensor, after: Tensor, path: str) -> None:
    """A PNG with a row before | after | difference (brighter) for every image in [0, 1]."""
    difference = ((before - after).abs() * MAGNIFIED).clamp(max=1)
    rows = torch.cat([before, after, difference], 3)  # (N, 3, S, 3S)
    pixels = (torch.cat(list(rows), 1) * 255).to(torch.uint8).permute(1, 2, 0)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels.cpu().numpy())).save(path, format="PNG")
