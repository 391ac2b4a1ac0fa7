import errno
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL import __version__ as pillow_version
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.transforms import functional as TF

from data import images as module
from data import order
from data.images import (
    VIEWS,
    CenterImages,
    TrainImages,
    TrainViews,
    center_crop,
    list_paths,
    load_image,
    photo_crop,
    random_crop,
    scan_images,
    source_size,
    to_float,
    to_uint8,
    views_of,
)
from data.walk import HIDDEN
from modeling.photos import TURNS, load_photo
from runtime.randomness import generator_for
from tests.golden.fill import photo
from tests.refusals import refusal

SIZES = [(500, 375), (375, 500)]


def sha(image):
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()[:16]


def noise(width, height, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def crops(image, size, kind):
    """The views of an image as PIL images."""
    source = to_uint8(center_crop(image, source_size(size, kind)))
    views = views_of(source, size, kind)
    return [Image.fromarray(view.permute(1, 2, 0).numpy()) for view in views]


def same(a, b):
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


def test_images_have_the_suffixes_that_torchvision_reads():
    assert module.IMG_EXTENSIONS == IMG_EXTENSIONS


# ---------------------------------------------------------------------- crops
@pytest.mark.parametrize("width, height", SIZES)
def test_ten_crop_pixels_are_the_published_ones(golden, width, height):
    figures = golden("ten_crop.json")
    expected = figures[f"{width}x{height}"]
    image = photo(width, height)
    versions = f"Pillow {pillow_version} here, {figures['pillow']} made the figures"
    assert sha(image) == expected["source_sha"], versions
    assert [sha(view) for view in crops(image, 256, "ten_crop")] == expected["ten"], versions


@pytest.mark.parametrize("width, height", SIZES)
def test_centre_crop_pixels_are_the_published_ones(golden, width, height):
    expected = golden("ten_crop.json")[f"{width}x{height}"]["center"]
    assert sha(center_crop(photo(width, height), 256)) == expected


@pytest.mark.parametrize("kind", VIEWS)
def test_number_and_size_of_views(kind):
    views = crops(noise(50, 40), 32, kind)
    assert [view.size for view in views] == [(32, 32)] * VIEWS[kind]


def test_five_crop_is_the_first_half_of_ten_crop():
    image = noise(50, 40)
    five, ten = crops(image, 32, "five_crop"), crops(image, 32, "ten_crop")
    assert all(same(a, b) for a, b in zip(five, ten[:5]))


def test_last_five_of_ten_crop_are_mirrored_views_of_the_same_image():
    # 20 and not 32: with an odd margin the centres of image and mirror are a pixel apart.
    ten = crops(noise(50, 40), 20, "ten_crop")
    assert not any(same(view, ImageOps.mirror(view)) for view in ten)
    # The mirrored image is cut, so its left corner is the right corner mirrored.
    for mirrored, original in zip(ten[5:], (1, 0, 3, 2, 4)):
        assert same(mirrored, ImageOps.mirror(ten[original]))


@pytest.mark.parametrize("size", [20, 32, 33, 48, 256])
@pytest.mark.parametrize("kind", VIEWS)
def test_views_cut_from_tensors_are_torchvisions_byte_for_byte(kind, size):
    image = noise(size + 31, size + 12)
    if kind == "center_flip":
        whole = center_crop(image, size)
        expected = [whole, TF.hflip(whole)]
    else:
        cut = TF.five_crop if kind == "five_crop" else TF.ten_crop
        expected = cut(center_crop(image, int(size * 1.1)), size)
    views = crops(image, size, kind)
    assert len(views) == len(expected) and all(same(*pair) for pair in zip(views, expected))


def test_views_of_a_batch_are_those_of_its_images():
    sources = torch.randint(0, 256, (3, 3, 35, 35), dtype=torch.uint8)
    batch = torch.stack(views_of(sources, 32, "ten_crop"), 1)
    assert batch.shape == (3, 10, 3, 32, 32) and batch.dtype == torch.uint8
    for source, views in zip(sources, batch):
        assert torch.equal(torch.stack(views_of(source, 32, "ten_crop")), views)


@pytest.mark.parametrize(
    "kind, side", [("center_flip", 256), ("five_crop", 281), ("ten_crop", 281)]
)
def test_one_crop_holds_all_views_of_an_image(tmp_path, kind, side):
    noise(300, 290).save(tmp_path / "a.png")
    source = CenterImages([str(tmp_path / "a.png")], source_size(256, kind))[0]
    assert source.shape == (3, side, side) and source.dtype == torch.uint8
    views = views_of(source, 256, kind)
    for view, crop in zip(views, crops(noise(300, 290), 256, kind)):
        assert (view.permute(1, 2, 0).numpy() == np.asarray(crop)).all()


def test_center_flip_is_the_centre_crop_and_its_mirror():
    image = noise(50, 40)
    view, mirrored = crops(image, 32, "center_flip")
    assert same(view, center_crop(image, 32))
    assert same(mirrored, ImageOps.mirror(view)) and not same(mirrored, view)


def test_centre_crop_halves_large_images_with_box():
    image = noise(16, 16)
    halved = np.asarray(image).astype(float).reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(image, 8)) - halved).max() <= 1  # rounded twice


