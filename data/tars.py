"""Images read directly from a tar; nothing is unpacked.

A tar inside the tar counts as a folder, so ImageNet's training set as downloaded, a tar with one tar per
class, lists like one folder per class. Listing reads the header of every member (ImageNet: 1.28 million)
and saves the result as TAR.index.npz in a folder of the caller, because the tar's own may be read-only:

    names           the members' paths in UTF-8, separated by NUL; a folder's ends with "/"
    offsets, sizes  int64, in bytes, of their content in the tar; 0 for folders
    about           version of this format; size in bytes and modification time (ns) of the tar

An index with another version, or of a tar that has changed since, is made anew.
"""

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from data.walk import is_hidden
from runtime.errors import InputError
from runtime.files import read_npz, whole_file
from runtime.processes import on_main

VERSION = 1
SCANNERS = 8  # inner tars listed at once, because network file systems respond slowly
END = bytes(tarfile.BLOCKSIZE)  # the block after the last member
MAGIC = {  # patterns of the first bytes: of a tar, and of compressed files, which may hold one
    "tar": rb"(?s:.{257})ustar", "gzip": rb"\x1f\x8b", "bzip2": rb"BZh[1-9]1AY&SY", "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd",
}  # fmt: skip


class Member(NamedTuple):
    """A file in a tar, or a folder, whose name ends with "/"."""

    name: str
    offset: int = 0  # bytes, of its content in the file
    size: int = 0


class TarPath(NamedTuple):
    """An image in a tar, used like a path; `str` gives TAR/NAME."""

    tar: "Tar"
    number: int  # of the member

    def __str__(self) -> str:
        return f"{self.tar.path}/{self.tar.names[self.number]}"

    def read(self) -> bytes:
        """Raises InputError if the tar has changed or was cut short, and OSError, which may pass."""
        path, size = self.tar.path, int(self.tar.sizes[self.number])
        file = opened(path, self.tar.stamp)
        try:
            content = os.pread(file.fileno(), size, int(self.tar.offsets[self.number]))
        except OSError:
            opened.cache_clear()  # a stale handle stays so
            raise
        if len(content) < size:
            raise cut_short(path)
        return content


@dataclass(eq=False)
class Tar:
    """A tar whose members are known."""

    path: Path
    stamp: tuple[int, int]  # `stamp_of` the listed file
    names: list[str]  # of the members, N
    offsets: np.ndarray  # of their content in the file, in bytes: (N,), int64
    sizes: np.ndarray  # in bytes: (N,), int64


@cache
def opened(path: Path, stamp: tuple[int, int]) -> IO[bytes]:
    """A tar, kept open. Forked processes and threads share it, as `os.pread` moves no position."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115 - kept
    if stamp_of(file.fileno()) != stamp:
        raise InputError(f"{path} has changed since it was listed: run the same command again")
    return file


def is_tar(path: str | Path) -> bool:
    """Whether a file is a tar, compressed or not, by its name or its first bytes."""
    path = Path(path)
    return path.is_file() and (path.suffix.lower() == ".tar" or kind_of(path) is not None)


def kind_of(path: Path) -> str | None:
    """A key of `MAGIC`, by a file's first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(tarfile.BLOCKSIZE)
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; make it readable") from e
    return next((name for name, magic in MAGIC.items() if re.match(magic, head)), None)


def open_tar(path: str | Path, index_folder: Path | None) -> Tar:
    """A tar of images; `index_folder`, unless None, keeps its index.

    All processes of a job call this together; the main process writes the index. Raises InputError if the
    file is compressed, empty, cut short or not a tar.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind not in ("tar", None):
        raise InputError(
            f"{path} is compressed ({kind}), so images cannot be read in place: decompress or unpack it"
        )
    stamp = stamp_of(path)
    if index_folder is None:
        return list_members(path, stamp)
    index = index_folder / f"{path.name}.index.npz"

    def update() -> None:
        if read_index(index, path, stamp) is None:
            tar = list_members(path, stamp)
            with contextlib.suppress(InputError):  # the index only saves time
                write_index(index, tar)

    on_main(update)
    # A machine without access to the main process's folder lists the tar itself.
    return read_index(index, path, stamp) or list_members(path, stamp)


def stamp_of(file: Path | int) -> tuple[int, int]:
    """Size in bytes and modification time (ns), which identify a file's state."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


