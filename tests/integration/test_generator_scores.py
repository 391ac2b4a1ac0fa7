"""evaluate.py --generator as a user starts it: on one rank and on two."""

import json

import pytest
import torch

from modeling.generator import Generator
from tests.integration.conftest import execute
from tests.integration.test_bad_input import refused
from tests.tiny import tiny_generator
from tests.unit.evaluation.test_generator_scores import write_cache


@pytest.fixture
def scored(tmp_path):
    model = Generator(tiny_generator(codebook_size=32, image_seq_len=21))
    torch.nn.init.normal_(model.output.weight)
    torch.save(model.state_dict(), tmp_path / "generator.bin")
    return [
        "evaluate.py", "--generator", tmp_path / "generator.bin",
        "--cache", write_cache(tmp_path / "cache"), "--picture", tmp_path / "p.png",
        "--batch_size=5", "--num_workers=1",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(scored):
    one = json.loads(execute(*scored).stdout.splitlines()[-1])
    two = execute(*scored, ranks=2).stdout
    assert two.count("bits per image") == 1
    two = json.loads(two.strip().splitlines()[-1])
    # 18 views in batches of 5: ranks of unequal share.
    for name in ("metrics", "by_position", "by_group"):
        assert flat(two[name]) == pytest.approx(flat(one[name]), rel=1e-12)
    assert two["views"] == 18 and two["cache"] == one["cache"]


def flat(values):
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return [x for value in values for x in flat(value)]
    return [values] if isinstance(values, (int, float)) else []


def test_a_cut_cache_ends_in_one_line(scored, tmp_path):
    (tmp_path / "cache/labels.bin").write_bytes(b"")
    done = execute(*scored, check=False)
    refused(done, "labels.bin is damaged: 0 bytes, 36 bytes expected")
    assert not (tmp_path / "p.png").exists()
