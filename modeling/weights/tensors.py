"""Reads and writes weight files: tensors only, strictly by name and shape.

Files of other people are told by their first bytes, and models are found among other content.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError
from .files import whole_file, write_torch, writing
from .metadata import KEY, MARKS, TOKENIZER, About, about_shapes, parse, shown_sizes

log = logging.getLogger(__name__)

# Names that torch.compile, FSDP and activation checkpointing insert at any depth.
INSERTED = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
MOST_WRAPPERS = 4  # dicts around a model
SAFETENSORS, PYTORCH = "safetensors", "PyTorch"  # the kinds that hold weights


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .pth, .pt, .bin or .safetensors file, on the CPU, memory-mapped.

    No code in the file is run (`weights_only`). Raises InputError for a file that is missing, unreadable,
    damaged or of another kind, or that holds anything but tensors by name.
    """
    content, _ = read_file(Path(path))
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise InputError(f"{path} holds no flat dict of tensors; export the model's weights alone")
    return content


def read_model(path: str | Path, kind: str) -> tuple[dict[str, Tensor], Optional[About]]:
    """The tensors of a file's only model of this kind, and the file's metadata, which are None if it states none.

    Other content may be around the model, as in the published trainer's `last.pth`; a line in the log then
    says where it was (`find_models`). Raises InputError as `read_state_dict` does, and if there is no such
    model or more than one, or if the metadata contradict the tensors.
    """
    content, entries = read_file(Path(path))
    about = parse(entries[KEY], path) if KEY in entries else None
    found = list(find_models(content, kind))
    if len(found) > 1:
        places = " and ".join(" -> ".join(around) or "the file itself" for _, around in found)
        raise InputError(
            f"{path} holds more than one {kind} ({places}): save the one to use as a file of its own"
        )
    if not found:
        raise InputError(
            f"{path} is not a {kind} but {describe(content)}: pass the path of a {kind}'s weights"
        )
    ((state, around),) = found
    if about is not None:
        if about.kind != kind:
            raise InputError(
                f"the metadata of {path} says {about.kind}, but it holds a {kind}: export the weights again"
            )
        for name, size in shown_sizes(kind, state, path).items():
            if about.config[name] != size:
                raise InputError(
                    f"{path} states {name}={about.config[name]}, but its tensors have {size}: its "
                    f"metadata is wrong; export the weights again"
                )
    # torchrun and accelerate number their processes in RANK: one of them says it.
    if around and os.environ.get("RANK", "0") == "0":
        log.warning("%s: took the weights from %s", path, " -> ".join(around))
    return state, about


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


