"""Bytes that a compiled training step moves, counted from Inductor's code for an H100.

Autograd runs kernels of a device, so the joint graph is traced on fake CPU tensors and moved to the
H100 before Inductor sees it. Attention, whose kernel is the library's, stands as one operation that
reads and writes its operands once.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from benchmarks.paper.inductor import Emitted, InternalsMoved, Program, pretended_h100
from benchmarks.paper.model import Counted
from modeling import generator
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


def stand_in(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float = 0.0) -> Tensor:
    """In place of `modeling.attention`, whose own way on a CPU is not that on CUDA."""
    return torch.ops.alitok_paper.attention(q, k, v, dropout)[0]


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


def backend(record: list[Program], kept: list[float]) -> Callable:
    """A Dynamo backend that adds the forward's and the backward's program to `record`, and the bytes
    that the forward keeps for the backward to `kept`."""
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
            if not backward:
                kept.append(bytes_kept(module))
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


def bytes_kept(forward: torch.fx.GraphModule) -> float:
    """Bytes that a forward graph computes for its backward, with its result, without its inputs."""
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    computed = {n for n in output.args[0] if isinstance(n, torch.fx.Node) and n.op != "placeholder"}
    values = [node.meta.get("val") for node in computed]
    return float(sum(v.numel() * v.dtype.itemsize for v in values if isinstance(v, Tensor)))


class Compiled(NamedTuple):
    """What a compiled function of a training step moves, launches and keeps."""

    counted: Counted
    kept: float  # bytes


def compiled_training(function: Callable, inputs: Callable[[], tuple]) -> Compiled:
    """Count forward and backward of `function` under bf16 autocast; `inputs` makes its arguments.

    Its result, or the first of its results, is differentiated.
    """
    record: list[Program] = []
    kept: list[float] = []
    torch._dynamo.reset()
    try:
        with mock.patch.object(generator, "attention", stand_in):
            with torch.autocast("cpu", torch.bfloat16):
                compiled = torch.compile(function, backend=backend(record, kept), fullgraph=True)
                y = compiled(*inputs())
            (y if isinstance(y, Tensor) else y[0]).sum().backward()
    except Exception as e:
        raise InternalsMoved(f"torch {torch.__version__}: {type(e).__name__}: {e}") from e
    if len(record) != 2:
        raise InternalsMoved(f"torch {torch.__version__}: {len(record)} programs, not 2")
    moved = {kind: sum(p.moved[kind] for p in record) for kind in record[0].moved}
    return Compiled(Counted(moved, sum(p.launches for p in record)), sum(kept))


def programs_of_step(
    config: GeneratorConfig, batch: int, blocks: int = 1
) -> tuple[Compiled, Compiled]:
    """What a step compiles: blocks, one at a time unless `blocks` says how many, and output and loss."""
    shape = batch, config.image_seq_len, config.hidden_size
    with FakeTensorMode():
        model = Generator(replace(config, num_hidden_layers=blocks)).train()

        def run(x: Tensor, table: Tensor) -> Tensor:
            for block in model.blocks:
                x = block(x, table)
            return x

        def state() -> Tensor:
            return torch.empty(shape, requires_grad=True)

        codes = torch.zeros(shape[:2], dtype=torch.int64)
        block = compiled_training(run, lambda: (state(), model.rotary[: shape[1]]))
        return block, compiled_training(model.loss, lambda: (state(), codes))
