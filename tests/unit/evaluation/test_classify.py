"""The class under which a generator finds an image's codes most likely."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import evaluate
from data.tokens import open_tokens
from evaluation.likelihood import Share, class_nats
from modeling.generator import Generator, next_code_loss
from modeling.weights.metadata import GENERATOR, about_model
from modeling.weights.tensors import write_state_dict
from tests.refusals import refusal
from tests.tiny import tiny_cache, tiny_generator
from tests.unit.evaluation.test_generator_scores import write_cache

SIZES = tiny_generator(codebook_size=32, image_seq_len=21)  # three classes


@pytest.fixture
def model():
    torch.manual_seed(1)
    generator = Generator(SIZES).eval()
    torch.nn.init.normal_(generator.output.weight)  # starts at zero: every code alike
    return generator


@pytest.fixture
def store(tmp_path):
    """Nine images of two views."""
    return open_tokens(write_cache(tmp_path / "cache"))


def expected_nats(model, store):
    """(images, views, classes), one sequence at a time."""
    with torch.no_grad():
        rows = [
            next_code_loss(model(codes[None, :-1], torch.tensor([label])), codes[None])[0] * 21
            for image in range(store.images)
            for view in range(store.views)
            for codes in [torch.from_numpy(store.codes(image, view))]
            for label in range(3)
        ]
    return torch.stack(rows).view(9, 2, 3)


# 64: all classes of many views at once; 7: of two views; 2: a part of the classes of one view.
@pytest.mark.parametrize("batch", [64, 7, 2, 1])
def test_nats_are_those_of_every_class_whatever_the_batch(model, store, batch):
    nats = class_nats(model, store, Share(batch))
    assert not nats.requires_grad
    torch.testing.assert_close(nats, expected_nats(model, store), rtol=1e-5, atol=1e-4)


def test_processes_share_every_view_once(model, store):
    parts = [class_nats(model, store, Share(7, rank, 3)) for rank in range(3)]
    torch.testing.assert_close(sum(parts), class_nats(model, store, Share(7)), rtol=1e-5, atol=1e-4)
    assert torch.stack(parts).count_nonzero(0).eq(1).all()


def test_compiled_nats_are_the_eager_ones_from_one_program(model, store):
    expected, counter = class_nats(model, store, Share(12)), CompileCounter()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(dynamic=False, backend=counter)
    # Four views at once, and two that are left.
    torch.testing.assert_close(class_nats(model, store, Share(12, compiled=True)), expected)
    assert counter.frame_count == 1


# ---------------------------------------------------------------------- the program
class Knows(Generator):
    """Prefers code `label` at every position."""

    def forward(self, codes, labels, targets=None):
        logits = torch.zeros(len(codes), 21, 32)
        logits[torch.arange(len(codes)), :, labels] = 1.0
        return logits


@pytest.fixture
def classify(model, tmp_path, monkeypatch, capsys):
    """Run evaluate.py on the CPU; returns the JSON result and all that it said."""
    monkeypatch.chdir(tmp_path)
    torch.save(model.state_dict(), "generator.bin")

    def start(*argv, cache="cache", generator="generator.bin"):
        evaluate.main([
            "--classify", f"--generator={generator}", f"--cache={cache}", "--num_workers=0",
            "--device=cpu", *argv,
        ])  # fmt: skip
        said = capsys.readouterr().out
        return json.loads(said.strip().splitlines()[-1]), said

    return start


def write_votes(folder, votes, labels, classes=("a", "b", "c")):
    """A cache whose view v of image i holds code c votes[i][v][c] times, and code 31 else."""
    rows = [
        [np.repeat([0, 1, 2, 31], [*counts, 21 - sum(counts)]) for counts in views]
        for views in votes
    ]
    paths = [f"{i},x.png" for i in range(len(votes))]
    tiny_cache(folder, rows, labels, classes, paths=paths, tokenizer="abc")


VOTES = [
    [(9, 0, 0), (0, 3, 0)],  # its views disagree: together a
    [(0, 4, 0), (0, 5, 1)],  # b
    [(0, 4, 0), (0, 0, 5)],  # c
    [(0, 0, 2), (2, 0, 1)],  # c and a, together c
]


def test_accuracy_is_of_images_by_all_their_views_and_of_single_views(
    classify, tmp_path, monkeypatch
):
    monkeypatch.setattr("evaluation.generator_scores.build_generator", Knows)
    write_votes(tmp_path / "votes", VOTES, [0, 1, 2, 0])
    result, said = classify("--answers=out/a.csv", cache="votes")
    assert result["metrics"] == {"top1": 0.75, "top1_of_views": 5 / 8}
    assert "75.00% of 4 images" in said and "62.50% of single views (2 per image)" in said
    assert result["classes"] == 3 and result["cache"]["images"] == 4
    with open("out/a.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["image"] for row in rows] == [f"{i},x.png" for i in range(4)]
    assert [row["class"] for row in rows] == ["a", "b", "c", "a"]
    assert [row["answer"] for row in rows] == ["a", "b", "c", "c"]
    # -log p of 42 codes: log(31 + e) each, less one nat for each vote.
    whole = 42 * np.log(31 + np.e)
    assert float(rows[3]["nats"]) == pytest.approx(whole - 2, abs=1e-3)
    assert float(rows[3]["answer_nats"]) == pytest.approx(whole - 3, abs=1e-3)


def test_labels_are_those_of_the_classes_names(classify, store, model, tmp_path):
    about = about_model(GENERATOR, SIZES, classes=["class2", "class0", "class1"])
    write_state_dict(model.state_dict(), tmp_path / "named.safetensors", about)
    result, _ = classify("--answers=a.csv", generator="named.safetensors")
    found = expected_nats(model, store).sum(1).argmin(1)
    right = found == torch.tensor([1, 2, 0] * 3)
    assert result["metrics"]["top1"] == pytest.approx(right.double().mean().item())
    with open("a.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["class"] for row in rows] == ["class0", "class1", "class2"] * 3
    assert [row["answer"] for row in rows] == [about.classes[i] for i in found.tolist()]


def test_a_class_that_the_cache_lacks_can_be_the_answer(classify, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.generator_scores.build_generator", Knows)
    write_votes(tmp_path / "two", VOTES, [0, 1, 1, 0], ("a", "b"))
    result, said = classify("--answers=a.csv", cache="two")
    assert "warning: two has 2 of the generator's 3 classes" in said
    with open("a.csv", newline="") as lines:
        assert [row["answer"] for row in csv.DictReader(lines)] == ["a", "b", "2", "2"]
    assert result["metrics"]["top1"] == 0.5


def test_precision_is_the_one_asked_for(classify, store):
    precisions = [classify(f"--precision={name}")[0]["precision"] for name in ("fp32", "bf16")]
    assert precisions == ["fp32", "bf16"] and classify()[0]["precision"] == "fp32"


def test_what_cannot_be_classified_is_refused_and_writes_nothing(classify, store, tmp_path):
    single = Generator(tiny_generator(codebook_size=32, image_seq_len=21, condition_num_classes=1))
    torch.save(single.state_dict(), "single.bin")
    write_cache(tmp_path / "one", classes=1)
    huge = torch.load("generator.bin")
    huge["output.weight"].fill_(3e38)  # finite, but what it is multiplied with overflows
    torch.save(huge, "huge.bin")
    (tmp_path / "file").write_text("")
    for answers, generator, cache, named in (
        ("a.csv", "single.bin", "one", ["single.bin", "--classify"]),
        ("a.csv", "huge.bin", "cache", ["huge.bin", "cache"]),
        ("file/a.csv", "none.bin", "cache", ["cannot write file"]),  # before anything is read
    ):
        call = partial(classify, f"--answers={answers}", generator=generator, cache=cache)
        refusal(call, *named)
    assert not (tmp_path / "a.csv").exists()
