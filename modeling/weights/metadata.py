"""The metadata of a weights file: the model, its sizes, the tokenizer of its codes, class names.

Every weights file of this project has an entry `alitok`: a JSON text in the `__metadata__` of .safetensors, a
dict in the `_metadata` of a PyTorch state dict, where `load_state_dict` ignores it. Its content:

    version     1
    kind        generator, tokenizer or discriminator
    config      the sizes of the model, by the names of its config (`SIZES`)
    stage       of a tokenizer: 1 or 2; null if unknown
    tokenizer   fingerprint (`weights.fingerprint`) of the tokenizer whose codes a generator models,
                or of the tokenizer itself; null if unknown
    classes     of a generator: the class names of its training set, by label; null if unknown
    untrained   of a generator: the labels without images in training

Sizes of other files come from tensor shapes and the published head size.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional, get_type_hints

from torch import Tensor

from ..errors import InputError, describe
from ..fields import is_a

KEY, VERSION = "alitok", 1
GENERATOR, TOKENIZER, DISCRIMINATOR = "generator", "tokenizer", "discriminator"
# By kind of model, a tensor that only such models have.
MARKS = {
    GENERATOR: "embeddings.weight", TOKENIZER: "latent_tokens", DISCRIMINATOR: "block_in.0.weight"
}  # fmt: skip
# Of a tokenizer: sizes that determine its codes, and sizes of the decoder that both stages share.
ENCODER = (
    "codebook_size", "token_size", "num_latent_tokens", "image_size", "patch_size",
    "encoder_width", "encoder_layers", "encoder_heads",
)  # fmt: skip
DECODER = ("decoder_width", "decoder_layers", "decoder_heads")
FLAGS = ("causal", "prefix_head")  # the sizes that are true or false
# The sizes that determine a model's computation and tensor shapes.
SIZES = {
    GENERATOR: (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "codebook_size",
        "image_seq_len", "condition_num_classes",
    ),
    TOKENIZER: (*ENCODER, *DECODER, "num_buffer_tokens", *FLAGS),
    DISCRIMINATOR: (),
}  # fmt: skip
HEAD_SIZE = 64  # of the published tokenizers
UNSEEN = ("encoder_heads", "decoder_heads", "causal")  # not visible in a tokenizer's tensors


@dataclass(frozen=True)
class About:
    """The metadata of a file (see the module's docstring), or the same derived from its tensors.

    `assumed` are published values of sizes that a file neither states nor shows.
    """

    kind: str
    config: dict[str, Any]
    tokenizer: Optional[str] = None
    stage: Optional[int] = None
    classes: Optional[list[str]] = None
    untrained: list[int] = field(default_factory=list)
    assumed: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """The entry `alitok` of a file."""
        content: dict[str, Any] = {"version": VERSION, "kind": self.kind, "config": self.config}
        if self.kind == TOKENIZER:
            content["stage"] = self.stage
        if self.kind != DISCRIMINATOR:
            content["tokenizer"] = self.tokenizer
        if self.kind == GENERATOR:
            content |= {"classes": self.classes, "untrained": self.untrained}
        return content

    def without_images(self, labels: Iterable[int]) -> list[int]:
        """The labels that the generator was not trained on; none if that is unknown."""
        if self.classes is None:
            return []
        known = len(self.classes)
        return sorted(label for label in set(labels) if label >= known or label in self.untrained)


def about_model(
    kind: str, config: Any = None, tokenizer: Optional[str] = None, **known: Any
) -> About:
    """The metadata for weights of a model with this config; `known` are further fields of `About`."""
    sizes = {name: getattr(config, name) for name in SIZES[kind]}
    if kind == TOKENIZER:
        sizes["num_latent_tokens"] = config.num_tokens  # null stands for it in a config
    return About(kind, sizes, tokenizer, **known)


def parse(entry: Any, source: object) -> About:
    """Read an entry `alitok`, a dict or its JSON text. Raises InputError, naming `source`."""
    try:
        # A dict goes through JSON too, so that both formats have the same types.
        content = json.loads(entry if isinstance(entry, str) else json.dumps(entry))
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
    types = get_type_hints(About)
    known = {n: content[n] for n in ("tokenizer", "stage", "classes", "untrained") if n in content}
    for name, value in known.items():
        if not is_a(value, types[name]) or (name == "stage" and value not in (None, 1, 2)):
            raise damaged(source, f"{name}={value!r:.40} is of the wrong type")
    if len(known.get("classes") or ()) > config.get("condition_num_classes", 0):
        raise damaged(source, f"it names {len(known['classes'])} classes, more than the model has")
    return About(kind, config, **known)


def damaged(source: object, reason: str) -> InputError:
    return InputError(f"the metadata of {source} is damaged ({reason}): export the weights again")


# ---------------------------------------------------------------------- sizes from shapes
def about_shapes(kind: str, state: dict[str, Tensor], source: object) -> About:
    """The description of a model derived from its tensors, as `shown_sizes`."""
    shown = shown_sizes(kind, state, source)
    if kind != TOKENIZER:
        return About(kind, shown)
    heads = {
        f"{part}_heads": shown[f"{part}_width"] // HEAD_SIZE
        for part in ("encoder", "decoder")
        if shown[f"{part}_width"] % HEAD_SIZE == 0
    }
    stage1 = shown["prefix_head"] or "quantize.embed_prob" in state
    assumed = {"causal": shown["prefix_head"], **heads}
    return About(kind, shown, stage=1 if stage1 else None, assumed=assumed)


def shown_sizes(kind: str, state: dict[str, Tensor], source: object) -> dict[str, Any]:
    """The sizes that tensor shapes show. Raises InputError, naming `source`, if tensors of the kind are missing.

    They show neither a tokenizer's heads, nor whether its decoder is causal, nor a generator's number of
    codes per image.
    """
    show = {GENERATOR: generator_sizes, TOKENIZER: tokenizer_sizes}.get(kind)
    try:
        return {} if show is None else show(state)
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as e:
        raise InputError(
            f"{source} does not hold all tensors of a {kind} ({describe(e)}): pass a {kind}'s complete "
            f"weights, or export them again"
        ) from e


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
