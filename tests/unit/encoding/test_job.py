"""The encoding job: batches, unreadable images, the hash of a listing."""

import pytest
import torch
from PIL import Image

from data.cache import fingerprint
from data.images import VIEWS, cut_views
from encoding.job import EncodingPlan, ReadableCrops, listing_hash, part_batches
from runtime.errors import InputError


@pytest.mark.parametrize("kind", VIEWS)
def test_unreadable_image_keeps_its_place_as_black_views(tmp_path, kind):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    plan = EncodingPlan(20, kind, skip_unreadable=1)
    crop, readable = ReadableCrops([str(bad)], plan)[0]
    Image.new("RGB", (30, 40)).save(tmp_path / "good.png")
    good, good_is_readable = ReadableCrops([str(tmp_path / "good.png")], plan)[0]
    assert crop.shape == good.shape and good_is_readable is True
    views = cut_views(crop[None], 20, kind)[0]
    assert views.shape == (VIEWS[kind], 3, 20, 20) and views.dtype == torch.uint8
    assert not views.any() and readable is False
    with pytest.raises(InputError, match=r"bad\.png"):
        ReadableCrops([str(bad)], EncodingPlan(20, kind))[0]


def test_batches_are_consecutive_and_never_cross_a_part():
    parts = part_batches(3 * 16 * 2 + 5, 3)
    assert [len(part) for part in parts] == [16, 16, 2]
    batches = [batch for part in parts for batch in part]
    assert [i for batch in batches for i in batch] == list(range(101))
    assert {len(batch) for batch in batches[:-1]} == {3} and len(batches[-1]) == 2


def test_hash_of_a_listing_is_that_of_earlier_caches_and_takes_any_name():
    paths = ["cat/a.png", "dög/b.png"]
    assert listing_hash(paths) == fingerprint({"encoder." + "\n".join(paths): torch.zeros(0)})
    assert listing_hash(["cat/\udcff.png"]) != listing_hash(["cat/\udcfe.png"])
