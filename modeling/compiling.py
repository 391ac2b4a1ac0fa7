"""torch.compile for the trainers, the sampler and the decoder of images."""

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .errors import describe

# Programs per function in one process: three sizes, two types, several batches and samplings, and three
# kinds of `layer`.
RECOMPILE_LIMIT = 128


def compile_function(function: Callable) -> Callable:
    """torch.compile for the fixed shapes of an engine; only what is marked dynamic may vary.

    `fullgraph` makes Dynamo raise instead of falling back to eager code. Deterministic, so that Inductor
    selects no kernel by timing, and images are the same on every GPU of a kind.
    """
    import torch._dynamo.config as dynamo
    from torch._inductor import config

    # For all sizes, types and samplings of one process.
    dynamo.recompile_limit = max(RECOMPILE_LIMIT, dynamo.recompile_limit)
    dynamo.accumulated_recompile_limit = max(
        8 * RECOMPILE_LIMIT, dynamo.accumulated_recompile_limit
    )
    # torch 2.9 has only the older option, which leaves one configuration per kernel.
    name, value = "deterministic", True
    if not hasattr(config, name):
        name, value = "triton.autotune_pointwise", False
    return torch.compile(function, dynamic=False, fullgraph=True, options={name: value})


def compile_blocks(*stacks: Iterable[nn.Module]) -> None:
    """Compile the blocks of stacks in place, for fixed shapes; equal blocks share one program.

    Other shapes would compile again: run them under the stance "force_eager".
    """
    import torch._dynamo.config as dynamo

    # Otherwise Dynamo cuts blocks at the boundaries of DDP's buckets.
    dynamo.optimize_ddp = False
    for block in itertools.chain(*stacks):
        block.compile(dynamic=False, backend=inductor_or_eager)


def compile_training(generator: Any) -> None:
    """Compile the blocks and the loss of a `Generator` in place, for training."""
    compile_blocks(generator.blocks)
    generator.loss = torch.compile(generator.loss, dynamic=False, backend=inductor_or_eager)


def inductor_or_eager(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """A backend of torch.compile: Inductor or, after one warning, eager code from then on."""
    import torch._functorch.config as functorch

    # The backward pass too: at its first call, when it is compiled otherwise, nothing could replace it.
    eagerly = "force_non_lazy_backward_lowering"  # torch 2.9 does not have this option
    options = {eagerly: True} if hasattr(functorch, eagerly) else {}
    try:
        with functorch.patch(options):
            return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as e:
        warnings.warn(f"a model is not compiled, which is slower: {describe(e)}", stacklevel=2)
        torch.compiler.set_stance("force_eager")
        return graph.forward
