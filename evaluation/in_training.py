"""FID while training: the trainers' models against `experiment.fid_reference`, on all processes."""

from typing import Optional

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from configs.schema import GeneratorRun
from data.images import CenterImages, to_float
from evaluation.compare import Collector, Evaluator
from modeling.engine import Engine
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from runtime.errors import InputError
from runtime.randomness import image_uniforms
from runtime.signals import outlive_first_signal

CHUNK = 64  # images sampled together where the config leaves it open


def open_evaluator(reference: Optional[str], ready: bool, needed: str) -> Optional[Evaluator]:
    """The reference's side, if one is given; `needed` names the options that it cannot do without."""
    if reference is None:
        return None
    if not ready:
        raise InputError(f"experiment.fid_reference={reference} needs {needed}")
    return Evaluator.open(reference, PartialState())


def metrics_of(evaluator: Evaluator, collector: Collector, name: str) -> dict[str, float]:
    """The known figures, for the log; the Fréchet distance under `name`. Empty but on rank 0."""
    samples = collector.finish()
    metrics = evaluator.result(samples, samples.images).get("metrics", {})
    return {
        f"val/{name if key == 'gFID' else key}": value
        for key, value in metrics.items()
        if value is not None
    }


def sampling_engine(generator: Generator, options: GeneratorRun, batch: int) -> Engine:
    """What sample_imagenet.py would sample with, but for its compiling, which is too long here."""
    cuda = generator.output.weight.is_cuda
    dtype = torch.bfloat16 if cuda else torch.float32
    return Engine(generator, batch, options.model.generator.sampling, dtype)


@torch.no_grad()
def generated(
    evaluator: Evaluator, generator: Generator, tokenizer: Tokenizer, options: GeneratorRun
) -> dict[str, float]:
    """gFID and the rest of `experiment.num_fid_samples` images, the ones that sampling would make."""
    sampler, vq_model = options.model.generator, options.model.vq_model
    count = options.experiment.num_fid_samples
    chunk = options.experiment.per_proc_batch_size or CHUNK
    processes, size = evaluator.processes, (vq_model.image_size, vq_model.image_size)
    collector = Collector("generated images", count, size, evaluator.inception)
    engine = sampling_engine(generator, options, chunk)
    for start in range(0, count, chunk)[processes.process_index :: processes.num_processes]:
        indices = range(start, min(start + chunk, count))
        labels = torch.tensor([i % sampler.condition_num_classes for i in indices])
        uniforms = image_uniforms(sampler.seed, indices, sampler.image_seq_len)
        codes = engine.sample(labels, uniforms)
        collector.add(start, (tokenizer.decode(codes) * 255).to(torch.uint8))
    return metrics_of(evaluator, collector, "gFID")


@torch.no_grad()
def reconstructed(
    evaluator: Evaluator, tokenizer: Tokenizer, paths: list[str], batch: int, workers: int
) -> dict[str, float]:
    """rFID and the rest of the reconstructions of the images at `paths`, by ADM's centre crop.

    A true rFID where the reference is the statistics of these very images.
    """
    processes, size = evaluator.processes, tokenizer.config.image_size
    collector = Collector("reconstructions", len(paths), (size, size), evaluator.inception)
    starts = range(0, len(paths), batch)[processes.process_index :: processes.num_processes]
    batches = [list(range(start, min(start + batch, len(paths)))) for start in starts]
    was_training = tokenizer.training
    tokenizer.eval()
    loader = DataLoader(
        CenterImages(paths, size), batch_sampler=batches, num_workers=workers,
        worker_init_fn=outlive_first_signal,
    )  # fmt: skip
    for start, pixels in zip(starts, loader):
        images = tokenizer.decode(tokenizer.encode(to_float(pixels.to(processes.device))))
        collector.add(start, (images * 255).to(torch.uint8))
    tokenizer.train(was_training)
    return metrics_of(evaluator, collector, "rFID")
