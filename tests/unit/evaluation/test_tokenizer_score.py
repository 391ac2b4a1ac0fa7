import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import evaluate
from data.images import center_crop, load_image
from evaluation.features import Inception
from evaluation.lpips import LPIPS
from evaluation.metrics import frechet_distance
from evaluation.reconstruction import MAGNIFICATION, ssim, weights_hash
from modeling.tokenizer import Tokenizer
from modeling.weights.tensors import write_state_dict
from runtime.errors import InputError
from tests.inception import TinyFeatures
from tests.refusals import refusal
from tests.tars import flattened, tar_of_tars
from tests.tiny import STAGE1, sizes_file, tiny_tokenizer

SIZES = dict(patch_size=4, encoder_width=8, encoder_heads=1, decoder_width=8, decoder_heads=1)
STAGES = {1: STAGE1, 2: dict(num_buffer_tokens=3)}


# ---------------------------------------------------------------------- SSIM
def by_scipy(a, b):
    """Of one channel (H, W), as Wang et al. define it."""

    def mean(x):
        return gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

    ma, mb = mean(a), mean(b)
    va, vb, ab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 1e-4, 9e-4
    return ((2 * ma * mb + c1) * (2 * ab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()


def test_ssim_is_its_definition():
    images, others = torch.rand(2, 2, 3, 20, 17)
    others = 0.7 * images + 0.3 * others
    expected = [
        np.mean([by_scipy(x.double().numpy(), y.double().numpy()) for x, y in zip(a, b)])
        for a, b in zip(images, others)
    ]
    np.testing.assert_allclose(ssim(images, others), expected, rtol=1e-9)
    assert 0.3 < expected[0] < 0.99


def test_ssim_of_equal_images_is_one_and_of_negatives_is_below_zero():
    images = torch.rand(2, 3, 16, 16)
    assert ssim(images, images).tolist() == pytest.approx([1, 1])
    assert (ssim(images, 1 - images) < 0).all()


# ---------------------------------------------------------------------- the whole command
class HalfDistance:
    def __init__(self, weights):
        assert weights == Path("weights")

    def to(self, device):
        return self

    def distance(self, images, targets):
        return (images - targets).abs().mean() / 2


@pytest.fixture(params=[1, 2])
def run_folder(request, tmp_path):
    """What training leaves: a config and weights, of either stage."""
    config = tiny_tokenizer(**SIZES, **STAGES[request.param])
    tokenizer = Tokenizer(config)
    write_state_dict(tokenizer.state_dict(), tmp_path / "tokenizer.pth")
    sizes_file(tmp_path / "config.yaml", vq_model=config)
    return tmp_path, tokenizer.eval()


@pytest.fixture
def score(run_folder, monkeypatch, capsys):
    folder, tokenizer = run_folder
    monkeypatch.setattr(evaluate, "Inception", TinyFeatures)
    monkeypatch.setattr(evaluate, "LPIPS", HalfDistance)
    rng = np.random.default_rng(0)
    for i in range(13):
        path = folder / "images/val" / f"c{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((29, 23), Image.Resampling.BICUBIC).save(path)

    def start(*arguments):
        evaluate.main([
            "--reconstruction", f"--tokenizer={folder}/tokenizer.pth", "--device=cpu",
            f"--config={folder}/config.yaml", f"--data_path={folder}/images", "--split=val",
            f"--picture={folder}/out/pairs.png", "--num_workers=0", "--batch_size=5", *arguments,
        ])  # fmt: skip
        said = capsys.readouterr().out
        return json.loads(said.strip().splitlines()[-1]), said

    start.folder, start.tokenizer = folder, tokenizer
    return start


def reconstructions(score):
    paths = sorted((score.folder / "images/val").rglob("*.png"))
    pixels = [torch.from_numpy(np.array(center_crop(load_image(p), 16))) for p in paths]
    before = torch.stack(pixels).permute(0, 3, 1, 2)
    codes = score.tokenizer.encode(before / 255)
    with torch.no_grad():
        return before, codes, score.tokenizer.decode(codes)


def test_all_figures_are_those_of_centre_crops_and_their_reconstructions(score):
    result, said = score()
    before, codes, after = reconstructions(score)
    metrics = result["metrics"]
    names = ["rFID", "PSNR", "SSIM", "LPIPS", "codebook_use", "perplexity", "code_agreement"]
    assert list(metrics) == names and "gFID" not in said
    features = [TinyFeatures()(x)[0] for x in (before, (after * 255).to(torch.uint8))]
    assert metrics["rFID"] == pytest.approx(frechet_distance(*features), rel=1e-5)
    mse = (before / 255 - after).square().mean((1, 2, 3))
    assert metrics["PSNR"] == pytest.approx((-10 * mse.log10()).mean().item(), rel=1e-5)
    assert metrics["SSIM"] == pytest.approx(ssim(before / 255, after).mean().item(), rel=1e-5)
    expected = (before / 255 - after).abs().mean().item() / 2
    assert metrics["LPIPS"] == pytest.approx(expected, rel=1e-5)
    assert metrics["codebook_use"] == len(codes.unique()) / 16
    assert result["samples"]["images"] == result["reference"]["images"] == 13
    assert result["weights"]["tokenizer"] == weights_hash(score.tokenizer)
    assert result["weights"]["encoder_heads"] == score.tokenizer.config.encoder_heads


PUBLISHED = SimpleNamespace(Inception=Inception, LPIPS=LPIPS)  # the real ones, without files
WITHOUT = {
    "Inception": ("rFID", r"rFID is left out: no weights-inception-2015-12-05-6726825d\.pth"),
    "LPIPS": ("LPIPS", r"LPIPS is left out: no vgg16-397923af\.pth"),
}


@pytest.mark.parametrize("missing", [["Inception"], ["LPIPS"], ["Inception", "LPIPS"]])
def test_figures_whose_networks_are_missing_are_named_and_left_out(
    score, monkeypatch, nowhere, missing
):
    everything, _ = score()
    for name in missing:
        monkeypatch.setattr(evaluate, name, getattr(PUBLISHED, name))
    result, said = score()
    left_out = [WITHOUT[name][0] for name in missing]
    kept = {k: v for k, v in everything["metrics"].items() if k not in left_out}
    assert result["metrics"] == kept and kept.keys() >= {"PSNR", "SSIM", "codebook_use"}
    lines = [line for line in said.splitlines() if "left out" in line and line[0] != "{"]
    assert len(lines) == len(missing)
    for name, line in zip(missing, lines):
        assert re.match("warning: " + WITHOUT[name][1] + ".*weights/README.md", line)
        assert line.removeprefix("warning: ") in result["warnings"]
    table = [line.split()[0] for line in said.splitlines() if line and line[0] != "{"]
    assert not set(left_out) & set(table) and "PSNR" in table
    # The sets are still identified, and the picture is drawn.
    for side in ("samples", "reference"):
        assert result[side]["hash"] == everything[side]["hash"]
    assert Path(result["picture"]).exists() and result["weights"] == everything["weights"]
    assert (result["protocol"]["network"] is None) == ("Inception" in missing)


def test_statistics_cannot_be_saved_without_their_network(score, monkeypatch, nowhere):
    monkeypatch.setattr(evaluate, "Inception", PUBLISHED.Inception)
    refusal(lambda: score(f"--save_stats={score.folder}/val.npz"), "--save_stats", "no weights-inc")
    assert not (score.folder / "val.npz").exists() and not (score.folder / "out").exists()


def test_a_network_that_is_there_and_not_right_is_refused(score, monkeypatch, nowhere):
    (nowhere / "weights").mkdir()
    torch.save({"a": torch.ones(1)}, nowhere / "weights/weights-inception-2015-12-05-6726825d.pth")
    monkeypatch.setattr(evaluate, "Inception", PUBLISHED.Inception)
    refusal(score, "weights/weights-inception-2015-12-05-6726825d.pth")


def test_picture_shows_before_after_and_difference(score):
    result, _ = score()
    before, _, after = reconstructions(score)
    assert result["picture"] == f"{score.folder}/out/pairs.png"
    picture = np.asarray(Image.open(result["picture"]))
    assert picture.shape == (5 * 16, 3 * 16, 3)  # the first batch has five
    second = picture[16:32].reshape(16, 3, 16, 3).transpose(1, 3, 0, 2)
    np.testing.assert_array_equal(second[0], before[1])
    np.testing.assert_array_equal(second[1], (after[1] * 255).to(torch.uint8))
    difference = (MAGNIFICATION * (before[1] / 255 - after[1]).abs()).clamp(max=1) * 255
    np.testing.assert_allclose(second[2], difference, atol=1)


@pytest.mark.parametrize("flag", ["--picture=blocked/p.png", "--save_stats=blocked/s.npz"])
def test_outputs_are_tried_before_anything_is_computed(score, monkeypatch, flag):
    monkeypatch.chdir(score.folder)
    (score.folder / "blocked").write_text("a file")
    monkeypatch.setattr(evaluate, "score_tokenizer", lambda *_: pytest.fail("images were read"))
    refusal(lambda: score(flag), "blocked")


def test_figures_are_printed_before_a_file_that_cannot_be_written(score, monkeypatch, capsys):
    def full(*_):
        raise InputError("no space left")

    monkeypatch.setattr(evaluate, "draw_preview", full)
    with pytest.raises(InputError, match="no space left"):
        score()
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["metrics"]["PSNR"] > 0


def test_three_images_are_scored_too(score):
    """Precision and recall would need more, but are not figures of a tokenizer."""
    for path in (score.folder / "images/val").rglob("*.png"):
        if path.stem not in ("00", "01", "02"):
            path.unlink()
    metrics = score()[0]["metrics"]
    assert metrics["PSNR"] > 0 and metrics["rFID"] > 0


def test_one_image_has_all_figures_but_rfid(score):
    for path in (score.folder / "images/val").rglob("*.png"):
        if path.stem != "00":
            path.unlink()
    (score.folder / "images/val/c1").rmdir()
    result, said = score()
    assert result["metrics"]["PSNR"] > 0 and "rFID" not in result["metrics"]
    assert "warning: rFID is left out" in said


def test_statistics_of_the_originals_serve_as_a_reference(score):
    _, _ = score(f"--save_stats={score.folder}/val.npz")
    with np.load(score.folder / "val.npz", allow_pickle=False) as stored:
        before, _, _ = reconstructions(score)
        np.testing.assert_allclose(stored["mu"], TinyFeatures()(before)[0].mean(0), rtol=1e-5)


def test_tar_of_the_images_has_their_figures(score, monkeypatch):
    monkeypatch.chdir(score.folder)
    expected, _ = score()
    images = score.folder / "images/val"
    tar = tar_of_tars(images, score.folder / "val.tar")
    flattened(images, score.folder / "flat")  # in another order: the same but for rounding
    for source in (tar, score.folder / "flat"):
        result, said = score(f"--data_path={source}", "--split=")
        assert f"{source}: 13 images" in said
        assert result["samples"]["images"] == 13
        for name, value in expected["metrics"].items():
            assert result["metrics"][name] == pytest.approx(value, rel=1e-4), name
    assert (score.folder / "out/val.tar.index.npz").exists()  # beside the picture


def test_folder_that_is_not_there_is_named(score):
    refusal(lambda: score("--split=test"), score.folder / "images/test")


# ---------------------------------------------------------------------- loading
@pytest.mark.parametrize(
    "text, named",
    [
        ("encoder_widht: 8", ["model.vq_model.encoder_width"]),
        ("image_size: 32", ["image_size=32", "other.yaml, line 1", "tokenizer.pth"]),
        (None, ["other.yaml"]),
    ],
)
def test_misspelt_config_and_misfitting_weights_are_refused(score, text, named):
    if text is not None:
        (score.folder / "other.yaml").write_text(f"model: {{vq_model: {{{text}}}}}")
    refusal(lambda: score(f"--config={score.folder}/other.yaml"), *named)


def test_images_smaller_than_the_window_of_ssim_are_refused(score):
    config = tiny_tokenizer(**SIZES, image_size=8)
    small = sizes_file(score.folder / "small.yaml", vq_model=config)
    tokenizer = Tokenizer(config)
    write_state_dict(tokenizer.state_dict(), score.folder / "small.pth")
    flags = f"--tokenizer={score.folder}/small.pth", f"--config={small}"
    refusal(lambda: score(*flags), "8 px", "SSIM")


def test_result_names_the_weights_whatever_the_unused_buffer_holds(score):
    before = weights_hash(score.tokenizer)
    with torch.no_grad():
        for name, tensor in score.tokenizer.state_dict().items():
            tensor.add_(0.5 if name == "quantize.embed_prob" else 0)
        assert weights_hash(score.tokenizer) == before
        score.tokenizer.quantize.embedding.weight[0, 0] += 1
    assert weights_hash(score.tokenizer) != before
