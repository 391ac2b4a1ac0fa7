from pathlib import Path

from runtime.published import find_published
from tests.refusals import refusal

WEIGHTS = Path("weights")


def test_missing_file_is_named_with_the_places_and_the_remedy(nowhere):
    named = (
        "vgg.pth",
        f"weights/ or {nowhere}/hub/checkpoints",
        "weights/README.md",
        "or do without",
    )
    refusal(lambda: find_published("vgg.pth", WEIGHTS, ", or do without"), *named)


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
    refusal(lambda: find_published("vgg.pth", Path("elsewhere")), "vgg.pth", "elsewhere/")
