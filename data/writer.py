"""Writes the packed token store, which `data/tokens.py` documents."""

import hashlib
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from data.cache import write_manifest
from runtime.errors import InputError
from runtime.files import sync_file, sync_folder
from runtime.parts import Parts

IMAGES_PER_SHARD = 65_536


class TokenWriter:
    """Writes a store into an empty folder; codes come in the order of images."""

    def __init__(self, folder: Path, views: int, tokens: int, codebook_size: int):
        if codebook_size > 65_536:
            raise InputError(f"a codebook of {codebook_size} codes does not fit 16 bits")
        self.folder, self.views, self.tokens = folder, views, tokens
        self.codebook_size = codebook_size
        self.files: list[dict[str, Any]] = []
        self.images = 0
        self._shard: IO[bytes] | None = None
        self._digest = hashlib.sha256()  # of the open shard

    def append(self, codes: np.ndarray) -> None:
        """Add the codes (n, views, tokens), below `codebook_size`, of the next n images."""
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
        """Write labels and paths, then the manifest with `about` and checksums."""
        self._close()
        if not self.images == len(labels) == len(paths):
            raise ValueError(
                f"{self.images} images written, but {len(labels)} labels and {len(paths)} paths"
            )
        # Names that are not UTF-8 keep their bytes; a line break in a name becomes a blank.
        lines = "".join(path.replace("\n", " ") + "\n" for path in paths)
        for name, content in (
            ("labels.bin", np.asarray(labels, "<i4").tobytes()),
            ("paths.txt", lines.encode(errors="surrogateescape")),
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


def write_packed_store(
    store: Path,
    parts: Parts,
    writer_sizes: tuple[int, int, int],
    labels: list[int],
    paths: list[str],
    classes: list[str],
    about: dict[str, Any],
) -> None:
    """Empty the folder `store` and write the codes of all parts into it, in order and durably.

    `writer_sizes` are views, tokens and codebook_size.
    """
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    writer = TokenWriter(store, *writer_sizes)
    for number in tqdm(range(parts.count), unit="part", desc="pack", disable=None):
        writer.append(parts.read(number, "codes"))
    writer.finish(labels, paths, classes, about)
    for file in store.iterdir():
        sync_file(file)
    sync_folder(store)
