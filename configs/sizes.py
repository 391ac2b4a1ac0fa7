"""The sizes of a program's models: those of their weights and, for the rest, the options.

A size that was set, on the command line or in a file, must agree with the weights.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Optional, TypeVar

from configs.load import BROUGHT, CLASSES, load_sizes, resumed_run
from configs.schema import Experiment, GeneratorRun
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import TOKENIZER
from modeling.weights.opened import Opened, load_tokenizer
from runtime.errors import InputError
from runtime.processes import on_main, open_on_all

T = TypeVar("T", bound=Any)  # a config
VQ_MODEL, GENERATOR = "model.vq_model.", "model.generator."  # the sections of their options


def tokenizer_of(
    path: str, config: Optional[str] = None, with_decoder: bool = True, **flags: Any
) -> Tokenizer:
    """The tokenizer of a program with flags, in eval mode on the CPU; all processes call this together.

    `path` is that of its weights, `config` the YAML of its --config. Raises InputError if that or a flag
    contradicts the weights.
    """
    opened, options = open_on_all(path, TOKENIZER), load_sizes(config, **flags)
    sizes = agreed(opened, options.model.vq_model, options.places, VQ_MODEL)
    return load_tokenizer(opened, sizes, with_decoder)


def open_initial(experiment: Experiment, kind: str) -> Optional[Opened]:
    """The weights of `experiment.init_weights`, which set the sizes of a new run's model; all ranks call
    this. None without the option, and if the run resumes."""
    if experiment.init_weights is None or on_main(lambda: resumed_run(experiment)) is not None:
        return None
    return open_on_all(experiment.init_weights, kind)


def with_weights(
    options: GeneratorRun, tokenizer: Optional[Opened], generator: Optional[Opened] = None
) -> GeneratorRun:
    """These options with the sizes of the weights. An untrained generator takes the number of codes and
    the codebook size from the tokenizer.

    Raises InputError if an option contradicts the weights.
    """
    places, vq_model, made = options.places, options.model.vq_model, options.model.generator
    unread = ()
    if tokenizer is None:
        names = [VQ_MODEL + field.name for field in fields(vq_model)]
        unread = tuple(name for name in names if name not in places)
    else:
        vq_model = agreed(tokenizer, vq_model, places, VQ_MODEL)
        codes = {"image_seq_len": vq_model.num_tokens, "codebook_size": vq_model.codebook_size}
        made = replace(made, **{n: v for n, v in codes.items() if GENERATOR + n not in places})
    if generator is not None:
        made = agreed(generator, made, places, GENERATOR)
    model = replace(options.model, vq_model=vq_model, generator=made)
    return options.changed(model=model, unread=unread)


def with_start(options: GeneratorRun, weights: Opened) -> GeneratorRun:
    """These options with the sizes of the weights that a generator's training starts from. Its codes are
    the tokenizer's, and its classes those of the data.

    Raises InputError if an option contradicts the weights.
    """
    brought = {name: weights.about.config[name] for name in BROUGHT}
    weights = replace(weights, about=replace(weights.about, config=brought))
    made = agreed(weights, options.model.generator, options.places, GENERATOR)
    return options.changed(model=replace(options.model, generator=made))


def with_classes(options: GeneratorRun, source: str, count: int) -> GeneratorRun:
    """These options with the number of classes of the training data `source`, if none is set.

    More may be set than there are, as presets for all of ImageNet do. Raises InputError for fewer.
    """
    name, made = f"{GENERATOR}{CLASSES}", options.model.generator
    known, place = made.condition_num_classes, options.places.get(name)
    if place is not None and known < count:
        remedy = f"leave it out, or set {count}"
        if resumed_run(options.experiment) is not None:
            remedy = (
                "leave it out or, if the run itself has fewer, start another from its weights, with "
                "experiment.init_weights"
            )
        raise InputError(f"{name}={known} ({place}), but {source} has {count} classes: {remedy}")
    if place is None:
        made = replace(made, condition_num_classes=count)
    return options.changed(model=replace(options.model, generator=made))


def agreed(weights: Opened, used: T, places: Mapping[str, Any], prefix: str) -> T:
    """A model's config with the sizes of its weights; those in `places` were set."""
    names = [field.name for field in fields(used) if prefix + field.name in places]

    def named(name: str, value: Any) -> str:
        return f"{prefix}{name}={value} ({places[prefix + name]})"

    return weights.config(used, {name: getattr(used, name) for name in names}, named)
