import shutil

import numpy as np
import pytest

from data.images import identity_for_all, scan_images
from data.tokens import open_tokens
from tests.tars import packed
from tests.tiny import tiny_cache


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a/0.png", 3), ("a/1.png", 5), ("b/0.png", 7)):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x" * size)
    return tmp_path / "train"


def identity(root):
    return identity_for_all(scan_images(root).paths)


def test_images_keep_their_identity_where_they_move_or_are_packed(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere/x")
    assert identity(tmp_path / "elsewhere/x") == identity(folder)
    (tmp_path / "train.tar").write_bytes(packed(folder))
    assert identity(tmp_path / "train.tar") == identity(folder)


@pytest.mark.parametrize(
    "change, differs",
    [
        (lambda root: (root / "a/1.png").write_bytes(b"xx"), "image sizes"),
        (lambda root: (root / "a/1.png").rename(root / "a/2.png"), "image names"),
        (lambda root: (root / "b").rename(root / "c"), "image names"),
    ],
)
def test_other_images_are_told_apart(folder, change, differs):
    before = identity(folder)
    change(folder)
    after = identity(folder)
    assert [name for name in before if before[name] != after[name]] == [differs]


def test_a_link_to_nothing_is_left_to_its_reader(folder):
    (folder / "a/2.png").symlink_to("nowhere")
    assert identity_for_all([*scan_images(folder).paths, folder / "a/2.png"])


def cache(folder, seed, labels):
    codes = np.random.default_rng(seed).integers(0, 32, (3, 1, 4))
    tiny_cache(folder, codes, labels, ["a", "b"])
    return open_tokens(folder)


def test_caches_of_other_codes_or_labels_are_told_apart(tmp_path):
    one, same, codes, labels = (
        cache(tmp_path / name, seed, labels).identity()
        for name, seed, labels in (
            ("one", 0, [0, 1, 1]), ("same", 0, [0, 1, 1]), ("codes", 1, [0, 1, 1]),
            ("labels", 0, [0, 0, 1]),
        )
    )  # fmt: skip
    assert one == same and one not in (codes, labels)


def test_a_published_cache_is_known_by_its_files(tmp_path):
    for name, codes in (("x", [[1, 2]]), ("y", [[1, 2]]), ("z", [[1, 2], [3, 4]])):
        (tmp_path / name / "a").mkdir(parents=True)
        np.savez(tmp_path / name / "a/0.JPEG.npz", codes=np.array(codes))
    x, y, z = (open_tokens(tmp_path / name).identity() for name in "xyz")
    assert x == y != z
