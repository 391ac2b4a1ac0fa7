"""Work cut into numbered parts. Any rank may write a part; it is written whole or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InputError
from runtime.files import read_npz, whole_file, write_whole


def batches_of(count: int, batch: int, rank: int = 0, world: int = 1) -> list[range]:
    """One rank's share of fixed batches of the indices below `count`; the last batch may be smaller."""
    starts = range(0, count, batch)[rank::world]
    return [range(start, min(start + batch, count)) for start in starts]


def differing(
    earlier: dict[str, Any],
    settings: dict[str, Any],
    places: tuple[object, object] = ("there", "now"),
) -> str:
    """The entries in which two settings differ, with both values; empty if they agree.

    `places` says where each value is from.
    """
    return ", ".join(
        f"{key} ({earlier.get(key)} {places[0]}, {settings.get(key)} {places[1]})"
        for key in sorted(earlier.keys() | settings.keys())
        if earlier.get(key) != settings.get(key)
    )


def check_settings(path: Path, settings: dict[str, Any], remedy: str) -> None:
    """Write `settings` as JSON, or compare them with what an earlier run wrote there.

    Raises InputError, naming the differing entries and the remedy. Only one process calls this
    (`runtime.processes.on_main`).
    """
    if not path.exists():
        write_whole(path, json.dumps(settings, indent=1).encode())
        return
    try:
        earlier = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise InputError(f"{path} is damaged; {remedy}") from e
    changed = differing(earlier, settings)
    if changed:
        raise InputError(f"{path.parent} holds work with other settings: {changed}; {remedy}")


class Parts:
    """A folder of numbered .npz parts. A part that exists is complete."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def missing(self) -> list[int]:
        """The parts that do not exist yet. The main process asks (`runtime.processes.on_main`): a network
        file system may show the other processes an outdated listing."""
        return [i for i in range(self.count) if not self.path(i).exists()]

    def write(self, number: int, **arrays: Any) -> None:
        """Write the named arrays as part `number`."""
        with whole_file(self.path(number)) as partial, open(partial, "wb") as file:
            np.savez(file, **arrays)

    def read(self, number: int, name: str) -> np.ndarray:
        return read_npz(self.path(number), "remove it and run the same command again", name)[0]
