"""`open_weights`: weights and their sizes, from files of any kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import InputError
from ..tokenizer import Tokenizer, TokenizerConfig
from .metadata import TOKENIZER, About, about_model, about_shapes
from .runs import find_weights
from .tensors import fingerprint, load_tensors, read_model

T = TypeVar("T", bound=Any)  # a config
Named = Callable[[str, Any], str]  # how messages call an option with its value


@dataclass(frozen=True)
class Opened:
    """Opened weights: their file, its tensors (on the CPU, mapped), and their description."""

    file: Path
    state: dict[str, Tensor]
    about: About

    def sizes(self, chosen: Mapping[str, Any], named: Named = "{}={}".format) -> dict[str, Any]:
        """The sizes of this model. `chosen`, set by the user, replace only assumed ones.

        Raises InputError if one of them contradicts the weights.
        """
        for name, size in self.about.config.items():
            set_to = chosen.get(name)
            if set_to not in (None, size):
                raise InputError(
                    f"{named(name, set_to)} contradicts {self.file}, whose weights have "
                    f"{name}={size}: leave it out, or pass other weights"
                )
        assumed = {name: chosen.get(name, size) for name, size in self.about.assumed.items()}
        return {**assumed, **self.about.config}

    def config(
        self, base: T, chosen: Optional[Mapping[str, Any]] = None, named: Named = "{}={}".format
    ) -> T:
        """The config of the model: `base`, a dataclass, with its `sizes`.

        Raises InputError also if no model can have these.
        """
        sizes = self.sizes(chosen or {}, named)
        try:
            return replace(base, **sizes)
        except InputError as e:
            raise InputError(f"{self.file}: {e}") from e


def open_weights(path: str | Path, kind: str) -> Opened:
    """The weights of a model of this kind; their sizes come from metadata, else from tensor shapes.

    `path` is a file, a run's folder or a checkpoint (`runs.find_weights`). Raises InputError if there are
    no such weights, or if they are damaged.
    """
    return open_file(find_weights(path, kind), kind)


def open_file(file: Path, kind: str) -> Opened:
    """`open_weights` of a file that `find_weights` returned."""
    state, about = read_model(file, kind)
    return Opened(file, state, about or about_shapes(kind, state, file))


def config_of(opened: Opened, config: Optional[TokenizerConfig]) -> TokenizerConfig:
    """A tokenizer's sizes; `config`, by default the published one, gives those that the weights do not."""
    chosen = {} if config is None else about_model(TOKENIZER, config).config
    return opened.config(config or TokenizerConfig(), chosen, "tokenizer config: {}={}".format)


class Unfilled(TorchFunctionMode):
    """Leaves out random initial weights. On the meta device, `normal_` would import TorchDynamo, which
    takes as long as torch itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (nn.init.normal_, nn.init.trunc_normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_tokenizer(opened: Opened, config: TokenizerConfig, with_decoder: bool = True) -> Tokenizer:
    """A tokenizer of either stage, in eval mode on the CPU. Raises InputError if the weights do not fit the
    config."""
    with torch.device("meta"), Unfilled():  # random initial weights would cost seconds
        tokenizer = Tokenizer(config, with_decoder=with_decoder)
    tokenizer.to_empty(device="cpu").float()  # whatever torch's default type is
    spare, own = tokenizer.training_only, tokenizer.state_dict()
    for name in own.keys() & set(spare):
        own[name].zero_()  # a file may lack it
    ignore = tuple(name for name in spare if name not in own)
    if not with_decoder:
        ignore = ("decoder.", *ignore)
    load_tensors(tokenizer, opened.state, str(opened.file), ignore, keep=spare)
    return tokenizer.eval()


def check_same_codes(generator: Opened, tokenizer: Opened) -> None:
    """Refuse a generator and a tokenizer whose codes differ; fields unknown on either side are skipped."""
    stated, tokens = generator.about, tokenizer.about.config["num_latent_tokens"]
    sizes = stated.config.get("image_seq_len", tokens), stated.config["codebook_size"]
    made = tokens, tokenizer.about.config["codebook_size"]
    if sizes != made:
        raise InputError(
            f"{generator.file} expects {sizes[0]} codes from a codebook of {sizes[1]}, but {tokenizer.file} makes "
            f"{made[0]} from {made[1]}: pass the tokenizer that it was trained with"
        )
    if stated.tokenizer is not None and stated.tokenizer != (here := fingerprint(tokenizer.state)):
        raise InputError(
            f"{generator.file} models the codes of another tokenizer (fingerprint "
            f"{stated.tokenizer:.40}) than {tokenizer.file} ({here}): pass the tokenizer that it was "
            f"trained with"
        )
