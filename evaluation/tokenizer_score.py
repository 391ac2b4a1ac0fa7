"""A tokenizer's score on images: rFID, PSNR, SSIM, LPIPS, use of the codebook."""

from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import PartialState

from data.classes import printable
from data.images import scan_images
from data.pictures import picture_grid, to_pixels, write_png
from evaluation.evaluator import describe_result
from evaluation.features import FeatureNetwork
from evaluation.lpips import LPIPS
from evaluation.reconstruction import (
    CodeUse,
    Features,
    ImageMean,
    Preview,
    figures_of,
    image_batches,
    psnr,
    reconstruct,
    ssim,
)
from evaluation.set_metrics import FID
from evaluation.statistics import Collector, SetStatistics
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import UNSEEN
from modeling.weights.tensors import tensors_hash
from runtime.processes import progress

PREVIEW_IMAGES = 8
MAGNIFICATION = 4  # of the differences in the picture
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
    count = len(listing.paths)
    if count < 2:
        network = None  # a covariance needs two
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
    # What no tensor's shape shows.
    unseen = {name: getattr(tokenizer.config, name) for name in UNSEEN}
    result["weights"] = {"tokenizer": weights_hash(tokenizer), **unseen}
    return result, originals, preview


def draw_preview(preview: Preview, path: Path) -> None:
    """A PNG with a row before | after | difference (magnified) per image."""
    difference = (preview.before - preview.after).abs() * MAGNIFICATION
    rows = torch.stack([preview.before, preview.after, difference], 1).flatten(0, 1)
    write_png(picture_grid(to_pixels(rows), 3), path)
