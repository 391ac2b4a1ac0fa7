"""The published layout of a token cache: one .npz file per image.

CLASS/FILE.JPEG.npz holds the key `codes`, int64, (V, T); a label is the rank of its folder's name. The
published code writes nothing else; this one adds a manifest.json beside the folders.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cache import MANIFEST, TokenCache, read_manifest, write_manifest
from data.identity import hash_of_names, hash_of_sizes
from data.walk import walk
from runtime.errors import InputError
from runtime.files import read_npz, sync_file, sync_folder, writing

PACKED_ONLY = ("layout", "codes_dtype", "images_per_shard", "files")  # entries of the manifest


class NpzStore(TokenCache):
    """The published layout, opened for reading. Opening lists all files; reading a view reads all views
    of its image."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        unknown = {"layout": "npz", "codebook_size": None, "tokenizer": None}
        self.manifest = {**unknown, **(read_manifest(path) if path.exists() else {})}
        self.codebook_size = self.manifest["codebook_size"]
        folders = walk(str(self.folder))[0] if self.folder.is_dir() else {}
        # Of the manifest, so that a stray folder shifts no labels; without one, the folders.
        top = {folder.split(os.sep)[0] for folder in folders} - {""}
        self.classes: list[str] = self.manifest.get("classes", sorted(top))
        ranks = {name: label for label, name in enumerate(self.classes)}
        found = sorted(
            (name, folder, file)
            for folder, files in folders.items()
            if (name := folder.split(os.sep)[0]) in ranks
            for file in files
            if file.endswith(".npz")
        )
        self._files = [os.path.join(self.folder, folder, file) for _, folder, file in found]
        self.labels = np.array([ranks[name] for name, *_ in found], np.int32)
        self.images = len(found)
        if not self.images:
            raise InputError(f"no token cache at {self.folder}: make one with pretokenization.py")
        expected = self.manifest.get("images", self.images)
        if self.images != expected:
            raise InputError(
                f"{self.folder} holds {self.images} .npz files, {expected} expected; make it again"
            )
        self.views, self.tokens = 0, 0  # the first file may have any shape, the others must match
        self.views, self.tokens = self._read(0).shape

    def identity(self) -> dict[str, str]:
        return {
            "image names": hash_of_names(self._files),
            "image sizes": hash_of_sizes(self._files),
        }

    def _read(self, image: int) -> np.ndarray:
        """All codes of an image: (V, T)."""
        file = self._files[image]
        (codes,) = read_npz(file, "make the cache again", "codes")
        fits = codes.ndim == 2 and codes.size and np.issubdtype(codes.dtype, np.integer)
        if not fits or (self.views and codes.shape != (self.views, self.tokens)):
            raise InputError(
                f"{file} holds {codes.dtype} codes of shape {codes.shape} instead of integers (views, "
                f"codes) as in the other files; make the cache again"
            )
        self.check_codes(codes, f"image {image}, {file},")
        return codes

    def codes(self, image: int, view: int) -> np.ndarray:
        return self._read(image)[view].astype(np.int64)

    def paths(self, count: int) -> list[str]:
        files = (os.path.relpath(file, self.folder) for file in self._files[:count])
        return [file.removesuffix(".npz") for file in files]

    def verify(self) -> None:
        """Read every file: shape, type and range of its codes. Raises InputError."""
        for image in range(self.images):
            self._read(image)


def write_npz_files(store: Path, paths: list[str], codes: np.ndarray) -> None:
    """Write codes (n, V, T) as one file per image, durably."""
    for path, image in zip(paths, codes):
        file = store / f"{path}.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, codes=image.astype(np.int64))
    os.sync()  # once for all of them: one fsync per file takes ten times as long


def export_npz(store: TokenCache, shards: list[np.ndarray], folder: Path) -> None:
    """Write a packed store as pretokenization's `--format npz` would have written it.

    `shards` are its codes (n, V, T) in order. The folder is whole or absent. Raises InputError if
    it exists, or if an image does not lie in the folder of its class.
    """
    if folder.exists():
        raise InputError(f"{folder} exists: choose another --output")
    partial = folder.with_name(folder.name + ".export")  # .partial is pretokenization's
    paths = store.paths(store.images)
    for path, label in zip(paths, store.labels.tolist()):
        if path.split("/")[0] != store.classes[label] or ".." in path.split("/"):
            raise InputError(
                f"{store.folder} lists {path}, which is not in the folder of its class"
            )
    with writing(partial):
        shutil.rmtree(partial, ignore_errors=True)  # of a killed call
        partial.mkdir(parents=True)
        first = 0
        for codes in tqdm(shards, unit="shard", desc=folder.name, disable=None):
            write_npz_files(partial, paths[first : first + len(codes)], codes)
            first += len(codes)
        about = {name: value for name, value in store.manifest.items() if name not in PACKED_ONLY}
        write_npz_manifest(partial, about)
        os.rename(partial, folder)
        sync_folder(folder.parent)


def write_npz_manifest(store: Path, entries: dict[str, Any]) -> None:
    """Write the manifest that the published layout lacks, and one folder per class."""
    for name in entries["classes"]:
        (store / name).mkdir(exist_ok=True)  # a class keeps its rank without a readable image
        sync_folder(store / name)
    write_manifest(store, {"layout": "npz", **entries})
    sync_file(store / MANIFEST)
    sync_folder(store)
