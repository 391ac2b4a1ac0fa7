"""What a weights file says of itself: the model, its sizes, the tokenizer of its codes, class names.

A .safetensors file that this project writes holds one entry in its `__metadata__`, under the key
`alitok`: a JSON object of

    version     1
    kind        generator, tokenizer or discriminator
    config      the sizes of the model, by the names of its config (`SIZES`)
    stage       of a tokenizer: of its training, 1 or 2; null where that is unknown
    tokenizer   fingerprint (`weights.fingerprint`) of the tokenizer whose codes a generator models,
                or of the tokenizer itself; null where it is unknown
    classes     of a generator: the names of its training set's classes, a label being an index into
                them; null where they are unknown

One entry, because the order of several is not the same at every writing.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError

T = TypeVar("T")
KEY, VERSION = "alitok", 1
GENERATOR, TOKENIZER, DISCRIMINATOR = "generator", "tokenizer", "discriminator"
# All that decides what a model computes, and the shapes of its tensors.
SIZES = {
    GENERATOR: (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "codebook_size",
        "image_seq_len", "condition_num_classes",
    ),
    TOKENIZER: (
        "codebook_size", "token_size", "num_latent_tokens", "image_size", "patch_size",
        "encoder_width", "encoder_layers", "encoder_heads", "decoder_width", "decoder_layers",
        "decoder_heads", "num_buffer_tokens", "causal", "prefix_head",
    ),
    DISCRIMINATOR: (),
}  # fmt: skip
FLAGS = ("causal", "prefix_head")  # the sizes that are true or false


@dataclass(frozen=True)
class About:
    """The entry `alitok`, as the module's docstring describes it."""

    kind: str
    config: dict[str, Any]
    tokenizer: Optional[str] = None
    stage: Optional[int] = None
    classes: Optional[tuple[str, ...]] = None

    def entries(self) -> dict[str, str]:
        """The `__metadata__` of a file."""
        content: dict[str, Any] = {"version": VERSION, "kind": self.kind, "config": self.config}
        if self.kind == TOKENIZER:
            content["stage"] = self.stage
        if self.kind != DISCRIMINATOR:
            content["tokenizer"] = self.tokenizer
        if self.kind == GENERATOR:
            content["classes"] = None if self.classes is None else list(self.classes)
        return {KEY: json.dumps(content)}

    def expect(self, kind: str, source: object) -> None:
        """Raise InputError for a file of another kind of model."""
        if self.kind != kind:
            raise InputError(
                f"{source} holds a {self.kind}, not a {kind}: pass the path of a {kind}'s weights"
            )

    def build(self, config: type[T], kind: str, source: object) -> T:
        """The config of this kind of model. Raises InputError for another kind or sizes that cannot be."""
        self.expect(kind, source)
        try:
            return config(**self.config)
        except InputError as e:
            raise damaged(source, str(e)) from e

    def check_tensors(self, state: dict[str, Tensor], source: object) -> None:
        """Raise InputError where a size contradicts the shapes of the file's tensors."""
        shown = shown_sizes(self.kind, state)
        if shown is None:
            raise InputError(
                f"{source} says that it holds a {self.kind}, which its tensors are not: its metadata "
                f"is wrong; export the weights again"
            )
        for name, size in shown.items():
            if self.config[name] != size:
                raise InputError(
                    f"{source} states {name}={self.config[name]}, but its tensors have {size}: its "
                    f"metadata is wrong; export the weights again"
                )


def about_model(
    kind: str,
    config: Any = None,
    tokenizer: Optional[str] = None,
    stage: Optional[int] = None,
    classes: Optional[list[str]] = None,
) -> About:
    """What a file with the weights of a model of this config says; see `About`."""
    sizes = {name: getattr(config, name) for name in SIZES[kind]}
    if kind == TOKENIZER:
        sizes["num_latent_tokens"] = config.num_tokens  # null stands for it in a config
    return About(kind, sizes, tokenizer, stage, None if classes is None else tuple(classes))


