"""Write scikit-learn's 1,797 handwritten digits as an ImageFolder: `python -m quickstart.digits DIR`.

1,500 digits for training and 297 for validation, split by class; 8x8 scans enlarged to 32x32 PNGs.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from runtime.arguments import Parser, as_path
from runtime.program import run

VALIDATION = 297


def write_digits(folder: Path) -> None:
    values, classes = load_digits(return_X_y=True)  # (1797, 64) in 0 … 16, (1797,)
    pixels = np.round(np.asarray(values) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    train, val = train_test_split(
        np.arange(len(pixels)), test_size=VALIDATION, stratify=classes, random_state=0
    )
    for split, indices in (("train", train), ("val", val)):
        for i in indices:
            target = folder / split / str(classes[i]) / f"{i:04d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels[i]).resize((32, 32), Image.Resampling.BILINEAR)
            content = io.BytesIO()
            image.save(content, "png")
            # A file that is there keeps its time: caches are resumed only with unchanged images.
            if not target.exists() or target.read_bytes() != content.getvalue():
                target.write_bytes(content.getvalue())


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m quickstart.digits", description="Write the digits as images.")
    parser.add_argument("folder", type=as_path, help="folder to write train/ and val/ into")
    write_digits(parser.parse_args(argv).folder)


if __name__ == "__main__":
    run(main)
