import re
from operator import attrgetter
from pathlib import Path

import pytest

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


README = (Path(__file__).parents[3] / "weights/README.md").read_text()


@pytest.mark.parametrize(
    "module, path",
    [
        ("torchvision.models", "ConvNeXt_Small_Weights.IMAGENET1K_V1.url"),
        ("torchvision.models", "VGG16_Weights.IMAGENET1K_V1.url"),
        ("torch_fidelity.feature_extractor_inceptionv3", "URL_INCEPTION_V3"),
        ("timm.models.vision_transformer", "default_cfgs"),
    ],
)
def test_the_commands_for_weights_have_the_addresses_of_packages(module, path):
    found = pytest.importorskip(module)  # the last two are no requirements of ours
    address = attrgetter(path)(found)
    if isinstance(address, dict):
        address = address["vit_large_patch14_dinov2"].default.url
    assert f"\nwget {address}\n" in README


def test_there_is_a_command_for_every_file_that_has_an_address():
    files = re.findall(r"^\| `([\w.-]+\.pth)` \|", README, re.M)
    commands = README[README.index("```bash") : README.rindex("```")]
    assert [file for file in files if file not in commands] == ["AliTok.pth"] and len(files) == 6
