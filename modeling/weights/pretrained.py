"""Opens a tokenizer from a file, a run, a saved folder or the hub."""

from pathlib import Path
from typing import Optional

from ..errors import InputError
from ..tokenizer import Tokenizer, TokenizerConfig
from . import hub
from .metadata import TOKENIZER
from .opened import config_of, load_tokenizer, open_weights
from .runs import all_checkpoints, expanded

FILE = "tokenizer.safetensors"  # in a folder of `Pipeline.save_pretrained`
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def open_tokenizer(
    name: str | Path, config: Optional[TokenizerConfig] = None, revision: Optional[str] = None
) -> Tokenizer:
    """A tokenizer in eval mode, on the CPU (`Tokenizer.from_pretrained`)."""
    path = expanded(name)
    if not path.exists() and path.suffix not in SUFFIXES and str(name).count("/") == 1:
        path = hub.download(str(name), revision, (FILE,))
    elif revision is not None:
        raise InputError(f"revision={revision} is for the hub, but {name} is a local path")
    if (path / FILE).is_file() and not all_checkpoints(path):  # an export may be older than they
        path = path / FILE
    opened = open_weights(path, TOKENIZER)
    return load_tokenizer(opened, config_of(opened, config))
