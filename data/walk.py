"""Walks through folders of images and of codes."""

import os
from collections import Counter, deque

# Names, in lower case, that operating systems add beside a user's files; dot files are hidden too.
SYSTEM = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "desktop.ini",
}  # fmt: skip
HIDDEN, LINKED = "hidden or system entries", "links to folders that are listed anyway"


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def walk(root: str) -> tuple[dict[str, list[str]], Counter[str]]:
    """File names by the path of their folder, "" for the root, and numbers of entries left out.

    Every real folder is entered once: under its own name if it lies below the root, otherwise under that
    of the first link to it. A link to a folder that contains it is not followed, because everything
    beside it would be listed again.
    """
    folders: dict[str, list[str]] = {}
    left_out: Counter[str] = Counter()
    entered = set()
    starts = deque([root])  # links are walked after all real folders
    while starts:
        links = []
        for parent, names, files in os.walk(starts.popleft(), onerror=fail):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in entered:
                left_out[LINKED] += 1
                names.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            shown = [name for name in files if not is_hidden(name)]
            folders[os.path.relpath(parent, root)] = shown
            left_out[HIDDEN] += len(files) - len(shown) + sum(map(is_hidden, names))
            names[:] = [name for name in names if not is_hidden(name)]
            links += [path for n in names if os.path.islink(path := os.path.join(parent, n))]
        for link in sorted(links):
            above = os.path.realpath(link)
            if os.path.commonpath([above, os.path.realpath(os.path.dirname(link))]) == above:
                left_out[LINKED] += 1
            else:
                starts.append(link)
    folders[""] = folders.pop(".")
    return folders, +left_out


def fail(error: OSError) -> None:
    raise error
