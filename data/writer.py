"""Writes the packed token store, which `data/tokens.py` documents."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cache import write_manifest
from runtime.errors import InputError
from runtime.files import file_entry, sync_file, sync_folder
from runtime.parts import Parts

IMAGES_PER_SHARD = 65_536


class TokenWriter:
    """Writes a store into an empty folder; codes come in the order of images."""

    def __init__(self, folder: Path, views: int, tokens: int, codebook_size: int):
        if codebook_size > 65_536:
            raise InputError(f"a codebook of {codebook_size} codes does not fit 16 bits")
        self.folder, self.views, self.tokens = folder, views, tokens
        self.codebook_size = codebook_size
        self.images = 0

    def append(self, codes: np.ndarray) -> None:
        """Add the codes (n, views, tokens), below `codebook_size`, of the next n images."""
        highest = codes.max(initial=0)
        if codes.shape[1:] != (self.views, self.tokens) or highest >= self.codebook_size:
            raise ValueError(f"codes of shape {codes.shape}, up to {highest}, do not fit the store")
        while len(codes):
            shard, place = divmod(self.images, IMAGES_PER_SHARD)
            part, codes = np.split(codes, [IMAGES_PER_SHARD - place])
            with open(self.folder / f"codes-{shard:05d}.bin", "ab") as file:
                file.write(part.astype("<u2").tobytes())
            self.images += len(part)

    def finish(
        self, labels: list[int], paths: list[str], classes: list[str], about: dict[str, Any]
    ) -> None:
        """Write labels and paths, then the manifest with `about` and checksums."""
        if not self.images == len(labels) == len(paths):
            raise ValueError(
                f"{self.images} images written, but {len(labels)} labels and {len(paths)} paths"
            )
        # Names that are not UTF-8 keep their bytes; a line break in a name becomes a blank.
        lines = "".join(path.replace("\n", " ") + "\n" for path in paths)
        (self.folder / "labels.bin").write_bytes(np.asarray(labels, "<i4").tobytes())
        (self.folder / "paths.txt").write_bytes(lines.encode(errors="surrogateescape"))
        shards = sorted(self.folder.glob("codes-*.bin"))
        files = [*shards, self.folder / "labels.bin", self.folder / "paths.txt"]
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
                "files": [file_entry(file) for file in files],
            },
        )


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
