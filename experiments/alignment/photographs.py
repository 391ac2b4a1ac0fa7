"""Cut crops of free photographs: `python -m experiments.alignment.photographs DIR`.

The photographs are those among Debian's packages of desktop backgrounds (`PACKAGES`; names and licences in DATA.md).
They are downloaded by `apt-get download` into DIR/packages, unless the packages lie there already. No root is needed.

A crop is a square of 10 to 90 % of the photograph's shorter side at a random place, reduced to 72 pixels. Its class is
the size of the square: a detail, a part or a view. Held-out photographs appear in DIR/val alone.
"""

import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from data.images import load_image
from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.files import writing
from runtime.program import run

PACKAGES = (
    "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds", "plasma-workspace-wallpapers",
)  # fmt: skip
BACKGROUNDS, NATURE = "usr/share/backgrounds", "usr/share/backgrounds/mate/nature"
WALLPAPERS, LARGEST = "usr/share/wallpapers", "contents/images/2560x1600.jpg"
TRAINED = (
    *(f"{BACKGROUNDS}/{name}.jpg" for name in (
        "Bridge_by_Sander_Klootwijk", "Picture_0B_by_freespace", "Picture_1A_by_freespace",
        "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich",
        "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt",
        "sunset_by_Aitzol_Berasategi",
    )),
    *(f"{NATURE}/{name}.jpg" for name in (
        "Aqua", "Blinds", "Garden", "GreenMeadow", "LadyBird", "Storm", "TwoWings", "Wood", "YellowFlower",
    )),
    *(f"{WALLPAPERS}/{name}/{LARGEST}" for name in (
        "BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "FallenLeaf", "Grey", "Kite",
        "OneStandsOut", "Path", "summer_1am",
    )),
    f"{BACKGROUNDS}/Infinite-Sea_by_Aury88.jpg",
)  # fmt: skip
HELD_OUT = (
    f"{BACKGROUNDS}/Dragonfly_by_Bolly.jpg",
    f"{BACKGROUNDS}/Kleiber_by_Lukas_Baubkus.jpg",
    f"{BACKGROUNDS}/friends_by_Aitzol_Berasategi.jpg",
    f"{BACKGROUNDS}/picosdeeuropa_by_Aitzol_Berasategi.jpg",
    f"{NATURE}/Dune.jpg",
    f"{NATURE}/RainDrops.jpg",
    f"{WALLPAPERS}/EveningGlow/{LARGEST}",
)
SIDE = 72  # pixels of a crop: crops of 64 are shifted by up to 8
# Larger photographs are reduced to this side first: the smallest crop still has 144 pixels.
SHORTER = 1440
SHARES = (0.1, 0.9)  # of the photograph's shorter side
CLASSES = ((0.3, "detail"), (0.6, "part"), (1.0, "view"))  # up to which share
CROPS = {"train": 300, "val": 150}  # per photograph


def unpack(folder: Path) -> Path:
    """The files of all packages below `folder`. Raises InputError if a command fails or is missing."""
    files = folder / "files"
    folder.mkdir(parents=True, exist_ok=True)
    commands = [
        ["apt-get", "download", name] for name in PACKAGES if not [*folder.glob(f"{name}_*.deb")]
    ]
    try:
        for command in commands:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        for package in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(files)], check=True)
    except FileNotFoundError as e:
        raise InputError(
            f"{e.filename} is missing: run this on Debian or Ubuntu, or put the packages "
            f"{', '.join(PACKAGES)} into {folder} and unpack them into {files}"
        ) from e
    except subprocess.CalledProcessError as e:
        lines = (e.stderr or "").strip().splitlines() or [f"status {e.returncode}"]
        raise InputError(f"{' '.join(e.cmd)} failed ({lines[-1]}): run apt-get update first") from e
    return files


def write_crops(photograph: Path, folder: Path, number: int, rng: np.random.Generator) -> None:
    """Write `number` crops of one photograph into the folders of their classes."""
    photo = load_image(photograph)
    scale = SHORTER / min(photo.size)
    photo.thumbnail((photo.width * scale, photo.height * scale))
    shorter = min(photo.size)
    for index in range(number):
        share = rng.uniform(*SHARES)
        side = round(share * shorter)
        x, y = (int(rng.integers(length - side, endpoint=True)) for length in photo.size)
        crop = photo.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        kind = next(name for limit, name in CLASSES if share <= limit)
        crop.save(folder / kind / f"{name_of(photograph)}_{index:03}.png")


def name_of(photograph: Path) -> str:
    """The file's name without suffix or, for usr/share/wallpapers/NAME/contents/images/…, NAME."""
    return photograph.parents[2].name if photograph.match(LARGEST) else photograph.stem


def write_photographs(folder: Path) -> dict[str, int]:
    """Write folder/train and folder/val, one folder per class; the number of images in each."""
    files, counts = unpack(folder / "packages"), {}
    for split, names in (("train", TRAINED), ("val", HELD_OUT)):
        with writing(folder / split):
            for _, kind in CLASSES:
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            rng = np.random.default_rng([number, split == "val"])
            write_crops(files / name, folder / split, CROPS[split], rng)
        counts[split] = len(names) * CROPS[split]
    return counts


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.alignment.photographs",
                    description="Cut crops of free photographs as an image folder.")  # fmt: skip
    parser.add_argument("folder", type=as_path, help="train/ and val/ are written into it")
    folder = parser.parse_args(argv).folder
    counts = write_photographs(folder)
    print(f"{counts['train']} crops in {folder}/train, {counts['val']} in {folder}/val")


if __name__ == "__main__":
    run(main)
