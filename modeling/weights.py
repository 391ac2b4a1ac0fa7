"""Reading and writing weight files: tensors only, strictly by name and shape."""

import ctypes
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError
from .files import whole_file


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .pth, .pt, .bin or .safetensors file, on the CPU, memory-mapped.

    No code in the file is ever run (`weights_only`). Raises InputError for a file that is missing,
    damaged or holds anything but a flat dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"no weights at {path}: put the published file there (see weights/README.md) or give "
            f"the path of your own"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # older files (VGG's, LPIPS's) cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as e:  # a damaged pickle raises almost anything
        reason = str(e).strip().splitlines()[0][:100] if str(e).strip() else type(e).__name__
        raise InputError(
            f"{path} is no file of plain tensors, or is damaged; fetch or export it again ({reason})"
        ) from e
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no flat dict of tensors; export the model's weights alone")
    return state


def write_state_dict(state: dict[str, Tensor], path: str | Path) -> None:
    """Write tensors as safetensors or, for any other suffix, in PyTorch's format; never in part."""
    path = Path(path)
    # A tensor that shares memory would be saved whole; clones keep the file to what is named.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    with whole_file(path) as partial:
        if path.suffix == ".safetensors":
            save_file(state, partial)
        else:
            torch.save(state, partial)


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
        return len(state[key])

    def depth(prefix: str) -> int:
        numbers = {k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)}
        return len(numbers)

    if {"blocks.0.attn.qkv.weight", "embeddings.weight", "output.weight"} <= state.keys():
        size = state["embeddings.weight"].shape[1]
        name = {(768, 24): "AliTok-B, ", (1024, 24): "AliTok-L, ", (1280, 32): "AliTok-XL, "}
        layers = depth("blocks.")
        return (
            f"a generator ({name.get((size, layers), '')}hidden size {size}, {layers} layers, "
            f"{rows('output.weight')} codes)"
        )
    if "quantize.embedding.weight" in state and "latent_tokens" in state:
        stage = 1 if "decoder.ffn_aux.0.weight" in state else 2
        return (
            f"a stage-{stage} tokenizer ({rows('latent_tokens')} tokens, "
            f"{rows('quantize.embedding.weight')} codes, {depth('encoder.transformer.')} encoder "
            f"and {depth('decoder.transformer.')} decoder layers)"
        )
    if "to_logits.0.weight" in state and "block_in.0.weight" in state:
        return "a discriminator"
    return f"something else ({len(state)} tensors, the first is {next(iter(state), 'none')})"


def load_weights(
    model: nn.Module, path: str | Path, ignore: Iterable[str] = (), keep: Iterable[str] = ()
) -> None:
    """Load a file into a model, strictly.

    Entries of the file that start with one of `ignore` are left out; entries of the model that
    start with one of `keep` may be missing from the file and keep their values. Everything else
    must match by name and shape, or InputError says which does not and what the file seems to be.
    """
    load_tensors(model, read_state_dict(path), str(path), tuple(ignore), tuple(keep))


def load_tensors(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    ignore: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
) -> None:
    """`load_weights` from tensors in memory; `source` names them in messages."""
    wanted = model.state_dict()
    given = {k: v for k, v in state.items() if not (ignore and k.startswith(ignore))}
    missing = [k for k in wanted if k not in given and not (keep and k.startswith(keep))]
    unknown = [k for k in given if k not in wanted]
    shapes = [
        f"{k} {tuple(given[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in wanted
        if k in given and given[k].shape != wanted[k].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown), ("of other shape", shapes))
        if names
    ]
    if problems:
        raise InputError(
            f"{source} does not fit the configured {type(model).__name__.lower()}: "
            f"{'; '.join(problems)}. The file seems to be {describe(state)}; "
            f"give the matching config or weights"
        )
    model.load_state_dict(given, strict=False)  # strictness was checked above, with reasons
