import pytest
import torch

from train_tokenizer.__main__ import add_up, has_collapsed, interleave


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


def test_previews_show_before_and_after_in_turn():
    before, after = torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1)
    assert interleave(before, after)[:, 0, 0, 0].tolist() == [0, 1, 0, 1]
