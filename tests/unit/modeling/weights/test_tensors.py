import gzip
import hashlib
import math
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from modeling.generator import Generator, GeneratorConfig
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights.metadata import DISCRIMINATOR, MARKS, TOKENIZER
from modeling.weights.tensors import (
    describe,
    find_models,
    fingerprint,
    load_tensors,
    read_model,
    read_state_dict,
    tensors_hash,
    write_state_dict,
)
from tests.payload import Payload
from tests.refusals import refusal
from tests.tiny import STAGE1
from train_tokenizer.discriminator import Discriminator

FORMATS = ["weights.pth", "weights.bin", "weights.safetensors"]


def tensors():
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
    }


def refused(path, *named):
    return refusal(lambda: read_state_dict(path), path, *named)


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_again(tmp_path, name):
    given = tensors()
    write_state_dict(given, tmp_path / "new" / "folder" / name)
    got = read_state_dict(tmp_path / "new" / "folder" / name)
    assert got.keys() == given.keys()
    for key in given:
        assert torch.equal(got[key], given[key]) and got[key].dtype == given[key].dtype


@pytest.mark.parametrize("name", FORMATS)
def test_writing_leaves_the_file_alone_and_whole(tmp_path, name):
    write_state_dict(tensors(), tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "name, writer",
    [("w.pth", "torch.save"), ("w.safetensors", "modeling.weights.tensors.save_file")],
)
def test_failed_writing_leaves_the_file_as_it_was(tmp_path, monkeypatch, name, writer):
    def run_out_of_disk(state, path, *_):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    write_state_dict(tensors(), tmp_path / name)
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr(writer, run_out_of_disk)
    named = tmp_path / name, "no space left on device"
    refusal(lambda: write_state_dict(tensors(), tmp_path / name), *named)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_is_written_without_the_tensor_it_is_of(tmp_path, name):
    write_state_dict({"a": torch.zeros(100_000)[:10]}, tmp_path / name)
    assert (tmp_path / name).stat().st_size < 10_000


def test_tensors_that_share_memory_are_written_as_safetensors(tmp_path):
    shared = torch.randn(4)
    write_state_dict({"a": shared, "b": shared}, tmp_path / "w.safetensors")
    assert torch.equal(read_state_dict(tmp_path / "w.safetensors")["b"], shared)


def test_parameters_are_read_as_plain_tensors(tmp_path):
    write_state_dict({"a": nn.Parameter(torch.ones(2))}, tmp_path / "w.pth")
    assert not read_state_dict(tmp_path / "w.pth")["a"].requires_grad


