"""Formats of weight files in practice: file kinds by first bytes, and models among other content."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from torch import Tensor

from .metadata import DISCRIMINATOR, GENERATOR, TOKENIZER

# By kind of model, a tensor that only such models have.
MARKS = {
    GENERATOR: "embeddings.weight", TOKENIZER: "latent_tokens", DISCRIMINATOR: "block_in.0.weight"
}  # fmt: skip
# Names that torch.compile, FSDP and activation checkpointing insert at any depth.
INSERTED = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
MOST_WRAPPERS = 4  # dicts around a model

SAFETENSORS, PYTORCH = "safetensors", "PyTorch"  # the kinds that hold weights


def kind_by_content(path: Path) -> Optional[str]:
    """`SAFETENSORS`, `PYTORCH`, or another kind of file with a remedy; None if unknown.

    Reads the first bytes, and the table of a zip archive. Raises OSError.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, which stands for the file: run git lfs pull in its repository"
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not the file that it links to: download the file itself"
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff")):
        return "an image: give a weights file"
    if start.startswith(b"\x1f\x8b"):
        return "a gzip archive: unpack it first"
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") < 100_000_000:
        return SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        return kind_of_zip(path)
    return None


def kind_of_zip(path: Path) -> Optional[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError):
        return None  # damaged
    if any(name.endswith("data.pkl") for name in names):
        return PYTORCH
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz), for example of samples or codes: give a weights file"
    return "a zip archive: unpack it first"


def find_models(
    content: Any, kind: str, around: tuple[str, ...] = ()
) -> Iterator[tuple[dict[str, Tensor], tuple[str, ...]]]:
    """Every model of this kind in nested dicts: its tensors by its own names, and what was around them,
    outermost first: entries, and a prefix of the tensors' names."""
    if not isinstance(content, dict) or len(around) > MOST_WRAPPERS:
        return
    named = {INSERTED.sub("", str(name)): value for name, value in content.items()}
    if len(named) < len(content):  # a tensor with and without an inserted name: both count
        named = {str(name): value for name, value in content.items()}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for name in tensors:
        if f".{name}".endswith(f".{MARKS[kind]}"):
            prefix = name.removesuffix(MARKS[kind])
            own = {n.removeprefix(prefix): tensors[n] for n in tensors if n.startswith(prefix)}
            yield own, (*around, prefix) if prefix else around
    for name, value in named.items():
        if value is not content:  # a dict may contain itself
            yield from find_models(value, kind, (*around, name))