def about_file(path: str | Path) -> Optional[About]:
    """What a file says of itself; only its header is read.

    None for a file of another format or that somebody else has written, and where no file can be
    read: whoever loads its tensors says what is wrong then. Raises InputError for a version or an
    entry that this code does not know.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            entries = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return None if KEY not in entries else parse(entries[KEY], path)


def parse(text: str, source: object) -> About:
    """The entry of a file's metadata; InputError names `source`."""
    try:
        content = json.loads(text)
        version = content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise damaged(source, "it is not an object with a version") from e
    if version != VERSION:
        raise InputError(
            f"{source} has metadata of format version {version!r:.20}, but this code reads version "
            f"{VERSION}: update the code, or export the weights with this version"
        )
    kind, config = content.get("kind"), content.get("config")
    if kind not in tuple(SIZES) or not isinstance(config, dict):
        raise damaged(source, "it names no known kind of model with its config")
    for name in sorted(config.keys() ^ set(SIZES[kind])):
        raise damaged(source, f"{name!r:.40} is {'unknown' if name in config else 'missing'}")
    for name, value in config.items():
        if type(value) is not (bool if name in FLAGS else int):
            raise damaged(source, f"{name}={value!r:.40} is of the wrong type")
    tokenizer, stage, classes = (content.get(name) for name in ("tokenizer", "stage", "classes"))
    if not isinstance(tokenizer, (str, type(None))) or stage not in (None, 1, 2):
        raise damaged(source, "its tokenizer or stage is of the wrong type")
    if classes is not None:
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise damaged(source, "its classes are not a list of names")
        if len(classes) > config.get("condition_num_classes", 0):
            raise damaged(source, f"it names {len(classes)} classes, more than the model has")
        classes = tuple(classes)
    return About(kind, config, tokenizer, stage, classes)


def damaged(source: object, reason: str) -> InputError:
    return InputError(f"the metadata of {source} is damaged ({reason}): export the weights again")


# ---------------------------------------------------------------------- what shapes show
def shown_sizes(kind: str, state: dict[str, Tensor]) -> Optional[dict[str, Any]]:
    """The sizes that the shapes of a model's tensors show; None where they are of no such model.

    The heads of a tokenizer, whether its decoder is causal, and the number of codes of a generator
    show in no shape.
    """
    show = {GENERATOR: generator_sizes, TOKENIZER: tokenizer_sizes}.get(kind)
    try:
        return {} if show is None else show(state)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError):
        return None


def generator_sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """Raises KeyError or ValueError for other tensors."""
    codes, hidden = state["output.weight"].shape
    return {
        "hidden_size": hidden,
        "num_hidden_layers": sum(name.endswith(".attn.qkv.weight") for name in state),
        "num_attention_heads": hidden // len(state["blocks.0.attn.q_norm.weight"]),
        "codebook_size": codes,
        "condition_num_classes": len(state["embeddings.weight"]) - codes - 2,
    }


def tokenizer_sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """Raises KeyError or ValueError for other tensors."""
    codes, token_size = state["quantize.embedding.weight"].shape
    tokens, encoder_width = state["latent_tokens"].shape
    buffers, decoder_width = state["decoder.class_embedding"].shape
    patch = state["encoder.patch_embed.weight"].shape[-1]
    return {
        "codebook_size": codes,
        "token_size": token_size,
        "num_latent_tokens": tokens,
        "image_size": math.isqrt(len(state["encoder.positional_embedding"])) * patch,
        "patch_size": patch,
        "encoder_width": encoder_width,
        "encoder_layers": layers(state, "encoder.transformer."),
        "decoder_width": decoder_width,
        "decoder_layers": layers(state, "decoder.transformer."),
        "num_buffer_tokens": buffers,
        "prefix_head": "decoder.ffn_aux.0.weight" in state,
    }


def layers(state: dict[str, Tensor], prefix: str) -> int:
    """How many numbers follow a prefix in the names of tensors."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
