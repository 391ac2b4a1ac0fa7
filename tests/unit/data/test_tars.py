"""Images in tars: listed as the folders they were, read byte for byte, indexed, and damaged ones refused."""

import bz2
import errno
import gzip
import io
import lzma
import os
import pickle
import random
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data import tars
from data.images import CenterImages, list_paths, load_image, scan_images
from data.tars import is_tar, open_tar
from runtime.errors import InputError
from tests.payload import Payload
from tests.refusals import refusal
from tests.tars import add, packed, plain_tar, tar_of_tars

LONG = "x" * 120 + ".png"  # longer than the header's field


@pytest.fixture
def root(tmp_path):
    """Three classes whose images, nested folders, other files and odd names are all different."""
    rng = np.random.default_rng(0)
    names = [
        "n02/b.png",
        "n02/a.JPEG",
        "n02/deep/0.png",
        "n02/h/1.png",
        "n01/z.png",
        f"n01/{LONG}",
    ]
    for name in [*names, "n10/\udcff.png", "n10/ä ö.PNG", "n10/a.png"]:
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, "JPEG" if name.endswith("JPEG") else "PNG")
    (tmp_path / "root/n01/notes.txt").write_text("no image")
    (tmp_path / "root/n02/c.GIF").write_bytes(b"")
    return tmp_path / "root"


@pytest.fixture
def archive(root, tmp_path):
    return tar_of_tars(root, tmp_path / "data/train.tar")


def content(listing):
    return [path.read() for path in listing.paths]


@pytest.mark.parametrize("make", [tar_of_tars, plain_tar])
def test_a_tar_lists_and_reads_as_its_folders(root, tmp_path, make):
    expected = scan_images(root)
    found = scan_images(make(root, tmp_path / "data/train.tar"), index_folder=tmp_path / "out")
    assert found.classes == expected.classes == ["n01", "n02", "n10"]
    assert found.names == expected.names and len(found.names) == 9
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.left_out == expected.left_out == {".txt": 1, ".gif": 1}
    assert found.describe() == expected.describe()
    for name, path, file in zip(found.names, found.paths, expected.paths):
        assert path.read() == Path(file).read_bytes() and str(path).endswith(f".tar/{name}")
        assert load_image(path).tobytes() == load_image(file).tobytes()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_any_format_of_tar_is_read(root, tmp_path, format):
    (root / "n01" / LONG).unlink()  # USTAR has no such name
    path = tmp_path / "x.tar"
    path.write_bytes(packed(root, format))
    assert scan_images(path).names == scan_images(root).names
    assert content(scan_images(path))[0] == (root / "n01/z.png").read_bytes()


def test_of_two_members_with_one_name_the_later_counts(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for text in (b"first", b"other", b"last"):
            add(tar, "cat/a.png", text)
    assert content(scan_images(tmp_path / "x.tar")) == [b"last"]


def test_a_tar_is_known_by_its_name_or_its_first_bytes(archive, tmp_path):
    os.rename(archive, tmp_path / "train")
    assert is_tar(tmp_path / "train") and not is_tar(tmp_path)
    (tmp_path / "list").write_text("BZh9/a.png\n")
    assert not is_tar(tmp_path / "list") and not is_tar(tmp_path / "none.tar")
    assert len(list_paths(tmp_path / "train")) == 9


# ---------------------------------------------------------------------- processes
def test_workers_threads_and_other_processes_read_the_same(root, archive):
    expected = torch.stack([*CenterImages(scan_images(root).paths, 8)])
    paths = scan_images(archive).paths
    paths[0].read()  # opened before the workers start
    loader = DataLoader(CenterImages(paths, 8), batch_size=2, num_workers=2)
    assert torch.equal(torch.cat([*loader]), expected)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda p: p.read(), paths * 20)) == content(scan_images(archive)) * 20
    assert pickle.loads(pickle.dumps(paths[3])).read() == paths[3].read()


# ---------------------------------------------------------------------- the index
def no_listing(monkeypatch):
    def fail(path, stamp):
        raise AssertionError("listed again")

    monkeypatch.setattr(tars, "list_members", fail)


