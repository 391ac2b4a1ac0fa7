"""Bytes that a compiled training step moves, counted from Inductor's code for an H100.

Autograd runs kernels of a device, so the joint graph is traced on fake CPU tensors and moved to the
H100 before Inductor sees it. Attention, whose kernel is the library's, stands as one operation that
reads and writes its operands once.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from benchmarks.paper.inductor import Emitted, InternalsMoved, Program, pretended_h100
from modeling.generator import Generator, GeneratorConfig

CUDA = torch.device("cuda", 0)


@torch.library.custom_op("alitok_paper::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """Flash attention: the output (B, H, L, h), laid out as (B, L, H, h), and log-sums (B, H, L)."""
    raise NotImplementedError("only for tracing")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    B, H, L, h = q.shape
    return q.new_empty(B, L, H, h).transpose(1, 2), q.new_empty(B, H, L, dtype=torch.float32)


@torch.library.custom_op("alitok_paper::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    raise NotImplementedError("only for tracing")


@attention_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.dropout = inputs
    ctx.save_for_backward(q, k, v, *output)


def differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple:
    return (*attention_backward(gradient, *ctx.saved_tensors, ctx.dropout), None)


attention.register_autograd(differentiate, setup_context=save_for_backward)


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """F.scaled_dot_product_attention as the generator calls it."""
    return torch.ops.alitok_paper.attention(q, k, v, dropout_p)[0]


def on_cuda(module: torch.fx.GraphModule, inputs: list) -> tuple[torch.fx.GraphModule, list]:
    """A copy of a traced graph whose tensors are on the H100, and its inputs there."""
    moved = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def place(value: Any) -> Any:
        if isinstance(value, torch.device):
            return CUDA
        if isinstance(value, Tensor):
            with mode:
                return torch.empty_strided(
                    value.shape, value.stride(), dtype=value.dtype, device=CUDA
                )
        return value

    for node in moved.graph.nodes:
        node.args = map_aggregate(node.args, place)
        node.kwargs = map_aggregate(node.kwargs, place)
        if node.op == "get_attr":
            setattr(moved, node.target, place(getattr(moved, node.target)))
    placed = [place(x) for x in inputs]
    FakeTensorProp(moved, mode).propagate(*placed)
    return moved, [mode, *placed]


def backend(record: list[Program]) -> Callable:
    """A Dynamo backend that adds the forward's and the backward's program to `record`."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.virtualized import V

    def compiler(backward: bool) -> Callable:
        def compile_graph(module: torch.fx.GraphModule, inputs: list) -> Callable:
            moved, (mode, *placed) = on_cuda(module, inputs)
            context = TracingContext(mode)
            with (
                pretended_h100(record),
                tracing(context),
                contextlib.suppress(Emitted),
            ):
                compile_fx_inner(moved, placed, is_backward=backward)
            return make_boxed_func(module.forward)

        return compile_graph

    def partition(joint: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        values = [node.meta.get("val") for node in joint.graph.nodes]
        with V.set_fake_mode(detect_fake_mode([v for v in values if isinstance(v, Tensor)])):
            joint_graph.joint_graph_passes(joint)
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    return aot_autograd(
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )


def training_programs(config: GeneratorConfig, batch: int) -> list[Program]:
    """The forward and the backward program of the blocks under bf16 autocast, without the loss."""
    record: list[Program] = []
    torch._dynamo.reset()
    try:
        with FakeTensorMode(), mock.patch.object(F, "scaled_dot_product_attention", stand_in):
            model = Generator(config).train()

            def blocks(x: Tensor, table: Tensor) -> Tensor:
                for block in model.blocks:
                    x = block(x, table)
                return x

            x = torch.empty(batch, config.image_seq_len, config.hidden_size, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16):
                compiled = torch.compile(blocks, backend=backend(record), fullgraph=True)
                y = compiled(x, model.rotary[: config.image_seq_len])
            y.sum().backward()
    except Exception as e:
        raise InternalsMoved(f"torch {torch.__version__}: {type(e).__name__}: {e}") from e
    if len(record) != 2:
        raise InternalsMoved(f"torch {torch.__version__}: {len(record)} programs, not 2")
    return record


def bytes_per_layer(config: GeneratorConfig, batch: int) -> dict[str, float]:
    """Bytes that one more layer moves, forward and backward, by kind."""
    totals = []
    for layers in (2, 3):
        programs = training_programs(replace(config, num_hidden_layers=layers), batch)
        totals.append({k: sum(p.moved[k] for p in programs) for k in programs[0].moved})
    return {kind: totals[1][kind] - totals[0][kind] for kind in totals[0]}
