"""The trial by which the second data set was chosen: `python -m experiments.alignment.data_trial DIR`.

Writes the candidates below DIR and compares their training and validation images without training anything: codes of
4x4 patches by k-means stand for a tokenizer's, tables of counts for a generator (`neighbours`). `photos` needs
`pip install scikit-image`, `emoji` what `emoji.py` needs; name the data sets to try others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from PIL import Image
from sklearn.cluster import MiniBatchKMeans

from data.images import center_crop, load_image, scan_images
from evaluation.reconstruction import codebook_use
from experiments.alignment.emoji import SIZE, write_emoji
from experiments.alignment.neighbours import predict
from modeling.tokenizer import TokenizerConfig
from quickstart.digits import write_digits
from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.program import run

CONFIG = TokenizerConfig(codebook_size=256, num_latent_tokens=64, image_size=32, patch_size=4)
CONTEXT = "left and above"
# scikit-image's photos in colour, and scikit-learn's; a class each.
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")  # fmt: skip
MORE_PHOTOS = ("china.jpg", "flower.jpg")
CROPS = {"train": 400, "val": 50}  # per photo
SIDES = (48, 96)  # pixels of a crop


def write_photos(folder: Path) -> None:
    """Random crops: of the left three quarters of every photo for training, of the rest for validation."""
    try:
        import skimage  # pyright: ignore[reportMissingImports] - for this trial alone
    except ImportError as e:
        raise InputError("photos come with scikit-image: pip install scikit-image") from e
    shipped = Path(skimage.__path__[0]) / "data"
    more = Path(sklearn.datasets.__file__).parent / "images"
    files = [*(shipped / name for name in PHOTOS), *(more / name for name in MORE_PHOTOS)]
    rng = np.random.default_rng(0)
    for file in files:
        photo = load_image(file)
        middle = photo.width * 3 // 4
        for split, left, right in (("train", 0, middle), ("val", middle, photo.width)):
            target = folder / split / file.stem
            target.mkdir(parents=True, exist_ok=True)
            for number in range(CROPS[split]):
                side = int(rng.integers(SIDES[0], SIDES[1], endpoint=True))
                x = int(rng.integers(left, right - side, endpoint=True))
                y = int(rng.integers(photo.height - side, endpoint=True))
                crop = photo.crop((x, y, x + side, y + side))
                crop.resize((SIZE, SIZE), Image.Resampling.LANCZOS).save(
                    target / f"{number:04}.png"
                )


WRITERS: dict[str, Callable[[Path], object]] = {
    "digits": write_digits, "emoji": write_emoji, "photos": write_photos
}  # fmt: skip


# ---------------------------------------------------------------------- what is compared
@dataclass
class Trial:
    """Figures of training / validation images."""

    images: tuple[int, int]
    psnr: tuple[float, float]  # dB, of k-means codes
    perplexity: tuple[float, float]  # of these codes
    bits: tuple[float, float]  # per code given CONTEXT; of training images that the tables left out
    nearest: tuple[
        float, float
    ]  # median RMS distance to the nearest (other) training image, as 8x8

    def line(self, name: str) -> str:
        pairs = [
            f"{first:{form}} / {second:{form}}"
            for (first, second), form in (
                (self.images, "d"), (self.psnr, ".1f"), (self.perplexity, ".0f"), (self.bits, ".2f"),
                (self.nearest, ".3f"),
            )
        ]  # fmt: skip
        return f"| {name} | {' | '.join(pairs)} |"


def read_crops(folder: Path) -> np.ndarray:
    """(N, 32, 32, 3), float32 in [0, 1]: the centre crops of a folder."""
    paths = scan_images(folder).paths
    pixels = [np.asarray(center_crop(load_image(path), CONFIG.image_size)) for path in paths]
    return np.stack(pixels).astype(np.float32) / 255


def patches(images: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) -> (64·N, 48), row-major as codes are."""
    cut = images.reshape(len(images), 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(-1, 48)


def small(images: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) -> (N, 192): the means of patches, by colour."""
    return images.reshape(len(images), 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(images), -1)


def nearest(images: np.ndarray, known: np.ndarray) -> np.ndarray:
    """RMS distance of every image (N, 192) to the nearest of `known`, other than at its own place in it."""
    squares = (images**2).sum(1)[:, None] + (known**2).sum(1) - 2 * images @ known.T
    if images is known:
        np.fill_diagonal(squares, np.inf)
    return np.sqrt(squares.min(1).clip(0) / images.shape[1])


def perplexity(codes: np.ndarray) -> float:
    counts = np.bincount(codes.flatten(), minlength=CONFIG.codebook_size)
    return codebook_use(torch.from_numpy(counts))[1]


def try_out(folder: Path) -> Trial:
    """The figures of the images in folder/train and folder/val."""
    images = [read_crops(folder / split) for split in ("train", "val")]
    means = MiniBatchKMeans(CONFIG.codebook_size, random_state=0, n_init="auto", batch_size=4096, max_iter=20)  # fmt: skip
    means.fit(patches(images[0]))
    codes, psnr = [], []
    for of in images:
        cut = patches(of)
        found = np.asarray(means.predict(cut))
        error = np.square(cut - means.cluster_centers_[found]).reshape(len(of), -1).mean(1)
        psnr.append(float((-10 * np.log10(error.clip(1e-10))).mean()))
        codes.append(found.reshape(len(of), -1).astype(np.int64))
    train, val = codes
    drawn = np.random.default_rng(0).permutation(len(train))
    left_out, counted = drawn[: len(train) // 10], drawn[len(train) // 10 :]
    inside = predict(train[counted], train[left_out], CONFIG)[CONTEXT][0].mean()
    outside = predict(train, val, CONFIG)[CONTEXT][0].mean()
    known, asked = small(images[0]), small(images[1])
    return Trial(
        (len(train), len(val)), (psnr[0], psnr[1]), (perplexity(train), perplexity(val)),
        (float(inside), float(outside)),
        (float(np.median(nearest(known, known))), float(np.median(nearest(asked, known)))),
    )  # fmt: skip


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.alignment.data_trial",
                    description="Compare candidates for a data set.")  # fmt: skip
    parser.add_argument("folder", type=as_path, help="the images are written below it")
    parser.add_argument("data", nargs="*", metavar="DATA", help=f"of {', '.join(WRITERS)} (all)")
    args = parser.parse_args(argv)
    unknown = [name for name in args.data if name not in WRITERS]
    if unknown:
        raise InputError(f"no data set {unknown[0]}: there are {', '.join(WRITERS)}")
    heads = (
        "images",
        "PSNR of k-means codes, dB",
        "perplexity",
        f"bits given {CONTEXT}",
        "nearest",
    )
    print(f"| train / val | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}")
    for name in args.data or WRITERS:
        if not (args.folder / name).is_dir():
            WRITERS[name](args.folder / name)
        print(try_out(args.folder / name).line(name), flush=True)


if __name__ == "__main__":
    run(main)
