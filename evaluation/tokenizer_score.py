"""A tokenizer's score on images: rFID, PSNR, SSIM, LPIPS, use of the codebook."""

from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import PartialState

from data.classes import printable
from data.images import scan_images
from data.pictures import picture_grid, to_pixels, write_png
from evaluation.evaluator import compare, conditions, protocol, warnings_of
from evaluation.features import FeatureNetwork
from evaluation.lpips import LPIPS
from evaluation.reconstruction import (
    SSIM_WINDOW,
    Features,
    Preview,
    Scores,
    StructuralSimilarity,
)
from evaluation.statistics import Collector, SetStatistics
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import UNSEEN
from modeling.weights.tensors import tensors_hash
from runtime.errors import InputError
from runtime.processes import matmul_precision

PREVIEW_IMAGES = 8
MAGNIFICATION = 4  # of the differences in the picture
# Figures by their names in a result, in its order.
METRICS = {
    "rFID": "rfid", "PSNR": "psnr", "SSIM": "ssim", "LPIPS": "lpips",
    "codebook_use": "codebook_use", "perplexity": "perplexity", "code_agreement": "code_agreement",
}  # fmt: skip


def weights_hash(tokenizer: Tokenizer) -> str:
    """Hash of all weights that images depend on."""
    state, spare = tokenizer.state_dict(), tokenizer.training_only
    return tensors_hash({name: state[name] for name in state if name not in spare})


def score_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    network: Optional[FeatureNetwork],
    lpips: Optional[LPIPS],
    processes: PartialState,
    batch: int,
    workers: int,
    index_folder: Path,
) -> tuple[dict[str, Any], SetStatistics, Preview]:
    """Reconstruct all images of a folder or tar (ADM's centre crop) once, in float32, and measure them.

    Without `network` there is no rFID, without `lpips` no LPIPS. Returns the result, empty except
    on the main process, the statistics of the originals and the first images, for `draw_preview`. The
    index of a tar is kept in `index_folder`.
    """
    size, device = tokenizer.config.image_size, tokenizer.latent_tokens.device
    check_window(size)
    listing = scan_images(folder, index_folder=index_folder)
    processes.print(f"{printable(folder)}: {listing.describe()}")
    count = len(listing.paths)
    before, after = (
        Collector(name, count, (size, size), network, device)
        for name in (str(folder), "its reconstructions")
    )
    preview = Preview(PREVIEW_IMAGES)
    scores = Scores(
        tokenizer, listing.paths, processes, lpips, StructuralSimilarity(device),
        Features(before, originals=True), Features(after), preview,
    )  # fmt: skip
    with matmul_precision("fp32"):
        scores.measure(batch, workers, bar=True)
    figures: dict[str, Optional[float]] = {**scores.reduced()}
    originals, reconstructions = before.finish(), after.finish()
    if not processes.is_main_process:
        return {}, originals, preview
    if network is not None:
        figures["rfid"] = compare(reconstructions, originals, device)["FID"]
    unseen = {name: getattr(tokenizer.config, name) for name in UNSEEN}  # by any tensor's shape
    result = {
        "metrics": {name: figures[key] for name, key in METRICS.items() if key in figures},
        "protocol": protocol(network, reconstructions, originals),
        "images_asked": count,
        "partial": False,
        "samples": reconstructions.summary(),
        "reference": originals.summary(),
        "weights": {"tokenizer": weights_hash(tokenizer), **unseen},
        **conditions(network, batch, device),
        "warnings": warnings_of(network, originals, reconstructions),
    }
    return result, originals, preview


def check_window(size: int) -> None:
    """Refuse images (size x size pixels) without a place for SSIM's window."""
    if size < SSIM_WINDOW:
        raise InputError(
            f"images of {size} px are smaller than the window of SSIM, {SSIM_WINDOW} px: use a "
            f"tokenizer of larger images"
        )


def draw_preview(preview: Preview, path: Path) -> None:
    """A PNG with a row before | after | difference (magnified) per image."""
    difference = (preview.before - preview.after).abs() * MAGNIFICATION
    rows = torch.stack([preview.before, preview.after, difference], 1).flatten(0, 1)
    write_png(picture_grid(to_pixels(rows), 3), path)
