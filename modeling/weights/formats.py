"""Formats of weight files in practice: file kinds by first bytes, and wrapped tensors."""

import zipfile
from pathlib import Path
from typing import Any, Optional

from torch import Tensor

from ..errors import InputError

# Entries of models that training programs save beside optimizer, losses or step; `model_state` is the
# published tokenizer trainer's.
ENTRIES = (
    "model_state", "model_state_dict", "state_dict", "model", "module", "net", "network", "weights",
    "params", "tokenizer", "generator", "ema", "ema_state_dict", "ema_model", "model_ema",
    "state_dict_ema", "params_ema",
)  # fmt: skip
# Names of wrapping modules, as prefixes of all tensor names of a file.
PREFIXES = ("module", "model", "ema", "ema_model", "model_ema", "state_dict", "net", "generator",
            "tokenizer")  # fmt: skip
# Names that torch.compile, FSDP and activation checkpointing insert at any depth.
INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
MOST_WRAPPERS = 8  # dicts around the tensors
COUNTER = "n_averaged"  # of torch's AveragedModel, beside its `module.` tensors

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


def unwrap(content: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by their own names, and the removed wrappers, outermost first.

    Removes entries (`ENTRIES`) around the tensors, a common prefix (`PREFIXES`) of all names, and names
    that wrappers insert (`INSERTED`). Raises InputError if there are several candidates, or none.
    """
    removed = []
    while True:  # dicts around the tensors
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise no_tensors(source)
        if all(isinstance(value, Tensor) for value in content.values()):
            break
        found = [e for e in ENTRIES if isinstance(content.get(e), dict) and content[e]]
        entry = only(found, source)
        if len(removed) == MOST_WRAPPERS:  # also stops at a dict that contains itself
            raise no_tensors(source)
        content = content[entry]
        removed.append(entry)
    while True:  # parts of the tensors' names
        names = [name for name in content if name != COUNTER]
        first = {name.partition(".")[0] for name in names if "." in name}
        inserted = [part for part in INSERTED if any(part in name for name in content)]
        if names and first <= set(PREFIXES) and all("." in name for name in names):
            part = only(sorted(first), source) + "."
            content = {name.removeprefix(part): content[name] for name in names}
        elif inserted:
            part = inserted[0]
            short = {name.replace(part, ""): tensor for name, tensor in content.items()}
            if len(short) < len(content):
                raise InputError(
                    f"{source} holds a tensor twice, with and without {part} in its name"
                )
            content = short
        else:
            return content, removed
        removed.append(part)


def only(candidates: list[str], source: str) -> str:
    """The only candidate. Raises InputError, naming all, if there are several."""
    if not candidates:
        raise no_tensors(source)
    if len(candidates) > 1:
        raise InputError(
            f"{source} holds more than one set of weights: {', '.join(candidates)}; save the one "
            f"to use as a file of its own"
        )
    return candidates[0]


def no_tensors(source: str) -> InputError:
    return InputError(f"{source} holds no flat dict of tensors; export the model's weights alone")
