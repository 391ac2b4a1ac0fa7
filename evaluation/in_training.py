"""Scores while training: the trainers' models on held-out images and against a reference."""

from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch
from accelerate import PartialState

from configs.schema import GeneratorRun
from evaluation.evaluator import Evaluator
from evaluation.lpips import LPIPS
from evaluation.reconstruction import (
    Consumer,
    PerceptualDistance,
    ReconstructionFeatures,
    ReconstructionSums,
    image_batches,
    reconstruct,
)
from evaluation.statistics import Collector
from generation.images import sample_images
from generation.job import SamplingJob, sampling_job
from modeling.engine import Engine
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from runtime.errors import InputError
from runtime.parts import share_of
from runtime.processes import matmul_precision
from runtime.signals import outlive_first_signal

CHUNK = 64  # images sampled together where the config sets no number


def open_evaluator(
    reference: Optional[str], ready: bool, needed: str, weights: Path, image_size: int
) -> Optional[Evaluator]:
    """The reference to score against, if there is one.

    `needed` names the options that a score cannot do without, `ready` says that they are set;
    `weights` is the folder of Inception's file. Raises InputError, also for a reference of another
    size than image_size x image_size pixels.
    """
    if reference is None:
        return None
    if not ready:
        raise InputError(f"experiment.fid_reference={reference} needs {needed}")
    return Evaluator.open(reference, PartialState(), weights, size=(image_size, image_size))


def job_in_training(options: GeneratorRun, device: torch.device) -> SamplingJob:
    """What sample_imagenet.py would sample, in chunks that leave room for the training.

    Nothing is compiled: that takes too long here. Raises InputError for what cannot be sampled on
    this device, so that a trainer can call it before its first step.
    """
    options = replace(options, experiment=replace(options.experiment, compile=False))
    job = sampling_job(options, device)
    return replace(job, chunk=job.chunk or CHUNK)


def sampling_engine(generator: Generator, options: GeneratorRun, batch: int) -> Engine:
    """What sample_imagenet.py would sample with, but not compiled."""
    job = job_in_training(options, generator.output.weight.device)
    return Engine(generator, batch, job.sampling, job.dtype)


def metrics_of(evaluator: Evaluator, collector: Collector, name: str) -> dict[str, float]:
    """The known metrics for the log, the Fréchet distance as `name`; empty except on rank 0.

    All processes must call this.
    """
    samples = collector.finish()
    metrics = evaluator.result(samples, collector.images).get("metrics", {})
    return {
        f"val/{name if key == 'gFID' else key}": value
        for key, value in metrics.items()
        if value is not None
    }


@torch.no_grad()
def generated(
    evaluator: Evaluator, generator: Generator, tokenizer: Tokenizer, options: GeneratorRun
) -> dict[str, float]:
    """val/gFID and the other metrics of the images that sample_imagenet.py would make."""
    processes, size = evaluator.processes, options.model.vq_model.image_size
    job = job_in_training(options, generator.output.weight.device)
    chunk = job.chunk or CHUNK
    collector = Collector("generated images", job.count, (size, size), evaluator.network)
    starts = share_of(range(0, job.count, chunk), processes.process_index, processes.num_processes)
    batches = [range(start, min(start + chunk, job.count)) for start in starts]
    with matmul_precision(job.precision):
        engine = Engine(generator, chunk, job.sampling, job.dtype)
        for batch in sample_images(engine, tokenizer, job, batches):
            pixels = torch.from_numpy(batch.images).permute(0, 3, 1, 2)
            collector.add(batch.indices.start, pixels)
    return metrics_of(evaluator, collector, "gFID")


def reconstructed(
    tokenizer: Tokenizer,
    paths: list[str],
    batch: int,
    workers: int,
    processes: PartialState,
    lpips: Optional[LPIPS] = None,
    evaluator: Optional[Evaluator] = None,
) -> dict[str, float]:
    """Metrics of the reconstructions of the images at `paths` (ADM's centre crop), in one pass.

    val/psnr, val/codebook_use and val/perplexity on all processes; val/lpips with `lpips`; and with
    `evaluator`, on rank 0 only, val/rFID and its other metrics: a true rFID where the reference
    holds these very images. Call it outside autocast: like evaluate.py it reconstructs in float32.
    """
    size, device = tokenizer.config.image_size, tokenizer.latent_tokens.device
    sums = ReconstructionSums(tokenizer.config.codebook_size, device)
    consumers: list[Consumer] = [sums]
    perceptual = None if lpips is None else PerceptualDistance(lpips, device)
    if perceptual is not None:
        consumers.append(perceptual)
    collector = None
    if evaluator is not None:
        collector = Collector("reconstructions", len(paths), (size, size), evaluator.network)
        consumers.append(ReconstructionFeatures(collector))
    rank, world = processes.process_index, processes.num_processes
    batches = image_batches(paths, size, batch, workers, rank, world, outlive_first_signal)
    reconstruct(tokenizer, batches, device, consumers)
    values = {f"val/{name}": value for name, value in sums.metrics().items()}
    if perceptual is not None:
        values["val/lpips"] = perceptual.mean()
    if evaluator is not None and collector is not None:
        values |= metrics_of(evaluator, collector, "rFID")
    return values