# ---------------------------------------------------------------------- listing
def list_members(path: Path, stamp: tuple[int, int]) -> Tar:
    """A tar, in which inner tars are replaced by their members. Raises InputError, as `walk` does."""
    found, inner = [], []
    for member in walk(path, 0, path.stat().st_size, str(path)):
        hidden = any(map(is_hidden, member.name.split("/")))  # as macOS adds ._NAME.tar
        is_inner = member.name.lower().endswith(".tar") and not hidden
        (inner if is_inner else found).append(member)

    def look_into(member: Member) -> list[Member]:
        where = f"{path}/{member.name}"
        return list(walk(path, member.offset, member.offset + member.size, where))

    with ThreadPoolExecutor(SCANNERS) as pool:
        contents = pool.map(look_into, inner)
        bar = tqdm(
            contents, f"list {path.name}", len(inner), False, unit="tar", delay=2, disable=None
        )
        for member, content in zip(inner, bar):
            folder = f"{member.name[: -len('.tar')]}/"
            found.append(Member(folder))
            found += [m._replace(name=folder + m.name) for m in content]
    if not any(m.name[-1] != "/" for m in found):
        raise InputError(f"{path} is empty: it holds no files")
    names, offsets, sizes = zip(*found)
    return Tar(path, stamp, list(names), np.array(offsets, np.int64), np.array(sizes, np.int64))


def walk(path: Path, start: int, end: int, where: str) -> Iterator[Member]:
    """The members of the tar in bytes `start` … `end` - 1 of a file; `where` names it in errors."""
    if start == end:
        raise InputError(f"{where} is empty: it holds no bytes; download or pack it again")
    try:
        with open(path, "rb") as file:
            file.seek(start)
            tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
            while (info := tar.next()) is not None:
                # A million of them would fill a gigabyte.
                tar.members.clear()  # type: ignore[attr-defined] (it is there, but not declared)
                if info.size < 0 or info.offset_data + info.size > end:
                    raise cut_short(where)
                member = member_of(info, where)
                if member.name != "/":  # the root itself, as `tar -C DIR .` stores it
                    yield member
            file.seek(tar.offset)  # after the last member that the library found
            if tar.offset + len(END) > end or file.read(len(END)) != END:
                raise cut_short(where)
    except (tarfile.TarError, OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise InputError(
            f"{where} is not a tar, or is damaged ({reason}): download or pack it again"
        ) from e


def member_of(info: tarfile.TarInfo, where: str) -> Member:
    """Raises InputError for a member without its own content, or with a name outside the tar."""
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in info.name or not (parts or info.isdir()):
        raise InputError(f"{where} holds {info.name!r}, a name outside the tar: pack it again")
    name = "/".join(parts)
    if info.isdir():
        return Member(f"{name}/")
    if not info.isreg() or info.issparse():
        raise InputError(
            f"{where} holds {name}, a link or special file: pack the files themselves (tar "
            f"--dereference --hard-dereference)"
        )
    return Member(name, info.offset_data, info.size)


def cut_short(where: str | Path) -> InputError:
    return InputError(f"{where} was cut short or is damaged: download or pack it again")


# ---------------------------------------------------------------------- the index
def write_index(index: Path, tar: Tar) -> None:
    text = "\0".join(tar.names).encode(errors="surrogateescape")
    with whole_file(index, shared=True) as partial, open(partial, "wb") as file:
        np.savez(
            file, names=np.frombuffer(text, np.uint8), offsets=tar.offsets, sizes=tar.sizes,
            about=np.array([VERSION, *tar.stamp], np.int64),
        )  # fmt: skip


def read_index(index: Path, path: Path, stamp: tuple[int, int]) -> Tar | None:
    """None if the index is missing or damaged, or describes another state of the tar."""
    try:
        about, text, offsets, sizes = read_npz(index, "", "about", "names", "offsets", "sizes")
    except InputError:
        return None
    names = text.tobytes().decode(errors="surrogateescape").split("\0")
    sound = about.tolist() == [VERSION, *stamp] and len(names) == offsets.size == sizes.size
    return Tar(path, stamp, names, offsets, sizes) if sound else None
