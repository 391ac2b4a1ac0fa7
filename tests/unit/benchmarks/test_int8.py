"""What the agreement of a smaller cache counts: codes after float32's, codes after its own, images."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import int8
from modeling import decode_attention
from modeling.engine import Engine
from modeling.generator import Generator
from modeling.sampling import Sampling
from modeling.tokenizer import Tokenizer
from modeling.weights.tensors import write_state_dict
from tests.refusals import refusal
from tests.tiny import sizes_file, tiny_generator, tiny_tokenizer

TOKENIZER = tiny_tokenizer(codebook_size=64, token_size=8, patch_size=4, decoder_width=32)
GENERATOR = tiny_generator(codebook_size=64, image_seq_len=21)


@pytest.fixture
def models(fill, nowhere):
    """The weight files of a tiny tokenizer and generator, and a config, in an empty folder."""
    model = fill(Generator(GENERATOR))
    write_state_dict(fill(Tokenizer(TOKENIZER)).state_dict(), nowhere / "tokenizer.pth")
    write_state_dict(model.state_dict(), nowhere / "generator.bin")
    file = sizes_file(nowhere / "sizes.yaml", vq_model=TOKENIZER, generator=GENERATOR)
    text = file.read_text().replace("  generator:\n", "  generator:\n    guidance_scale: 2.0\n")
    file.write_text(text + "experiment: {output_dir: nowhere, tokenizer_checkpoint: tokenizer.pth}")
    return model


def lines(capsys, *options):
    int8.main(["--config", "sizes.yaml", "--generator", "generator.bin", *options])
    return capsys.readouterr().out.splitlines()


def shares(line):
    """Percentages and dB of a line: forced codes, free codes, whole images; dB forced and free."""
    words = line.replace("%", " %").split()
    percent = [float(a) for a, b in itertools.pairwise(words) if b == "%"]
    return percent, [float(a) for a, b in itertools.pairwise(words) if b.startswith("dB")]


# ---------------------------------------------------------------------- the command
def test_every_way_has_a_line_and_float32_itself_agrees_wholly(models, capsys, monkeypatch):
    found = lines(capsys, "--images", "7", "--batch", "3")
    assert "generator.bin: 7 images of 21 codes" in found[1]
    assert [line.split(":")[0] for line in found[2:]] == list(int8.WAYS)
    for line in found[2:]:
        (forced, _, _), decibels = shares(line)
        assert 90 < forced <= 100 and all(d > 15 for d in decibels)
    monkeypatch.setattr(int8, "WAYS", {"itself": (torch.float32, "auto")})
    itself = lines(capsys, "--images", "7", "--batch", "3")[2]
    assert shares(itself) == ([100, 100, 100], [math.inf, math.inf])


def test_a_cache_that_loses_its_values_shows(models, capsys, monkeypatch):
    quantize = decode_attention.quantize
    monkeypatch.setattr(
        decode_attention, "quantize", lambda x: (quantize(x)[0] * 0, quantize(x)[1])
    )
    (line,) = [x for x in lines(capsys, "--images", "8") if x.startswith("float32, int8")]
    (forced, free, whole), _ = shares(line)
    assert forced < 80 and free <= forced + 5 and whole < 50


def test_number_of_images_does_not_depend_on_the_batch(models, capsys):
    for kind in int8.WAYS:
        few, many = (
            next(x for x in lines(capsys, "--images", "6", "--batch", b) if x.startswith(kind))
            for b in ("6", "4")
        )
        assert shares(few)[0] == pytest.approx(shares(many)[0], abs=1)  # up to rounding


def test_generator_is_by_default_that_of_the_configs_run(models, nowhere):
    refusal(lambda: int8.main(["--config", "sizes.yaml", "--images", "2"]), "nowhere")


# ---------------------------------------------------------------------- its parts
def test_a_captured_step_is_not_replayed_where_the_draws_are_the_teachers(models):
    """A CUDA graph holds the engine's own draws."""
    engine = Engine(models, 4, Sampling(2.0))
    inputs = [(torch.arange(4) % 3, torch.rand(4, 21))]
    codes = int8.drawn(engine, inputs)
    engine.graph = graph = SimpleNamespace(replay=lambda: pytest.fail("the graph was replayed"))
    assert torch.equal(int8.drawn_after(engine, inputs, codes), codes)
    assert engine.graph is graph


def test_teacher_forced_difference_stays_in_its_step(models):
    inputs = [(torch.arange(4) % 3, torch.rand(4, 21)), (torch.arange(4) % 3, torch.rand(4, 21))]
    engine = Engine(models, 4, Sampling(2.0))
    codes = int8.drawn(engine, inputs)
    assert torch.equal(int8.drawn_after(engine, inputs, codes), codes)
    functions, calls = engine.functions, []

    def wrong_at_the_fifth(*arguments):
        calls.append(0)
        return (functions.choose(*arguments) + (len(calls) % 21 == 5)) % 64

    engine.functions = functions._replace(choose=wrong_at_the_fifth)
    forced = int8.drawn_after(engine, inputs, codes)
    assert (forced != codes).all(0).nonzero().tolist() == [[4]]
    assert (forced != codes).sum() == 8
    free = int8.drawn(engine, inputs)
    assert torch.equal(free[:, :4], codes[:, :4]) and (free != codes).sum() > 8


def test_agreement_counts_codes_and_whole_images():
    codes = torch.zeros(4, 10, dtype=torch.int64)
    free = codes.clone()
    free[0, 3:] = 1
    found = int8.Agreement(codes, codes, free)
    assert (found.share(found.forced), found.share(found.free), found.whole) == (1, 33 / 40, 0.75)


def test_psnr_of_all_pixels_together():
    images = torch.zeros(2, 2, 2, 3, dtype=torch.uint8)
    others = images.clone()
    others[0] = 51  # a fifth of the range in half of the pixels
    assert int8.psnr(images, others) == pytest.approx(10 * math.log10(50))
    assert int8.psnr(images, images) == math.inf