def test_index_is_kept_where_it_is_asked_for_and_spares_the_listing(archive, tmp_path, monkeypatch):
    expected = scan_images(archive, index_folder=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["train.tar.index.npz"]
    assert [p.name for p in archive.parent.iterdir()] == ["train.tar"]
    no_listing(monkeypatch)
    found = scan_images(archive, index_folder=tmp_path / "out")
    assert found.names == expected.names and content(found) == content(expected)


def test_without_a_folder_nothing_is_written(archive, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    scan_images(archive)
    assert sorted(tmp_path.rglob("*")) == before


def test_index_of_another_state_of_the_tar_is_made_anew(root, archive, tmp_path):
    scan_images(archive, index_folder=tmp_path / "out")
    index = tmp_path / "out/train.tar.index.npz"
    old = index.read_bytes()
    (root / "n01/z.png").unlink()
    tar_of_tars(root, archive)
    found = scan_images(archive, index_folder=tmp_path / "out")
    assert found.names == scan_images(root).names and len(found.names) == 8
    assert index.read_bytes() != old
    # The same size at another time
    status = archive.stat()
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    before = index.read_bytes()
    scan_images(archive, index_folder=tmp_path / "out")
    assert index.read_bytes() != before


def test_index_of_another_version_is_made_anew(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "VERSION", 0)
    scan_images(archive, index_folder=tmp_path / "out")
    monkeypatch.undo()
    no_listing(monkeypatch)
    with pytest.raises(AssertionError, match="listed again"):
        scan_images(archive, index_folder=tmp_path / "out")


def test_damaged_index_is_made_anew(archive, tmp_path):
    index = tmp_path / "out/train.tar.index.npz"
    expected = scan_images(archive, index_folder=tmp_path / "out").names
    whole, rng = index.read_bytes(), random.Random(0)
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 0xFF
        for content in (whole[: rng.randrange(len(whole))], bytes(damaged), b""):
            index.write_bytes(content)
            assert scan_images(archive, index_folder=tmp_path / "out").names == expected
    assert [p.name for p in index.parent.iterdir()] == [index.name]


def test_code_in_an_index_does_not_run(archive, tmp_path):
    marker, index = tmp_path / "marker", tmp_path / "out/train.tar.index.npz"
    expected = scan_images(archive, index_folder=tmp_path / "out").names
    objects = np.array([Payload(marker)], dtype=object)
    for write in (
        lambda file: np.savez(file, about=objects, names=objects, offsets=objects, sizes=objects),
        lambda file: np.save(file, objects),
        lambda file: np.save(file, np.zeros(3)),
        lambda file: pickle.dump(Payload(marker), file),
    ):
        with open(index, "wb") as file:
            write(file)
        assert scan_images(archive, index_folder=tmp_path / "out").names == expected
    assert not marker.exists()


def test_an_index_that_cannot_be_written_is_done_without(archive, tmp_path):
    (tmp_path / "file").write_text("")
    found = scan_images(archive, index_folder=tmp_path / "file")
    assert content(found) == content(scan_images(archive))


def test_a_hidden_tar_in_a_tar_is_left_out(root, tmp_path):
    """As macOS packs the attributes of a class's tar, ._n01.tar, beside it."""
    archive = tar_of_tars(root, tmp_path / "train.tar")
    expected = scan_images(archive).names
    with tarfile.open(archive, "a") as tar:
        add(tar, "._n01.tar", b"attributes")
    assert scan_images(archive).names == expected


def test_tar_that_changes_after_it_was_listed_is_refused(archive):
    path = scan_images(archive).paths[0]
    archive.write_bytes(archive.read_bytes()[:-512])
    refusal(path.read, archive, "changed")


def test_tar_that_is_cut_short_while_it_is_read_is_refused(archive):
    *_, last = scan_images(archive).paths
    first = max(scan_images(archive).paths, key=lambda p: p.tar.offsets[p.number])
    last.read()
    path = last._replace(number=first.number)
    os.truncate(archive, int(first.tar.offsets[first.number]) + 3)
    refusal(path.read, archive, "cut short")


# ---------------------------------------------------------------------- damage
def refused(path, *words):
    refusal(lambda: scan_images(path), path, *words)


def test_cut_tar_is_refused_or_has_lost_nothing(root, archive, tmp_path):
    expected, whole = scan_images(archive), archive.read_bytes()
    end = max(p.tar.offsets[p.number] + p.tar.sizes[p.number] for p in expected.paths)
    cut = tmp_path / "cut.tar"
    refusals = 0
    for length in [*range(0, len(whole), 512), *range(0, len(whole), 371)]:
        cut.write_bytes(whole[:length])
        try:
            found = scan_images(cut)
        except InputError as e:
            refusals += 1
            assert re.search("cut short|empty|damaged", str(e)) and "\n" not in str(e)
        else:
            assert length > end and content(found) == content(expected)
    assert refusals > 50


@pytest.mark.parametrize("kept", ["nothing", "half a header", "a member", "all but the end"])
def test_cut_tar_inside_a_whole_one_is_refused(root, tmp_path, kept):
    inner = packed(root / "n01")
    length = {"nothing": 0, "half a header": 100, "a member": 1024, "all but the end": 0}[kept]
    if kept == "all but the end":
        with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
            tar.getmembers()
            length = tar.offset
    with tarfile.open(tmp_path / "x.tar", "w") as outer:
        add(outer, "n00.tar", packed(root / "n02"))
        add(outer, "n01.tar", inner[:length])
        add(outer, "n02.tar", packed(root / "n02"))
    words = "is empty" if kept == "nothing" else "cut short or is damaged"
    refused(tmp_path / "x.tar", f"{tmp_path}/x.tar/n01.tar", words)


def test_damaged_header_is_refused(archive):
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        second = tar.getmembers()[1].offset
    for start in (second, second + 512):  # of an inner tar; of its first member
        damaged = bytearray(whole)
        damaged[start + 148] ^= 1  # the checksum
        archive.write_bytes(damaged)
        refused(archive, "cut short or is damaged")


def test_member_of_negative_size_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "cat/a.png", b"x")
        info = tarfile.TarInfo("cat/b.png")
        info.size = -512  # after it comes it, again and again
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    refused(tmp_path / "x.tar", "damaged")


@pytest.mark.parametrize(
    "kind, compress", [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)]
)
@pytest.mark.parametrize("name", ["train.tar", "train.tar.gz"])
def test_compressed_tar_is_refused(archive, tmp_path, name, kind, compress):
    path = tmp_path / name
    path.write_bytes(compress(archive.read_bytes()))
    refused(path, kind)


