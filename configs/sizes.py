"""The sizes of the models that a program uses: what their weights are, and the options for the rest.

A size that was set, on the command line or in a file, must agree with the weights.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Optional, TypeVar

from configs.load import BROUGHT, CLASSES, resumed_run, tokenizer_config
from configs.schema import COMMAND_LINE, GeneratorRun
from modeling.tokenizer import TokenizerConfig
from modeling.weights.opened import Opened
from runtime.errors import InputError

T = TypeVar("T", bound=Any)  # a config


def tokenizer_sizes(tokenizer: Opened, config: Optional[str], **flags: Any) -> TokenizerConfig:
    """The tokenizer of a program with flags; `config` is the YAML of its --config.

    Raises InputError where either contradicts the weights.
    """
    return agreed(tokenizer, *tokenizer_config(config, **flags), "")


def with_weights(
    options: GeneratorRun, tokenizer: Optional[Opened], generator: Optional[Opened] = None
) -> GeneratorRun:
    """These options with the sizes of the weights. A generator that is still to be trained makes the
    codes of the tokenizer.

    Raises InputError where an option contradicts the weights.
    """
    model, places = options.model, options.places
    vq_model, made = model.vq_model, model.generator
    unread = ()
    if tokenizer is None:
        names = [f"model.vq_model.{field.name}" for field in fields(vq_model)]
        unread = tuple(name for name in names if name not in places)
    if tokenizer is not None:
        vq_model = agreed(tokenizer, vq_model, places, "model.vq_model.")
        codes = {"image_seq_len": vq_model.num_tokens, "codebook_size": vq_model.codebook_size}
        unset = {n: size for n, size in codes.items() if f"model.generator.{n}" not in places}
        made = replace(made, **unset)
    if generator is not None:
        made = agreed(generator, made, places, "model.generator.")
    changed = options.changed(model=replace(model, vq_model=vq_model, generator=made))
    object.__setattr__(changed, "unread", unread)
    return changed


def with_start(options: GeneratorRun, weights: Opened) -> GeneratorRun:
    """These options with the sizes of the weights that a generator's training starts from. Its codes are
    the tokenizer's, and its classes those of the data.

    Raises InputError where an option contradicts the weights.
    """
    brought = {name: weights.about.config[name] for name in BROUGHT}
    weights = replace(weights, about=replace(weights.about, config=brought))
    made = agreed(weights, options.model.generator, options.places, "model.generator.")
    return options.changed(model=replace(options.model, generator=made))


def with_classes(options: GeneratorRun, source: str, count: int) -> GeneratorRun:
    """These options with the number of classes of the training data `source`, where none is set.

    A file may set more than there are, as presets for all of ImageNet do. Raises InputError for fewer,
    and for another number on the command line.
    """
    name, made = f"model.generator.{CLASSES}", options.model.generator
    known, place = made.condition_num_classes, options.places.get(name)
    if place is None:
        made = replace(made, condition_num_classes=count)
    elif known < count or (known > count and place == COMMAND_LINE):
        remedy = f"leave it out, or set {count}"
        if place != COMMAND_LINE and resumed_run(options.experiment) is not None:
            remedy = "start another run from these weights, with experiment.init_weights"
        raise InputError(f"{name}={known} ({place}), but {source} has {count} classes: {remedy}")
    return options.changed(model=replace(options.model, generator=made))


def agreed(weights: Opened, used: T, places: Mapping[str, Any], prefix: str) -> T:
    """A model's config with the sizes of its weights; those in `places` were set."""
    chosen = {
        field.name: getattr(used, field.name)
        for field in fields(used)
        if prefix + field.name in places
    }

    def named(name: str, value: Any) -> str:
        return f"{prefix}{name}={value} ({places[prefix + name]})"

    return weights.config(used, chosen, named)
