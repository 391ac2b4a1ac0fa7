"""Tokenizers whose dependence is known by construction, and the command on random ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import reduce, repeat
from PIL import Image
from torch import nn

from experiments.alignment import inside
from experiments.alignment.dependence import (
    change_shares,
    code_rows,
    cut_errors,
    cut_lengths,
    earlier_changes,
    encode,
    evenly,
    masked_changes,
    psnr,
    replaced_changes,
)
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import TOKENIZER, about_model
from modeling.weights.tensors import fingerprint, write_state_dict
from tests.refusals import refusal
from tests.tiny import tiny_cache, tiny_generator, tiny_tokenizer

SIZES = tiny_tokenizer(codebook_size=32, patch_size=4, decoder_layers=2, num_buffer_tokens=1)
GRID, PREFIX, TOKENS = 4, 5, 21
OTHER = 0.9  # of a fill


def random_tokenizer(**sizes):
    """Weights of unit scale: with those of the start every part would add next to nothing."""
    tokenizer = Tokenizer(replace(SIZES, **sizes)).eval()
    for module in tokenizer.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for block in tokenizer.encoder.transformer:
        nn.init.normal_(block.attn.out_proj.weight)  # means over 37 tokens are small
    nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer


class PatchEncoder(nn.Module):
    """Latents that hold the mean of one patch in every channel, `shift` rows below their own."""

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift

    def forward(self, images, latent_tokens):
        means = reduce(images, "b c (g p) (h q) -> b g h", "mean", p=4, q=4)
        means = means[:, [min(row + self.shift, GRID - 1) for row in range(GRID)]]
        prefix = torch.cat([means[:, 0, :1], means[:, 0]], 1)
        latents = torch.cat([prefix, means.flatten(1)], 1)
        return latents[..., None].expand(-1, -1, 4)


class PatchDecoder(nn.Module):
    """Paints every patch in the value of its own code."""

    def forward(self, vectors):
        values = vectors[:, PREFIX:, 0].unflatten(1, (GRID, GRID))
        return repeat(values, "b g h -> b 3 (g p) (h q)", p=4, q=4), None


def patch_tokenizer(shift=0):
    """The codebook is 0, 1/31, …, 1 in every channel: codes are grey levels."""
    tokenizer = random_tokenizer()
    tokenizer.encoder = PatchEncoder(shift)
    tokenizer.decoder = PatchDecoder()
    with torch.no_grad():
        tokenizer.quantize.embedding.weight.copy_(torch.linspace(0, 1, 32)[:, None].expand(-1, 4))
    return tokenizer


def grey_patches(count):
    """Images whose patches have grey levels of the codebook: their codes are exact."""
    levels = torch.randint(0, 28, (count, GRID, GRID)) / 31
    return repeat(levels, "b g h -> b 3 (g p) (h q)", p=4, q=4)


# ---------------------------------------------------------------------- encoder
def test_a_local_encoder_changes_the_codes_of_replaced_rows_alone():
    tokenizer, images = patch_tokenizer(), grey_patches(8)
    changes = masked_changes(tokenizer, images, torch.tensor(OTHER))
    expected = (code_rows(tokenizer.config) > torch.arange(GRID - 1)[:, None]).double()
    assert torch.equal(changes, expected)
    kinds = earlier_changes(changes, tokenizer.config)
    assert not kinds["earlier"].any() and not kinds["prefix"].any()
    assert kinds["later"].tolist() == [1, 1, 1]


def test_codes_that_read_one_row_below_change_with_it():
    tokenizer, images = patch_tokenizer(shift=1), grey_patches(8)
    changes = masked_changes(tokenizer, images, torch.tensor(OTHER))
    # Rows 0 … r are kept: of these, row r alone reads a replaced one. The prefix reads row 1.
    kinds = earlier_changes(changes, tokenizer.config)
    assert kinds["earlier"].tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert kinds["prefix"].tolist() == [1, 0, 0]


def test_a_bidirectional_encoder_depends_on_later_rows():
    tokenizer, images = random_tokenizer(), grey_patches(64)
    kinds = earlier_changes(masked_changes(tokenizer, images, images.roll(1, 0)), tokenizer.config)
    assert (kinds["earlier"] > 0.05).all()
    assert kinds["earlier"][0] > kinds["earlier"][-1]  # more of the image was replaced


def test_shares_are_means_over_images():
    tokenizer, images = patch_tokenizer(), grey_patches(8)
    fill = images.clone()
    fill[:2] = OTHER  # six of eight images are "replaced" by themselves
    changes = masked_changes(tokenizer, images, fill)
    assert changes[0, PREFIX + GRID :].tolist() == [0.25] * 12


# ---------------------------------------------------------------------- decoder
def test_first_codes_decode_the_rows_that_they_paint():
    tokenizer, images = patch_tokenizer(), grey_patches(100)  # more than one batch
    lengths, errors = cut_lengths(tokenizer.config), cut_errors(tokenizer, images)
    assert lengths == [0, 5, 9, 13, 17, 21]
    variance = reduce(
        images.double().var(0, correction=0), "c (g p) w -> g", "mean", g=GRID
    )  # of an image from the mean image, which the mean vectors paint
    for length, line in zip(lengths, errors):
        known = max(length - PREFIX, 0) // GRID
        np.testing.assert_allclose(line[:known], 0, atol=1e-12)
        np.testing.assert_allclose(line[known:], variance[known:], rtol=1e-5)


def test_psnr_is_its_definition():
    assert psnr(torch.tensor([1.0, 0.01, 0.0])).tolist() == pytest.approx([0, 20, 100])


def test_a_causal_decoder_has_no_row_that_depends_on_later_codes():
    tokenizer, codes = random_tokenizer(causal=True), torch.randint(0, 32, (6, TOKENS))
    changes = replaced_changes(tokenizer, codes)
    rows = code_rows(tokenizer.config)
    later = rows > torch.arange(GRID)[:, None]  # (g, T): codes after the row
    assert not changes[later].any()
    assert (changes[~later] > 1e-4).all()
    shares = change_shares(changes, tokenizer.config)
    assert shares["earlier"] == 0 and shares["own"] > 0 and shares["later"] > 0
    assert sum(shares.values()) == pytest.approx(1)


def test_causal_rows_are_final_once_their_codes_are_known():
    tokenizer, images = random_tokenizer(causal=True), torch.rand(6, 3, 16, 16)
    errors = cut_errors(tokenizer, images)
    for line, length in enumerate(cut_lengths(tokenizer.config)):
        known = max(length - PREFIX, 0) // GRID
        assert torch.equal(errors[line, :known], errors[-1, :known])
        assert (errors[line, known:] != errors[-1, known:]).all() or length == TOKENS


def test_a_bidirectional_decoder_changes_every_row():
    tokenizer, codes = random_tokenizer(causal=False), torch.randint(0, 32, (6, TOKENS))
    changes = replaced_changes(tokenizer, codes)
    assert (changes > 1e-4).all()
    assert change_shares(changes, tokenizer.config)["earlier"] > 0.01


def test_change_of_a_replaced_code_is_its_size_in_pixels():
    tokenizer = patch_tokenizer()
    codes = torch.zeros(2, TOKENS, dtype=torch.long)
    codes[0, PREFIX + 6] = 31  # row 1, column 2: black to white in a quarter of the row
    changes = replaced_changes(tokenizer, codes)
    expected = torch.zeros(GRID)
    expected[1] = 0.5  # sqrt(1/4)
    np.testing.assert_allclose(changes[:, PREFIX + 6], expected, atol=1e-6)
    assert changes.isnan().sum() == (TOKENS - 1) * GRID  # all other codes are common to both images
    shares = change_shares(changes, tokenizer.config)
    assert shares == {"earlier": 0, "own": 1, "later": 0}
    assert change_shares(torch.full_like(changes, torch.nan), tokenizer.config) == {}


def test_without_prefix_the_first_codes_are_the_first_rows():
    config = replace(SIZES, num_latent_tokens=GRID**2)
    assert cut_lengths(config) == [0, 4, 8, 12, 16]
    assert code_rows(config).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    kinds = earlier_changes(torch.eye(3, 16), config)
    assert kinds.keys() == {"earlier", "later"}
    assert kinds["earlier"].tolist() == pytest.approx([1 / 4, 1 / 8, 1 / 12])


def test_images_are_spread_over_the_listing():
    paths = [str(i) for i in range(10)]
    assert evenly(paths, 4) == ["1", "3", "6", "8"] and evenly(paths, 20) == paths


# ---------------------------------------------------------------------- the command
@pytest.fixture
def study(tmp_path, monkeypatch):
    """Two tokenizers, causal and not, seven images, and the cache and a generator of the first."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "val" / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    stages = {
        "causal": dict(causal=True, prefix_head=True),
        "both": dict(causal=False, num_latent_tokens=GRID**2),  # without prefix
    }
    for name, sizes in stages.items():
        tokenizer = random_tokenizer(**sizes)
        (tmp_path / name).mkdir()
        about = about_model(TOKENIZER, tokenizer.config)
        write_state_dict(tokenizer.state_dict(), tmp_path / name / "tokenizer.pth", about)
        if name == "causal":
            print_cache(tokenizer, tmp_path / "cache")
    sizes = tiny_generator(
        num_hidden_layers=1, codebook_size=32, image_seq_len=TOKENS, condition_num_classes=2
    )
    write_state_dict(Generator(sizes).state_dict(), tmp_path / "generator.bin")
    return tmp_path


