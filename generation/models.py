"""The models of a sampling job with their weights, on the device, and how many images fit there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import psutil
import torch
from torch import Tensor

from configs.schema import GeneratorExperiment, GeneratorModels
from data.classes import trained_classes
from generation.job import SamplingJob
from modeling.devices import free_memory
from modeling.engine import PREFILLED_AT_ONCE, Engine, cache_bytes
from modeling.generator import Generator, build_generator
from modeling.image_decoder import DECODED_AT_ONCE
from modeling.sampling import ReferenceEngine
from modeling.tokenizer import Tokenizer
from modeling.weights.class_names import ClassNames
from modeling.weights.metadata import GENERATOR, TOKENIZER, About, about_file, about_model
from modeling.weights.tensors import check_same_codes, load_for_use, load_tensors, tensors_hash
from runtime.errors import InputError


@dataclass
class Models:
    """A tokenizer and, unless stored codes are decoded, a generator, in eval mode on one device."""

    tokenizer: Tokenizer
    generator: Optional[Generator]
    hashes: dict[str, str]  # of the weights, by "tokenizer" and "generator"
    device: torch.device

    def engine(self, job: SamplingJob, batch: int) -> Engine | ReferenceEngine:
        """The job's engine for batches of up to `batch` images."""
        assert self.generator is not None
        return job.sampler(self.generator, batch)


def generator_checkpoint(experiment: GeneratorExperiment) -> str:
    """The path of the generator's weights. Raises InputError where the option is missing."""
    if experiment.generator_checkpoint is None:
        raise InputError(
            "set experiment.generator_checkpoint=FILE, for example weights/alitok_b.bin"
        )
    return experiment.generator_checkpoint


def check_files(
    sizes: GeneratorModels,
    tokenizer: Path,
    tokenizer_state: dict[str, Tensor],
    generator: Optional[Path] = None,
) -> Optional[About]:
    """What the generator's file says of itself, as far as it says anything.

    Raises InputError for a file of another kind of model, for sizes that contradict the config's, and
    for a generator of other codes than the tokenizer's.
    """
    files = {"vq_model": (TOKENIZER, tokenizer), "generator": (GENERATOR, generator)}
    for section, (kind, file) in files.items():
        about = None if file is None else about_file(file)
        if about is None:
            continue
        about.expect(kind, file)
        used = about_model(kind, getattr(sizes, section)).config
        for name, value in about.config.items():
            if used[name] != value:
                raise InputError(
                    f"model.{section}.{name}={used[name]} contradicts {file}, which states {value}: "
                    f"set model.{section}.{name}={value}"
                )
    stated = None if generator is None else about_file(generator)
    check_same_codes(stated, generator, tokenizer_state, tokenizer)
    return stated


def class_names(about: Optional[About], weights: str, classes: int) -> ClassNames:
    """The names of a generator's classes: by its file, else by the run that its weights lie in."""
    if about is not None and about.classes is not None:
        return ClassNames(classes, dict(enumerate(about.classes)))
    return ClassNames(classes, trained_classes(weights))


def load_models(
    sizes: GeneratorModels,
    experiment: GeneratorExperiment,
    tokenizer_state: dict[str, Tensor],
    generator_state: Optional[dict[str, Tensor]],
    device: torch.device,
) -> Models:
    """Models of these sizes with these weights; `experiment` names the files in messages.

    Raises InputError where weights do not fit the sizes.
    """
    tokenizer, generator = Tokenizer(sizes.vq_model), None
    load_for_use(tokenizer, tokenizer_state, experiment.tokenizer_checkpoint)
    tokenizer.to(device).eval()
    hashes = {"tokenizer": tensors_hash(tokenizer_state)}
    if generator_state is not None:
        generator = build_generator(sizes.generator)
        load_tensors(generator, generator_state, generator_checkpoint(experiment))
        generator.to(device).eval()
        hashes["generator"] = tensors_hash(generator_state)
    return Models(tokenizer, generator, hashes, device)


def largest_batch(models: Models, job: SamplingJob) -> int:
    """How many images at once fit into free memory, by a conservative estimate."""
    device, config = models.device, models.tokenizer.config
    if device.type == "cuda":
        free = free_memory(device)
    else:
        free = psutil.virtual_memory().available
    # Decoding: a few activations as wide as the MLP, and pixels in float32 and as bytes.
    tokens = config.num_tokens + config.num_buffer_tokens
    pixels = 3 * config.image_size**2
    shared = DECODED_AT_ONCE * 4 * (4 * 4 * tokens * config.decoder_width + 4 * pixels)
    image = 8 * pixels  # as bytes: on the device, pinned, and in the two chunks being written
    if models.generator is not None:
        # The engine's weights, and sorted and summed logits in float64.
        sizes = models.generator.config
        shared += 4 * 12 * sizes.num_hidden_layers * sizes.hidden_size**2
        image += cache_bytes(sizes, job.sampling, job.dtype, job.cache)
        image += 64 * sizes.codebook_size
        if job.prefix is not None:  # activations of one part: residual, qkv, its float32, the MLP
            shared += PREFILLED_AT_ONCE * 4 * 24 * sizes.hidden_size
    return max(int(0.9 * free - shared) // image, 0)