@pytest.mark.parametrize("width, height", [(5, 9), (8, 8), (17, 16), (33, 80)])
def test_centre_crop_of_any_size_is_square(width, height):
    assert center_crop(noise(width, height), 8).size == (8, 8)


def test_center_images_are_the_centre_crops(tmp_path):
    noise(50, 40).save(tmp_path / "a.png")
    view = CenterImages([str(tmp_path / "a.png")], 32)[0]
    assert (view.permute(1, 2, 0).numpy() == np.asarray(center_crop(noise(50, 40), 32))).all()


def test_to_float_maps_0_and_255_to_0_and_1():
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx(
        [0.0, 0.2, 1.0]
    )


# ---------------------------------------------------------------------- folders
def test_classes_and_paths_are_sorted(tmp_path):
    for name in ("b/2.png", "b/1.png", "a/3.png", "C/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise(4, 4).save(tmp_path / name)
    listing = scan_images(tmp_path)
    assert listing.classes == ["C", "a", "b"] and listing.labels.tolist() == [0, 1, 2, 2]
    found = [Path(path).relative_to(tmp_path).as_posix() for path in listing.paths]
    assert found == ["C/4.png", "a/3.png", "b/1.png", "b/2.png"]


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".png", ".JPEG")):
            noise(4, 4).save(root / name)
        else:
            (root / name).write_bytes(b"")


def test_listing_is_that_of_torchvisions_image_folder(tmp_path):
    tree(tmp_path, "b/2.png", "b/x/1.png", "a/Z.png", "a/a.JPEG", "C/x.png", "a/n.txt")
    expected = ImageFolder(str(tmp_path))
    listing = scan_images(tmp_path)
    assert [*zip(listing.paths, listing.labels.tolist())] == expected.samples
    assert listing.classes == expected.classes


@pytest.mark.parametrize(
    "names, word",
    [
        ([], "no image folder"),
        (["notes.txt"], "no images"),
        (["hollow/notes.txt"], "no images"),
        (["full/a.png", "hollow/notes.txt"], "hollow"),
        (["b.png", "a.png", "stray/more/c.png", "stray/d.png"], "(a.png, b.png) beside folders of images (stray)"),
    ],
)  # fmt: skip
def test_a_folder_without_classes_of_images_is_refused(tmp_path, names, word):
    root = tmp_path / "root"
    tree(root, *names)
    for listed in (scan_images, list_paths):
        refusal(lambda listed=listed: listed(root), root, word)
    (tmp_path / "file").touch()
    refusal(lambda: scan_images(tmp_path / "file"), tmp_path / "file")


