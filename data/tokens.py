"""Token caches: the packed store, memory-mapped, and the published layout of one file an image.

    python -m data.tokens info DIR      what a cache holds and how it was made
    python -m data.tokens verify DIR    read all of it: checksums, shapes, codes and labels in range

The packed store of N images, V views an image and T codes a view is a folder of raw files (all
integers little-endian):

    manifest.json       what is described below; written last, so a folder with it is complete
    codes-00000.bin …   uint16, (images of this shard, V, T), C order, no header
    labels.bin          int32, (N,): class of image i
    paths.txt           UTF-8 as far as the file names are; line i: path of image i, relative to the
                        image folder (a line break within a name is written as a blank)

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
    tokenizer           fingerprint of encoder and codebook (`fingerprint`)
    image_size, crops, preprocessing    pixels; the kind of views, whose order `data.images.crops`
                        gives; what is done to an image, in words
    dtype, batch_size   of the encoder that computed the codes
    listed_images, listing    images found in the folder, and a hash of their paths
    skipped             paths of unreadable images, which the store leaves out
    software            versions of the libraries

The published layout is one file an image, CLASS/FILE.JPEG.npz, key `codes`, int64, (V, T); the class
index is the rank of the sorted folder names. Written here it comes with a manifest.json (layout
"npz", no images_per_shard, codes_dtype and files); the published code's own caches have none.
"""

import argparse
import hashlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.order import EpochDraws
from modeling.weights import tensors_hash
from runtime.errors import InputError
from runtime.files import file_sha256
from runtime.program import run

MANIFEST = "manifest.json"
FORMAT, VERSION = "alitok-tokens", 1
IMAGES_PER_SHARD = 65_536


def fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits of what decides the codes: encoder, latent tokens and codebook.

    The same for both stages of one tokenizer, whose decoders differ.
    """
    return tensors_hash(state, ("encoder.", "latent_tokens", "quantize.embedding."), torch.float32)


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    content = {"format": FORMAT, "version": VERSION, **entries}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        other = manifest["format"] != FORMAT or manifest["version"] != VERSION
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is damaged ({e!r}); make the cache again") from e
    if other:
        raise InputError(f"{path} is of another format; make the cache again")
    return manifest


class TokenWriter:
    """Writes a store into an empty folder as the codes come, in the order of the images."""

    def __init__(self, folder: Path, views: int, tokens: int, codebook_size: int):
        if codebook_size > 65_536:
            raise InputError(f"a codebook of {codebook_size} codes does not fit 16 bits")
        self.folder, self.views, self.tokens = folder, views, tokens
        self.codebook_size = codebook_size
        self.files: list[dict[str, Any]] = []
        self.images = 0
        self._shard = self._digest = None

    def append(self, codes: np.ndarray) -> None:
        """Add codes (n, views, tokens), below `codebook_size`, of the next n images."""
        highest = codes.max(initial=0)
        if codes.shape[1:] != (self.views, self.tokens) or highest >= self.codebook_size:
            raise ValueError(f"codes of shape {codes.shape}, up to {highest}, do not fit the store")
        codes = np.ascontiguousarray(codes, dtype="<u2")
        while len(codes):
            room = IMAGES_PER_SHARD - self.images % IMAGES_PER_SHARD
            if self._shard is None:
                name = f"codes-{self.images // IMAGES_PER_SHARD:05d}.bin"
                self._shard = open(self.folder / name, "wb")  # noqa: SIM115 - closed by _close
                self._digest = hashlib.sha256()
            content = codes[:room].tobytes()
            self._shard.write(content)
            self._digest.update(content)
            self.images += len(codes[:room])
            codes = codes[room:]
            if self.images % IMAGES_PER_SHARD == 0:
                self._close()

    def finish(
        self, labels: list[int], paths: list[str], classes: list[str], about: dict[str, Any]
    ) -> None:
        """Write labels and paths, then the manifest with `about` and all checksums."""
        self._close()
        if not self.images == len(labels) == len(paths):
            raise ValueError(
                f"{self.images} images written, {len(labels)} labels and {len(paths)} paths given"
            )
        for name, content in (
            ("labels.bin", np.asarray(labels, "<i4").tobytes()),
            # Names that are no UTF-8 keep their bytes; a line break in a name becomes a blank.
            (
                "paths.txt",
                "".join(p.replace("\n", " ") + "\n" for p in paths).encode(
                    errors="surrogateescape"
                ),
            ),
        ):
            (self.folder / name).write_bytes(content)
            self._record(name, len(content), hashlib.sha256(content))
        write_manifest(
            self.folder,
            {
                "layout": "packed",
                "images": self.images,
                "views": self.views,
                "tokens": self.tokens,
                "codes_dtype": "uint16",
                "codebook_size": self.codebook_size,
                "images_per_shard": IMAGES_PER_SHARD,
                **about,
                "classes": classes,
                "files": self.files,
            },
        )

    def _close(self) -> None:
        if self._shard is not None:
            self._record(Path(self._shard.name).name, self._shard.tell(), self._digest)
            self._shard.close()
            self._shard = None

    def _record(self, name: str, size: int, digest: Any) -> None:
        self.files.append({"name": name, "bytes": size, "sha256": digest.hexdigest()})


class TokenCache:
    """What both layouts share. `codes(image, view)` gives (T,), int64; `verify()` reads everything.

    Attributes: `folder`, `manifest`, `images` N, `views` V, `tokens` T, `classes` (names), `labels`
    (N,) int32. Where the published layout tells neither codebook size nor tokenizer, the manifest
    holds None for them.
    """

    def check(self, codebook_size: int, tokens: int, tokenizer: str | None = None) -> None:
        """Refuse a cache that another kind of tokenizer, or another tokenizer, wrote."""
        for name, wanted, found in (
            ("codebook size", codebook_size, self.manifest["codebook_size"]),
            ("codes an image", tokens, self.tokens),
            ("tokenizer", tokenizer, self.manifest["tokenizer"]),
        ):
            if None not in (wanted, found) and wanted != found:
                raise InputError(
                    f"{self.folder} is the cache of another tokenizer: {name} {found} there, "
                    f"{wanted} here; pretokenize with this one or give its cache"
                )
        # Known from now on even where the cache does not say it: codes beyond it are refused.
        self.codebook_size = codebook_size

    def refuse_codes(self, where: str) -> None:
        raise InputError(
            f"{where} of {self.folder} holds codes beyond {self.codebook_size - 1}: it is damaged "
            f"or of another tokenizer; make the cache again"
        )


class TokenStore(TokenCache):
    """A packed store opened for reading; opening costs the same whatever its size."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise InputError(f"no token cache at {folder}: make one with pretokenization.py")
        try:
            self.manifest = read_manifest(path)
            self.images, self.views = self.manifest["images"], self.manifest["views"]
            self.tokens, self.classes = self.manifest["tokens"], self.manifest["classes"]
            self.codebook_size = self.manifest["codebook_size"]
            self.per_shard = self.manifest["images_per_shard"]
            files = [(f["name"], f["bytes"]) for f in self.manifest["files"]]
            for name, size in files:
                self._check_file(name, size)
            self.labels = self._map("labels.bin", "<i4")
            self._shards = [
                self._map(name, "<u2").reshape(-1, self.views, self.tokens)
                for name, _ in files
                if name.startswith("codes-")
            ]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path} is damaged ({e!r}); make the cache again") from e
        if sum(map(len, self._shards)) != self.images or len(self.labels) != self.images:
            raise InputError(
                f"{path} does not add up to {self.images} images; make the cache again"
            )

    def __reduce__(self):
        return TokenStore, (self.folder,)  # a worker process maps the files itself

    def _map(self, name: str, dtype: str) -> np.ndarray:
        # As a plain array: indexing np.memmap costs several times as much.
        return np.asarray(np.memmap(self.folder / name, dtype, "r"))

    def _check_file(self, name: str, size: int) -> None:
        if Path(name).name != name:
            raise InputError(f"{self.folder / MANIFEST} names a file outside its folder: {name}")
        file = self.folder / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
            raise InputError(f"{file} is damaged: {found}, {size} bytes expected; make it again")

    def codes(self, image: int, view: int) -> np.ndarray:
        """Codes (T,), int64, of one view; touches nothing else of the shard."""
        shard, row = divmod(image, self.per_shard)
        codes = self._shards[shard][row, view].astype(np.int64)
        if codes.max() >= self.codebook_size:
            self.refuse_codes(f"image {image}")
        return codes

    def verify(self) -> None:
        """Read everything: checksums, codes and labels in range. Raises InputError."""
        for entry in self.manifest["files"]:
            if file_sha256(self.folder / entry["name"]) != entry["sha256"]:
                raise InputError(f"{self.folder / entry['name']} was altered; make the cache again")
        for number, shard in enumerate(self._shards):
            if int(shard.max()) >= self.codebook_size:
                self.refuse_codes(f"shard {number}")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise InputError(
                f"{self.folder} holds labels beyond its {len(self.classes)} classes; make it again"
            )