def test_files_in_the_format_before_pytorch_16_are_read(tmp_path):
    # torchvision's VGG and the LPIPS heads are published in it.
    torch.save(tensors(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert read_state_dict(tmp_path / "old.pth").keys() == tensors().keys()


# ---------------------------------------------------------------------- bad files
def npz(path):
    with open(path, "wb") as file:
        np.savez(file, codes=np.zeros(3))


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("AliTok.pth", b"tensors")


OLD = "old.pth"  # in the format before PyTorch 1.6


def cut(path, share):
    """A file of tensors, of which only the first part is there."""
    if path.name == OLD:
        torch.save(tensors(), path, _use_new_zipfile_serialization=False)
    else:
        write_state_dict(tensors(), path)
    os.truncate(path, int(path.stat().st_size * share))


# What lies at a path, and the word of its refusal.
BAD = {
    "nothing": (lambda path: None, "weights/README.md"),
    "a folder": (lambda path: path.mkdir(), "no weights"),
    **{f"{s} of it": (lambda path, s=s: cut(path, s), "damaged") for s in (0.0, 0.01, 0.5, 0.99)},
    "zip junk": (b"PK\x03\x04junk", "plain tensors"),
    "pickle junk": (b"h\xff\x80\x02", "plain tensors"),
    "junk": (bytes(range(256)), "plain tensors"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a page": (b"\n<!DOCTYPE html><html><body>Sign in", "HTML"),
    "npz": (npz, "NumPy"),
    "a zip archive": (zipped, "zip archive"),
    "gzip": (gzip.compress(b"tensors"), "gzip archive"),
    "an image": (b"\x89PNG\r\n\x1a\n", "an image"),
}


@pytest.mark.parametrize("name", [*FORMATS, OLD])
@pytest.mark.parametrize("content, word", BAD.values(), ids=BAD)
def test_what_is_no_file_of_tensors_is_refused(tmp_path, name, content, word):
    if callable(content):
        content(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, word)


@pytest.mark.parametrize("name, right", [("w.pth", "w.safetensors"), ("w.safetensors", "w.pth")])
def test_weights_under_another_formats_name_are_told_apart(tmp_path, name, right):
    write_state_dict(tensors(), tmp_path / right)
    os.rename(tmp_path / right, tmp_path / name)
    refused(tmp_path / name, right)


@pytest.mark.parametrize("name", FORMATS)
def test_file_that_may_not_be_read_is_a_matter_of_permission(tmp_path, monkeypatch, name):
    write_state_dict(tensors(), tmp_path / name)

    def forbid(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", forbid)  # root, who runs tests, may read anything
    refused(tmp_path / name, "Permission denied", "readable")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
@pytest.mark.parametrize("name", FORMATS)
def test_mode_of_a_file_follows_the_umask(tmp_path, name, umask, mode):
    before = os.umask(umask)
    try:
        write_state_dict(tensors(), tmp_path / name)
        (tmp_path / f"{name}.partial").touch(0o600)  # as a killed process may leave it
        write_state_dict(tensors(), tmp_path / name)
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == mode


def dump(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


def save_old(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, save_old, dump])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, write):
    mark = tmp_path / "executed"
    write({"a": torch.ones(2), "b": Payload(mark)}, tmp_path / "w.pth")
    assert "weights_only" not in refused(tmp_path / "w.pth", "plain tensors")
    assert not mark.exists()
    if write is not dump:  # it would have worked
        torch.load(tmp_path / "w.pth", weights_only=False)
        assert mark.exists()


# ---------------------------------------------------------------------- wrapped tensors
def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in NAMES.items()}


NAMES = {"latent_tokens": torch.ones(2), "encoder.module.bias": torch.zeros(2)}
GENERATOR = {
    "blocks.0.attn.qkv.weight": torch.ones(3, 1), "embeddings.weight": torch.ones(4, 1),
    "output.weight": torch.ones(2, 1),
}  # fmt: skip
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
PUBLISHED = {
    "model_state": NAMES,
    "criterion_state": {"discriminator.block_in.0.weight": torch.ones(1)},
    "optimizer_state": OPTIMIZER,
    "epoch": 7,
    "name": "stage1",
}
WRAPPED = {
    "model_state": PUBLISHED,
    "model_state -> module.": {**PUBLISHED, "model_state": prefixed("module.")},
    "state_dict": {"state_dict": NAMES, "optimizer": OPTIMIZER, "ema": None},
    "state_dict -> model.": {"state_dict": prefixed("model."), "epoch": 1},
    "model": {"model": NAMES, "step": 3},
    "ema": {"ema": NAMES, "step": 3},
    "ema -> module.": {"ema": {**prefixed("module."), "n_averaged": torch.tensor(5)}},
    "module.": prefixed("module._orig_mod."),
    "any -> name -> of.one.": {
        "any": {"name": prefixed("of._orig_mod.one.")},
        "generator": GENERATOR,
    },
    "": {
        name.replace("module.", "module._checkpoint_wrapped_module."): NAMES[name] for name in NAMES
    },
}


@pytest.mark.parametrize("removed", WRAPPED)
def test_wrapped_tensors_are_read_and_said(tmp_path, caplog, removed):
    torch.save(WRAPPED[removed], tmp_path / "last.pth")
    state, _ = read_model(tmp_path / "last.pth", TOKENIZER)
    assert state.keys() == NAMES.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in NAMES.items())
    said = f"{tmp_path / 'last.pth'}: took the weights from {removed}"
    assert [r.getMessage() for r in caplog.records] == ([said] if removed else [])


def test_prefixed_safetensors_are_read(tmp_path):
    write_state_dict(prefixed("module."), tmp_path / "w.safetensors")
    assert read_model(tmp_path / "w.safetensors", TOKENIZER)[0].keys() == NAMES.keys()


def test_unwrapping_is_said_by_one_process_and_never_of_plain_files(tmp_path, caplog, monkeypatch):
    write_state_dict(NAMES, tmp_path / "plain.pth")
    read_model(tmp_path / "plain.pth", TOKENIZER)
    torch.save(PUBLISHED, tmp_path / "last.pth")
    monkeypatch.setenv("RANK", "1")
    read_model(tmp_path / "last.pth", TOKENIZER)
    assert not caplog.records


@pytest.mark.parametrize(
    "content, named",
    [
        *(
            (content, "not a tokenizer but something else")
            for content in (
                {"a": torch.ones(2), "epoch": 3},
                [torch.ones(2)],
                {"model": {}},
                {"model": {"latent_tokens": [torch.ones(2)]}},
                {"model": {1: torch.ones(2)}},
            )
        ),
        (GENERATOR, "not a tokenizer but a generator"),
        ({"model": {"generator": GENERATOR}}, "not a tokenizer but a generator"),
        ({"model": NAMES, "ema": NAMES, "step": 3}, "(model and ema)"),
        ({"state_dict": {**prefixed("model."), **prefixed("ema.")}}, "model. and state_dict -> ema."),
        ({**NAMES, **prefixed("module.")}, "(the file itself and module.)"),
    ],
)  # fmt: skip
def test_what_holds_no_one_set_of_weights_is_refused(tmp_path, content, named):
    torch.save(content, tmp_path / "w.pth")
    refusal(lambda: read_model(tmp_path / "w.pth", TOKENIZER), tmp_path / "w.pth", named)


@pytest.mark.parametrize(
    "content", [{"a": torch.ones(2), "epoch": 3}, [torch.ones(2)], {"model": NAMES}]
)
def test_what_is_no_flat_dict_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "flat dict")