@pytest.mark.parametrize(
    "names, nested, remedy",
    [
        (["train/cat/a.png", "train/dog/b.png"], "train", "train"),
        (["a/cat/a.png", "b/cat/b.png", "devkit/readme"], "a, b", "a"),
        (["cat/a.png", "val/cat/b.png"], "val", "val"),
    ],
)
def test_a_folder_above_the_classes_is_refused(tmp_path, names, nested, remedy):
    root = tmp_path / "root"
    tree(root, *names)
    for listed in (scan_images, list_paths):
        refusal(lambda listed=listed: listed(root), root / remedy, root, nested)


def test_class_with_images_and_folders_of_images_is_a_class(tmp_path):
    tree(tmp_path, "cat/a.png", "cat/more/b.png")
    assert len(scan_images(tmp_path).paths) == 2


def test_header_says_how_many_classes_their_first_names_and_what_is_left_out(tmp_path):
    tree(tmp_path, *[f"class{i}/a.png" for i in range(5)])
    assert scan_images(tmp_path).describe() == "5 images, 5 classes (class0, class1, class2, …)"
    tree(tmp_path, "class1/b.gif", "class2/c.GIF", "class2/notes", "class3/.DS_Store", "top.txt")
    listing = scan_images(tmp_path)
    assert listing.left_out == {".gif": 2, ".txt": 1, "without a suffix": 1, HIDDEN: 1}
    words = "left out: 2 .gif, 1 .txt, 1 hidden or system entries, 1 without a suffix"
    assert words in listing.describe()


def test_images_in_no_folders_are_one_class(tmp_path):
    tree(tmp_path / "flat", "b.png", "a.JPEG", "notes", ".hidden/c.png")
    tree(tmp_path / "folder", "images/b.png", "images/a.JPEG")
    flat, inside = scan_images(tmp_path / "flat"), scan_images(tmp_path / "folder")
    assert flat.flat and not inside.flat
    assert (flat.names, flat.classes) == (inside.names, inside.classes)
    assert flat.paths == [str(tmp_path / "flat" / name) for name in ("a.JPEG", "b.png")]
    assert not flat.labels.any()
    assert flat.describe().startswith("2 images, no class folders: one class (images); left out: ")
    tree(tmp_path / "flat", "cat/notes")  # a folder without images is no class here
    assert scan_images(tmp_path / "flat").names == flat.names


def test_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    tree(tmp_path, "cat/a.png", "cat/closed/b.png")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    refusal(lambda: scan_images(tmp_path), tmp_path / "cat/closed", "Permission denied")


# ---------------------------------------------------------------------- loading
def bytes_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: show it turned by 90 degrees
    return bytes_of(noise(12, 8), "JPEG", exif=exif)


IMAGES = {
    "rgb": bytes_of(noise(12, 8), "PNG"),
    "grey": bytes_of(noise(12, 8, "L"), "PNG"),
    "grey jpeg": bytes_of(noise(12, 8, "L"), "JPEG"),
    "grey with alpha": bytes_of(noise(12, 8, "LA"), "PNG"),
    "black and white": bytes_of(noise(12, 8, "1"), "PNG"),
    "cmyk": bytes_of(noise(12, 8, "CMYK"), "JPEG"),
    "palette": bytes_of(noise(12, 8, "P"), "PNG"),
    "rgba": bytes_of(noise(12, 8, "RGBA"), "PNG"),
    "exif rotated": rotated_by_exif(),
}


