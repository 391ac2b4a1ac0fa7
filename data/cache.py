"""What both layouts of a token cache share: the manifest and the reading interface.

`data/tokens.py` documents the entries of the manifest.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from data.classes import map_labels
from runtime.errors import InputError

MANIFEST = "manifest.json"
FORMAT, VERSION = "alitok-tokens", 1


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    content = {"format": FORMAT, "version": VERSION, **entries}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1))


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises InputError if the manifest is damaged or has another format."""
    try:
        manifest = json.loads(path.read_text())
        name, version = manifest["format"], manifest["version"]
        if (name, version) != (FORMAT, VERSION):
            raise InputError(
                f"{path} has format {name}, version {version}, not {FORMAT}, version {VERSION}: read it with "
                f"the program that wrote it, or make the cache again"
            )
        classes = manifest.get("classes", [])
        if [Path(c).name for c in classes] != classes or {"", ".."} & {*classes}:
            raise ValueError("its classes are not names of folders")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is damaged ({e!r}); make the cache again") from e
    return manifest


class TokenCache(ABC):
    """A token cache opened for reading.

    `manifest["codebook_size"]` and `manifest["tokenizer"]` are None for a published cache without manifest.
    """

    folder: Path
    manifest: dict[str, Any]
    images: int  # N
    views: int  # V, per image
    tokens: int  # T, codes per view
    classes: list[str]  # names; a label is an index into them
    labels: np.ndarray  # (N,), int32
    codebook_size: int | None

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Short hashes of the cache's content, without its classes."""

    @abstractmethod
    def codes(self, image: int, view: int) -> np.ndarray:
        """Codes (T,), int64, of one view. Raises InputError for codes beyond the codebook."""

    @abstractmethod
    def paths(self, count: int) -> list[str]:
        """Paths of the first `count` images, relative to the image folder."""

    @abstractmethod
    def verify(self) -> None:
        """Read everything. Raises InputError if a file is damaged or a value is out of range."""

    def check(
        self,
        codebook_size: int,
        tokens: int,
        tokenizer: str | None = None,
        encoder_heads: int | None = None,
    ) -> None:
        """Refuse another tokenizer's cache; fields unknown on either side are skipped.

        Afterwards codes beyond `codebook_size` are refused even if the manifest does not state it.
        """
        self.refuse_joined_views(tokens)
        for name, there, here in (
            ("codebook size", self.manifest["codebook_size"], codebook_size),
            ("codes per image", self.tokens, tokens),
            ("tokenizer", self.manifest["tokenizer"], tokenizer),
            ("encoder_heads", self.manifest.get("encoder_heads"), encoder_heads),
        ):
            if None not in (there, here) and there != here:
                raise InputError(
                    f"{self.folder} is another tokenizer's cache: {name} {there} there, {here} here; "
                    f"pretokenize with this tokenizer or use its cache"
                )
        self.codebook_size = codebook_size

    def refuse_joined_views(self, tokens: int) -> None:
        """Raise InputError if the published program's defect made one view of two with `tokens` codes."""
        if self.views == 1 and self.tokens == 2 * tokens and self.manifest["tokenizer"] is None:
            raise InputError(
                f"{self.folder} holds (1, {self.tokens}) codes per image: a bug of the published "
                f"program joined each image's two views; make the cache with pretokenization.py"
            )

    def use_classes(self, classes: list[str]) -> None:
        """Replace labels by indices of the same names in `classes`.

        Raises InputError if `classes` lacks the class of an image.
        """
        if classes != self.classes:
            self.check_labels()
            self.labels = map_labels(self.labels, self.classes, classes, self.folder)
            self.classes = list(classes)

    def check_labels(self) -> None:
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise InputError(
                f"{self.folder} holds labels beyond its {len(self.classes)} classes; make it again"
            )

    def check_codes(self, codes: np.ndarray, where: str) -> None:
        """Refuse codes outside the codebook; `where` names the image or shard in the message."""
        size = self.codebook_size
        signed = codes.dtype.kind == "i"
        if (signed and codes.min() < 0) or (size is not None and codes.max() >= size):
            limit = "below 0" if size is None else f"beyond {size - 1}"
            raise InputError(
                f"{where} of {self.folder} holds codes {limit}: it is damaged or another "
                f"tokenizer's; make the cache again"
            )