def print_cache(tokenizer, folder):
    codes = encode(tokenizer, torch.rand(6, 3, 16, 16)).view(3, 2, TOKENS)
    mark = fingerprint(tokenizer.state_dict())
    tiny_cache(folder, codes, [0, 1, 0], ["c0", "c1"], tokenizer=mark)


def start(*arguments):
    inside.main(["--images=val", "--output=out", *arguments])


def test_the_command_answers_every_question_for_every_row(study, capsys):
    start(
        "--tokenizer", "causal=causal/tokenizer.pth", "both=both/tokenizer.pth",
        "--generator", "causal=generator.bin", "--cache", "causal=cache",
    )  # fmt: skip
    rows = json.loads((study / "out/inside.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["causal", "both"]
    causal, both = rows
    assert causal["generator_loss"]["metrics"]["nats_per_code"] == pytest.approx(
        np.log(32), rel=1e-5
    )
    assert causal["generator_loss"]["views"] == 6 and both["generator_loss"] is None
    assert causal["replaced"]["shares"]["earlier"] == 0 < both["replaced"]["shares"]["earlier"]
    for row in rows:
        prefix, tokens = (PREFIX, TOKENS) if row is causal else (0, GRID**2)
        assert (row["prefix_codes"], row["codes_per_image"]) == (prefix, tokens)
        assert np.shape(row["masked"]["mean colour"]["share_changed"]) == (GRID - 1, tokens)
        assert len(row["masked"]["another image"]["earlier"]) == GRID - 1
        assert np.shape(row["cut"]["psnr_by_row"]) == (1 + GRID + bool(prefix), GRID)
        assert np.shape(row["replaced"]["rms_change"]) == (GRID, tokens)
        assert len(row["neighbours"]["bits_by_row"]["left"]) == bool(prefix) + GRID
    pictures = {path.name for path in (study / "out").glob("*.png")}
    names = {"encoder.png", "cut.png", "decoder.png", "neighbours.png", "loss.png"}
    assert pictures == names
    said = capsys.readouterr().out
    assert "causal " in said and "both " in said and "3.466" in said


def test_one_tokenizer_needs_no_name(study):
    start("--tokenizer", "both/tokenizer.pth", "--train_images", "val")
    about = json.loads((study / "out/inside.json").read_text())
    assert [row["name"] for row in about["rows"]] == ["tokenizer"] and about["tables"] == "val"
    assert not (study / "out/loss.png").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tokenizer", "a", "b"], "two paths named tokenizer"),
        (["--tokenizer", "a=b", "--cache", "a=c"], "go together"),
        (["--tokenizer", "a=b", "--generator", "c=d", "--cache", "c=e"], "has no tokenizer"),
        (["--tokenizer", "=b"], "NAME=PATH"),
        (
            ["--tokenizer", "both/tokenizer.pth", "--generator=generator.bin", "--cache=cache"],
            "another tokenizer's cache",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(study, arguments, said):
    refusal(lambda: start(*arguments), said)
    assert not (study / "out").exists()


def test_one_image_is_too_few(study):
    for path in list((study / "val").rglob("*.png"))[1:]:
        path.unlink()
    for folder in (study / "val").iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()
    refusal(lambda: start("--tokenizer", "both/tokenizer.pth"), "too few images")


def test_numbers_are_kept_without_matplotlib(study, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    refusal(lambda: start("--tokenizer", "both/tokenizer.pth"), "matplotlib", "inside.json")
    assert (study / "out/inside.json").is_file()
