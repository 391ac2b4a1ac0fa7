"""Pretokenization's command line."""

import pytest
from PIL import Image

from data.images import scan_images
from pretokenization import WITHOUT_EFFECT, image_folder, kind_of_crops, parse
from tests.refusals import refusal

FOLDER = ["--data_path", "x"]


@pytest.mark.parametrize(
    "options, kind",
    [
        ([], "center_flip"),
        (["--flip_flag"], "center_flip"),
        (["--ten_crop"], "ten_crop"),
        (["--ten_crop", "--flip_flag"], "ten_crop"),
        (["--five_crop"], "five_crop"),
        (["--five_crop", "--flip_flag"], "ten_crop"),
    ],
)
def test_kind_of_crops(options, kind):
    assert kind_of_crops(parse([*FOLDER, *options])) == kind


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


@pytest.mark.parametrize("others", [[], ["val"], ["validation", "devkit"]])
def test_train_of_a_root_is_read_where_no_split_is_set(tmp_path, others):
    for name in ["train", *others]:
        image(tmp_path / name / "cat/a.png")
    folder, words = image_folder(str(tmp_path), None)
    assert folder == tmp_path / "train"
    assert f"{tmp_path} holds train/" in words and "--split is not set" in words
    assert image_folder(str(tmp_path / "train"), None) == (tmp_path / "train", "")


def test_a_class_named_train_is_no_split(tmp_path):
    for name in ("train", "car"):
        image(tmp_path / name / "a.png")
    assert image_folder(str(tmp_path), None) == (tmp_path, "")


def test_train_that_may_be_a_split_or_a_class_is_refused(tmp_path):
    for name in ("train", "val", "raw"):
        image(tmp_path / name / "a.png")
    refusal(lambda: image_folder(str(tmp_path), None), "beside val/ and raw/", "--split train")
    assert image_folder(str(tmp_path), "train")[0] == tmp_path / "train"


def test_images_right_in_train_are_not_taken_for_a_class(tmp_path):
    for name in ("train", "val"):
        image(tmp_path / name / "a.png")
    assert image_folder(str(tmp_path), None)[0] == tmp_path / "train"


def test_split_is_the_folder_below(tmp_path):
    image(tmp_path / "val/cat/a.png")
    assert image_folder(str(tmp_path), "val") == (tmp_path / "val", "")
    folder, _ = image_folder(str(tmp_path), "train")
    refusal(lambda: scan_images(folder), tmp_path / "train")


PUBLISHED = [
    *("--seed", "0", "--pin_mem", "--no_pin_mem", "--world_size", "8", "--local_rank", "-1"),
    *("--dist_url", "env://", "--dist_on_itp", "--device", "cuda:0"),
]


def test_published_flags_are_accepted():
    args = parse([*FOLDER, *PUBLISHED])
    assert args.device == "cuda:0"
    assert [flag for flag in WITHOUT_EFFECT if flag not in PUBLISHED] == []


def test_published_flags_that_are_absent_are_not_mentioned():
    args = parse(FOLDER)
    assert not any(hasattr(args, flag[2:]) for flag in WITHOUT_EFFECT)


@pytest.mark.parametrize(
    "option, value",
    [
        *[(name, value) for name in ("--batch_size", "--img_size", "--num_workers")
          for value in ("-1", "1e3", "nan", "", "two", "9" * 30)],
        ("--batch_size", "0"), ("--img_size", "0"), ("--skip_unreadable", "-1"),
        ("--device", "cuda:1"), ("--device", "gpu"), ("--device", ""), ("--dtype", "fp16"),
        ("--format", ""), ("--split", "test"), ("--cached_path", ""), ("--cached_path", "."),
        ("--cached_path", "/"), ("--cached_path", ".."), ("--config", ""),
        ("--tokenizer_checkpoint", " "), ("--data_path", ""),
    ],
)  # fmt: skip
def test_value_without_sense_is_refused_by_the_option(option, value):
    refusal(lambda: parse([*FOLDER, f"{option}={value}"]), option)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "--data_path"),
        (["--data_path"], "--data_path"),
        ([*FOLDER, "--ten_crops", "--x"], "--ten_crops"),
    ],
)
def test_missing_or_unknown_options_are_refused(arguments, named):
    refusal(lambda: parse(arguments), named)


def test_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = parse(["--data_path=~/images", "--cached_path=~/cache"])
    assert (args.data_path, str(args.cached_path)) == ("/home/me/images", "/home/me/cache")