def test_a_dict_that_holds_itself_has_an_end():
    content = {"step": 3}
    content["model"] = content
    assert list(find_models(content, TOKENIZER)) == []


CRITIC = {"block_in.0.weight": torch.ones(2), "to_logits.0.bias": torch.zeros(1)}
IN_CRITERION = {f"discriminator.{name}": tensor for name, tensor in CRITIC.items()}


@pytest.mark.parametrize(
    "content",
    [
        CRITIC,
        {**PUBLISHED, "criterion_state": {**IN_CRITERION, "lpips.lin0.weight": torch.ones(1)}},
        {f"module.{name}": tensor for name, tensor in CRITIC.items()},
        {**PUBLISHED, "criterion_state": CRITIC},
    ],
)
def test_one_model_is_read_out_of_a_file_of_several(tmp_path, content):
    torch.save(content, tmp_path / "last.pth")
    state, _ = read_model(tmp_path / "last.pth", DISCRIMINATOR)
    assert state.keys() == CRITIC.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in CRITIC.items())


@pytest.mark.parametrize(
    "content, named",
    [(NAMES, []), ({"a": CRITIC, "b": IN_CRITERION}, ["a and b -> discriminator."])],
)
def test_a_model_that_is_not_there_or_there_twice_is_refused(tmp_path, content, named):
    torch.save(content, tmp_path / "w.pth")
    file = tmp_path / "w.pth"
    refusal(lambda: read_model(file, DISCRIMINATOR), file, DISCRIMINATOR, *named)