class NpzStore(TokenCache):
    """The published layout, one .npz an image, behind the same interface.

    Opening lists the folder, so its cost grows with the number of images; every view read costs a
    file opened and all views read.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        unknown = {"layout": "npz", "codebook_size": None, "tokenizer": None}
        self.manifest = {**unknown, **(read_manifest(path) if path.exists() else {})}
        self.codebook_size = self.manifest["codebook_size"]
        self.classes = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir())
        self._files, labels = [], []
        for label, name in enumerate(self.classes):
            for folder, _, files in sorted(os.walk(self.folder / name)):
                self._files += [
                    os.path.join(folder, f) for f in sorted(files) if f.endswith(".npz")
                ]
            labels += [label] * (len(self._files) - len(labels))
        self.labels, self.images = np.array(labels, np.int32), len(labels)
        if not self.images:
            raise InputError(f"no token cache at {self.folder}: make one with pretokenization.py")
        expected = self.manifest.get("images", self.images)
        if self.images != expected:
            raise InputError(
                f"{self.folder} holds {self.images} .npz files, {expected} expected; make it again"
            )
        self.views, self.tokens = 0, 0  # any shape …
        self.views, self.tokens = self._read(0).shape  # … but that of the first from here on

    def _read(self, image: int) -> np.ndarray:
        file = self._files[image]
        try:
            with np.load(file, allow_pickle=False) as arrays:
                codes = arrays["codes"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise InputError(f"{file} is damaged ({e!r}); make it again") from e
        fits = codes.ndim == 2 and codes.size and np.issubdtype(codes.dtype, np.integer)
        if not fits or (self.views and codes.shape != (self.views, self.tokens)):
            raise InputError(
                f"{file} holds codes of shape {codes.shape}, {codes.dtype}: integers (views, codes) "
                f"expected, as in the other files; make it again"
            )
        if codes.min() < 0 or (self.codebook_size and codes.max() >= self.codebook_size):
            self.refuse_codes(f"image {image}, {file},")
        return codes

    def codes(self, image: int, view: int) -> np.ndarray:
        """Codes (T,), int64, of one view."""
        return self._read(image)[view].astype(np.int64)

    def verify(self) -> None:
        """Read every file: shape, type and range of its codes. Raises InputError."""
        for image in range(self.images):
            self._read(image)


def open_tokens(folder: str | Path) -> TokenCache:
    """A token cache of either layout. Raises InputError where there is none or it is damaged."""
    path = Path(folder) / MANIFEST
    if path.is_file():
        packed = read_manifest(path).get("layout") != "npz"
    else:
        packed = not Path(folder).is_dir()
    return TokenStore(folder) if packed else NpzStore(folder)


class TrainTokens(Dataset):
    """(codes (T,), label) by (epoch, index): one view drawn an image and epoch.

    With probability `class_dropout` the label is `no_class`; `data.order.EpochDraws` makes both
    draws.
    """

    def __init__(self, store: TokenCache, seed: int, class_dropout: float, no_class: int):
        self.store, self.no_class = store, no_class
        self.draws = EpochDraws(store.images, store.views, seed, class_dropout)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        view, dropped = self.draws.of(*key)
        index = key[1]
        label = self.no_class if dropped else int(self.store.labels[index])
        return torch.from_numpy(self.store.codes(index, view)), label


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
    parser = argparse.ArgumentParser(prog="python -m data.tokens", description="Look into a cache.")
    parser.add_argument("action", choices=["info", "verify"])
    parser.add_argument("folder")
    args = parser.parse_args(argv)
    cache = open_tokens(args.folder)
    about = {**cache.manifest, "images": cache.images, "views": cache.views, "tokens": cache.tokens}
    print(f"{args.folder}: {about['layout']}, {cache.images} images x {cache.views} views x "
          f"{cache.tokens} codes, {len(cache.classes)} classes")  # fmt: skip
    if args.action == "verify":
        cache.verify()
        print("all files are whole and all codes and labels in range")
        return
    size = sum(file.stat().st_size for file in Path(args.folder).rglob("*") if file.is_file())
    print(f"{size} bytes, {size / cache.images:.1f} an image")
    for name in sorted(about.keys() - {"layout", "images", "views", "tokens", "classes", "files"}):
        print(f"{name}: {about[name]}")


if __name__ == "__main__":
    run(main)
