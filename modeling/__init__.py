"""AliTok's models: tokenizer, generator and sampling.

Needs torch, einops, NumPy and safetensors only, and Pillow for photos. `Pipeline` and `Tokenizer` are
loaded when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .tokenizer import Tokenizer

__all__ = ["Pipeline", "Tokenizer"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{name.lower()}", __name__), name)
