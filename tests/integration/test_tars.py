"""Images in tars through the programs: the codes, losses and figures of the folders they were made from."""

import json
import os

import pytest

from tests.integration.test_pretokenization import Runs, copies, files, manifest
from tests.tars import flattened, packed, plain_tar, tar_of_tars


@pytest.fixture(scope="module")
def runs(workspace, warm, tmp_path_factory):
    return Runs(workspace, warm, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def data(tmp_path):
    """36 images in three parts of a cache, in two classes."""
    return copies(tmp_path / "data", 36)


@pytest.fixture
def archive(data, tmp_path):
    return tar_of_tars(data, tmp_path / "downloads/ILSVRC2012_img_train.tar")


# ---------------------------------------------------------------------- pretokenization
@pytest.mark.parametrize("layout", ["packed", "npz"])
def test_cache_from_a_tar_of_tars_is_that_of_the_folders_byte_for_byte(
    data, archive, runs, tmp_path, layout
):
    before = files(archive.parent)
    runs.ok(tmp_path / "folders", "--format", layout, data=data)
    said = runs.ok(tmp_path / "out/tar", "--format", layout, data=archive)
    assert f"{archive}: 36 images, 2 classes (c0, c1)" in said.splitlines()
    assert files(tmp_path / "out/tar") == files(tmp_path / "folders")
    # The index is beside the cache, nothing beside the tar; either source is the same set.
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["ILSVRC2012_img_train.tar.index.npz", "tar"]
    assert files(archive.parent) == before
    assert "is complete" in runs.ok(tmp_path / "out/tar", "--format", layout, data=data)
    assert "is complete" in runs.ok(tmp_path / "folders", "--format", layout, data=archive)


def test_workers_and_a_plain_tar_make_the_same_cache(data, archive, runs, tmp_path):
    runs.ok(tmp_path / "folders", "--ten_crop", data=data)
    runs.ok(tmp_path / "tar", "--ten_crop", "--num_workers", 2, data=archive)
    runs.ok(tmp_path / "plain", "--ten_crop", data=plain_tar(data, tmp_path / "plain.tar"))
    assert files(tmp_path / "tar") == files(tmp_path / "folders") == files(tmp_path / "plain")


@pytest.mark.slow
def test_ranks_share_a_tar_and_one_index(data, archive, runs, tmp_path):
    runs.ok(tmp_path / "one", data=data)
    argv = runs.argv(tmp_path / "out/two", data=archive)
    assert "36 images" in runs.warm.ok(*argv, ranks=2)
    assert files(tmp_path / "out/two") == files(tmp_path / "one")
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("form", ["list", "csv"])
def test_flat_images_with_labels_make_the_cache_of_the_folders(data, runs, tmp_path, kind, form):
    source, labels = tmp_path / "flat", tmp_path / "labels"
    classes = flattened(data, source)
    lines = [f"{label}\n" if form == "list" else f"{n},{label}\n" for n, label in classes.items()]
    labels.write_text("".join(lines))
    if kind == "tar":
        (tmp_path / "val.tar").write_bytes(packed(source))
        source = tmp_path / "val.tar"
    runs.ok(tmp_path / "folders", data=data)
    runs.ok(tmp_path / "flat_cache", "--labels", labels, data=source)
    assert files(tmp_path / "flat_cache") == files(tmp_path / "folders")


def test_unreadable_member_is_named_or_skipped_as_a_file_is(data, runs, tmp_path):
    bad = data / "c1/007.png"
    bad.write_bytes(bad.read_bytes()[:60])
    archive = tar_of_tars(data, tmp_path / "x.tar")
    line = runs.refused(tmp_path / "cache", data=archive)
    assert f"unreadable image {archive}/c1/007.png: " in line
    runs.ok(tmp_path / "cache", "--skip_unreadable", 1, data=archive)
    runs.ok(tmp_path / "folders", "--skip_unreadable", 1, data=data)
    assert manifest(tmp_path / "cache")["skipped"] == ["c1/007.png"]
    assert files(tmp_path / "cache") == files(tmp_path / "folders")


def test_classes_unlike_imagenets_are_warned_of(data, runs, tmp_path):
    assert "warning" not in runs.ok(tmp_path / "plain", data=data)
    (data / "c0").rename(data / "n01443537")
    (data / "c1").rename(data / "n01440764")
    said = runs.ok(tmp_path / "cache", data=data)
    assert said.count("warning: the 2 classes are synsets, but not ImageNet's 1000") == 1
    said = runs.warm.ok("data.tokens", "info", tmp_path / "cache")
    assert said.count("warning: the 2 classes are synsets, but not ImageNet's 1000") == 1


def test_bad_tars_and_labels_are_one_line_and_leave_nothing(data, archive, runs, tmp_path):
    (tmp_path / "out").mkdir()
    labels = tmp_path / "labels.txt"
    labels.write_text("c0\n" * 35)
    flattened(data, tmp_path / "flat")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(archive.read_bytes()[:-20_000])
    for source, options, words in (
        (cut, [], f"{cut}"),
        (archive, ["--split", "val"], f"{archive}/val"),
        (tmp_path / "flat", ["--labels", labels], f"{labels} has 35 lines"),
        (tmp_path / "flat", ["--labels", tmp_path / "none"], f"the labels in {tmp_path}/none"),
    ):
        assert words in runs.refused(tmp_path / "out/cache", *options, data=source)
        assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_takes_neither_index_nor_cache_is_one_line(archive, runs, tmp_path):
    line = runs.refused(tmp_path / "out/cache", data=archive, largest_file=1200)
    assert "cannot write" in line and not (tmp_path / "out/cache").exists()


# ---------------------------------------------------------------------- the trainers
def records(run):
    """What a run logs of its weights' way, whatever the clock says."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k in ("step", "loss") or k.startswith("val/")}
        for line in lines
    ]


@pytest.fixture
def tokenizer_run(workspace, warm):
    """Train a tokenizer on some images, for 6 steps."""

    def start(run, train, val, *options):
        said = warm.ok(
            "train_tokenizer", f"config={workspace.root}/stage1.yaml",
            f"experiment.output_dir={run}", f"dataset.params.train_dir={train}",
            f"dataset.params.val_dir={val}", *options,
        )  # fmt: skip
        return records(run) if (run / "metrics.jsonl").exists() else said

    return start


def test_tokenizer_trains_on_tars_as_on_folders(workspace, tokenizer_run, tmp_path):
    train = tar_of_tars(workspace.root / "train", tmp_path / "in/train.tar")
    val = tar_of_tars(workspace.root / "val", tmp_path / "in/val.tar")
    few = "experiment.max_train_examples=11"
    expected = tokenizer_run(tmp_path / "a", workspace.root / "train", workspace.root / "val", few)
    workers = "dataset.params.num_workers_per_gpu=1"
    assert tokenizer_run(tmp_path / "b", train, val, few, workers) == expected
    assert any("val/psnr" in record for record in expected)
    assert sorted(os.listdir(tmp_path / "in")) == ["train.tar", "val.tar"]
    indexes = sorted(path.name for path in (tmp_path / "b").glob("*.tar*"))
    assert indexes == ["train.tar.index.npz", "val.tar.index.npz"]


def test_tokenizer_trains_on_flat_images_and_a_dry_run_writes_nothing(
    workspace, tokenizer_run, tmp_path
):
    flattened(workspace.root / "train", tmp_path / "train")
    flat = tmp_path / "train.tar"
    flat.write_bytes(packed(tmp_path / "train"))
    said = tokenizer_run(tmp_path / "dry", flat, tmp_path / "train", "--dry-run")
    assert (
        f"{flat}: 14 images, no class folders: one class" in said
        and not (tmp_path / "dry").exists()
    )
    expected = tokenizer_run(tmp_path / "a", flat, flat)
    assert tokenizer_run(tmp_path / "b", tmp_path / "train", tmp_path / "train") == expected


def test_generator_trains_on_the_images_of_a_tar(workspace, warm, tmp_path):
    archive = tar_of_tars(workspace.root / "train", tmp_path / "in/train.tar")

    def losses(run, images):
        warm.ok(
            "train_ar.py", f"config={workspace.root}/generator.yaml",
            f"experiment.output_dir={run}", f"dataset.params.train_dir={images}",
            f"experiment.tokenizer_checkpoint={workspace.tokenizer}", "experiment.generate_every=0",
        )  # fmt: skip
        return records(run)

    assert losses(tmp_path / "a", archive) == losses(tmp_path / "b", workspace.root / "train")
