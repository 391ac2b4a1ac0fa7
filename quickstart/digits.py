"""Write scikit-learn's 1,797 handwritten digits as an ImageFolder: `python -m quickstart.digits DIR`.

1,500 for training and 297 for validation, drawn by class, 8x8 scans enlarged to 32x32 PNGs.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

VALIDATION = 297


def write_digits(folder: Path) -> None:
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(
        np.arange(len(pixels)), test_size=VALIDATION, stratify=digits.target, random_state=0
    )
    for split, indices in (("train", train), ("val", val)):
        for i in indices:
            target = folder / split / str(digits.target[i]) / f"{i:04d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels[i]).resize((32, 32), Image.Resampling.BILINEAR)
            image.save(target)


if __name__ == "__main__":
    write_digits(Path(sys.argv[1]))
