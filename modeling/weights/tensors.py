"""Reads and writes weight files: tensors only, strictly by name and shape."""

import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import InputError
from .files import write_safetensors, write_torch
from .formats import MARKS, PYTORCH, SAFETENSORS, find_models, kind_by_content
from .metadata import KEY, TOKENIZER, About, layers, parse

log = logging.getLogger(__name__)


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
    says where it was (`formats.find_models`). Raises InputError as `read_state_dict` does, and if there is no such
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
        others = [state for other in MARKS for state, _ in find_models(content, other)]
        flat = content if isinstance(content, dict) else {}
        flat = {str(name): value for name, value in flat.items() if isinstance(value, Tensor)}
        shown = describe(others[0] if others else flat)
        raise InputError(f"{path} is not a {kind} but {shown}: pass the path of a {kind}'s weights")
    ((state, around),) = found
    if about is not None:
        if about.kind != kind:
            raise InputError(
                f"the metadata of {path} says {about.kind}, but it holds a {kind}: export the weights again"
            )
        about.check_tensors(state, path)
    # torchrun and accelerate number their processes in RANK: one of them says it.
    if around and os.environ.get("RANK", "0") == "0":
        log.warning("%s: took the weights from %s", path, " -> ".join(around))
    return state, about


def read_file(path: Path) -> tuple[Any, dict]:
    """Whatever tensors and plain values a weights file holds, as they are nested there, and its
    metadata: `__metadata__` of safetensors, `_metadata` of a state dict."""
    try:
        kind = kind_by_content(path)
    except PermissionError as e:
        raise InputError(
            f"cannot read {path}: permission denied; ask its owner to make it readable"
        ) from e
    except OSError as e:
        raise no_file(path) from e
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


def no_file(path: Path) -> InputError:
    """For a missing file; names other weights beside it, if any."""
    beside = []
    if path.suffix == ".safetensors" and path.parent.is_dir():  # a run of the other kind
        beside = sorted(file.name for file in path.parent.glob("*.safetensors"))
    if beside:
        return InputError(
            f"no weights at {path}, but there are {', '.join(beside)}: pass a run of the right kind, "
            f"or one of these files"
        )
    return InputError(
        f"no weights at {path}: put the published file there (see weights/README.md) or pass the "
        f"path of your own"
    )


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
    entry = None if about is None else about.entry()
    if path.suffix == ".safetensors":
        write_safetensors(state, path, {} if entry is None else {KEY: json.dumps(entry)})
        return
    if entry is not None:
        state._metadata = {KEY: entry}  # type: ignore[attr-defined]  # as torch's own state dicts have
    write_torch(state, path)


def fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits of the tensors that decide the codes: encoder, latent tokens and quantizer.

    Both stages of one tokenizer have the same fingerprint: only their decoders differ. The number
    of heads is not part of it, because no tensor's shape shows it; the manifest of a cache and the
    metadata of weights hold it.
    """
    counted = {name: tensor for name, tensor in state.items() if name != "quantize.embed_prob"}
    return tensors_hash(counted, ("encoder.", "latent_tokens", "quantize."), torch.float32)


def tensors_hash(
    state: dict[str, Tensor], prefixes: tuple[str, ...] = ("",), dtype: torch.dtype | None = None
) -> str:
    """16 hex digits of the names and bytes of tensors, in the order of their names.

    Only names that start with one of `prefixes` count. With `dtype` the tensors are converted to it
    first, so that a copy of the same values in another type has the same hash.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.startswith(prefixes):
            digest.update(name.encode())
            tensor = state[name].detach().cpu().to(dtype or state[name].dtype).contiguous()
            if tensor.numel():
                # The tensor's own memory, without a copy.
                digest.update((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
    return digest.hexdigest()[:16]


def describe(state: dict[str, Tensor]) -> str:
    """What a state dict seems to be, in a few words."""

    def rows(key: str) -> int:
        return len(state[key]) if state[key].dim() else 0

    if {"blocks.0.attn.qkv.weight", "embeddings.weight", "output.weight"} <= state.keys():
        shape = state["embeddings.weight"].shape  # flat in a shard
        size = shape[-1] if shape else 0
        name = {(768, 24): "AliTok-B, ", (1024, 24): "AliTok-L, ", (1280, 32): "AliTok-XL, "}
        depth = layers(state, "blocks.")
        return (
            f"a generator ({name.get((size, depth), '')}hidden size {size}, {depth} layers, "
            f"{rows('output.weight')} codes)"
        )
    if "quantize.embedding.weight" in state and "latent_tokens" in state:
        # Stage 1 may lack either: the head needs prefix tokens, embed_prob needs clustering.
        stage = 1 if {"decoder.ffn_aux.0.weight", "quantize.embed_prob"} & state.keys() else 2
        positions = "encoder.positional_embedding"
        patches = rows(positions) if positions in state else 0
        prefix = " without prefix" if rows("latent_tokens") == patches else ""
        return (
            f"a stage-{stage} tokenizer ({rows('latent_tokens')} tokens{prefix}, "
            f"{rows('quantize.embedding.weight')} codes, "
            f"{layers(state, 'encoder.transformer.')} encoder "
            f"and {layers(state, 'decoder.transformer.')} decoder layers)"
        )
    if "to_logits.0.weight" in state and "block_in.0.weight" in state:
        return "a discriminator"
    return f"something else ({len(state)} tensors, the first is {next(iter(state), 'none')})"


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
    found = {k: v for k, v in state.items() if not (ignore and k.startswith(ignore))}
    missing = [k for k in wanted if k not in found and not (keep and k.startswith(keep))]
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
