"""Stage 2 may share stage 1's codes only while it has the same encoder and codebook."""

import torch

from experiments.alignment.judge import check_codes_are_shared
from tests.refusals import refusal


def write(folder, stage, **tensors):
    (folder / stage).mkdir(exist_ok=True)
    torch.save(tensors, folder / stage / "tokenizer.pth")


def test_another_codebook_is_refused(tmp_path):
    codes, other = torch.zeros(4, 2), torch.ones(4, 2)
    write(tmp_path, "stage1", **{"quantize.embedding.weight": codes, "quantize.embed_prob": codes, "decoder.a": codes})  # fmt: skip
    write(tmp_path, "stage2", **{"quantize.embedding.weight": codes, "decoder.b": other})
    check_codes_are_shared(tmp_path)
    write(tmp_path, "stage2", **{"quantize.embedding.weight": other, "decoder.b": other})
    refusal(lambda: check_codes_are_shared(tmp_path), "stage 2", "codebook")
