"""Scores during training: reconstructions of held-out images, and images against a reference."""

from dataclasses import replace
from typing import Optional

import torch
from accelerate import PartialState

from configs.schema import GeneratorRun
from evaluation.evaluator import Evaluator
from evaluation.lpips import LPIPS
from evaluation.metrics import NEIGHBOURS
from evaluation.reconstruction import CodeUse, Consumer, Features, ImageMean, psnr
from evaluation.statistics import Collector
from generation.images import sample_images
from generation.job import SamplingJob, sampling_job
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from runtime.errors import InputError
from runtime.parts import batches_of
from runtime.processes import matmul_precision

CHUNK = 64  # images sampled together by default, which leaves memory for training


def open_evaluator(
    reference: Optional[str], images: int, needed: str, image_size: int
) -> Optional[Evaluator]:
    """The evaluator of `experiment.fid_reference`, if that is set.

    `images` is the number of images to score, 0 if the option `needed` is missing. Raises InputError for
    too few images, and for a reference that cannot be read or is not of image_size x image_size pixels.
    """
    if reference is None:
        return None
    if images <= NEIGHBOURS:  # of precision and recall
        more = "" if images == 0 else f" (at least {NEIGHBOURS + 1} images)"
        raise InputError(f"experiment.fid_reference={reference} needs {needed}{more}")
    return Evaluator(reference, size=(image_size, image_size))


def job_in_training(options: GeneratorRun, device: torch.device) -> SamplingJob:
    """The job of sample_imagenet.py with these options, but not compiled, which would take too long. Raises
    InputError for options that the device does not support."""
    options = replace(options, experiment=replace(options.experiment, compile=False))
    return sampling_job(options, device)


def metrics_of(evaluator: Evaluator, collector: Collector, name: str) -> dict[str, float]:
    """The known metrics, gFID called `name`; empty except on rank 0. All processes call this together."""
    metrics = evaluator.result(collector.finish(), collector.images).get("metrics", {})
    known = {key: value for key, value in metrics.items() if value is not None}
    return {name if key == "gFID" else key: value for key, value in known.items()}


@torch.no_grad()
def collect_samples(
    evaluator: Evaluator, generator: Generator, tokenizer: Tokenizer, options: GeneratorRun
) -> Collector:
    """This rank's share of the images that sample_imagenet.py would make, for `metrics_of`.

    Uses no collectives, so a rank that fails cannot leave others waiting.
    """
    processes, size = PartialState(), options.model.vq_model.image_size
    job = job_in_training(options, tokenizer.latent_tokens.device)
    chunk = job.chunk or CHUNK
    collector = Collector("generated images", job.count, (size, size), evaluator.network)
    indices = batches_of(job.count, chunk, processes.process_index, processes.num_processes)
    with matmul_precision(job.precision):
        for batch in sample_images(job.sampler(generator, chunk), tokenizer, job, indices):
            collector.add(batch.indices.start, torch.from_numpy(batch.images).permute(0, 3, 1, 2))
    return collector


class ReferenceDistance(Features):
    """rFID and the other metrics of reconstructions of `images` images, on rank 0. It is a true rFID if the
    reference holds the same images."""

    def __init__(self, evaluator: Evaluator, images: int, size: int):
        super().__init__(Collector("reconstructions", images, (size, size), evaluator.network))
        self.evaluator = evaluator

    def metrics(self) -> dict[str, float]:
        values = metrics_of(self.evaluator, self.collector, "rFID")
        # Held-out images are sorted by class, so a split of the Inception Score would lack most classes.
        return {name: value for name, value in values.items() if not name.startswith("IS")}


def reconstruction_scores(
    tokenizer: Tokenizer, images: int, lpips: Optional[LPIPS], evaluator: Optional[Evaluator]
) -> list[Consumer]:
    """What measures the reconstructions of `images` held-out images for the log (`reconstruct`)."""
    config, device = tokenizer.config, tokenizer.latent_tokens.device
    scores: list[Consumer] = [ImageMean("psnr", psnr, device), CodeUse(config, device)]
    if lpips is not None:
        scores.append(ImageMean("lpips", lpips.distance, device))
    if evaluator is not None:
        scores.append(ReferenceDistance(evaluator, images, config.image_size))
    return scores
