"""The sampling job: its settings, everything besides weights that its images depend on, and its models."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Optional

import psutil
import torch
from accelerate import PartialState

from configs.schema import GeneratorModels, GeneratorRun
from configs.sizes import with_weights
from data.classes import first_names, printable
from generation.prefix import load_codes, prefix_codes
from modeling.devices import default_dtype, free_memory
from modeling.engine import PREFILLED_AT_ONCE, Engine, cache_bytes
from modeling.generator import Backbone, Generator, build_generator
from modeling.image_decoder import DECODED_AT_ONCE
from modeling.sampling import NO_CLASS, ReferenceEngine, Sampling
from modeling.tokenizer import Tokenizer
from modeling.weights.class_names import NONE, ClassNames, class_names, sorted_as_text
from modeling.weights.metadata import GENERATOR, TOKENIZER
from modeling.weights.opened import Opened, check_same_codes, load_tokenizer
from modeling.weights.tensors import load_tensors, tensors_hash
from runtime.errors import InputError
from runtime.processes import compiles, local_processes, on_main, open_on_all


@dataclass(frozen=True)
class SamplingJob:
    """Images 0 … count - 1. Image i has class classes[i mod len(classes)] and random numbers of (seed, i),
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


# ---------------------------------------------------------------------- its models
@dataclass
class Models:
    """A tokenizer and, unless stored codes are decoded, a generator, in eval mode on one device."""

    tokenizer: Tokenizer
    generator: Optional[Generator]
    hashes: dict[str, str]  # of the weights, by "tokenizer" and "generator"
    device: torch.device
    names: Optional[ClassNames] = None  # of the generator's classes


def open_job(options: GeneratorRun) -> tuple[SamplingJob, Models]:
    """The job of these options and its models; all processes call this together.

    Raises InputError if a file or option is missing or does not fit.
    """
    processes, device = PartialState(), PartialState().device
    assert device is not None  # accelerate's type hint allows it
    options, tokenizer, generator = open_models(options)
    experiment = options.experiment
    if generator is None:
        codes = load_codes("codes", str(experiment.codes), options.model.vq_model, whole=True)
        # Nothing is sampled, so neither classes nor a compiler matter.
        options = options.changed(experiment=replace(experiment, classes=None, compile=False))
        job = replace(sampling_job(options, device), count=len(codes), prefix=codes)
        return job, load_models(options.model, tokenizer, None, device)
    names = class_names(generator.about)
    job = sampling_job(options, device, names)
    classes = set(job.classes) - {NO_CLASS}
    missing = generator.about.without_images(classes)
    if missing:
        first = first_names([str(label) for label in missing])
        processes.print(
            f"warning: {printable(generator.file)} was not trained on {len(missing)} of "
            f"{len(classes)} classes ({first}): set experiment.classes to others"
        )
    doubt = sorted_as_text(names.folders)
    if doubt and any(isinstance(item, int) for item in experiment.classes or ()):
        processes.print(f"warning: {doubt}")
    models = load_models(options.model, tokenizer, generator, device)
    prefix = on_main(lambda: prefix_codes(experiment, models.tokenizer))
    return replace(job, prefix=prefix), replace(models, names=names)


def open_models(options: GeneratorRun) -> tuple[GeneratorRun, Opened, Optional[Opened]]:
    """The options with the sizes of the weights, and the weights of the tokenizer and, unless stored codes
    are decoded, of the generator; all processes call this together."""
    experiment, generator = options.experiment, None
    if experiment.codes is None:
        if experiment.generator_checkpoint is None:
            raise InputError(
                "set experiment.generator_checkpoint=FILE, for example weights/alitok_b.bin"
            )
        generator = open_on_all(experiment.generator_checkpoint, GENERATOR)
    tokenizer = open_on_all(experiment.tokenizer_checkpoint, TOKENIZER)
    if generator is not None:
        check_same_codes(generator, tokenizer)
    return with_weights(options, tokenizer, generator), tokenizer, generator


def load_models(
    sizes: GeneratorModels, tokenizer: Opened, generator: Optional[Opened], device: torch.device
) -> Models:
    """Models of these sizes with these weights. Raises InputError if they do not fit."""
    hashes, made = {"tokenizer": tensors_hash(tokenizer.state)}, None
    if generator is not None:
        made = build_generator(sizes.generator)
        load_tensors(made, generator.state, str(generator.file))
        made.to(device).eval()
        hashes["generator"] = tensors_hash(generator.state)
    return Models(load_tokenizer(tokenizer, sizes.vq_model).to(device), made, hashes, device)


def largest_batch(models: Models, job: SamplingJob) -> int:
    """How many images at once fit into free memory, by a conservative estimate."""
    device, config = models.device, models.tokenizer.config
    if device.type == "cuda":
        free = free_memory(device)
    else:
        free = psutil.virtual_memory().available // local_processes()
    # Decoding: some activations of the MLP's width, and pixels in float32 and as bytes.
    tokens = config.num_tokens + config.num_buffer_tokens
    pixels = 3 * config.image_size**2
    shared = DECODED_AT_ONCE * 4 * (4 * 4 * tokens * config.decoder_width + 4 * pixels)
    image = 8 * pixels  # bytes on the device, pinned, and in the two chunks being written
    if models.generator is not None:
        # The engine's weights, and sorted and summed logits in float64.
        sizes = models.generator.config
        shared += 4 * 12 * sizes.num_hidden_layers * sizes.hidden_size**2
        # The reference's cache is of float32 at most.
        dtype = torch.float32 if job.engine == "reference" else job.dtype
        image += cache_bytes(sizes, job.sampling, dtype, job.cache)
        image += 64 * sizes.codebook_size
        # Activations of one part: residual, qkv, its float32 copy, the MLP.
        if job.prefix is not None:
            shared += PREFILLED_AT_ONCE * 4 * 24 * sizes.hidden_size
    return max(int(0.9 * free - shared) // image, 0)
