"""GPU memory of a training step, counted from fake tensors: `python -m benchmarks.paper.memory`.

Weights, gradients and Adam's two moments are float32. Activations are what the forward pass keeps for
the backward pass under bf16 autocast: compiled as the trainer compiles, or eager, each with and
without `use_checkpoint`. What lives for a moment (a block's recomputed activations, gradients of
activations, the bf16 copies of weights) is not counted, nor are CUDA's context and fragmentation.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.paper.inductor import device_answers
from benchmarks.paper.training import CUDA, programs_of_step, stand_in
from modeling import generator as generators
from modeling import tokenizer as tokenizers
from modeling.generator import Generator, GeneratorConfig
from modeling.tokenizer import Tokenizer, TokenizerConfig

GIB = 2**30


def bytes_saved(forward: Callable[[], object], parameters: Iterable[Tensor]) -> float:
    """Bytes of the storages that autograd saves while `forward` runs, without the parameters'."""
    own = {p.untyped_storage()._cdata for p in parameters}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if (key := tensor.untyped_storage()._cdata) not in own:
            saved[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return float(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))


@contextlib.contextmanager
def pretended_tensors() -> Iterator[None]:
    """Within it, tensors are fake, may be on a CUDA device, and attention is the paper's stand-in."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in device_answers():
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        for module in (generators, tokenizers):
            stack.enter_context(mock.patch.object(module, "attention", stand_in))
        stack.enter_context(FakeTensorMode())
        yield


def eager(config: GeneratorConfig, batch: int) -> float:
    """Bytes of activations of an eager step; `config` says whether they are recomputed."""
    totals = []
    with pretended_tensors():
        for layers in (1, 2):
            with CUDA:
                model = Generator(replace(config, num_hidden_layers=layers)).train()
                codes = torch.zeros(batch, config.image_seq_len, dtype=torch.int64)
                labels = torch.zeros(batch, dtype=torch.int64)
            with torch.autocast("cuda", torch.bfloat16):
                step = lambda: model(codes[:, :-1], labels, codes)  # noqa: B023, E731
                totals.append(bytes_saved(step, model.parameters()))
    return totals[0] + (config.num_hidden_layers - 1) * (totals[1] - totals[0])


def tokenizer(batch: int, recompute: bool) -> tuple[float, float]:
    """Bytes of the state and of the activations of an eager step of stage 1, without its losses."""
    config = TokenizerConfig(num_buffer_tokens=1, causal=True, prefix_head=True, clustering=True)
    # A start by trunc_normal_ looks at values, which fake tensors do not have.
    with mock.patch.object(Tokenizer, "reset_parameters"), pretended_tensors():
        with CUDA:
            model: Any = Tokenizer(config).train()
            images = torch.zeros(batch, 3, config.image_size, config.image_size)
        model.encoder.recompute = model.decoder.recompute = recompute
        parameters = list(model.parameters())
        with torch.autocast("cuda", torch.bfloat16):
            saved = bytes_saved(lambda: model(images), parameters)
        return 16.0 * sum(p.numel() for p in parameters), saved


def activations(config: GeneratorConfig, batch: int) -> dict[str, float]:
    """Bytes of activations by way to train."""
    block, loss = programs_of_step(config, batch)
    stream = 4 * batch * config.image_seq_len * config.hidden_size  # what a block is given
    layers = config.num_hidden_layers

    def compiled(each: float) -> float:
        return layers * each + loss.kept + stream

    return {
        "compiled": compiled(block.kept),
        "compiled, checkpointed": compiled(stream) + block.kept,
        "eager": eager(config, batch),
        "eager, checkpointed": eager(replace(config, use_checkpoint=True), batch),
    }


def state(config: GeneratorConfig) -> float:
    """Bytes of weights, gradients and both moments."""
    with torch.device("meta"):
        return 16.0 * sum(p.numel() for p in Generator(config).parameters())


def main() -> None:
    from benchmarks.on_paper import SIZES

    for size, (config, batch) in SIZES.items():
        line = ", ".join(
            f"{way} {value / GIB:.1f}" for way, value in activations(config, batch).items()
        )
        print(
            f"{size.upper()}, {batch} images: counted GiB: weights, gradients and Adam "
            f"{state(config) / GIB:.1f}; activations {line}",
            flush=True,
        )
    for recompute, way in ((False, "eager"), (True, "eager, checkpointed")):
        held, kept = tokenizer(48, recompute)
        print(
            f"tokenizer, stage 1, 48 images: counted GiB: weights, gradients and Adam "
            f"{held / GIB:.1f}; activations {way} {kept / GIB:.1f}"
        )


if __name__ == "__main__":
    main()
