"""The encoding job: batches, unreadable images, images that were edited."""

import json
import os
import time

import pytest
import torch
from accelerate import PartialState
from PIL import Image

from data.images import VIEWS, scan_images, views_of
from data.tokens import open_tokens
from encoding import job
from encoding.job import EncodingPlan, ReadableCrops, encode_folder, encode_parts
from modeling.tokenizer import Tokenizer
from runtime import processes
from runtime.errors import InputError
from tests.refusals import refusal
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("kind", VIEWS)
def test_unreadable_image_keeps_its_place_as_black_views(tmp_path, kind):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    plan = EncodingPlan(20, kind, skip_unreadable=1)
    crop, facts = ReadableCrops([str(bad)], plan)[0]
    Image.new("RGB", (30, 40)).save(tmp_path / "good.png")
    good, good_facts = ReadableCrops([str(tmp_path / "good.png")], plan)[0]
    assert crop.shape == good.shape and good_facts[0] == 1
    views = torch.stack(views_of(crop, 20, kind))
    assert views.shape == (VIEWS[kind], 3, 20, 20) and views.dtype == torch.uint8
    assert not views.any() and facts[0] == 0
    crops = ReadableCrops([str(bad)], EncodingPlan(20, kind))
    refusal(lambda: crops[0], bad, "--skip_unreadable")


