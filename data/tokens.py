"""The packed token store: a folder of raw shards and one manifest, memory-mapped.

Layout of a store with N images, V views an image and T codes a view (all integers little-endian):

    manifest.json       what is described below; written last, so a folder with it is complete
    codes-00000.bin …   uint16, (images of this shard, V, T), C order, no header
    labels.bin          int32, (N,): class of image i
    paths.txt           UTF-8 as far as the file names are; line i: path of image i, relative to the image folder

manifest.json holds `format` ("alitok-tokens"), `version`, `images` N, `views` V, `tokens` T,
`codebook_size`, `image_size` (pixels), `crops` (kind of views; `data.images.crops` gives their
order), `tokenizer` (fingerprint of encoder and codebook), `classes` (names; a label is an index
into them), `software` (versions) and `files`: name, bytes and sha256 of every other file, shards in
order. Shards hold `images_per_shard` images each, the last one the rest.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modeling.errors import InputError
from training.randomness import generator_for

MANIFEST = "manifest.json"
FORMAT, VERSION = "alitok-tokens", 1
IMAGES_PER_SHARD = 65_536


def fingerprint(state: dict[str, Tensor]) -> str:
    """16 hex digits of what decides the codes: encoder, latent tokens and codebook.

    The same for both stages of one tokenizer, whose decoders differ.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.startswith(("encoder.", "latent_tokens", "quantize.embedding.")):
            digest.update(name.encode())
            digest.update(state[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenWriter:
    """Writes a store into an empty folder as the codes come, in the order of the images."""

    def __init__(self, folder: Path, views: int, tokens: int, codebook_size: int):
        if codebook_size > 65_536:
            raise InputError(f"a codebook of {codebook_size} codes does not fit 16 bits")
        self.folder, self.views, self.tokens = folder, views, tokens
        self.codebook_size = codebook_size
        self.files: list[dict[str, Any]] = []
        self.images = 0
        self._shard = None

    def append(self, codes: np.ndarray) -> None:
        """Add codes (n, views, tokens), below `codebook_size`, of the next n images."""
        if codes.shape[1:] != (self.views, self.tokens) or codes.max() >= self.codebook_size:
            raise ValueError(
                f"codes of shape {codes.shape}, up to {codes.max()}, do not fit the store"
            )
        codes = np.ascontiguousarray(codes, dtype="<u2")
        while len(codes):
            room = IMAGES_PER_SHARD - self.images % IMAGES_PER_SHARD
            if self._shard is None:
                name = f"codes-{self.images // IMAGES_PER_SHARD:05d}.bin"
                self._shard = open(self.folder / name, "wb")  # noqa: SIM115 - closed by _close
            self._shard.write(codes[:room].tobytes())
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
            self._record(self.folder / name)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "images": self.images,
            "views": self.views,
            "tokens": self.tokens,
            "codebook_size": self.codebook_size,
            "images_per_shard": IMAGES_PER_SHARD,
            **about,
            "classes": classes,
            "files": self.files,
        }
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1))

    def _close(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._record(Path(self._shard.name))
            self._shard = None

    def _record(self, path: Path) -> None:
        size = path.stat().st_size
        self.files.append({"name": path.name, "bytes": size, "sha256": file_sha256(path)})


class TokenStore:
    """A store opened for reading; opening costs the same whatever its size.

    Attributes: `manifest`, `labels` (N,) int32, `images` N, `views` V, `tokens` T, `classes`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise InputError(f"no token cache at {folder}: make one with pretokenization.py")
        try:
            self.manifest = json.loads(path.read_text())
            if self.manifest["format"] != FORMAT or self.manifest["version"] != VERSION:
                raise InputError(f"{path} is of another format; make the cache again")
            self.images, self.views = self.manifest["images"], self.manifest["views"]
            self.tokens, self.classes = self.manifest["tokens"], self.manifest["classes"]
            self.per_shard = self.manifest["images_per_shard"]
            files = [(f["name"], f["bytes"]) for f in self.manifest["files"]]
            for name, size in files:
                self._check_file(name, size)
            self.labels = np.memmap(self.folder / "labels.bin", "<i4", "r")
            self._shards = [
                np.memmap(self.folder / name, "<u2", "r").reshape(-1, self.views, self.tokens)
                for name, _ in files
                if name.startswith("codes-")
            ]
        except InputError:
            raise  # it is a ValueError too, but says better what is wrong
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path} is damaged ({e!r}); make the cache again") from e
        if sum(map(len, self._shards)) != self.images or len(self.labels) != self.images:
            raise InputError(
                f"{path} does not add up to {self.images} images; make the cache again"
            )

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
        return self._shards[shard][row, view].astype(np.int64)

    def verify(self) -> None:
        """Read everything: checksums and the range of the codes. Raises InputError."""
        for entry in self.manifest["files"]:
            if file_sha256(self.folder / entry["name"]) != entry["sha256"]:
                raise InputError(f"{self.folder / entry['name']} was altered; make the cache again")
        size = self.manifest["codebook_size"]
        for number, shard in enumerate(self._shards):
            if int(shard.max()) >= size:
                raise InputError(f"shard {number} of {self.folder} holds codes beyond {size - 1}")

    def check(self, codebook_size: int, tokens: int, tokenizer: str | None = None) -> None:
        """Refuse a cache that another kind of tokenizer, or another tokenizer, wrote."""
        for name, wanted, found in (
            ("codebook size", codebook_size, self.manifest["codebook_size"]),
            ("codes an image", tokens, self.tokens),
            ("tokenizer", tokenizer, self.manifest["tokenizer"]),
        ):
            if wanted is not None and wanted != found:
                raise InputError(
                    f"{self.folder} is the cache of another tokenizer: {name} {found} there, "
                    f"{wanted} here; pretokenize with this one or give its cache"
                )


class TrainTokens(Dataset):
    """(codes (T,), label) by (epoch, index): one view drawn an image and epoch.

    With probability `class_dropout` the label is `no_class`. Both draws are pure functions of
    (seed, epoch, index), whatever the workers or ranks.
    """

    def __init__(self, store: TokenStore, seed: int, class_dropout: float, no_class: int):
        self.store, self.seed = store, seed
        self.class_dropout, self.no_class = class_dropout, no_class

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        rng = generator_for(self.seed, epoch, index)
        view = int(rng.integers(self.store.views))
        dropped = rng.random() < self.class_dropout
        label = self.no_class if dropped else int(self.store.labels[index])
        return torch.from_numpy(self.store.codes(index, view)), label


class AllTokens(Dataset):
    """(codes (T,), label) of every view of every image, in order, for validation."""

    def __init__(self, store: TokenStore):
        self.store = store

    def __len__(self) -> int:
        return self.store.images * self.store.views

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, view = divmod(index, self.store.views)
        return torch.from_numpy(self.store.codes(image, view)), int(self.store.labels[image])
