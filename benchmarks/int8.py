"""How far smaller types of a trained generator's cache and weights move its codes and images.

    python -m benchmarks.int8 --config configs/digits_generator.yaml
    python -m benchmarks.int8 --config configs/alitok_b.yaml --generator weights/alitok_b.bin --images 64

Every way draws the codes of the same images from the same random numbers as float32 does. Teacher-forced,
each code follows float32's codes before it, so that a difference is one of that step alone. Free-running,
each follows the way's own codes, so that an image differs from its first other code on. Images are compared as
the PSNR over all pixels of all images, those of either code sequence decoded in float32.

`--generator` is a weights file or a run folder; by default it is the config's own run. The tokenizer is that
of the config. Further options of sample_imagenet.py may follow, such as model.generator.guidance_scale=1.0.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import configs.load
from benchmarks.common import machine
from configs.schema import GeneratorRun
from generation.job import Models, SamplingJob, load_models, open_models, sampling_job
from modeling.devices import find_device
from modeling.engine import Engine
from modeling.image_decoder import ImageDecoder
from modeling.sampling import image_uniforms
from runtime.program import run

Inputs = list[tuple[Tensor, Tensor]]  # labels (B,) and uniforms (B, T) of every batch
# The way that all others are compared with is float32 throughout.
WAYS = {
    "float32, int8 cache": (torch.float32, "int8"),
    "bf16": (torch.bfloat16, "auto"),
    "bf16, int8 cache": (torch.bfloat16, "int8"),
}


class Teacher:
    """Stands for an engine's draw: keeps what it draws, and continues with the codes given (B, T)."""

    def __init__(self, draw: Callable[..., Tensor], given: Tensor):
        self.draw, self.given = draw, given
        self.drawn: list[Tensor] = []

    def __call__(self, *arguments: Any) -> Tensor:
        self.drawn.append(self.draw(*arguments))
        return self.given[:, len(self.drawn) - 1]


@dataclass
class Agreement:
    """The codes (N, T) of one way beside those of float32."""

    codes: Tensor  # float32's
    forced: Tensor  # the way's, each after float32's codes
    free: Tensor  # the way's, each after its own

    def share(self, other: Tensor) -> float:
        """The share of codes that are float32's."""
        return (other == self.codes).double().mean().item()

    @property
    def whole(self) -> float:
        """Share of images all of whose free-running codes are float32's."""
        return (self.free == self.codes).all(1).double().mean().item()


def drawn(engine: Engine, inputs: Inputs) -> Tensor:
    """The codes (N, T) that an engine draws, each after its own codes."""
    return torch.cat([engine.sample(*batch) for batch in inputs])


def drawn_after(engine: Engine, inputs: Inputs, codes: Tensor) -> Tensor:
    """The codes (N, T) that an engine draws, each after those of `codes` (N, T) before it."""
    functions, graph, found = engine.functions, engine.graph, []
    engine.graph = None  # a captured step would not call the teacher
    for batch, given in zip(inputs, codes.split(engine.batch)):
        teacher = Teacher(functions.choose, given)
        engine.functions = functions._replace(choose=teacher)
        engine.sample(*batch)
        found.append(torch.stack(teacher.drawn, 1))
    engine.functions, engine.graph = functions, graph
    return torch.cat(found)


def psnr(images: Tensor, others: Tensor) -> float:
    """PSNR in dB over all pixels of uint8 images together; infinite for equal ones."""
    error = (images.double() - others.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def whole_batches(job: SamplingJob, batch: int, steps: int, device: torch.device) -> Inputs:
    """Labels (B,) and uniforms (B, T) of the job's images, and of those that fill the last batch."""
    starts = range(0, job.count, batch)
    return [
        (job.labels(indices).to(device), image_uniforms(job.seed, indices, steps).to(device))
        for indices in (range(start, start + batch) for start in starts)
    ]


def compare(models: Models, job: SamplingJob, batch: int) -> Iterator[str]:
    """A line per way, on the job's images, `batch` at a time."""
    model = models.generator
    assert model is not None
    inputs = whole_batches(job, batch, model.config.image_seq_len, models.device)
    codes = drawn(Engine(model, batch, job.sampling), inputs)
    decoder = ImageDecoder(models.tokenizer, torch.float32)
    images = decoder(codes[: job.count])
    for name, (dtype, cache) in WAYS.items():
        engine = Engine(model, batch, job.sampling, dtype, cache=cache)
        forced, free = drawn_after(engine, inputs, codes), drawn(engine, inputs)
        found = Agreement(codes[: job.count], forced[: job.count], free[: job.count])
        yield (
            f"{name}: teacher-forced {found.share(found.forced):.2%} of codes equal, images "
            f"{psnr(images, decoder(found.forced)):.1f} dB; free-running "
            f"{found.share(found.free):.1%} of codes and {found.whole:.1%} of images equal, images "
            f"{psnr(images, decoder(found.free)):.1f} dB"
        )


def load(config: str, generator: str | None, options: list[str]) -> GeneratorRun:
    """The config's options, with the generator given or that of its own run."""
    arguments = [f"config={config}", *options]
    if generator is None:
        generator = configs.load.load(GeneratorRun, arguments).experiment.output_dir
    arguments.append(f"experiment.generator_checkpoint={generator}")
    return configs.load.load(GeneratorRun, arguments, "sample_imagenet")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, help="YAML of the generator's run")
    parser.add_argument("--generator", help="weights file or run folder (the config's run)")
    parser.add_argument("--images", type=int, default=500, help="images sampled (500)")
    parser.add_argument("--batch", type=int, default=100, help="images sampled together (100)")
    parser.add_argument("options", nargs="*", help="option=value, as for sample_imagenet.py")
    args = parser.parse_args(argv)
    fixed = [f"experiment.num_fid_samples={args.images}", "experiment.precision=fp32"]
    options = load(args.config, args.generator, [*args.options, *fixed])
    experiment, device = options.experiment, find_device()
    generator = experiment.generator_checkpoint
    assert generator is not None  # `load` sets it
    options, tokenizer, weights = open_models(options)
    models = load_models(options.model, tokenizer, weights, device)
    job = sampling_job(options, device)
    print(machine())
    print(
        f"{generator}: {job.count} images of {options.model.generator.image_seq_len} codes, {job.sampling}"
    )
    for line in compare(models, job, min(args.batch, args.images)):
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