def read_file(path: Path) -> tuple[Any, dict]:
    """The tensors and plain values of a weights file, nested as stored, and its metadata: `__metadata__` of
    safetensors, `_metadata` of a state dict."""
    try:
        kind = kind_by_content(path)
    except OSError as e:
        raise InputError(
            f"no weights at {path}: put the published file there (see weights/README.md), make it "
            f"readable or pass the path of your own ({e.strerror})"
        ) from e
    named = SAFETENSORS if path.suffix == ".safetensors" else PYTORCH
    if kind in (SAFETENSORS, PYTORCH) and kind != named:
        suffix = ".safetensors" if kind == SAFETENSORS else ".pth"
        raise InputError(
            f"{path} is a {kind} file under another name: rename it to {path.stem}{suffix}"
        )
    if kind not in (None, SAFETENSORS, PYTORCH):
        raise InputError(f"{path} is {kind}")
    try:
        if named == SAFETENSORS:
            with safe_open(path, "pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        # Older files (VGG's, LPIPS's) are not zip archives and cannot be mapped.
        mmap = kind == PYTORCH
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        entries = getattr(content, "_metadata", None)
        return content, entries if isinstance(entries, dict) else {}
    except Exception as e:  # a damaged pickle raises almost anything
        raise not_tensors(path, e) from e


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


def not_tensors(path: Path, error: Exception) -> InputError:
    """For a file that cannot be loaded, with torch's reason without its advice."""
    text = str(error).strip()
    found = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", text, re.IGNORECASE)
    if found:
        return InputError(
            f"{path} is not a file of plain tensors: it holds a Python object ({found[1]}), which "
            f"is never loaded, since it may run code; save the tensors alone"
        )
    text = text.rpartition("WeightsUnpickler error: ")[2]
    reason = text.splitlines()[0][:100] if text else type(error).__name__
    return InputError(
        f"{path} is not a file of plain tensors, or is damaged; fetch or export it again ({reason})"
    )


def write_state_dict(
    state: dict[str, Tensor], path: str | Path, about: Optional[About] = None
) -> None:
    """Write tensors as safetensors or, for any other suffix, in PyTorch's format; never in part.

    `about` goes into the file's metadata; the fingerprint of a tokenizer is computed here.
    """
    path = Path(path)
    # Clones, because torch would save the whole memory that a view shares.
    state = OrderedDict((k, v.detach().cpu().contiguous().clone()) for k, v in state.items())
    if about is not None and about.kind == TOKENIZER:
        about = dataclasses.replace(about, tokenizer=fingerprint(state))
    entries = {} if about is None else {KEY: about.entry()}
    if path.suffix == ".safetensors":
        texts = {key: json.dumps(entry) for key, entry in entries.items()}
        with whole_file(path) as partial, writing(path, SafetensorError):
            save_file(state, partial, texts)
        return
    state._metadata = entries  # type: ignore[attr-defined]  # as torch's own state dicts have
    write_torch(state, path)


def fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits of the tensors that decide the codes: encoder, latent tokens and quantizer.

    Both stages of one tokenizer have the same fingerprint: only their decoders differ. The number
    of heads is not part of it, because no tensor's shape shows it; the manifest of a cache and the
    metadata of weights hold it.
    """
    codes = ("encoder.", "latent_tokens", "quantize.")
    counted = {
        name: tensor.float()  # a copy of the same values in another type is the same tokenizer
        for name, tensor in state.items()
        if name.startswith(codes) and name != "quantize.embed_prob"
    }
    return tensors_hash(counted)


def tensors_hash(state: dict[str, Tensor]) -> str:
    """16 hex digits of the names and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def describe(content: Any) -> str:
    """What a state dict or other content of a file seems to be, such as a model with its sizes, in one line."""
    for kind in MARKS:
        for state, _ in find_models(content, kind):
            try:
                about = about_shapes(kind, state, "it")
            except InputError:
                return f"a {kind} that lacks tensors"
            stage = f"stage-{about.stage or 2} " if kind == TOKENIZER else ""
            sizes = ", ".join(f"{name}={size}" for name, size in about.config.items())
            return f"a {stage}{kind}" + (f" ({sizes})" if sizes else "")
    names = list(content) if isinstance(content, dict) else []
    return f"something else ({len(names)} entries, the first is {next(iter(names), 'none')})"


def load_tensors(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    ignore: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
) -> None:
    """Load tensors into a model, strictly; `source` names them in messages.

    Entries of `state` that start with one of `ignore` are left out. Entries of the model that start
    with one of `keep` may be missing from `state` and keep their values. Everything else must match
    by name and shape and must be finite. InputError names what does not match, and what the file
    seems to be, or the first tensor with NaN or infinite values; the model is then unchanged.
    """
    wanted = model.state_dict()
    found = {k: v for k, v in state.items() if not k.startswith(ignore)}
    missing = [k for k in wanted if k not in found and not k.startswith(keep)]
    unknown = [k for k in found if k not in wanted]
    shapes = [
        f"{k} {tuple(found[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in found and found[k].shape != wanted[k].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of other shape", shapes))
        if names
    ]
    if problems:
        raise InputError(
            f"{source} does not fit the configured {type(model).__name__.lower()}: "
            f"{'; '.join(problems)}. The file seems to be {describe(state)}; pass the matching "
            f"config or weights"
        )
    for name, tensor in found.items():
        if tensor.is_meta or not tensor.is_floating_point():  # meta tensors have no values
            continue
        wide = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit types lack isfinite
        bad = wide.numel() - int(torch.isfinite(wide).sum())
        if bad:
            raise InputError(
                f"{source} holds {bad} NaN or infinite values in {name}, of {tensor.numel()}: fetch "
                f"or export it again, or take an earlier checkpoint"
            )
    model.load_state_dict(found, strict=False)  # strictness was checked above, with reasons
