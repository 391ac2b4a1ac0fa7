"""GPU memory of a training step, counted from fake tensors: `python -m benchmarks.paper.memory`.

Weights, gradients and Adam's two moments are float32. Activations are what the forward pass keeps for
the backward pass under bf16 autocast. Generators: compiled as the trainer compiles, or eager, each with and
without `use_checkpoint`. Tokenizers: eager, with the losses of the phase that keeps most, and all networks
of the run. What lives for a moment (a block's recomputed activations, gradients of activations, the
bf16 copies of weights) is not counted, nor are averages of weights, CUDA's context and fragmentation.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.paper.inductor import device_answers
from benchmarks.paper.training import CUDA, programs_of_step, stand_in
from configs.load import load
from configs.schema import GeneratorRun, Phase, TokenizerRun
from modeling import generator as generators
from modeling import tokenizer as tokenizers
from modeling.generator import Generator, GeneratorConfig
from train_tokenizer.__main__ import build_tokenizer
from train_tokenizer.discriminator import Discriminator
from train_tokenizer.losses import FrozenNetworks, tokenizer_terms

GIB = 2**30
GENERATORS = ("alitok_b", "alitok_l", "alitok_xl", "alitok_l_512")
TOKENIZERS = (
    "tokenizer_stage1", "tokenizer_stage2", "tokenizer_v3_stage1", "tokenizer_v3_stage2",
    "tokenizer_stage1_512", "tokenizer_stage2_512", "finetune_decoder",
)  # fmt: skip


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


def place(module: nn.Module) -> None:
    """Make fake tensors on the GPU of a module's tensors, which are on "meta"."""
    for part in module.modules():
        owned: Any = part._parameters, part._buffers
        for tensors in owned:
            for name, x in tensors.items():
                if x is None:
                    continue
                made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
                is_parameter = isinstance(x, nn.Parameter)
                tensors[name] = nn.Parameter(made, x.requires_grad) if is_parameter else made


def tokenizer(options: TokenizerRun) -> tuple[float, float]:
    """Bytes of the state and, of the phase that keeps most, of the activations of an eager step."""
    model, size = options.model, options.model.vq_model.image_size
    meta = torch.device("meta")
    with meta:
        trained, critic = build_tokenizer(options).train(), Discriminator(exact=False)
        networks = FrozenNetworks(options.phases, None, meta)
    frozen = [m for m in (networks.convnext, networks.lpips) if m is not None]
    modules = [trained, critic, *frozen]
    with pretended_tensors():
        for module in modules:
            place(module)
        parameters = [p for module in modules for p in module.parameters()]
        fixed = [*parameters, *(b for module in modules for b in module.buffers())]
        with CUDA:
            images = torch.zeros(options.training.per_gpu_batch_size, 3, size, size)

        def judge(made: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return critic.requires_grad_(False)(made).float()

        def step(phase: Phase) -> object:
            with torch.autocast("cuda", torch.bfloat16):
                out: Any = convert_to_fp32(trained(images))
            terms = tokenizer_terms(
                out, images, model.vq_model, model.stage, phase, options.losses, networks, judge
            )
            return sum(weight * value for weight, value in terms.values())

        held = sum(p.numel() * (16 if p.requires_grad else 4) for p in parameters)
        return float(held), max(bytes_saved(lambda: step(p), fixed) for p in options.phases)  # noqa: B023


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
    for name in GENERATORS:
        options = load(GeneratorRun, [f"config=configs/{name}.yaml"], "train_ar")
        batch, sizes = options.training.per_gpu_batch_size, options.model.generator
        config = replace(sizes, use_checkpoint=False)
        line = ", ".join(
            f"{way} {value / GIB:.1f}" for way, value in activations(config, batch).items()
        )
        print(
            f"{name}, {batch} images: counted GiB: weights, gradients and Adam "
            f"{state(config) / GIB:.1f}; activations {line}",
            flush=True,
        )
    for name, recompute in itertools.product(TOKENIZERS, ("False", "True")):
        given = [f"config=configs/{name}.yaml", f"model.use_checkpoint={recompute}"]
        run = load(TokenizerRun, given, "train_tokenizer")
        held, kept = tokenizer(run)
        print(
            f"{name}, {run.training.per_gpu_batch_size} images, use_checkpoint={recompute}: counted GiB: "
            f"weights, gradients, Adam and networks {held / GIB:.1f}; activations, eager, {kept / GIB:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
