import pytest
import torch
from torch._inductor import compile_fx

from modeling.compiling import compile_blocks, inductor_or_eager


def test_what_cannot_be_compiled_runs_eagerly_with_one_warning(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(compile_fx, "compile_fx", fail)
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    expected = model(x).square().sum()
    compile_blocks([model])
    loss_of = torch.compile(lambda y: y.square().sum(), backend=inductor_or_eager)
    try:
        with pytest.warns(
            UserWarning, match="not compiled, .*: RuntimeError: no compiler$"
        ) as seen:
            for _ in range(2):
                loss = loss_of(model(x))
    finally:
        torch._dynamo.reset()
        torch.compiler.set_stance("default")
    assert sum("not compiled" in str(w.message) for w in seen) == 1
    assert torch.equal(loss, expected)
    loss.backward()
    assert model.weight.grad is not None
