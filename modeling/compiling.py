"""torch.compile as the trainers, the sampler and the decoder of images use it."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .decode_attention import describe

# Programs per function in one process: three sizes, two types, several batches and samplings; of
# `layer`, three for each.
RECOMPILE_LIMIT = 128


def compile_function(function: Callable) -> Callable:
    """torch.compile for the fixed shapes of an engine; only what is marked dynamic may vary.

    `fullgraph` makes Dynamo raise where it would otherwise fall back to eager code. Deterministic:
    Inductor then chooses no kernel by timing, so the order of its sums, and with it the images, are
    the same on every GPU of a kind.
    """
    from torch._inductor import config

    # torch 2.9 has the older option alone, which leaves a kernel one configuration.
    name, value = "deterministic", True
    if not hasattr(config, name):
        name, value = "triton.autotune_pointwise", False
    return torch.compile(function, dynamic=False, fullgraph=True, options={name: value})


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Dynamo's limits raised so that all sizes, types and samplings of one process fit."""
    import torch._dynamo.config as dynamo

    with dynamo.patch(
        recompile_limit=max(RECOMPILE_LIMIT, dynamo.recompile_limit),
        accumulated_recompile_limit=max(8 * RECOMPILE_LIMIT, dynamo.accumulated_recompile_limit),
    ):
        yield


def compile_blocks(*stacks: Iterable[nn.Module]) -> None:
    """Compile the blocks of stacks in place, for fixed shapes.

    Equal blocks share one program, so that a start compiles a few blocks whatever the depth. An odd
    shape makes a program of its own: run it under the stance "force_eager".
    """
    import torch._dynamo.config as dynamo

    # A block's gradients are ready when its backward ends. Dynamo would cut each block in two where
    # DDP's first bucket, of 1 MiB, is full.
    dynamo.optimize_ddp = False
    for block in itertools.chain(*stacks):
        block.compile(dynamic=False, backend=inductor_or_eager)


def compile_training(generator: Any) -> None:
    """Compile what a training step of a `Generator` runs, in place: the blocks, and the loss behind them."""
    compile_blocks(generator.blocks)
    generator.loss = torch.compile(generator.loss, dynamic=False, backend=inductor_or_eager)


def inductor_or_eager(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """A backend of torch.compile: Inductor or, after one warning, eager code from then on."""
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as e:
        warnings.warn(f"a model is not compiled, which is slower: {describe(e)}", stacklevel=2)
        torch.compiler.set_stance("force_eager")
        return graph.forward
