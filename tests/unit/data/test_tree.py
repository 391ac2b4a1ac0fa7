"""One walk for all programs: links are followed once, hidden and system entries are left out."""

import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.images import list_paths, scan_images
from data.npz import NpzStore
from data.tree import read_tree
from data.walk import HIDDEN, LINKED
from evaluation.look import list_photos
from evaluation.sources import open_images
from tests.refusals import refusal

STRAY = [
    ".ipynb_checkpoints/a.png", ".Trash-1000/files/b.png", "__MACOSX/cat/._a.png", "@eaDir/c.png",
    "lost+found/d.png", "cat/._a.png", "cat/Thumbs.db", "cat/.hidden/e.png", "dog/.DS_Store",
]  # fmt: skip


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, format="PNG")


@pytest.fixture
def photos(tmp_path):
    for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
        photo(tmp_path / "photos" / name)
    return tmp_path / "photos"


def listings(root):
    """What each program lists, as paths relative to the root."""
    found = {
        "scan_images": [str(path) for path in scan_images(root).paths],
        "list_paths": [str(path) for path in list_paths(root)],
        "evaluate": [str(path) for path in open_images(root).paths],
    }
    if root.is_dir():
        found["look"] = list(list_photos([str(root)]).values())
    return {
        key: sorted(os.path.relpath(path, root) for path in paths) for key, paths in found.items()
    }


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_hidden_and_system_entries_are_left_out_and_counted(photos, packed):
    expected = listings(photos)["look"]
    for name in STRAY:
        photo(photos / name)
    root = photos
    if packed:
        root = photos.with_suffix(".tar")
        with tarfile.open(root, "w") as tar:
            tar.add(photos, "")
    assert all(found == expected for found in listings(root).values())
    listing = scan_images(root)
    assert listing.classes == ["cat", "dog"] and listing.left_out == {HIDDEN: len(STRAY)}
    assert f"left out: {len(STRAY)} hidden or system entries" in listing.describe()


def test_hidden_folders_are_no_classes_of_a_published_cache(tmp_path):
    for name in (".ipynb_checkpoints", "cat", "dog", "lost+found"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "a.JPEG.npz", codes=np.zeros((2, 5), np.int64))
    assert NpzStore(tmp_path).classes == ["cat", "dog"]


def test_every_program_follows_links_to_class_folders(photos):
    photo(photos.parent / "elsewhere/ant/x.png")
    os.symlink("../elsewhere/ant", photos / "ant")
    found = listings(photos)
    assert all(paths[0] == "ant/x.png" and len(paths) == 4 for paths in found.values()), found
    assert scan_images(photos).classes == ["ant", "cat", "dog"]


@pytest.mark.parametrize(
    "link, target",
    [
        ("cat/up", ".."),  # an ancestor
        ("cat/far", "../../.."),  # above the root
        ("cat/same", "."),
        ("ant", "dog"),  # a class under a second name, the first in order
        ("cat/other", "../dog"),
        ("ant", "."),
    ],
)
def test_a_link_to_a_folder_that_is_listed_anyway_lists_nothing_again(photos, link, target):
    photo(photos.parent / "beside/x.png")
    before = scan_images(photos)
    os.symlink(target, photos / link)
    listing = scan_images(photos)
    assert (listing.paths, listing.classes) == (before.paths, before.classes)
    assert listing.left_out == {LINKED: 1}
    assert all(len(paths) == 3 for paths in listings(photos).values())


def test_two_links_to_one_folder_list_it_once(photos):
    photo(photos.parent / "elsewhere/deep/x.png")
    for name in ("cat/one", "dog/two"):
        os.symlink("../../elsewhere/deep", photos / name)
    tree = read_tree(photos)
    assert [name for name in tree.images() if name.endswith("x.png")] == ["cat/one/x.png"]
    assert tree.left_out == {LINKED: 1}


@pytest.mark.parametrize("inside", [".", "runs", "cat/../runs/a", "link"])
def test_an_output_in_the_folder_that_is_read_is_refused(photos, inside):
    os.symlink(photos / "cat", photos.parent / "link")
    output = photos / inside if inside != "link" else photos.parent / "link"
    for program in (scan_images, list_paths):
        refusal(lambda listed=program: listed(photos, index_folder=output), photos)
    refusal(lambda: list_photos([str(photos)], output), photos)
    assert scan_images(photos, index_folder=photos.parent / "photos-out")
