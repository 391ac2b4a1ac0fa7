import hashlib
import json
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import tokens
from data.cache import write_manifest
from data.npz import NpzStore, export_npz
from data.order import EpochDraws
from data.tokens import (
    AllTokens,
    TokenStore,
    TrainTokens,
    main,
    open_tokens,
    write_packed_store,
)
from modeling.weights.tensors import fingerprint
from tests.refusals import refusal
from tests.tiny import tiny_cache

IMAGES, VIEWS, TOKENS, CODEBOOK = 10, 3, 5, 4096
LABELS = [i % 2 for i in range(IMAGES)]
PATHS = [f"{'cat' if i % 2 == 0 else 'dög'}/{i:02d}.png" for i in range(IMAGES)]
CLASSES = ["cat", "dög"]
ABOUT = {"tokenizer": "0123456789abcdef", "image_size": 32, "crops": "five_crop"}
SHARDS = ["codes-00000.bin", "codes-00001.bin", "codes-00002.bin"]


def random_codes(images=IMAGES, codebook=CODEBOOK):
    return np.random.default_rng(0).integers(0, codebook, (images, VIEWS, TOKENS))


def write(folder, codes, codebook=CODEBOOK, pieces=(3, 8), labels=LABELS, **changes):
    """Write the store of the first images into `folder` and return it."""
    sizes = {"views": codes.shape[1], "tokens": codes.shape[2], "codebook_size": codebook}
    entries = {**sizes, **ABOUT, "classes": CLASSES, **changes}
    labels, paths = labels[: len(codes)], PATHS[: len(codes)]
    write_packed_store(folder, np.split(codes, pieces), labels, paths, entries)
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(tokens, "IMAGES_PER_SHARD", 4)


@pytest.fixture
def cache(tmp_path):
    """A store of three shards, of 4, 4 and 2 images."""
    return write(tmp_path / "cache", random_codes())


def edit_manifest(cache, **changes):
    path = cache / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------------- what is on disk
def test_every_view_reads_back_as_written(cache):
    store, codes = TokenStore(cache), random_codes()
    assert (store.images, store.views, store.tokens) == (IMAGES, VIEWS, TOKENS)
    for image in range(IMAGES):
        for view in range(VIEWS):
            row = store.codes(image, view)
            assert row.dtype == np.int64 and (row == codes[image, view]).all()


def test_labels_and_classes_read_back_as_written(cache):
    store = TokenStore(cache)
    assert store.labels.tolist() == LABELS and store.classes == CLASSES


def test_shards_are_headerless_little_endian_uint16_in_order_of_images(cache):
    codes = random_codes()
    for name, part in zip(SHARDS, (codes[:4], codes[4:8], codes[8:])):
        expected = b"".join(int(code).to_bytes(2, "little") for code in part.flatten())
        assert (cache / name).read_bytes() == expected


def test_a_store_holds_nothing_but_what_is_documented(cache):
    expected = {*SHARDS, "labels.bin", "paths.txt", "manifest.json"}
    assert {path.name for path in cache.iterdir()} == expected


def test_labels_are_little_endian_int32(cache):
    expected = b"".join(label.to_bytes(4, "little") for label in LABELS)
    assert (cache / "labels.bin").read_bytes() == expected


def test_paths_are_utf8_lines(cache):
    assert (cache / "paths.txt").read_bytes().decode("utf-8") == "\n".join(PATHS) + "\n"


