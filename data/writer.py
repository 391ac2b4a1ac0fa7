"""Writes the packed token store, which `data/tokens.py` documents."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import write_manifest
from runtime.files import file_entry, sync_file, sync_folder

IMAGES_PER_SHARD = 65_536


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