def test_names_of_a_wrapper_among_others_are_the_models_own(tmp_path, caplog):
    state = {"model.weight": torch.ones(1), "lin.model.weight": torch.ones(1)}
    write_state_dict(state, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth").keys() == state.keys() and not caplog.records


# ---------------------------------------------------------------------- descriptions
def on_meta(build):
    with torch.device("meta"):
        return build()


def shapes_of(model):
    """The state dict of a model of any size, in a few bytes."""
    return {k: torch.zeros(()).expand(v.shape) for k, v in model.state_dict().items()}


B = "a generator (hidden_size=768, num_hidden_layers=24, num_attention_heads=16, codebook_size=4096"
XL = "a generator (hidden_size=1280, num_hidden_layers=32"
STAGE_1, STAGE_2 = (
    f"a stage-{stage} tokenizer (codebook_size=4096, token_size=32, num_latent_tokens=273"
    for stage in (1, 2)
)
NO_PREFIX = "tokenizer (codebook_size=4096, token_size=32, num_latent_tokens=256"
MODELS = {
    B: lambda: Generator(GeneratorConfig()),
    XL: lambda: Generator(GeneratorConfig(hidden_size=1280, num_hidden_layers=32)),
    STAGE_2: lambda: Tokenizer(TokenizerConfig()),
    STAGE_1: lambda: Tokenizer(TokenizerConfig(**STAGE1)),
    # Stage 1 may lack the head, which needs prefix tokens, or `embed_prob`, which needs clustering.
    f"a stage-1 {NO_PREFIX}": lambda: Tokenizer(
        TokenizerConfig(num_latent_tokens=256, clustering=True)
    ),
    f"a stage-2 {NO_PREFIX}": lambda: Tokenizer(TokenizerConfig(num_latent_tokens=256)),
    "a discriminator": Discriminator,
    "something else (2 entries, the first is weight": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("expected", MODELS)
def test_description_tells_what_a_file_is(expected):
    assert expected in describe(shapes_of(on_meta(MODELS[expected])))


def test_empty_file_is_described():
    assert "0 entries" in describe({})


@pytest.mark.parametrize("shape", [(), (6,)])
def test_flat_tensors_are_described(shape):
    """As in a file of one rank's shards, which no model fits."""
    for kind, mark in MARKS.items():
        assert f"a {kind}" in describe({mark: torch.zeros(shape)})


# ---------------------------------------------------------------------- loading
def misfit(model, state, *named):
    return refusal(lambda: load_tensors(model, state, "some/file.bin"), "some/file.bin", *named)


@pytest.mark.parametrize(
    "model, weights, without, named",
    [
        (STAGE_2, B, None, ("tokenizer", "latent_tokens", "embeddings.weight", "a generator")),
        (B, STAGE_2, None, ("generator", "stage-2")),
        (B, XL, None, ("embeddings.weight (5098, 1280)", "(5098, 768)", "blocks.24.", XL)),
        (STAGE_2, STAGE_1, None, ("decoder.class_embedding", "(1, 1024)", "(32, 1024)", "stage-1")),
        (B, B, "output.weight", ("1 missing: output.weight",)),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_what_they_are(model, weights, without, named):
    state = shapes_of(on_meta(MODELS[weights]))
    state.pop(without, None)
    misfit(on_meta(MODELS[model]), state, *named)


def test_long_lists_of_keys_are_cut_after_three():
    message = misfit(nn.Linear(2, 2), {f"k{i}": torch.ones(1) for i in range(9)}, "9 unknown")
    assert "k2" in message and "k3" not in message


def test_misfit_leaves_the_model_as_it_was():
    model = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    misfit(model, {"weight": torch.ones(2, 2)})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_matching_weights_are_loaded():
    model = nn.Linear(2, 2)
    load_tensors(model, {"weight": torch.ones(2, 2), "bias": torch.full((2,), 3.0)}, "file")
    assert (model.weight == 1).all() and (model.bias == 3).all()


def test_half_precision_weights_are_loaded_in_the_type_of_the_model():
    model = nn.Linear(2, 2)
    state = {k: torch.ones_like(v).bfloat16() for k, v in model.state_dict().items()}
    load_tensors(model, state, "file")
    assert model.weight.dtype == torch.float32 and (model.weight == 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused_by_name(value, kind):
    model = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: torch.ones_like(v).to(kind) for k, v in model.state_dict().items()}
    state["bias"][1] = value
    refusal(lambda: load_tensors(model, state, "w.pth"), "w.pth", "bias")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_ignored_tensors_need_not_be_finite():
    state = {**nn.Linear(2, 2).state_dict(), "aux.weight": torch.tensor([math.nan])}
    load_tensors(nn.Linear(2, 2), state, "file", ignore=("aux.",))


def test_only_named_entries_may_be_extra_or_missing():
    model = nn.Linear(2, 2)
    bias = model.bias.detach().clone()
    state = {"weight": torch.ones(2, 2), "aux.weight": torch.ones(5)}
    load_tensors(model, state, "file", ignore=("aux.",), keep=("bias",))
    assert (model.weight == 1).all() and torch.equal(model.bias, bias)
    refusal(lambda: load_tensors(model, state, "file", ignore=("aux.",)), "1 missing: bias")
    refusal(lambda: load_tensors(model, state, "file", keep=("bias",)), "1 unknown: aux.weight")


# ---------------------------------------------------------------------- hashes
STATE = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.tensor([0.5, -1.0], dtype=torch.bfloat16),
    "c.count": torch.tensor([3]),
}


def test_hash_is_that_of_names_and_bytes_in_the_order_of_names():
    digest = hashlib.sha256()
    for name in sorted(STATE):
        digest.update(name.encode())
        digest.update(STATE[name].view(torch.uint8).numpy().tobytes())
    assert tensors_hash(STATE) == digest.hexdigest()[:16]
    assert tensors_hash(dict(reversed(STATE.items()))) == tensors_hash(STATE)
    transposed = {**STATE, "b.weight": STATE["b.weight"].T.contiguous().T}  # the same values
    assert tensors_hash(transposed) == tensors_hash(STATE)


@pytest.mark.parametrize("name", STATE)
def test_hash_changes_with_every_tensor_and_name(name):
    changed = STATE[name].clone()
    changed.view(-1)[-1] += 1
    assert tensors_hash({**STATE, name: changed}) != tensors_hash(STATE)
    renamed = {("x" if key == name else key): tensor for key, tensor in STATE.items()}
    assert tensors_hash(renamed) != tensors_hash(STATE)


def test_the_fingerprint_is_the_hash_of_what_decides_the_codes_in_float32():
    codes = {
        "quantize.a": torch.ones(2),
        "latent_tokens": torch.zeros(3),
        "encoder.b": torch.ones(1),
    }
    others = {"quantize.embed_prob": torch.ones(1), "decoder.c": torch.ones(1)}
    half = {name: tensor.bfloat16() for name, tensor in codes.items()}
    assert fingerprint({**codes, **others}) == fingerprint(half) == tensors_hash(codes)


def test_hash_takes_empty_and_single_values():
    states = [{"x": torch.zeros(0)}, {"x": torch.tensor(1.0)}, {}]
    assert len({tensors_hash(state) for state in states}) == 3
    repeated = torch.ones(1).expand(5)
    assert tensors_hash({"x": repeated}) == tensors_hash({"x": torch.ones(5)})
