import pytest
import torch

from configs.schema import Phase
from train_tokenizer.__main__ import add_up, begun, has_collapsed


@pytest.mark.parametrize(
    "used, each, collapsed",
    [(9, 1000, True), (10, 1000, False), (9, 100, False)],  # the last: 9 tokens a code at most
)
def test_codebook_has_collapsed_below_a_tenth_once_enough_tokens_are_counted(used, each, collapsed):
    counts = torch.zeros(100)
    counts[:used] = each
    assert has_collapsed(counts) is collapsed


def test_values_of_micro_batches_add_up_and_stay_not_finite():
    sums = {}
    for loss, mse in ((1.0, float("inf")), (2.0, -float("inf"))):
        add_up(sums, {"loss": torch.tensor(loss, requires_grad=True), "mse": torch.tensor(mse)})
    assert sums["loss"].item() == 3.0 and not sums["loss"].requires_grad
    assert not sums["mse"].isfinite()


@pytest.mark.parametrize("step, names", [(0, ""), (1, "a"), (10, "a"), (11, "ab"), (30, "ab")])
def test_a_phase_has_begun_once_it_has_a_step(step, names):
    phases = [Phase(name="a", steps=10), Phase(name="b", steps=20), Phase(name="c", steps=1)]
    assert "".join(phase["name"] for phase in begun(phases, step)) == names
