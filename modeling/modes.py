"""The mode of a model: training, with dropout and recomputation, or evaluation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """`model`, a module, in eval mode within a block; its mode is restored after it, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
