from pathlib import Path

import pytest

from runtime.errors import InputError
from runtime.published import find_published

WEIGHTS = Path("weights")


def test_missing_file_is_named_with_the_places_and_the_remedy(nowhere):
    with pytest.raises(InputError) as caught:
        find_published("vgg.pth", WEIGHTS, ", or do without")
    message = str(caught.value)
    assert f"no vgg.pth in weights/ or {nowhere}/hub/checkpoints" in message
    assert "weights/README.md" in message and message.endswith("where), or do without")


def test_the_folder_comes_before_the_download_cache(nowhere):
    cached = nowhere / "hub" / "checkpoints" / "vgg.pth"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_published("vgg.pth", WEIGHTS) == cached
    own = nowhere / "weights" / "vgg.pth"
    own.parent.mkdir()
    own.touch()
    assert find_published("vgg.pth", WEIGHTS).resolve() == own


def test_only_the_folder_that_the_caller_names_is_read(nowhere):
    (nowhere / "weights").mkdir()
    (nowhere / "weights" / "vgg.pth").touch()
    with pytest.raises(InputError, match=r"no vgg\.pth in elsewhere/"):
        find_published("vgg.pth", Path("elsewhere"))
