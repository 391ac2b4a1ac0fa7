"""The sizes of a program's models: those of their weights and, for the rest, the options.

A size that was set, on the command line or in a file, must agree with the weights.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Optional, TypeVar

from configs.load import BROUGHT, CLASSES, load_sizes, resumed_run
from configs.schema import GeneratorRun
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import GENERATOR, TOKENIZER
from modeling.weights.opened import Opened, load_tokenizer
from modeling.weights.tensors import describe
from runtime.errors import InputError
from runtime.processes import on_main, open_on_all

T = TypeVar("T", bound=Any)  # a config, or options
SECTIONS = {TOKENIZER: "vq_model", GENERATOR: "generator"}  # of `model`, by kind of weights


def tokenizer_of(
    path: str, config: Optional[str] = None, with_decoder: bool = True, **flags: Any
) -> Tokenizer:
    """The tokenizer of a program with flags, in eval mode on the CPU; all processes call this together.

    `path` is that of its weights, `config` the YAML of its --config. Raises InputError if that or a flag
    contradicts the weights.
    """
    opened, options = open_on_all(path, TOKENIZER), load_sizes(config, **flags)
    sizes = agreed(opened, options.model.vq_model, options.places)
    return load_tokenizer(opened, sizes, with_decoder)


def open_start(options: T, kind: str) -> tuple[T, Optional[Opened]]:
    """These options of a trainer with the sizes of the weights `experiment.init_weights`, and the weights, None
    without the option and if the run resumes; all ranks call this. A generator's codes are the tokenizer's,
    and its classes those of the data.

    Raises InputError if an option contradicts the weights, and for those of stage 1 in stage 2.
    """
    experiment, model, section = options.experiment, options.model, SECTIONS[kind]
    if experiment.init_weights is None or on_main(lambda: resumed_run(experiment)) is not None:
        return options, None
    weights = open_on_all(experiment.init_weights, kind)
    about = weights.about
    if kind == GENERATOR:
        about = replace(about, config={name: about.config[name] for name in BROUGHT})
    elif model.stage == 2 and about.stage == 1:
        raise InputError(
            f"{weights.file} is {describe(weights.state)}: for stage 2, set "
            f"experiment.stage1_checkpoint to it instead of experiment.init_weights"
        )
    sizes = agreed(replace(weights, about=about), getattr(model, section), options.places)
    return options.changed(model=replace(model, **{section: sizes})), weights


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
        names = [f"model.vq_model.{field.name}" for field in fields(vq_model)]
        unread = tuple(name for name in names if name not in places)
    else:
        vq_model = agreed(tokenizer, vq_model, places)
        codes = {"image_seq_len": vq_model.num_tokens, "codebook_size": vq_model.codebook_size}
        unset = {n: v for n, v in codes.items() if f"model.generator.{n}" not in places}
        made = replace(made, **unset)
    if generator is not None:
        made = agreed(generator, made, places)
    model = replace(options.model, vq_model=vq_model, generator=made)
    return options.changed(model=model, unread=unread)


def with_classes(options: GeneratorRun, source: str, count: int) -> GeneratorRun:
    """These options with the number of classes of the training data `source`, if none is set.

    More may be set than there are, as presets for all of ImageNet do. Raises InputError for fewer.
    """
    name, made = f"model.generator.{CLASSES}", options.model.generator
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


def agreed(weights: Opened, used: T, places: Mapping[str, Any]) -> T:
    """A model's config with the sizes of its weights; those in `places` were set."""
    prefix = f"model.{SECTIONS[weights.about.kind]}."
    names = [field.name for field in fields(used) if prefix + field.name in places]
    chosen = {name: getattr(used, name) for name in names}

    def named(name: str, value: Any) -> str:
        return f"{prefix}{name}={value} ({places[prefix + name]})"

    return weights.config(used, chosen, named)
