"""The report of the quickstart: two pictures and one table, from the files that its programs wrote."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.svm import SVC

from data.images import CenterImages, scan_images, source_size, views_of
from data.pictures import picture_grid, to_pixels, write_png
from data.tokens import TokenStore
from evaluation.metrics import frechet_distance
from evaluation.reconstruction import (
    CodeUse,
    ImageMean,
    Preview,
    figures_of,
    image_batches,
    psnr,
    reconstruct,
)
from evaluation.report import table_of
from modeling.tokenizer import Tokenizer
from runtime.arguments import Parser, as_path
from runtime.program import run

CPU = torch.device("cpu")

PAIRS = 30  # reconstructions in the picture
GREY = 127  # between the images of a picture


def validation_metrics(folder: Path, stage: int) -> tuple[dict[str, float], np.ndarray]:
    """Metrics on all validation images, and pixels before | after of the first ones."""
    tokenizer = Tokenizer.from_pretrained(folder / f"stage{stage}/tokenizer.pth", device="cpu")
    # Every tenth image first, so that all ten classes come into the picture.
    paths = scan_images(folder / "data/val").paths
    paths = [p for start in range(10) for p in paths[start::10]]
    scores, preview = [ImageMean("psnr", psnr, CPU), CodeUse(tokenizer.config, CPU)], Preview(PAIRS)
    batches = image_batches(paths, tokenizer.config.image_size, batch=33, workers=0)
    reconstruct(tokenizer, batches, [*scores, preview])
    return figures_of(scores), to_pixels(preview.pairs)


def features(images: np.ndarray, colour: bool = False) -> np.ndarray:
    """(N, H, W, 3) uint8 -> grey means of 2x2 pixels (N, H/2 · W/2), or colours of 4x4 (N, H/4 · W/4 · 3)."""
    pixels, side = images.astype(np.float32) / 255, 4 if colour else 2
    if not colour:
        pixels = pixels.mean(3, keepdims=True)
    n, h, w, c = pixels.shape
    return pixels.reshape(n, h // side, side, w // side, side, c).mean((2, 4)).reshape(n, -1)


def real_images(folder: Path, size: int, kind: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, S, S, 3) and classes of real images: their centre crops, or all views of a kind."""
    listing = scan_images(folder)
    images = CenterImages(listing.paths, size if kind is None else source_size(size, kind))
    crops = torch.stack([images[i] for i in range(len(images))])
    views = torch.stack([crops] if kind is None else views_of(crops, size, kind), 1)
    pixels = views.flatten(0, 1).permute(0, 2, 3, 1).numpy()  # of (N, V, 3, S, S)
    return pixels, np.repeat(listing.labels, views.shape[1])


def best_validation(folder: Path) -> dict[str, float]:
    """The record of the weights that were sampled from, with the training loss before it."""
    lines = (folder / "generator/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    best = min((r for r in records if "val/loss" in r), key=lambda r: r["val/loss"])
    training = [r for r in records if "loss" in r and r["step"] <= best["step"]]
    return {**best, "loss": training[-1]["loss"]}


class Judge:
    """A classifier trained on crops of the training images, and Fréchet distances to their features.

    `data` holds train/ and val/, one folder per class. The features are grey for grey images.
    """

    def __init__(self, data: Path, size: int):
        self.data, self.size = data, size
        pixels, classes = real_images(data / "train", size, "five_crop")
        self.colour = bool((pixels != pixels[..., :1]).any())
        self.real, self.classes = features(pixels, self.colour), len(np.unique(classes))
        self.classifier = SVC(C=10.0).fit(self.real, classes)

    def of_samples(self, images: np.ndarray) -> dict[str, float]:
        """Scores of images (N, S, S, 3), uint8; image i was requested as class i mod their number."""
        found, asked = features(images, self.colour), np.arange(len(images)) % self.classes
        return {
            "fid": frechet_distance(found, self.real),
            "recognised": float((self.classifier.predict(found) == asked).mean()),
        }

    def of_validation(self) -> dict[str, float]:
        """What the validation images reach: crops for the distance, centre crops for the classifier."""
        crops, _ = real_images(self.data / "val", self.size, "five_crop")
        centres, classes = real_images(self.data / "val", self.size, None)
        read = self.classifier.predict(features(centres, self.colour))
        return {
            "fid_val": frechet_distance(features(crops, self.colour), self.real),
            "recognised_val": float((read == classes).mean()),
        }


def copied_share(folder: Path) -> float:
    """Share of generated digits whose codes are those of a training view."""
    codes = np.load(folder / "samples_codes.npz")["arr_0"]
    store = TokenStore(folder / "cache_train")
    known = {store.codes(i, v).tobytes() for i in range(store.images) for v in range(store.views)}
    return float(np.mean([row.astype(np.int64).tobytes() in known for row in codes]))


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m quickstart.report", description="Report on a quickstart.")
    parser.add_argument("folder", type=as_path, help="folder of a finished quickstart")
    folder = parser.parse_args(argv).folder
    stage1, _ = validation_metrics(folder, 1)
    stage2, pairs = validation_metrics(folder, 2)
    write_picture(pairs, folder / "reconstructions.png", 12)
    images = np.load(folder / "samples.npz")["arr_0"]
    write_picture(images[:100], folder / "generated.png", 10)  # 0…9, ten times
    judge = Judge(folder / "data", images.shape[1])
    score = {**judge.of_samples(images), **judge.of_validation()}
    generator = best_validation(folder)
    tokens = TokenStore(folder / "cache_val").tokens
    bits = generator["val/loss"] * tokens / math.log(2)
    rows = [
        ("reconstruction PSNR, stage 1 (causal decoder)", f"{stage1['psnr']:.2f} dB"),
        ("reconstruction PSNR, stage 2 (bidirectional decoder)", f"{stage2['psnr']:.2f} dB"),
        ("codes in use on validation images", f"{stage2['codebook_use']:.1%}"),
        ("generator loss, training | validation", f"{generator['loss']:.3f} | {generator['val/loss']:.3f}"),
        ("the same per validation image", f"{bits:.1f} bits"),
        ("generator top-1 accuracy, validation", f"{generator['val/accuracy']:.1%}"),
        (f"{len(images)} generated digits read as the class asked for", f"{score['recognised']:.1%}"),
        ("real validation digits read right by the same classifier", f"{score['recognised_val']:.1%}"),
        ("Fréchet distance to training digits (2×2 pixel means, not Inception), of generated | validation", f"{score['fid']:.2f} | {score['fid_val']:.2f}"),
        ("generated digits whose codes copy a training image's", f"{copied_share(folder):.1%}"),
    ]  # fmt: skip
    print(table_of(rows, align="left"))
    print(
        f"pictures: {folder / 'reconstructions.png'} (before | after), {folder / 'generated.png'}"
    )


def write_picture(images: np.ndarray, path: Path, columns: int) -> None:
    """A grid of (N, H, W, 3), uint8, enlarged twice."""
    grid = picture_grid(images, columns, margin=2, background=GREY)
    write_png(grid.repeat(2, 0).repeat(2, 1), path)


if __name__ == "__main__":
    run(main, sys.argv[1:])
