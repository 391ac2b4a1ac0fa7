import tempfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from evaluation.sources import ArrayImages, npz_keys, open_images
from runtime.files import read_npz
from tests.refusals import refusal
from tests.tars import packed

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)


def folder(path, pixels=PIXELS):
    path.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path


@pytest.fixture(params=["stored", "compressed", "folder", "tar", "other key"])
def images(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "images.npz"
    if request.param == "stored":
        np.savez(path, arr_0=PIXELS, arr_1=np.arange(7))  # labels, as ADM writes them
    if request.param == "compressed":
        np.savez_compressed(path, PIXELS)
    if request.param == "other key":
        np.savez(path, images=PIXELS)
    if request.param == "folder":
        path = folder(tmp_path / "folder")
    if request.param == "tar":
        path = tmp_path / "samples.tar"
        path.write_bytes(packed(folder(tmp_path / "folder")))
    return open_images(path)


def test_images_of_a_tar_come_in_the_order_of_a_folders_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/0", "a-b/1", "a/2", "a/c/3", "a.b/4", "5"):
        path = tmp_path / f"root/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[int(path.stem)]).save(path)
    (tmp_path / "root/notes.txt").write_text("")
    (tmp_path / "x.tar").write_bytes(packed(tmp_path / "root"))
    expected = open_images(tmp_path / "root").read(0, 6)
    np.testing.assert_array_equal(open_images(tmp_path / "x.tar").read(0, 6), expected)


def test_every_source_gives_the_same_images(images):
    assert images.shape == PIXELS.shape
    read = images.read(2, 5)
    assert read.dtype == np.uint8 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, PIXELS[2:5])
    np.testing.assert_array_equal(images.read(0, 7), PIXELS)


def test_arrays_in_fortran_order_are_read_as_they_are(tmp_path):
    np.savez(tmp_path / "f.npz", np.asfortranarray(PIXELS))
    np.testing.assert_array_equal(open_images(tmp_path / "f.npz").read(1, 3), PIXELS[1:3])


def test_npz_is_mapped_not_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS)
    assert isinstance(open_images(tmp_path / "a.npz").array, np.memmap)


@pytest.mark.parametrize("compress", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_npz_is_refused(tmp_path, compress, share):
    path = tmp_path / "cut.npz"
    compress(path, PIXELS)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refusal(lambda: open_images(path), path, "cut short")


def test_array_shorter_than_its_header_says_is_refused(tmp_path):
    path = tmp_path / "short.npz"
    np.save(tmp_path / "a.npy", PIXELS)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "a.npy").read_bytes()[:-10])
    refusal(lambda: open_images(path), path, "shorter than it says")


def test_a_full_temporary_folder_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    """An array that is compressed is unpacked there."""

    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "whole.npz"
    np.savez_compressed(path, PIXELS)
    monkeypatch.setattr("evaluation.sources.shutil.copyfileobj", full)
    message = refusal(lambda: open_images(path), tempfile.gettempdir(), "No space left")
    assert str(path) not in message


def test_damaged_compressed_npz_is_refused(tmp_path):
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, PIXELS)
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(data)
    refusal(lambda: open_images(path), path, "cut short")


@pytest.mark.parametrize(
    "array, words",
    [
        (PIXELS.astype(np.float32), "is float32: pass uint8"),
        (PIXELS.transpose(0, 3, 1, 2), "has shape (7, 3, 5, 6)"),
        (PIXELS[0], "has shape (5, 6, 3)"),
        (PIXELS[:0], "has shape (0, 5, 6, 3)"),
    ],
)
def test_other_shapes_and_types_are_refused(tmp_path, array, words):
    np.savez(tmp_path / "a.npz", array)
    refusal(lambda: open_images(tmp_path / "a.npz"), tmp_path / "a.npz", words)
    refusal(lambda: ArrayImages("memory", array), "memory", words)


def test_pickled_objects_are_never_loaded(tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, arr_0=np.array([{}, []], dtype=object), mu=np.array([{}], dtype=object))
    refusal(lambda: open_images(path), path, "Python objects")
    refusal(lambda: read_npz(path, "make it again", "mu"), path)


def test_npz_of_other_things_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS, y=PIXELS)
    refusal(lambda: open_images(tmp_path / "a.npz"), "no arr_0 of images (x, y)")


def test_a_zip_without_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("samples.npz", b"")
    refusal(lambda: open_images(tmp_path / "a.zip"), "a.zip holds no arr_0", "no arrays")


def test_nothing_there_is_said(tmp_path):
    refusal(lambda: npz_keys(tmp_path / "none.npz"), f"no {tmp_path}/none.npz")
    (tmp_path / "empty").mkdir()
    refusal(lambda: open_images(tmp_path / "empty"), tmp_path / "empty")


def test_images_of_two_sizes_in_a_folder_are_named(tmp_path):
    images = open_images(folder(tmp_path / "f", [*PIXELS[:3], PIXELS[3][:4]]))
    refusal(lambda: images.read(0, 4), "000003.png is 6x4 pixels, not 6x5 like 000000.png")


def test_cut_picture_in_a_folder_is_named(tmp_path):
    images = open_images(folder(tmp_path / "f"))
    bad = tmp_path / "f/000004.png"
    bad.write_bytes(bad.read_bytes()[:60])
    refusal(lambda: images.read(4, 5), f"unreadable image {bad}")
