"""The photographs' crops, the bits that patches need, and the rows on these data."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

import configs.load
from configs.schema import TokenizerRun
from experiments.alignment import photographs
from experiments.alignment.ablation import chains_of
from experiments.alignment.needed_bits import flat_psnr, means_psnr, needed_bits, patches
from experiments.alignment.photo_score import crops, entropy
from experiments.alignment.rows import ROWS, STAGE1, STAGE2, recipe, varied


def test_every_photograph_is_on_one_side_only(tmp_path, monkeypatch):
    names = {"train": ("a.jpg", f"wallpapers/b/{photographs.LARGEST}"), "val": ("c.jpg",)}
    for name in (*names["train"], *names["val"]):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (400, 300), "red").save(tmp_path / "files" / name)
    monkeypatch.setattr(photographs, "TRAINED", names["train"])
    monkeypatch.setattr(photographs, "HELD_OUT", names["val"])
    monkeypatch.setattr(photographs, "CROPS", {"train": 30, "val": 20})
    monkeypatch.setattr(photographs, "unpack", lambda folder: tmp_path / "files")
    assert photographs.write_photographs(tmp_path) == {"train": 60, "val": 20}
    found = {s: list((tmp_path / s).glob("*/*.png")) for s in ("train", "val")}
    assert {split: len(files) for split, files in found.items()} == {"train": 60, "val": 20}
    assert {file.name.split("_")[0] for file in found["train"]} == {"a", "b"}
    assert {file.name.split("_")[0] for file in found["val"]} == {"c"}
    assert {file.parent.name for file in found["train"]} == {"detail", "part", "view"}
    assert {Image.open(file).size for file in found["train"]} == {(72, 72)}
    assert not set(photographs.TRAINED) & set(photographs.HELD_OUT)


def test_a_class_is_the_share_of_the_photograph(tmp_path):
    """A photograph that brightens from left to right shows how wide a crop was."""
    ramp = np.broadcast_to(np.linspace(0, 255, 600, dtype=np.uint8)[None, :, None], (600, 600, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    for _, kind in photographs.CLASSES:
        (tmp_path / kind).mkdir()
    photographs.write_crops(tmp_path / "ramp.png", tmp_path, 40, np.random.default_rng(0))
    limits = [0.1, *(limit for limit, _ in photographs.CLASSES)]
    for (low, high), (_, kind) in zip(pairwise(limits), photographs.CLASSES):
        for file in (tmp_path / kind).iterdir():
            row = np.asarray(Image.open(file))[36, :, 0].astype(int)
            share = (row[-1] - row[0]) / 255
            assert low - 0.02 <= share <= high + 0.02, (kind, share)


@pytest.mark.parametrize(
    "limit, used", [(4, [0, 2, 3, 5]), (6, range(6)), (9, range(6)), (None, range(6))]
)
def test_a_sample_of_crops_is_evenly_spaced(tmp_path, limit, used):
    """The listing is sorted by class: the first ones alone would leave classes out."""
    for i in range(6):
        (tmp_path / f"{i // 2}").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(tmp_path / f"{i // 2}/{i}.png")
    assert (crops(tmp_path, 8, limit)[:, 0, 0, 0] // 10).tolist() == list(used)


def test_bits_of_a_white_source_are_its_rate_distortion_function():
    rng = np.random.default_rng(0)
    vectors = 0.1 * rng.standard_normal((100_000, 12))
    exact = 12 * 0.5 * np.log2(0.1**2 / 10**-3)
    assert needed_bits(vectors) == pytest.approx(exact, rel=0.02)
    assert needed_bits(0.01 * vectors) == 0  # below the allowed error already


def test_patches_are_row_major():
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    cut = patches(image, 8)
    assert cut.shape == (4, 192)
    np.testing.assert_allclose(cut[1], image[0, :8, 8:].flatten() / 255, rtol=1e-6)


def test_patches_of_one_colour_lose_what_varies_within_them():
    stripes = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # grey on average, and half the range from it everywhere
    assert flat_psnr(patches(stripes, 4), 2, 2) == pytest.approx(10 * np.log10(4))


def test_means_show_the_nearest_of_theirs():
    vectors = np.array([[0.0], [0.2], [1.0]] * 500)  # two means: about 0.1 and 1
    assert means_psnr(vectors, 2) == pytest.approx(-10 * np.log10(0.02 / 3), abs=0.2)


def test_entropy_counts_frequencies():
    assert entropy(np.array([[0, 1], [2, 3]])) == pytest.approx(2)
    assert entropy(np.zeros((3, 5), dtype=np.int64)) == 0


def test_the_photographs_rate_stays_whatever_the_length():
    row = next(row for row in ROWS if row.name == "causal")
    for text, steps in (("data=photographs", 1700), ("tokenizer_steps=2,data=photographs", 3400)):
        made = recipe(row, varied(text)[0])
        run = configs.load.load(TokenizerRun, [f"config={STAGE1}", *made.stage1])
        high, tail = run.phases
        assert (high.steps, high.learning_rate, high.end_lr) == (steps, 1e-3, 1e-3)
        assert (tail.steps, tail.learning_rate, tail.end_lr) == (0.6 * steps, 3e-5, 3e-5)
        (plain,) = configs.load.load(TokenizerRun, [f"config={STAGE2}"]).phases
        (phase,) = configs.load.load(TokenizerRun, [f"config={STAGE2}", *made.stage2]).phases
        assert phase.learning_rate == plain.learning_rate  # stage 2 keeps its own


def test_photographs_are_sampled_at_every_scale_and_scored(tmp_path):
    data = tmp_path / "photographs"
    for kind in ("detail", "part", "view"):
        (data / "train" / kind).mkdir(parents=True)
    overrides, names = varied("data=photographs,position_init=normal")
    rows = [row for row in ROWS if row.name in names]
    chains = chains_of(tmp_path, data, rows, [42], overrides)
    assert [chain.title for chain in chains] == ["seed 42 bidirectional", "seed 42 causal"]
    commands = {step.name: step.command for step in chains[1].steps}
    assert {"samples_1", "samples_2", "samples_4", "judge_stage1"} < commands.keys()
    assert "model.generator.guidance_scale=4" in commands["samples_4"]
    assert "--five_crop" not in commands["cache_train"]
    assert "model.vq_model.patch_size=8" in commands["generator"]
    assert "experiments.alignment.photo_score" in commands["judge_stage1"]


def test_stage_2_shows_the_photographs_codes_of_every_scale(tmp_path):
    data = tmp_path / "photographs"
    for kind in ("detail", "part", "view"):
        (data / "train" / kind).mkdir(parents=True)
    rows = [row for row in ROWS if row.name == "stage2"]
    (chain,) = chains_of(tmp_path, data, rows, [42], varied("data=photographs")[0])
    commands = {step.name: step.command for step in chain.steps}
    run = tmp_path / "seed_42" / "aux"
    assert f"experiment.codes={run / 'samples_2_codes.npz'}" in commands["samples_stage2_2"]
    assert commands["judge_stage2"][1:] == [
        "experiments.alignment.photo_score", str(run), str(data), "stage2"
    ]  # fmt: skip
