import dataclasses

import pytest
import torch

from modeling.engine import decode_images
from modeling.generator import Generator, GeneratorConfig
from modeling.pipeline import Pipeline
from modeling.randomness import image_uniforms
from modeling.sampling import sample_codes
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights import write_state_dict
from runtime.errors import InputError

SMALL = TokenizerConfig(
    codebook_size=16,
    token_size=4,
    image_size=16,
    patch_size=8,
    encoder_width=16,
    encoder_layers=1,
    encoder_heads=2,
    decoder_width=16,
    decoder_layers=1,
    decoder_heads=2,
)
TINY = GeneratorConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    codebook_size=16,
    image_seq_len=7,
    condition_num_classes=3,
)


@pytest.fixture
def made(fill, tmp_path):
    generator, tokenizer = fill(Generator(TINY)), fill(Tokenizer(SMALL))
    write_state_dict(generator.state_dict(), tmp_path / "g.bin")
    write_state_dict(tokenizer.state_dict(), tmp_path / "t.pth")
    return generator, tokenizer, str(tmp_path / "g.bin"), str(tmp_path / "t.pth")


def test_pipeline_reads_the_sizes_and_makes_the_images_of_its_parts(made):
    generator, tokenizer, *files = made
    pipeline = Pipeline(*files, tokenizer_config=SMALL, device="cpu")
    assert pipeline.generator.config == TINY
    images = pipeline([2, 0], seed=5, guidance_scale=4.0, guidance_power=1.5)
    uniforms = image_uniforms(5, range(2), 7)
    codes = sample_codes(generator, torch.tensor([2, 0]), uniforms, 4.0, 1.5)
    assert torch.equal(images, decode_images(tokenizer, codes, torch.float32))
    assert images.shape == (2, 16, 16, 3)
    assert not torch.equal(pipeline([2, 0], seed=6, guidance_scale=4.0), images)


def test_pipeline_samples_codes_without_prefix_tokens(fill, tmp_path):
    small = dataclasses.replace(SMALL, num_latent_tokens=4)  # 2 x 2
    generator = fill(Generator(dataclasses.replace(TINY, image_seq_len=4)))
    tokenizer = fill(Tokenizer(small))
    write_state_dict(generator.state_dict(), tmp_path / "g.bin")
    write_state_dict(tokenizer.state_dict(), tmp_path / "t.pth")
    files = str(tmp_path / "g.bin"), str(tmp_path / "t.pth")
    pipeline = Pipeline(*files, tokenizer_config=small, device="cpu")
    images = pipeline([2, 0], seed=5, guidance_scale=4.0, guidance_power=1.5)
    uniforms = image_uniforms(5, range(2), 4)
    codes = sample_codes(generator, torch.tensor([2, 0]), uniforms, 4.0, 1.5)
    assert codes.shape == (2, 4)
    assert torch.equal(images, decode_images(tokenizer, codes, torch.float32))
    with pytest.raises(InputError, match="4 tokens without prefix"):
        Pipeline(*files, tokenizer_config=SMALL)


def test_pipeline_refuses_files_in_the_wrong_order_and_unknown_classes(made):
    *_, generator, tokenizer = made
    with pytest.raises(InputError, match="does not fit the configured tokenizer"):
        Pipeline(tokenizer, generator, tokenizer_config=SMALL)
    with pytest.raises(InputError, match="is not a generator but a stage-2 tokenizer"):
        Pipeline(tokenizer, tokenizer, tokenizer_config=SMALL)
    with pytest.raises(InputError, match="class 9 asked for"):
        Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")([9])


@pytest.mark.parametrize(
    "classes, words",
    [([], "at least one class number"), (1, "pass a list"), ([0.5], "pass a list"), ([-1], "-1")],
)
def test_pipeline_refuses_classes_that_make_no_images(made, classes, words):
    *_, generator, tokenizer = made
    pipeline = Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")
    with pytest.raises(InputError, match=words):
        pipeline(classes)


def test_pipeline_refuses_unknown_settings_and_devices_that_are_not_there(made, monkeypatch):
    *_, generator, tokenizer = made
    pipeline = Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")
    with pytest.raises(InputError, match=r"no sampling setting guidance: there are guidance_scale"):
        pipeline([0], guidance=4.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device"):
        Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cuda")


def test_an_image_does_not_depend_on_what_is_made_with_it(made):
    *_, generator, tokenizer = made
    pipeline = Pipeline(generator, tokenizer, tokenizer_config=SMALL, device="cpu")
    assert torch.equal(pipeline([1, 2, 0], seed=3)[:2], pipeline([1, 2], seed=3))
