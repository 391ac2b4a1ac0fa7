import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter

from data.tokens import open_tokens
from evaluation.likelihood import Likelihood, Share, likelihood_sums, position_sums
from modeling.compiling import compile_blocks
from modeling.generator import Generator, next_code_loss
from tests.tiny import tiny_cache, tiny_generator

TINY = tiny_generator(codebook_size=32, image_seq_len=21)


@pytest.fixture
def store(tmp_path):
    """Seven images of two views: 14 views, which batches of four do not divide."""
    rng = np.random.default_rng(0)
    tiny_cache(tmp_path / "cache", rng.integers(0, 32, (7, 2, 21)), [i % 3 for i in range(7)])
    return open_tokens(tmp_path / "cache")


@pytest.fixture
def model():
    generator = Generator(TINY).eval()
    torch.nn.init.normal_(generator.output.weight)  # starts at zero: every code alike
    return generator


def test_figures_are_those_of_the_models_own_loss(store, model):
    found = Likelihood(likelihood_sums(model, store, Share(4)), 14)
    codes = torch.stack([torch.from_numpy(store.codes(i, v)) for i in range(7) for v in (0, 1)])
    labels = torch.from_numpy(store.labels.copy()).long().repeat_interleave(2)
    with torch.no_grad():
        logits = model(codes[:, :-1], labels)
    loss, accuracy = next_code_loss(logits, codes)
    five = (logits.topk(5).indices == codes[..., None]).any(2).float().mean()
    metrics = found.result()["metrics"]
    assert metrics["nats_per_code"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["top1"] == pytest.approx(accuracy.item(), rel=1e-6)
    assert metrics["top5"] == pytest.approx(five.item(), rel=1e-6)
    assert metrics["bits_per_image"] == pytest.approx(21 * loss.item() / math.log(2), rel=1e-6)
    first = F.cross_entropy(logits[:, 0], codes[:, 0]).item()  # a position is not shifted
    assert found.result()["by_position"]["nats"][0] == pytest.approx(first, rel=1e-6)


def test_positions_and_groups_add_up_to_the_whole(store, model):
    found = Likelihood(likelihood_sums(model, store, Share(4)), 14)
    result, whole = found.result(), found.figures()
    names = ["prefix", "row 1", "row 2", "row 3", "row 4"]
    assert [group["name"] for group in result["by_group"]] == names
    assert [group["codes"] for group in result["by_group"]] == [5, 4, 4, 4, 4]
    for name in ("nats", "top1", "top5"):
        total = sum(group["codes"] * group[name] for group in result["by_group"])
        assert total == pytest.approx(21 * whole[name], rel=1e-12)
        assert sum(result["by_position"][name]) == pytest.approx(21 * whole[name], rel=1e-12)
    row2 = result["by_position"]["nats"][9:13]
    assert result["by_group"][2]["nats"] == pytest.approx(np.mean(row2), rel=1e-12)


def test_processes_share_every_view_once(store, model):
    whole = likelihood_sums(model, store, Share(4))
    parts = [likelihood_sums(model, store, Share(4, i, 3)) for i in range(3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)
    assert all(part.any() for part in parts)


def test_compiled_score_is_the_eager_one_and_compiles_two_programs(store, model, monkeypatch):
    """The blocks share one; the smaller last batch has none."""
    expected = likelihood_sums(model, store, Share(4))
    counter, compile_function = CompileCounter(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **options: compile_function(f, **{**options, "backend": counter}),
    )
    compile_blocks(model.blocks)
    found = likelihood_sums(model, store, Share(4, compiled=True))
    torch.testing.assert_close(found, expected)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_tie_is_no_hit_but_for_the_first_code():
    sums = position_sums(torch.zeros(1, 3, 32), torch.tensor([[0, 4, 5]]))
    np.testing.assert_allclose(sums[0], 3 * [math.log(32)], rtol=1e-6)
    assert sums[1].tolist() == [1, 0, 0] and sums[2].tolist() == [1, 1, 0]


def test_training_mode_is_left_as_it_was(store, model):
    model.train()
    dropped = likelihood_sums(model, store, Share(4))
    assert model.training
    model.eval()
    assert torch.equal(likelihood_sums(model, store, Share(4)), dropped)  # fmt: skip
    assert not model.training


def test_training_mode_is_left_as_it_was_by_a_failure_too(store, model, monkeypatch):
    """A run trains on without a validation that fails, and must do so with dropout."""
    monkeypatch.setattr(type(store), "codes", lambda *_: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        likelihood_sums(model, store, Share(4))
    assert model.training


def test_caches_of_g_prefix_tokens_are_grouped_too():
    groups = Likelihood(torch.ones(3, 20, dtype=torch.float64), 1).groups()  # 4 + 4 x 4
    assert [codes for _, codes, _ in groups] == [4, 4, 4, 4, 4]


def test_caches_without_prefix_tokens_are_grouped_by_row():
    sums = torch.arange(16.0, dtype=torch.float64).expand(3, 16)
    groups = Likelihood(sums, 1).groups()
    assert [(name, codes) for name, codes, _ in groups] == [(f"row {i}", 4) for i in (1, 2, 3, 4)]
    assert [figures["nats"] for _, _, figures in groups] == [1.5, 5.5, 9.5, 13.5]