def test_batches_are_consecutive_and_never_cross_a_part(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{i}.png") for i in range(11)]
    for path in paths:
        Image.new("RGB", (16, 16)).save(path)
    plan, sizes = EncodingPlan(16, "center_flip", batch_size=3, num_workers=0), []
    encoder = Tokenizer(tiny_tokenizer(), with_decoder=False).eval()
    monkeypatch.setattr(
        job, "encode_views", lambda _, crops, *rest: sizes.append(len(crops)) or crops[:, 0, 0, :1]
    )
    PartialState(cpu=True)
    crops = ReadableCrops(paths, plan)
    parts = list(encode_parts(encoder, crops, plan, [range(0, 5), range(5, 11)]))
    assert sizes == [3, 2, 3, 3]
    assert [(len(codes), len(facts)) for codes, facts in parts] == [(5, 5), (6, 6)]


# ---------------------------------------------------------------------- the whole job
@pytest.fixture
def encode(tmp_path):
    """Encodes the folder `photos` into `cache`, one image per batch; returns the manifest."""
    encoder = Tokenizer(tiny_tokenizer(), with_decoder=False).eval()
    for name in ("cat/a.jpg", "cat/b.jpg", "d\udcff/c.jpg"):
        save(tmp_path / "photos" / name)

    def run(**options):
        plan = EncodingPlan(16, "center_flip", num_workers=0, **{"batch_size": 1, **options})
        listing = scan_images(tmp_path / "photos")
        PartialState(cpu=True)
        encode_folder(listing, encoder, plan, tmp_path / "cache")
        return json.loads((tmp_path / "cache/manifest.json").read_text())

    return run


def save(path, seconds=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path, **options)
    os.utime(path, (time.time() + seconds,) * 2)


def test_images_that_say_they_are_rotated_are_counted(encode, tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path / "photos/cat/b.jpg", exif=exif)
    assert encode()["rotated"] == 1
    assert "warning: 1 images carry an EXIF rotation" in capsys.readouterr().out


def test_a_complete_cache_of_edited_images_is_warned_of_or_refused(encode, tmp_path, capsys):
    encode()
    encode()
    assert "warning" not in capsys.readouterr().out
    save(tmp_path / "photos/cat/b.jpg", seconds=100)  # as long as before
    encode()
    assert "warning: 1 images were changed after" in (said := capsys.readouterr().out)
    assert "(cat/b.jpg): remove it to encode them again" in said
    save(tmp_path / "photos/cat/b.jpg", comment=b"longer")
    refusal(encode, tmp_path / "cache", "sizes")


def test_a_complete_cache_of_other_settings_is_refused_before_all_images_are_looked_at(
    encode, tmp_path, monkeypatch
):
    encode()
    monkeypatch.setattr(job, "sizes_and_times", lambda paths: 1 / 0)
    refusal(lambda: encode(batch_size=2), tmp_path / "cache", "batch_size (1 there, 2 now)")


@pytest.mark.parametrize("edit", [{"seconds": -100}, {"comment": b"longer"}], ids=str)
def test_images_edited_between_an_interruption_and_its_resume_are_refused(
    encode, tmp_path, monkeypatch, edit
):
    monkeypatch.setattr(job, "publish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode()
    monkeypatch.undo()
    save(tmp_path / "photos/cat/b.jpg", **edit)
    refusal(encode, "1 images", "cat/b.jpg")
    assert not (tmp_path / "cache").exists()


def test_an_unreadable_image_may_be_repaired_before_the_resume(encode, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "BATCHES_PER_PART", 2)
    (tmp_path / "photos/d\udcff/c.jpg").write_bytes(b"no image")
    refusal(encode, "unreadable image")
    assert len(list((tmp_path / "cache.partial/parts").iterdir())) == 1
    save(tmp_path / "photos/d\udcff/c.jpg", seconds=100)
    assert encode()["images"] == 3


def test_an_image_that_was_left_out_may_be_repaired_before_the_resume(
    encode, tmp_path, monkeypatch
):
    """Its part is made again, and the cache is that of images which were never damaged."""
    monkeypatch.setattr(job, "BATCHES_PER_PART", 2)
    for name in ("cat/b.jpg", "d\udcff/c.jpg"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    refusal(lambda: encode(skip_unreadable=1), "--skip_unreadable 1", "2 unreadable images")
    assert len(list((tmp_path / "cache.partial/parts").iterdir())) == 1  # of a.jpg and b.jpg
    save(tmp_path / "photos/cat/b.jpg", seconds=100)
    found = encode(skip_unreadable=1)
    assert (found["images"], found["skipped"]) == (2, ["d\udcff/c.jpg"])


def test_an_image_that_failed_for_a_moment_is_read_again_on_the_resume(
    encode, tmp_path, monkeypatch
):
    read = job.load_photo

    def fail(path):
        if str(path).endswith("b.jpg"):
            raise InputError(f"cannot read {path}: Input/output error")
        return read(path)

    monkeypatch.setattr(job, "load_photo", fail)
    monkeypatch.setattr(job, "publish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(skip_unreadable=1)
    monkeypatch.undo()
    found = encode(skip_unreadable=1)
    assert (found["images"], found["skipped"]) == (3, [])


def test_a_file_of_an_image_that_has_become_unreadable_goes(encode, tmp_path, monkeypatch):
    """In the published layout a killed run leaves files without the part that vouches for them."""
    monkeypatch.setattr(job.Parts, "write", lambda *args, **arrays: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(layout="npz", skip_unreadable=1)
    monkeypatch.undo()
    (tmp_path / "photos/cat/b.jpg").write_bytes(b"no image")
    found = encode(layout="npz", skip_unreadable=1)
    assert (found["images"], found["skipped"]) == (2, ["cat/b.jpg"])
    assert open_tokens(tmp_path / "cache").images == 2


@pytest.mark.parametrize("layout", ["packed", "npz"])
def test_parts_of_unknown_settings_are_made_again(encode, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(job, "publish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(layout=layout, batch_size=2)
    monkeypatch.undo()
    parts = tmp_path / "cache.partial/parts"
    left = {part.name: part.stat().st_mtime_ns for part in parts.iterdir()}
    (parts.parent / "settings.json").unlink()
    monkeypatch.setattr(job, "publish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(layout=layout, batch_size=2)
    assert all(left[part.name] < part.stat().st_mtime_ns for part in parts.iterdir())


def test_a_link_to_a_place_that_is_not_there_yet_is_followed(encode, tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "scratch/mine")
    assert encode()["images"] == 3
    assert (tmp_path / "scratch/mine/manifest.json").is_file()


@pytest.mark.parametrize("layout", ["packed", "npz"])
def test_nothing_is_published_without_all_parts(encode, tmp_path, monkeypatch, layout):
    """Another process may not have made its share, or a file system may not show it yet."""
    original = job.encode_parts
    monkeypatch.setattr(
        job, "encode_parts",
        lambda encoder, source, plan, ranges: original(encoder, source, plan, ranges[:-1]),
    )  # fmt: skip
    monkeypatch.setattr(job, "BATCHES_PER_PART", 1)
    refusal(lambda: encode(layout=layout), tmp_path / "cache.partial", "lacks parts")
    monkeypatch.setattr(job, "encode_parts", original)
    assert encode(layout=layout)["images"] == 3


def test_a_process_that_lists_other_images_is_refused(encode, tmp_path, monkeypatch):
    """Every process cuts parts from its own listing: one missing image would shift all that follow."""
    encode()
    main = {**json.loads((tmp_path / "cache/manifest.json").read_text()), "layout": "packed"}
    encode()  # the same listing: accepted
    monkeypatch.setattr(processes, "on_main", lambda work: {name: main[name] for name in work()})
    encode()
    (tmp_path / "photos/cat/a.jpg").unlink()
    refusal(encode, "main process", "listed_images (3", "2 here")