def test_manifest_holds_what_is_documented(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    files = manifest.pop("files")
    assert manifest == {
        "format": "alitok-tokens",
        "version": 1,
        "layout": "packed",
        "images": IMAGES,
        "views": VIEWS,
        "tokens": TOKENS,
        "codes_dtype": "uint16",
        "codebook_size": CODEBOOK,
        "images_per_shard": 4,
        "classes": CLASSES,
        **ABOUT,
    }
    assert [entry["name"] for entry in files] == [*SHARDS, "labels.bin", "paths.txt"]


def test_manifest_holds_size_and_sha256_of_every_other_file(cache):
    for entry in json.loads((cache / "manifest.json").read_text())["files"]:
        content = (cache / entry["name"]).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_store_may_have_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = write(Path("cache"), random_codes())
    files = json.loads((cache / "manifest.json").read_text())["files"]
    assert [entry["name"] for entry in files] == [*SHARDS, "labels.bin", "paths.txt"]


def test_bytes_do_not_depend_on_how_codes_come_in(tmp_path):
    one = write(tmp_path / "one", random_codes(), pieces=())
    many = write(tmp_path / "many", random_codes(), pieces=range(1, IMAGES))
    for path in one.iterdir():
        assert path.read_bytes() == (many / path.name).read_bytes()


def test_a_last_full_shard_is_followed_by_no_empty_one(tmp_path):
    cache = write(tmp_path / "cache", random_codes(8), pieces=(5,))
    assert sorted(path.name for path in cache.glob("codes-*")) == SHARDS[:2]
    assert (TokenStore(cache).codes(7, 2) == random_codes(8)[7, 2]).all()


def test_store_is_at_most_one_percent_larger_than_two_bytes_a_code(tmp_path, monkeypatch):
    monkeypatch.undo()  # shards of their real size
    codes = np.zeros((2000, 10, 273), np.uint16)
    classes = [f"n{i:08d}" for i in range(1000)]
    paths = [f"{classes[i // 2]}/{classes[i // 2]}_{i:05d}.JPEG" for i in range(2000)]
    entries = {"views": 10, "tokens": 273, "codebook_size": CODEBOOK, **ABOUT, "classes": classes}
    cache = tmp_path / "cache"
    write_packed_store(cache, [codes], [i // 2 for i in range(2000)], paths, entries)
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 1.01 * 2 * codes.size


def test_largest_codebook_of_16_bits_reads_back(tmp_path):
    codes = np.full((2, VIEWS, TOKENS), 65_535)
    cache = write(tmp_path / "cache", codes, codebook=65_536, pieces=())
    TokenStore(cache).verify()
    assert (TokenStore(cache).codes(1, 1) == 65_535).all()


def test_another_number_of_labels_fails_and_leaves_no_manifest(tmp_path):
    with pytest.raises(ValueError, match="10 images, but 9 labels"):
        write(tmp_path / "cache", random_codes(), labels=LABELS[:9])
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_writing_replaces_what_a_killed_call_left(cache):
    (cache / "codes-00007.bin").write_bytes(b"left")
    write(cache, random_codes(5))
    TokenStore(cache).verify()
    assert not (cache / "codes-00007.bin").exists()


# ---------------------------------------------------------------------- damage
def cut(file):
    file.write_bytes(file.read_bytes()[:-2])


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def holding(content):
    return lambda file: file.write_bytes(content)


def stating(**changes):
    return lambda manifest: edit_manifest(manifest.parent, **changes)


def listing(name):
    """A manifest that lists a further file, which is there."""

    def damage(manifest):
        (manifest.parents[1] / "x").write_bytes(b"12")
        files = json.loads(manifest.read_text())["files"]
        edit_manifest(manifest.parent, files=[*files, {"name": name, "bytes": 2, "sha256": "0"}])

    return damage


STORED = [*SHARDS, "labels.bin", "paths.txt"]


@pytest.mark.parametrize(
    "file, damage, word",
    [
        *((name, damage, name) for name in STORED for damage in (cut, Path.unlink)),
        ("manifest.json", Path.unlink, "pretokenization.py"),
        ("manifest.json", holding(b""), "damaged"),
        ("manifest.json", holding(b"[]"), "damaged"),
        ("manifest.json", holding(b"\xff\xfe"), "damaged"),
        ("manifest.json", holding(b'{"format": "alitok-tokens", "version": 1}'), "damaged"),
        ("manifest.json", halve, "damaged"),
        ("manifest.json", stating(images=IMAGES + 1), "damaged"),
        ("manifest.json", stating(views=4), "damaged"),
        ("manifest.json", stating(views="3"), "damaged"),
        ("manifest.json", stating(files=[]), "damaged"),
        ("manifest.json", stating(files=[{"name": 5, "bytes": 0, "sha256": ""}]), "damaged"),
        *(("manifest.json", listing(name), name) for name in ("../x", "/etc/hostname", "sub/x")),
        ("manifest.json", stating(version=2), "version 2"),
        ("manifest.json", stating(format="other"), "format other"),
    ],
)
def test_a_damaged_store_is_refused_when_it_is_opened(cache, file, damage, word):
    damage(cache / file)
    named = cache if damage is Path.unlink and file == "manifest.json" else cache / file
    refusal(lambda: open_tokens(cache), named, word)


def relabel(*labels):
    """Other labels, and a manifest that fits them."""

    def damage(cache):
        (cache / "labels.bin").write_bytes(content := np.array(labels, "<i4").tobytes())
        files = json.loads((cache / "manifest.json").read_text())["files"]
        sha = {"labels.bin": hashlib.sha256(content).hexdigest()}
        edit_manifest(
            cache, files=[{**f, "sha256": sha.get(f["name"], f["sha256"])} for f in files]
        )

    return damage


def take_manifest_of_another(cache):
    other = write(cache.parent / "other", random_codes()[::-1])
    (cache / "manifest.json").write_bytes((other / "manifest.json").read_bytes())


@pytest.mark.parametrize(
    "damage, named",
    [
        *((lambda cache, name=name: flip_a_bit(cache / name), name) for name in STORED),
        (lambda cache: edit_manifest(cache, codebook_size=int(random_codes().max())), "beyond"),
        (relabel(*LABELS[:-1], 2), "2 classes"),
        (relabel(*LABELS[:-1], -1), "2 classes"),
        (take_manifest_of_another, SHARDS[0]),
    ],
)
def test_verify_finds_what_opening_does_not(cache, damage, named):
    TokenStore(cache).verify()
    damage(cache)
    refusal(TokenStore(cache).verify, cache, named)
    refusal(lambda: main(["verify", str(cache)]), cache, named)


def test_writer_refuses_codes_beyond_the_codebook_or_of_another_shape(tmp_path):
    codes = random_codes(codebook=64)
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / "a", codes, codebook=int(codes.max()))
    with pytest.raises(ValueError, match="do not fit"):
        write(tmp_path / "b", codes, tokens=TOKENS + 1)


def test_codes_beyond_the_codebook_are_refused_when_read(tmp_path):
    codes = random_codes(codebook=64)
    codes[9, 2, 4] = 64
    cache = write(tmp_path / "cache", codes, codebook=65)
    edit_manifest(cache, codebook_size=64)
    store = TokenStore(cache)
    store.codes(9, 1)
    refusal(lambda: store.codes(9, 2), "image 9", cache, "beyond 63")


# ---------------------------------------------------------------------- at the size of ImageNet
def test_store_of_imagenets_size_opens_in_a_fifth_of_a_second(tmp_path, monkeypatch):
    monkeypatch.undo()  # shards of their real size
    images, row = 1_281_167, 10 * 273 * 2
    files = []
    for first in range(0, images, 65_536):
        size = min(65_536, images - first) * row
        files.append({"name": f"codes-{len(files):05d}.bin", "bytes": size, "sha256": ""})
    files.append({"name": "labels.bin", "bytes": 4 * images, "sha256": ""})
    files.append({"name": "paths.txt", "bytes": 33 * images, "sha256": ""})
    for entry in files:
        (tmp_path / entry["name"]).touch()
        os.truncate(tmp_path / entry["name"], entry["bytes"])  # sparse
    shape = {"images": images, "views": 10, "tokens": 273, "codebook_size": 4096}
    about = {"classes": [f"n{i:08d}" for i in range(1000)], "tokenizer": "", "files": files}
    write_manifest(tmp_path, {**shape, "images_per_shard": 65_536, **about})

    def opening():
        started = time.perf_counter()
        store = TokenStore(tmp_path)
        store.codes(images - 1, 9)
        return time.perf_counter() - started

    assert min(opening() for _ in range(3)) <= 0.2
    # A worker process maps the codes itself; it is sent 5 MB of labels, not 7 GB.
    assert len(pickle.dumps(TokenStore(tmp_path))) < 6e6


# ---------------------------------------------------------------------- the published layout
def write_npz(folder, codes):
    """Codes as the published code caches them: no manifest, one file an image."""
    for image, path in zip(codes, PATHS):
        file = folder / f"{path}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, codes=image)
    return folder


BY_CLASS = sorted(range(IMAGES), key=lambda i: PATHS[i])


@pytest.fixture
def published(tmp_path):
    return write_npz(tmp_path / "published", random_codes())


def test_published_layout_reads_as_the_store_does(published):
    store, codes = open_tokens(published), random_codes()
    assert (store.images, store.views, store.tokens) == (IMAGES, VIEWS, TOKENS)
    assert store.classes == CLASSES and store.labels.tolist() == sorted(LABELS)
    for place, image in enumerate(BY_CLASS):
        for view in range(VIEWS):
            row = store.codes(place, view)
            assert row.dtype == np.int64 and (row == codes[image, view]).all()
    store.verify()


def test_class_index_is_the_rank_among_all_folders(published):
    (published / "ant").mkdir()
    assert NpzStore(published).labels.tolist() == [1 + label for label in sorted(LABELS)]


NO_CLASS = 99


def drawing(store, seed, class_dropout):
    draws = EpochDraws(store.labels, store.views, seed, class_dropout, NO_CLASS)
    return TrainTokens(store, draws)


def test_training_draws_the_same_views_from_either_layout(published, tmp_path):
    store = TokenStore(write(tmp_path / "packed", random_codes()[BY_CLASS]))
    one, other = (drawing(s, 3, 0.0) for s in (store, NpzStore(published)))
    for key in [(0, 2), (1, 2), (5, 9)]:
        assert torch.equal(one[key][0], other[key][0])


def test_open_tokens_tells_the_layouts_apart(cache, published, tmp_path):
    assert isinstance(open_tokens(cache), TokenStore)
    assert isinstance(open_tokens(published), NpzStore)
    write_manifest(published, {"layout": "npz", "images": IMAGES})
    assert isinstance(open_tokens(published), NpzStore)
    (tmp_path / "empty").mkdir()
    for empty in (tmp_path / "nowhere", tmp_path / "empty"):
        refusal(lambda empty=empty: open_tokens(empty), empty)


NPZ = "cat/02.png.npz"


@pytest.mark.parametrize(
    "damage, named",
    [
        (cut, NPZ),
        (flip_a_bit, NPZ),
        (holding(b""), NPZ),
        (lambda f: np.savez(f, other=np.zeros(3)), NPZ),
        (lambda f: np.savez(f, codes=np.zeros((VIEWS, TOKENS + 1), int)), NPZ),
        (lambda f: np.savez(f, codes=np.zeros((VIEWS, TOKENS))), NPZ),
        (lambda f: np.savez(f, codes=np.full((VIEWS, TOKENS), -1)), NPZ),
        (lambda f: np.savez(f, codes=np.full((VIEWS, TOKENS), CODEBOOK)), NPZ),
        (Path.unlink, "9 .npz files, 10 expected"),
    ],
)
def test_damaged_npz_is_named(published, damage, named):
    write_manifest(published, {"layout": "npz", "images": IMAGES, "codebook_size": CODEBOOK})
    NpzStore(published).verify()
    damage(published / NPZ)
    refusal(lambda: NpzStore(published).verify(), named)


def test_check_of_the_published_layout_compares_what_it_tells(published):
    store = NpzStore(published)
    refusal(lambda: store.check(CODEBOOK, 6, "f" * 16), published, "codes per image", 5, 6)
    store.check(int(random_codes().max()), TOKENS, "f" * 16)
    refusal(store.verify, "beyond")


@pytest.mark.parametrize("stray", ["__MACOSX", "ant", ".hidden", "zebra"])
def test_stray_folder_does_not_move_the_labels_of_a_manifest(published, stray):
    about = {"layout": "npz", "images": IMAGES, "classes": CLASSES}
    write_manifest(published, about)
    (published / stray).mkdir()
    np.savez(published / stray / "x.npz", codes=random_codes()[0])
    store = open_tokens(published)
    assert store.classes == CLASSES and store.labels.tolist() == sorted(LABELS)
    store.verify()


@pytest.mark.parametrize("stray", ["__MACOSX", ".Trash"])
def test_what_a_system_leaves_behind_is_no_class_without_a_manifest_either(published, stray):
    (published / stray).mkdir()
    store = open_tokens(published)
    assert store.classes == CLASSES and store.labels.tolist() == sorted(LABELS)


def test_class_of_the_manifest_whose_folder_is_gone_keeps_its_rank(published):
    classes = ["ant", *CLASSES]
    write_manifest(published, {"layout": "npz", "images": IMAGES, "classes": classes})
    assert open_tokens(published).labels.tolist() == [1 + label for label in sorted(LABELS)]


@pytest.mark.parametrize("classes", [["../x"], "cat", [3], ["/etc"], [""], [".."]], ids=str)
@pytest.mark.parametrize("layout", ["cache", "published"])
def test_manifest_cannot_name_classes_outside_its_folder(layout, classes, request):
    folder = request.getfixturevalue(layout)
    manifest = {"layout": "npz", **open_tokens(folder).manifest, "classes": classes}
    write_manifest(folder, manifest)
    refusal(lambda: open_tokens(folder), folder / "manifest.json", "damaged")


def test_the_published_programs_centre_crops_are_refused_with_their_defect(tmp_path):
    store = NpzStore(write_npz(tmp_path / "published", random_codes()[:, :1]))
    refusal(lambda: store.check(CODEBOOK, TOKENS / 2), "(1, 5)", "two views")
    store.check(CODEBOOK, TOKENS)


@pytest.mark.parametrize(
    "paths, label",
    [(["cat/../../a", *PATHS[1:]], 0), (["/etc/a", *PATHS[1:]], 0), (PATHS[1:] + PATHS[:1], 1)],
)
def test_a_path_outside_the_folder_of_its_class_is_not_exported(cache, tmp_path, paths, label):
    store = TokenStore(cache)
    store.paths = lambda count: paths
    refusal(lambda: export_npz(store, store.shards, tmp_path / "exported"), paths[0])
    assert not list(tmp_path.glob("exported*"))


def test_exporting_leaves_unfinished_work_of_that_name_alone(cache, tmp_path):
    """pretokenization.py keeps it in CACHE.partial."""
    work = tmp_path / "exported.partial/parts/000000.npz"
    work.parent.mkdir(parents=True)
    work.write_bytes(b"hours")
    store = TokenStore(cache)
    export_npz(store, store.shards, tmp_path / "exported")
    assert work.read_bytes() == b"hours" and (tmp_path / "exported/manifest.json").exists()


@pytest.mark.parametrize("folder", [".", "/"])
def test_a_folder_that_exists_is_not_exported_to(cache, folder):
    store = TokenStore(cache)
    refusal(lambda: export_npz(store, store.shards, Path(folder)), "--output")


# ---------------------------------------------------------------------- classes of another set
@pytest.mark.parametrize("layout", ["cache", "published"])
def test_labels_are_numbered_by_another_sets_classes(layout, request):
    store = open_tokens(request.getfixturevalue(layout))
    names = [store.classes[label] for label in store.labels]
    store.use_classes(["ant", "dög", "emu", "cat"])
    assert [store.classes[label] for label in store.labels] == names
    assert {name: label for name, label in zip(names, store.labels)} == {"cat": 3, "dög": 1}
    validation = AllTokens(store)
    assert [label for _, label in (validation[i * VIEWS] for i in range(IMAGES))] == list(
        store.labels
    )
    store.verify()


def test_validation_cache_that_lacks_a_class_is_scored_with_the_training_labels(tmp_path):
    training = write(tmp_path / "train", random_codes())
    codes, paths = random_codes(2), ["dög/a.png", "dög/b.png"]
    held_out = tiny_cache(tmp_path / "val", codes, [0, 0], ["dög"], CODEBOOK, paths)
    store = TokenStore(held_out)
    store.use_classes(TokenStore(training).classes)
    assert store.labels.tolist() == [1, 1]


def test_classes_that_cannot_be_mapped_are_refused(cache):
    refusal(lambda: TokenStore(cache).use_classes(["cat"]), cache, "dög")
    edit_manifest(cache, classes=["cat"])
    refusal(lambda: TokenStore(cache).use_classes(["cat", "dog"]), cache, "labels", "1 classes")


def test_worker_process_keeps_the_other_sets_classes(cache):
    store = TokenStore(cache)
    store.use_classes(["ant", "dög", "emu", "cat"])
    other = pickle.loads(pickle.dumps(store))
    assert other.classes == store.classes and (other.labels == store.labels).all()


# ---------------------------------------------------------------------- python -m data.tokens
@pytest.mark.parametrize("layout", ["cache", "published"])
def test_info_and_verify_on_the_command_line(layout, request, capsys):
    folder = request.getfixturevalue(layout)
    main(["info", str(folder)])
    said = capsys.readouterr().out
    assert f"{IMAGES} images x {VIEWS} views x {TOKENS} codes, 2 classes" in said
    assert ("tokenizer: 0123456789abcdef" in said) == (layout == "cache")
    main(["verify", str(folder)])
    assert "all files are whole" in capsys.readouterr().out


# ---------------------------------------------------------------------- of which tokenizer
def test_check_accepts_the_tokenizer_that_wrote_it(cache):
    TokenStore(cache).check(CODEBOOK, TOKENS, ABOUT["tokenizer"], 12)  # which states no heads
    edit_manifest(cache, encoder_heads=12)
    TokenStore(cache).check(CODEBOOK, TOKENS)
    TokenStore(cache).check(CODEBOOK, TOKENS, ABOUT["tokenizer"], 12)


@pytest.mark.parametrize(
    "place, asked, named",
    [
        (0, 8192, ("codebook size", 4096, 8192)),
        (1, 6, ("codes per image", 5, 6)),
        (2, "f" * 16, ("tokenizer", ABOUT["tokenizer"], "f" * 16)),
        (3, 8, ("encoder_heads", 12, 8)),
    ],
)
def test_check_refuses_another_tokenizer_and_says_what_differs(cache, place, asked, named):
    edit_manifest(cache, encoder_heads=12)
    given = [CODEBOOK, TOKENS, ABOUT["tokenizer"], 12]
    given[place] = asked
    refusal(lambda: TokenStore(cache).check(*given), cache, *named)


STATE = {
    "encoder.conv_out.weight": torch.ones(2, 3),
    "latent_tokens": torch.ones(4, 2),
    "quantize.embedding.weight": torch.ones(8, 2),
    "quantize.embed_prob": torch.ones(8),
    "decoder.ffn.0.weight": torch.ones(5),
}
DECIDING = ["encoder.conv_out.weight", "latent_tokens", "quantize.embedding.weight"]


@pytest.mark.parametrize("name", DECIDING)
def test_fingerprint_changes_with_what_decides_the_codes(name):
    changed = STATE[name].clone()
    changed.view(-1)[-1] += 1e-6
    assert fingerprint({**STATE, name: changed}) != fingerprint(STATE)


def test_fingerprint_ignores_decoder_and_clustering():
    alone = {name: STATE[name] for name in DECIDING}
    assert fingerprint(alone) == fingerprint(STATE)


def test_fingerprint_ignores_the_order_of_entries():
    assert fingerprint(dict(reversed(STATE.items()))) == fingerprint(STATE)


# ---------------------------------------------------------------------- training
@pytest.fixture
def numbered(tmp_path):
    """A store whose codes tell image and view: all codes of a view are VIEWS·image + view."""
    rows = np.arange(IMAGES * VIEWS).reshape(IMAGES, VIEWS, 1)
    return TokenStore(write(tmp_path / "numbered", np.repeat(rows, TOKENS, 2)))


def test_draws_are_a_function_of_seed_epoch_and_index(numbered):
    keys = [(epoch, index) for epoch in range(5) for index in range(IMAGES)]
    one, other = (drawing(numbered, 7, 0.5) for _ in range(2))
    forwards = {key: one[key] for key in keys}
    for key in reversed(keys):
        codes, label = other[key]
        assert torch.equal(codes, forwards[key][0]) and label == forwards[key][1]


def test_seeds_draw_other_views(numbered):
    drawn = [
        [drawing(numbered, seed, 0.0)[0, i][0][0].item() for i in range(IMAGES)] for seed in (1, 2)
    ]
    assert drawn[0] != drawn[1]


def test_codes_are_one_whole_view_of_the_image_asked_for(numbered):
    dataset = drawing(numbered, 7, 0.0)
    for index in range(IMAGES):
        codes, label = dataset[0, index]
        assert codes.shape == (TOKENS,) and codes.dtype == torch.int64
        assert len(codes.unique()) == 1 and codes[0] // VIEWS == index
        assert label == LABELS[index]


def test_every_view_is_drawn_over_the_epochs(numbered):
    dataset = drawing(numbered, 7, 0.0)
    for index in range(IMAGES):
        views = {dataset[epoch, index][0][0].item() % VIEWS for epoch in range(40)}
        assert views == set(range(VIEWS))


def test_draws_do_not_depend_on_how_many_images_there_are(numbered, tmp_path):
    rows = np.arange(4 * VIEWS).reshape(4, VIEWS, 1)
    fewer = TokenStore(write(tmp_path / "fewer", np.repeat(rows, TOKENS, 2), pieces=()))
    one, other = drawing(numbered, 7, 0.5), drawing(fewer, 7, 0.5)
    for epoch in range(20):
        for index in range(4):
            assert torch.equal(one[epoch, index][0], other[epoch, index][0])
            assert one[epoch, index][1] == other[epoch, index][1]


def test_views_are_drawn_evenly(numbered):
    dataset = drawing(numbered, 7, 0.5)
    drawn = [dataset[e, i][0][0].item() % VIEWS for e in range(300) for i in range(IMAGES)]
    for view in range(VIEWS):
        share = drawn.count(view) / len(drawn)
        assert abs(share - 1 / VIEWS) < 3 * (2 / 9 / len(drawn)) ** 0.5


def test_class_is_dropped_at_the_given_rate(numbered):
    dataset = drawing(numbered, 7, 0.1)
    labels = [dataset[epoch, i][1] for epoch in range(300) for i in range(IMAGES)]
    share = labels.count(NO_CLASS) / len(labels)
    assert abs(share - 0.1) < 3 * (0.1 * 0.9 / len(labels)) ** 0.5
    assert set(labels) == {0, 1, NO_CLASS}


def test_class_is_never_dropped_at_rate_0(numbered):
    dataset = drawing(numbered, 7, 0.0)
    assert all(dataset[e, i][1] == LABELS[i] for e in range(30) for i in range(IMAGES))


def test_validation_walks_every_view_of_every_image_in_order(numbered):
    dataset = AllTokens(numbered)
    items = [dataset[i] for i in range(len(dataset))]
    assert [codes[0].item() for codes, _ in items] == list(range(IMAGES * VIEWS))
    assert [label for _, label in items] == [label for label in LABELS for _ in range(VIEWS)]
