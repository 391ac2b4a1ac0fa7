"""Token caches: the packed store, memory-mapped, and the published layout of one file per image.

    python -m data.tokens info DIR      print what a cache holds and how it was made
    python -m data.tokens verify DIR    read everything and check sums, shapes and ranges
    python -m data.tokens show DIR --tokenizer FILE --images 16     draw the images that the codes describe
    python -m data.tokens export DIR --output NEW     write a packed store as the published layout

The packed store of N images, V views per image and T codes per view is a folder of raw files (all
integers are little-endian):

    manifest.json       described below; written last, so a folder that has it is complete
    codes-00000.bin …   uint16, (images of this shard, V, T), C order, no header
    labels.bin          int32, (N,): class of image i
    paths.txt           line i is the path of image i, relative to the image folder, in the bytes of its
                        name (UTF-8, as a rule); a line break in a name becomes a blank

Shards hold `images_per_shard` images each, the last one the rest, so view v of image i begins at byte
2·T·(V·(i mod images_per_shard) + v) of shard ⌊i / images_per_shard⌋. manifest.json is one object:

    format, version     "alitok-tokens", 1
    layout              "packed"
    images, views, tokens     N, V, T
    codes_dtype         "uint16"
    codebook_size       codes lie in [0, codebook_size)
    images_per_shard    see above
    classes             names, sorted; a label is an index into them
    files               name, bytes and sha256 of every other file, the shards in order first
    tokenizer           fingerprint of encoder and codebook (`modeling.weights.tensors.fingerprint`)
    encoder_heads       attention heads of the encoder, which no tensor's shape shows
    image_size, crops, preprocessing    pixels per side; the kind of views, in the order of
                        `data.images.views_of`; how images were prepared, in words
    dtype, batch_size   precision and images per batch of the encoder
    listed_images, listing    number of images in the folder, and a hash of their paths
    image_sizes         a hash of their sizes in bytes
    rotated             number of images that EXIF would rotate; their codes ignore it
    skipped             paths of unreadable images, which the store lacks
    software            versions of the libraries

`data/npz.py` describes the published layout, CLASS/FILE.JPEG.npz. This code adds a manifest.json to it,
with layout "npz" and without images_per_shard, codes_dtype and files.
"""

import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.cache import MANIFEST, TokenCache, read_manifest, write_manifest
from data.classes import describe_classes, misnumbered
from data.identity import hash_of_texts
from data.npz import NpzStore, export_npz
from data.order import EpochDraws
from runtime.arguments import Parser, as_path, new_file, number, path
from runtime.errors import InputError
from runtime.files import file_entry, file_sha256, sync_file, sync_folder
from runtime.program import run

IMAGES_PER_SHARD = 65_536  # of new stores


