"""torch.compile as the sampler and the decoder of images use it."""

import contextlib
from collections.abc import Callable, Iterator

import torch

# Programs per function in one process: three sizes, two types, several batches and samplings; of
# `layer`, three for each.
RECOMPILE_LIMIT = 128


def compile_function(function: Callable) -> Callable:
    """torch.compile for the fixed shapes of an engine; only what is marked dynamic may vary.

    `fullgraph` makes Dynamo raise where it would otherwise fall back to eager code. Deterministic:
    Inductor then chooses no kernel by timing, so the order of its sums, and with it the images, are
    the same on every GPU of a kind.
    """
    return torch.compile(function, dynamic=False, fullgraph=True, options={"deterministic": True})


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Dynamo's limits raised so that all sizes, types and samplings of one process fit."""
    import torch._dynamo.config as dynamo

    with dynamo.patch(
        recompile_limit=max(RECOMPILE_LIMIT, dynamo.recompile_limit),
        accumulated_recompile_limit=max(8 * RECOMPILE_LIMIT, dynamo.accumulated_recompile_limit),
    ):
        yield
