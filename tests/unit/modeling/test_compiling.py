import pytest
import torch
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config

from modeling.compiling import compile_blocks, inductor_or_eager

LAZY = pytest.mark.skipif(
    not hasattr(functorch_config, "force_non_lazy_backward_lowering"),
    reason="this torch compiles the backward pass at its first call",
)


@pytest.mark.parametrize("part", ["all", pytest.param("the backward pass", marks=LAZY)])
def test_what_cannot_be_compiled_runs_eagerly_with_one_warning(monkeypatch, part):
    inner = compile_fx.fx_codegen_and_compile

    def fail(*args, **options):
        if part == "all" or options.get("is_backward"):
            raise RuntimeError("no compiler\nand more")
        return inner(*args, **options)

    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", fail)
    model, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    expected = model(x).square().sum()
    compile_blocks([model])
    loss_of = torch.compile(lambda y: y.square().sum(), backend=inductor_or_eager)
    try:
        with (
            inductor_config.patch(fx_graph_cache=False),
            pytest.warns(UserWarning, match="not compiled, .*: RuntimeError: no compiler$") as seen,
        ):
            for _ in range(2):
                loss = loss_of(model(x))
    finally:
        torch._dynamo.reset()
        torch.compiler.set_stance("default")
    assert sum("not compiled" in str(w.message) for w in seen) == 1
    assert torch.equal(loss, expected)
    loss.backward()
    assert model.weight.grad is not None