class TokenStore(TokenCache):
    """A packed store, for reading. Opening takes the same time for any size."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        self.manifest = manifest = read_manifest(path)
        try:
            self.images, self.views = manifest["images"], manifest["views"]
            self.tokens, self.classes = manifest["tokens"], manifest["classes"]
            self.codebook_size = manifest["codebook_size"]
            self.per_shard: int = manifest["images_per_shard"]
            for file in manifest["files"]:
                self._check_file(file["name"], file["bytes"])
            self.labels = self._map("labels.bin", "<i4")
            self.shards = [  # all codes in order: (n, V, T), uint16
                self._map(file["name"], "<u2").reshape(-1, self.views, self.tokens)
                for file in manifest["files"]
                if file["name"].startswith("codes-")
            ]
            if not sum(map(len, self.shards)) == len(self.labels) == self.images:
                raise ValueError(f"its files do not add up to {self.images} images")
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path} is damaged ({e!r}); make the cache again") from e

    def __reduce__(self):  # a worker process maps the files itself
        return TokenStore, (self.folder,), {"labels": self.labels, "classes": self.classes}

    def _map(self, name: str, dtype: str) -> np.ndarray:
        # As a plain array: indexing np.memmap costs several times as much.
        return np.asarray(np.memmap(self.folder / name, dtype, "r"))

    def _check_file(self, name: str, size: int) -> None:
        if Path(name).name != name:
            raise InputError(f"{self.folder / MANIFEST} names a file outside its folder: {name}")
        file = self.folder / name
        there = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
        if there != f"{size} bytes":
            raise InputError(
                f"{file} is damaged: {there}, {size} bytes expected; make the cache again"
            )

    def codes(self, image: int, view: int) -> np.ndarray:
        """Codes (T,), int64, of one view. Reads nothing else."""
        shard, row = divmod(image, self.per_shard)
        codes = self.shards[shard][row, view]
        self.check_codes(codes, f"image {image}")
        return codes.astype(np.int64)

    def identity(self) -> dict[str, str]:
        return {"codes": hash_of_texts(file["sha256"] for file in self.manifest["files"])}

    def paths(self, count: int) -> list[str]:
        # Names that are not UTF-8 keep their bytes; only \n ends a line.
        file = self.folder / "paths.txt"
        with open(file, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            return [line.rstrip("\n") for line in islice(lines, count)]

    def verify(self) -> None:
        """Check all sums and the ranges of codes and labels. Raises InputError."""
        for entry in self.manifest["files"]:
            if file_sha256(self.folder / entry["name"]) != entry["sha256"]:
                raise InputError(f"{self.folder / entry['name']} was altered; make the cache again")
        for place, shard in enumerate(self.shards):
            self.check_codes(shard, f"shard {place}")
        self.check_labels()


def write_packed_store(
    store: Path,
    blocks: Iterable[np.ndarray],
    labels: list[int],
    paths: list[str],
    entries: dict[str, Any],
) -> None:
    """Empty the folder `store` and write codes into it, durably.

    `blocks` are the codes (n, V, T) of consecutive images. `entries` are those of the manifest that do not follow
    from its files: at least views, tokens, codebook_size and classes. Raises ValueError if the codes do not fit
    them, or if the numbers of images, labels and paths differ.
    """
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    shape, images = (entries["views"], entries["tokens"]), 0
    for codes in blocks:
        highest = codes.max(initial=0)
        if codes.shape[1:] != shape or highest >= entries["codebook_size"]:
            raise ValueError(f"codes of shape {codes.shape}, up to {highest}, do not fit the store")
        while len(codes):
            shard, place = divmod(images, IMAGES_PER_SHARD)
            part, codes = np.split(codes, [IMAGES_PER_SHARD - place])
            with open(store / f"codes-{shard:05d}.bin", "ab") as file:
                file.write(part.astype("<u2").tobytes())
            images += len(part)
    if not images == len(labels) == len(paths):
        raise ValueError(f"{images} images, but {len(labels)} labels and {len(paths)} paths")
    # Names that are not UTF-8 keep their bytes; a line break in a name becomes a blank.
    lines = "".join(path.replace("\n", " ") + "\n" for path in paths)
    (store / "labels.bin").write_bytes(np.asarray(labels, "<i4").tobytes())
    (store / "paths.txt").write_bytes(lines.encode(errors="surrogateescape"))
    files = [*sorted(store.glob("codes-*.bin")), store / "labels.bin", store / "paths.txt"]
    layout = {"codes_dtype": "uint16", "images_per_shard": IMAGES_PER_SHARD}
    stated = {"layout": "packed", "images": images, **entries, **layout}
    write_manifest(store, {**stated, "files": [file_entry(file) for file in files]})
    for file in store.iterdir():
        sync_file(file)
    sync_folder(store)


def open_tokens(folder: str | Path) -> TokenCache:
    """Open a token cache of either layout. Raises InputError if it is missing or damaged."""
    path = Path(folder) / MANIFEST
    packed = path.is_file() and read_manifest(path).get("layout") != "npz"
    return TokenStore(folder) if packed else NpzStore(folder)


class TrainTokens(Dataset):
    """(codes (T,), label) by (epoch, index), of one random view per image and epoch.

    The label is `no_class` with probability `class_dropout`. `data.order.EpochDraws` draws both.
    """

    def __init__(self, store: TokenCache, draws: EpochDraws):
        self.store, self.draws = store, draws

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        view, label = self.draws.of(*key)
        return torch.from_numpy(self.store.codes(key[1], view)), label


class AllTokens(Dataset):
    """(codes (T,), label) of every view of every image, in order, for validation."""

    def __init__(self, store: TokenCache):
        self.store = store

    def __len__(self) -> int:
        return self.store.images * self.store.views

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, view = divmod(index, self.store.views)
        return torch.from_numpy(self.store.codes(image, view)), int(self.store.labels[image])


def main(argv: list[str]) -> None:
    description = "Describe, verify, show or export a token cache."
    parser = Parser(prog="python -m data.tokens", description=description)
    add = parser.add_argument
    add("action", choices=["info", "verify", "show", "export"])
    add("folder", type=path)
    add("--tokenizer", type=path, help="show: weights or run of the cache's tokenizer")
    add("--config", type=path, help="show: YAML whose model.vq_model describes another tokenizer")
    add("--images", type=number(1, 10_000), default=16, help="show: number of images (16)")
    picture = "output/cache.png"
    add("--picture", type=new_file(".png"), default=picture, help=f"show: PNG to draw ({picture})")
    add("--output", type=as_path, help="export: folder to write")
    args = parser.parse_args(argv)
    if (args.tokenizer is not None) != (args.action == "show"):
        raise InputError("show needs --tokenizer PATH to decode codes; no other action takes it")
    if (args.output is not None) != (args.action == "export"):
        raise InputError("export needs --output DIR; no other action takes it")
    cache = open_tokens(args.folder)
    if args.action == "export":
        if not isinstance(cache, TokenStore):
            raise InputError(f"{args.folder} has the published layout already")
        cache.verify()
        export_npz(cache, cache.shards, args.output)
        print(f"wrote {args.output}: {cache.images} images x {cache.views} views")
        return
    if args.action == "show":
        from data.show import show_cache  # readers need no models

        count = show_cache(cache, args.tokenizer, args.config, args.images, Path(args.picture))
        print(f"wrote {args.picture}: the first views of {count} of {cache.images} images")
        return
    about = {**cache.manifest, "images": cache.images, "views": cache.views, "tokens": cache.tokens}
    print(f"{args.folder}: {about['layout']}, {cache.images} images x {cache.views} views x "
          f"{cache.tokens} codes, {describe_classes(cache.classes)}")  # fmt: skip
    if doubt := misnumbered(cache.classes):
        print(f"warning: {doubt}")
    if args.action == "verify":
        cache.verify()
        print("all files are whole and all codes and labels in range")
        return
    size = sum(file.stat().st_size for file in Path(args.folder).rglob("*") if file.is_file())
    print(f"{size} bytes, {size / cache.images:.1f} per image")
    for name in sorted(about.keys() - {"layout", "images", "views", "tokens", "classes", "files"}):
        print(f"{name}: {about[name]}")


if __name__ == "__main__":
    run(main)