def test_empty_tars_are_refused(root, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"")
    refused(path, "is empty")
    with tarfile.open(path, "w"):
        pass
    refused(path, "is empty")
    with tarfile.open(path, "w") as tar:
        add(tar, "n01.tar", packed(root / "n01"))
        add(tar, "n02.tar", bytes(10240))
    refused(path, "no images in n02")


def test_class_without_images_is_named(root, tmp_path):
    for file in (root / "n01").iterdir():
        file.rename(file.with_suffix(".txt"))
    refused(tar_of_tars(root, tmp_path / "x.tar"), "n01")
    refused(plain_tar(root, tmp_path / "y.tar"), "n01")


def test_what_is_no_tar_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(b"text " * 500)
    refused(path, "is not a tar")
    refused(tmp_path / "none.tar", "no image folder")


def test_images_in_no_folders_of_a_tar_are_one_class(root, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(packed(root / "n01"))
    found = scan_images(path)
    files = sorted(["z.png", LONG])
    assert found.classes == ["images"] and found.names == [f"images/{name}" for name in files]
    assert found.describe() == "2 images, no class folders: one class (images); left out: 1 .txt"
    assert [str(p) for p in list_paths(path)] == [f"{path}/{name}" for name in files]


def test_folder_above_the_classes_is_refused(root, tmp_path):
    path = plain_tar(root.parent, tmp_path.parent / f"{tmp_path.name}.tar")
    refused(path, "root/n01")


@pytest.mark.parametrize("name", ["../a.png", "cat/../../a.png"])
def test_name_outside_the_tar_is_refused(tmp_path, name):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "cat/b.png", b"x")
        add(tar, name, b"x")
    refused(tmp_path / "x.tar", name)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "cat/a.png", b"x")
        info = tarfile.TarInfo("cat/b.png")
        info.type, info.linkname = kind, "cat/a.png"
        tar.addfile(info)
    refused(tmp_path / "x.tar", "cat/b.png", "--dereference")


def test_member_that_is_no_image_is_named_when_it_is_read(root, tmp_path):
    (root / "n01/z.png").write_bytes(b"no image")
    path = scan_images(tar_of_tars(root, tmp_path / "x.tar")).paths[1]
    assert " at 0x" not in refusal(lambda: load_image(path), f"{tmp_path}/x.tar/n01/z.png")


def test_an_error_that_passes_does_not_make_an_image_of_a_tar_unreadable(archive, monkeypatch):
    path = scan_images(archive).paths[0]
    left, read = [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "stale")], os.pread
    monkeypatch.setattr("modeling.photos.PAUSES", (0.0, 0.0))
    tars.opened.cache_clear()
    opens, stamp_of = [], tars.stamp_of
    monkeypatch.setattr(tars, "stamp_of", lambda file: opens.append(file) or stamp_of(file))
    monkeypatch.setattr(os, "pread", lambda *of: fail(left.pop()) if left else read(*of))
    assert load_image(path).size and len(opens) == 3  # anew for every try: a stale handle stays so
    left.append(OSError(errno.EACCES, "Permission denied"))
    refusal(lambda: load_image(path), str(path), "Permission denied")


def fail(error):
    raise error


def test_open_tar_says_what_cannot_be_read(archive, monkeypatch):
    def closed(path, *args, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", closed)
    refusal(lambda: open_tar(archive, None), archive, "Permission denied")
