"""Scores during training: reconstructions of held-out images, and images against a reference."""

from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch
from accelerate import PartialState

from configs.schema import GeneratorRun
from data.images import ImagePath
from evaluation.evaluator import Evaluator
from evaluation.lpips import LPIPS
from evaluation.reconstruction import Features, Scores
from evaluation.statistics import Collector
from generation.images import sample_images
from generation.job import SamplingJob, sampling_job
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from runtime.errors import InputError
from runtime.parts import share_of
from runtime.processes import matmul_precision

CHUNK = 64  # images sampled together by default


def open_evaluator(
    reference: Optional[str], images: int, needed: str, weights: Path, image_size: int
) -> Optional[Evaluator]:
    """The evaluator of `experiment.fid_reference`, if that is set.

    `images` is the number of images to score, 0 if the option `needed` is missing; `weights` is the
    folder of Inception's file. Raises InputError for fewer than two images, and for a reference that
    cannot be read or is not of image_size x image_size pixels.
    """
    if reference is None:
        return None
    if images < 2:
        more = "" if images == 0 else ", of 2 images or more"
        raise InputError(f"experiment.fid_reference={reference} needs {needed}{more}")
    return Evaluator(reference, PartialState(), weights, size=(image_size, image_size))


def job_in_training(options: GeneratorRun, device: torch.device) -> SamplingJob:
    """The job of sample_imagenet.py with these options, in chunks that leave memory for training, and not
    compiled, which would take too long. Raises InputError for options that the device does not support."""
    options = replace(options, experiment=replace(options.experiment, compile=False))
    job = sampling_job(options, device)
    return replace(job, chunk=job.chunk or CHUNK)


def metrics_of(evaluator: Evaluator, collector: Collector, name: str) -> dict[str, float]:
    """The known metrics for the log, gFID called `name`; empty but on rank 0. All processes call this."""
    samples = collector.finish()
    metrics = evaluator.result(samples, collector.images).get("metrics", {})
    return {
        f"val/{name if key == 'gFID' else key}": value
        for key, value in metrics.items()
        if value is not None
    }


class GeneratedScores:
    """val/gFID and the other metrics of the images that sample_imagenet.py would make.

    `measure` samples this rank's share without talking to others, so that no rank waits for one that
    fails; `reduced` adds up over all ranks.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        generator: Generator,
        tokenizer: Tokenizer,
        options: GeneratorRun,
    ):
        self.evaluator, self.generator, self.tokenizer = evaluator, generator, tokenizer
        self.options = options
        self.collector: Optional[Collector] = None

    @torch.no_grad()
    def measure(self) -> "GeneratedScores":
        """Sample this rank's share."""
        processes, size = self.evaluator.processes, self.options.model.vq_model.image_size
        job = job_in_training(self.options, self.tokenizer.latent_tokens.device)
        chunk, rank, world = job.chunk or CHUNK, processes.process_index, processes.num_processes
        collector = Collector("generated images", job.count, (size, size), self.evaluator.network)
        batches = [
            range(start, min(start + chunk, job.count))
            for start in share_of(range(0, job.count, chunk), rank, world)
        ]
        with matmul_precision(job.precision):
            engine = job.sampler(self.generator, chunk)
            for batch in sample_images(engine, self.tokenizer, job, batches):
                pixels = torch.from_numpy(batch.images).permute(0, 3, 1, 2)
                collector.add(batch.indices.start, pixels)
        self.collector = collector
        return self

    def reduced(self) -> dict[str, float]:
        """The metrics on rank 0, {} elsewhere; all ranks call this together."""
        assert self.collector is not None, "measure comes first"
        return metrics_of(self.evaluator, self.collector, "gFID")


class ReconstructionScores(Scores):
    """`Scores` for the log: val/psnr, …; with an evaluator also val/rFID and its other metrics, on rank 0.
    That is a true rFID if the reference holds the same images."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        paths: list[ImagePath],
        processes: PartialState,
        lpips: Optional[LPIPS] = None,
        evaluator: Optional[Evaluator] = None,
    ):
        self.evaluator, self.collector, consumers = evaluator, None, []
        if evaluator is not None:
            size = (tokenizer.config.image_size, tokenizer.config.image_size)
            self.collector = Collector("reconstructions", len(paths), size, evaluator.network)
            consumers.append(Features(self.collector))
        super().__init__(tokenizer, paths, processes, lpips, *consumers)

    def reduced(self) -> dict[str, float]:
        values = {f"val/{name}": value for name, value in super().reduced().items()}
        if self.evaluator is not None and self.collector is not None:
            values |= metrics_of(self.evaluator, self.collector, "rFID")
        return values
