"""The settings of a sampling job: everything besides weights that its images depend on."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Optional

import torch

from configs.schema import GeneratorRun
from modeling.devices import default_dtype
from modeling.engine import Engine
from modeling.generator import Backbone, Generator
from modeling.sampling import NO_CLASS, ReferenceEngine, Sampling
from modeling.weights.class_names import NONE, ClassNames
from runtime.errors import InputError
from runtime.processes import compiles


@dataclass(frozen=True)
class SamplingJob:
    """Images 0 … count - 1. Image i has class classes[i mod their number] and random numbers of (seed, i),
    so any process can make any image."""

    count: int
    classes: tuple[int, ...]  # labels; NO_CLASS: an image without a class
    seed: int
    sampling: Sampling
    precision: str  # fp32, tf32 or bf16
    compiled: bool
    chunk: Optional[int]  # images sampled together; None: as many as memory allows
    engine: str = "auto"  # see modeling.engine.Engine; reference: ReferenceEngine
    cache: str = "auto"
    # Codes (M, n) that image i begins with: row i mod M; None: all codes are sampled. Without a generator
    # they are all codes of the images, which are only decoded.
    prefix: Optional[torch.Tensor] = field(default=None, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the generator's matrices."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def sampler(self, model: Backbone, batch: int) -> Engine | ReferenceEngine:
        """The sampler of a generator's codes, for batches of up to `batch` images.

        Raises InputError if the engine does not support the backbone.
        """
        if self.engine == "reference":
            return ReferenceEngine(model, batch, self.sampling, self.dtype)
        if not isinstance(model, Generator):
            raise InputError(
                f"experiment.engine={self.engine} does not support {type(model).__name__}: set "
                f"experiment.engine=reference"
            )
        return Engine(
            model, batch, self.sampling, self.dtype, self.compiled, self.engine, self.cache
        )

    def labels(self, indices: range) -> torch.Tensor:
        """Classes of the images at `indices`: (len(indices),), int64."""
        return torch.tensor([self.classes[i % len(self.classes)] for i in indices])

    def beginnings(self, indices: range) -> Optional[torch.Tensor]:
        """First codes of the images at `indices`: (len(indices), n), int64."""
        if self.prefix is None:
            return None
        return self.prefix[[i % len(self.prefix) for i in indices]]


def sampling_job(
    options: GeneratorRun, device: torch.device, names: Optional[ClassNames] = None
) -> SamplingJob:
    """The job of these options on this device, with `auto` resolved.

    `names` are the generator's class names, if known. Raises InputError for unknown classes and for
    options that the device does not support.
    """
    experiment, generator = options.experiment, options.model.generator
    known = generator.condition_num_classes
    names = names or ClassNames(known)
    classes = tuple(names.labels(experiment.classes or range(known)))
    sampling, reference = generator.sampling, experiment.engine == "reference"
    if reference and experiment.cache != "auto":
        raise InputError(
            f"experiment.engine=reference does not support experiment.cache={experiment.cache}: leave "
            f"one of them out"
        )
    if set(classes) == {NO_CLASS}:  # guidance would double the work and change nothing
        sampling = replace(sampling, guidance_scale=1.0)
    return SamplingJob(
        count=experiment.num_fid_samples,
        classes=classes,
        seed=generator.seed,
        sampling=sampling,
        precision=sampling_precision(experiment.precision, device),
        compiled=not reference and compiles(experiment.compile, "experiment.compile"),
        chunk=experiment.per_proc_batch_size,
        engine=experiment.engine,
        cache=experiment.cache,
    )


def in_options(labels: Iterable[int]) -> list[int | str]:
    """Labels as `experiment.classes` has them."""
    return [NONE if label == NO_CLASS else label for label in labels]


def sampling_precision(precision: str, device: torch.device) -> str:
    """fp32, tf32 or bf16; auto is bf16 on CUDA (from Ampere on) and fp32 elsewhere."""
    if precision == "auto":
        return "bf16" if default_dtype(device) == torch.bfloat16 else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise InputError("experiment.precision=tf32 works only on CUDA: choose fp32 or bf16")
    return precision
