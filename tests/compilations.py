"""Compilations of a training program, step by step."""

import torch
from torch._dynamo.testing import CompileCounter


def count_by_step(module, monkeypatch) -> list[int]:
    """A list that the run of `module` fills: programs compiled before each step began, from the first.

    Compiled functions run as they are, with their graphs traced and guarded.
    """
    counter, before_step = CompileCounter(), []
    compile_function, seed_step = torch.compile, module.seed_step

    def counted(*arguments):
        before_step.append(counter.frame_count)
        return seed_step(*arguments)

    torch._dynamo.reset()
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **options: compile_function(f, **{**options, "backend": counter}),
    )
    monkeypatch.setattr(module, "seed_step", counted)
    return before_step
