"""A tokenizer from wherever its weights are: a file, a run, a saved folder or the hub."""

from pathlib import Path
from typing import Optional

from ..errors import InputError
from ..tokenizer import Tokenizer, TokenizerConfig
from . import hub
from .metadata import TOKENIZER, about_file, about_model
from .runs import weights_in
from .tensors import load_for_use, read_state_dict

FILE = "tokenizer.safetensors"  # of a folder that `Pipeline.save_pretrained` writes
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")


def open_tokenizer(
    name: str | Path, config: Optional[TokenizerConfig] = None, revision: Optional[str] = None
) -> Tokenizer:
    """A tokenizer in eval mode, on the CPU (`Tokenizer.from_pretrained`)."""
    path = Path(name).expanduser()
    if not path.exists() and path.suffix not in SUFFIXES and str(name).count("/") == 1:
        path = hub.download(str(name), revision, (FILE,))
    elif revision is not None:
        raise InputError(f"revision={revision} is for the hub, but {name} is a local path")
    if (path / FILE).is_file():
        path = path / FILE
    file = weights_in(path, TOKENIZER)
    about = about_file(file)
    if about is not None:
        stated = about.build(TokenizerConfig, TOKENIZER, file)
        if config is not None and about_model(TOKENIZER, config).config != about.config:
            raise InputError(f"config contradicts {file}, which states its sizes: leave it out")
        config = stated
    tokenizer = Tokenizer(config or TokenizerConfig()).eval()
    load_for_use(tokenizer, read_state_dict(file), str(file))
    return tokenizer