@pytest.mark.parametrize("name", IMAGES)
def test_any_image_becomes_rgb_as_torchvision_converts_it(tmp_path, name):
    path = tmp_path / "image"
    path.write_bytes(IMAGES[name])
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (12, 8)
    assert same(image, pil_loader(path))


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "unreadable"),
        (b"no image at all", "unreadable"),
        (bytes_of(noise(64, 64), "JPEG")[:900], "unreadable"),
        (bytes_of(noise(64, 64), "PNG")[:900], "unreadable"),
        (bytes_of(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floats"),
        (bytes_of(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"), "32-bit integers"),
        (bytes_of(Image.new("RGB", (1, 40_000)), "PNG"), 40000),
        (bytes_of(Image.new("RGB", (40_000, 1)), "PNG"), 40000),
    ],
)
def test_unreadable_image_is_refused(tmp_path, content, word):
    (tmp_path / "broken.JPEG").write_bytes(content)
    refusal(lambda: load_image(tmp_path / "broken.JPEG"), tmp_path / "broken.JPEG", word)


def test_a_long_image_is_read(tmp_path):
    Image.new("RGB", (2, 1000)).save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png").size == (2, 1000)


def loaded(path, content):
    path.write_bytes(content)
    return np.asarray(load_image(path))


RAMP = np.array([[0, 1, 257, 32768], [65535, 256, 127 * 257, 300]], np.uint16)


def sixteen_bit_pgm():
    return b"P5 4 2 65535\n" + RAMP.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "content",
    [bytes_of(Image.fromarray(RAMP), "PNG"), bytes_of(Image.fromarray(RAMP), "TIFF"), sixteen_bit_pgm()],
    ids=["png", "tiff", "pgm"],
)  # fmt: skip
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, content):
    expected = np.rint(RAMP / 257).astype(np.uint8)
    assert expected.max() == 255 and expected[0, 3] == 128
    pixels = loaded(tmp_path / "image", content)
    assert pixels.shape == (2, 4, 3) and (pixels == expected[..., None]).all()


def see_through(mode):
    """The left half is transparent, with a hidden colour; the right half is opaque."""
    image = noise(12, 8).convert({"LA": "L", "PA": "P"}.get(mode, mode))
    if mode in ("RGB", "L", "P"):  # one colour is transparent
        image.paste(image.getpixel((0, 0)), (0, 0, 6, 8))
        return bytes_of(image, "PNG", transparency=image.getpixel((0, 0)))
    alpha = Image.new("L", (12, 8), 255)
    alpha.paste(0, (0, 0, 6, 8))
    image.putalpha(alpha)
    return bytes_of(image, "PNG" if mode != "PA" else "TIFF")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L", "P"])
def test_transparent_pixels_become_white_and_opaque_ones_stay(tmp_path, mode):
    content = see_through(mode)
    hidden = np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))
    pixels = loaded(tmp_path / "image", content)
    opaque = hidden[..., 3] == 255
    assert 20 < opaque.sum() <= 48 and (hidden[~opaque][:, 3] == 0).all()
    assert (pixels[~opaque] == 255).all() and (hidden[~opaque][:, :3] != 255).any()
    assert (pixels[opaque] == hidden[opaque][:, :3]).all()


def test_half_transparent_pixels_are_half_white(tmp_path):
    content = bytes_of(Image.new("RGBA", (2, 2), (0, 100, 200, 128)), "PNG")
    pixels = loaded(tmp_path / "image", content)
    assert np.abs(pixels[0, 0] - np.array([127, 177, 227])).max() <= 1


def test_transparent_sixteen_bit_grey_is_white(tmp_path):
    content = bytes_of(Image.fromarray(RAMP), "PNG", transparency=256)
    pixels = loaded(tmp_path / "image", content)
    assert (pixels[1, 1] == 255).all() and (pixels[0, 0] == 0).all()


# ---------------------------------------------------------------------- augmentation
@pytest.fixture
def photos(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path in paths:
        noise(24, 16).save(path)  # all the same, so that only the draw can tell them apart
    return paths


def test_augmentation_is_a_function_of_seed_epoch_and_index(photos):
    keys = [(epoch, index) for epoch in range(4) for index in range(3)]
    one, other = (TrainImages(photos, 8, 12, True, seed=5) for _ in range(2))
    forwards = {key: one[key] for key in keys}
    for key in reversed(keys):
        assert torch.equal(other[key], forwards[key])


def test_no_stream_of_augmentation_is_one_of_the_orders_or_the_views(photos, monkeypatch):
    keys = {module: [], order: []}
    for room, noted in keys.items():
        monkeypatch.setattr(
            room, "generator_for", lambda *key, n=noted: (n.append(key), generator_for(*key))[1]
        )
    dataset = TrainImages(photos, 8, 12, True, 5)
    draws = order.EpochDraws(np.arange(3), 10, 5, 0.1, 99)
    samples = order.SampleOrder(3, 1, 5)
    for epoch in range(4):
        for index in range(3):
            (
                dataset[epoch, index],
                draws.of(epoch, index),
                samples.sample(3 * epoch + index),
            )
    assert len(set(keys[module])) == 12 and len(set(keys[order])) == 8
    assert not set(keys[module]) & set(keys[order])


def test_augmentation_differs_between_epochs(photos):
    dataset = TrainImages(photos, 8, 12, True, seed=5)
    assert len({dataset[epoch, 0].numpy().tobytes() for epoch in range(20)}) > 5


def test_augmentation_differs_between_images(photos):
    dataset = TrainImages(photos, 8, 12, True, seed=5)
    assert any(not torch.equal(dataset[e, 0], dataset[e, 1]) for e in range(4))


def test_augmentation_differs_between_seeds(photos):
    one, other = TrainImages(photos, 8, 12, True, 5), TrainImages(photos, 8, 12, True, 6)
    assert any(not torch.equal(one[e, 0], other[e, 0]) for e in range(4))


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_mirrored_only_when_asked(tmp_path, flip):
    image = noise(8, 8)
    image.save(tmp_path / "a.png")
    dataset = TrainImages([str(tmp_path / "a.png")], 8, 8, flip, seed=0)
    seen = {dataset[epoch, 0].numpy().tobytes() for epoch in range(20)}
    expected = [image, ImageOps.mirror(image)] if flip else [image]
    assert seen == {to_uint8(view).numpy().tobytes() for view in expected}


def drawn_crops(image, size, resize):
    return {
        random_crop(image, size, resize, False, generator_for(0, i)).tobytes() for i in range(40)
    }


def test_random_crop_reaches_every_offset():
    image = noise(10, 8)
    assert drawn_crops(image, 8, 8) == {image.crop((x, 0, x + 8, 8)).tobytes() for x in range(3)}


def test_random_crop_cuts_the_image_whose_shorter_side_was_resized():
    image = noise(21, 16)
    resized = image.resize((10, 8), Image.Resampling.BILINEAR)
    assert drawn_crops(image, 8, 8) == {resized.crop((x, 0, x + 8, 8)).tobytes() for x in range(3)}


# ---------------------------------------------------------------------- list files
def test_list_file_names_images_relative_to_itself_or_absolutely(tmp_path):
    for name in ("lists/in.png", "out.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed = tmp_path / "lists/train.txt"
    listed.write_text(f"\ufeffin.png\n\n../out.png \n{tmp_path}/out.png\n", "utf-8")
    expected = ["lists/in.png", "lists/../out.png", "out.png"]
    assert list_paths(listed) == [str(tmp_path / name) for name in expected]


def test_list_file_names_images_relative_to_a_root_where_they_are_not_beside_it(tmp_path):
    tree(tmp_path, "lists/both.png", "root/both.png", "root/cat/a.png")
    listed = tmp_path / "lists/train.txt"
    listed.write_text("both.png\ncat/a.png\n")
    expected = [str(tmp_path / "lists/both.png"), str(tmp_path / "root/cat/a.png")]
    assert list_paths(listed, tmp_path / "root") == expected
    refusal(lambda: list_paths(listed), "line 2", tmp_path / "lists/cat/a.png")
    (tmp_path / "root/cat/a.png").unlink()
    named = "line 2", tmp_path / "lists/cat/a.png", tmp_path / "root/cat/a.png"
    refusal(lambda: list_paths(listed, tmp_path / "root"), *named)


def test_folder_lists_its_images_without_classes(tmp_path):
    for name in ("b/2.png", "a/1.png"):
        (tmp_path / name).parent.mkdir()
        noise(4, 4).save(tmp_path / name)
    assert list_paths(tmp_path) == [str(tmp_path / "a/1.png"), str(tmp_path / "b/2.png")]


@pytest.mark.parametrize(
    "content, word",
    [
        (b"a.png\nb.png\n", "line 2"),
        (b"\n", "no images"),
        (b"\x89PNG\xff", "text file"),
    ],
)
def test_bad_list_file_is_refused(tmp_path, content, word):
    (tmp_path / "a.png").touch()
    (tmp_path / "list").write_bytes(content)
    refusal(lambda: list_paths(tmp_path / "list"), tmp_path / "list", word)


# ---------------------------------------------------------------------- views drawn without a cache
def test_views_and_labels_are_drawn_as_from_a_ten_crop_cache(tmp_path):
    from types import SimpleNamespace

    from data.tokens import TrainTokens

    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, size in zip(paths, ((40, 30), (30, 40), (33, 33))):
        noise(*size).save(path)
    draws = order.EpochDraws(np.array([2, 0, 1]), 10, 5, 0.3, 3)
    images = TrainViews(paths, 16, draws)
    # The codes of a view are its number, so that the cache's draws can be read off.
    store = SimpleNamespace(codes=lambda image, view: np.array([view]))
    tokens = TrainTokens(store, draws)
    found, views = set(), set()
    for key in [(epoch, index) for epoch in range(8) for index in range(3)]:
        (pixels, label), ((view,), expected) = images[key], tokens[key]
        assert label == expected
        cut = crops(load_image(paths[key[1]]), 16, "ten_crop")[view]
        assert torch.equal(pixels, to_uint8(cut))
        found.add(label)
        views.add(int(view))
    assert found == {0, 1, 2, 3} and len(views) > 5


# ---------------------------------------------------------------------- odd photos
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_to_look_at_stands_upright_and_a_cache_ignores_its_rotation(tmp_path, orientation):
    image = noise(40, 30)
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as saved:
        upright = ImageOps.exif_transpose(saved)
    expected = to_uint8(center_crop(upright, 16))
    assert torch.equal(photo_crop(tmp_path / "a.png", 16), expected)
    assert load_photo(tmp_path / "a.png")[1] == TURNS.get(orientation)
    assert same(load_image(tmp_path / "a.png"), image)


def test_damaged_exif_makes_no_image_unreadable(tmp_path):
    noise(40, 30).save(tmp_path / "a.png", exif=b"Exif\0\0not a TIFF")
    assert load_photo(tmp_path / "a.png")[1] is None


def test_an_error_that_passes_does_not_make_an_image_unreadable(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    original, left = Image.open, [OSError(errno.EIO, "I/O error"), OSError(errno.ESTALE, "stale")]

    def failing(*args, **options):
        if left:
            raise left.pop()
        return original(*args, **options)

    monkeypatch.setattr("modeling.photos.PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Image, "open", failing)
    assert load_image(tmp_path / "a.png").size == (4, 4)
    left += [OSError(errno.EIO, "I/O error")] * 3
    refusal(lambda: load_image(tmp_path / "a.png"), "I/O error")
    left += [OSError(errno.EIO, "I/O error")] * 2  # it persists: a single try until one succeeds
    refusal(lambda: load_image(tmp_path / "a.png"), "I/O error")
    assert len(left) == 1
    refusal(lambda: load_image(tmp_path / "a.png"), "I/O error")
    assert load_image(tmp_path / "a.png") and not left
    left.append(OSError(errno.EACCES, "denied"))  # does not pass: not tried again
    refusal(lambda: load_image(tmp_path / "a.png"), "denied")
