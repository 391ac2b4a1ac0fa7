"""The end of the quickstart: two pictures and one table, from the files that its programs wrote."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import configs.load
from configs.schema import TokenizerRun
from data.images import CenterImages, CroppedImages, list_images
from data.tokens import TokenStore
from evaluation.metrics import frechet_distance
from evaluation.reconstruction import reconstruct_all
from modeling.tokenizer import Tokenizer
from modeling.weights import load_weights
from runtime.program import run


def validation_metrics(folder: Path, stage: int) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics on all validation images, and pairs before | after of the first ones."""
    options = configs.load.load(TokenizerRun, [f"config={folder / f'stage{stage}/config.yaml'}"])
    tokenizer = Tokenizer(options.model.vq_model)
    load_weights(tokenizer, folder / f"stage{stage}/tokenizer.pth")
    # Every tenth image first: all ten classes come into the picture.
    paths = [path for path, _ in list_images(folder / "data/val")[0]]
    paths = [p for start in range(10) for p in paths[start::10]]
    images = CenterImages(paths, tokenizer.config.image_size)
    sums, before, after = reconstruct_all(tokenizer, DataLoader(images, 33), torch.device("cpu"))
    return sums.metrics(), torch.stack([before, after], 1).flatten(0, 1)


def features(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, H/2 · W/2) grey means of 2x2 pixels."""
    grey = images.astype(np.float32).mean(3) / 255
    n, h, w = grey.shape
    return grey.reshape(n, h // 2, 2, w // 2, 2).mean((2, 4)).reshape(n, -1)


def real_digits(folder: Path, size: int, kind: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Features and classes of real digits: their centre crops, or all views of a kind."""
    samples, _ = list_images(folder)
    paths, labels = [path for path, _ in samples], np.array([label for _, label in samples])
    if kind is None:
        views = torch.stack([CenterImages(paths, size)[i] for i in range(len(paths))])
        return features(views.permute(0, 2, 3, 1).numpy()), labels
    crops = CroppedImages(paths, size, kind)
    views = torch.stack([crops[i] for i in range(len(paths))])  # (N, V, 3, S, S)
    pixels = views.flatten(0, 1).permute(0, 2, 3, 1).numpy()
    return features(pixels), np.repeat(labels, views.shape[1])


def best_validation(folder: Path) -> dict[str, float]:
    """The record of the weights that were sampled from, with the training loss before it."""
    lines = (folder / "generator/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    best = min((r for r in records if "val/loss" in r), key=lambda r: r["val/loss"])
    training = [r for r in records if "loss" in r and r["step"] <= best["step"]]
    return {**best, "loss": training[-1]["loss"]}


def main(argv: list[str]) -> None:
    folder = Path(argv[0])
    stage1, _ = validation_metrics(folder, 1)
    stage2, pairs = validation_metrics(folder, 2)
    picture(pairs[:60], folder / "reconstructions.png", 12)

    images = np.load(folder / "samples.npz")["arr_0"]
    codes = np.load(folder / "samples_codes.npz")["arr_0"]
    asked = np.arange(len(images)) % 10
    shown = torch.from_numpy(images[:100]).permute(0, 3, 1, 2) / 255  # 0…9, ten times
    picture(shown, folder / "generated.png", 10)

    size = images.shape[1]
    real, classes = real_digits(folder / "data/train", size, "five_crop")
    held_out, _ = real_digits(folder / "data/val", size, "five_crop")
    fid = frechet_distance(features(images), real), frechet_distance(held_out, real)
    classifier = SVC(C=10.0).fit(real, classes)
    on_real = classifier.score(*real_digits(folder / "data/val", size, None))
    on_generated = (classifier.predict(features(images)) == asked).mean()

    store = TokenStore(folder / "cache_train")
    known = {store.codes(i, v).tobytes() for i in range(store.images) for v in range(store.views)}
    copies = np.mean([row.astype(np.int64).tobytes() in known for row in codes])
    generator = best_validation(folder)

    rows = [
        ("reconstruction PSNR, stage 1 (causal decoder)", f"{stage1['psnr']:.2f} dB"),
        ("reconstruction PSNR, stage 2 (bidirectional decoder)", f"{stage2['psnr']:.2f} dB"),
        ("codes in use on validation images", f"{stage2['codebook_use']:.1%}"),
        ("generator loss, training | validation", f"{generator['loss']:.3f} | {generator['val/loss']:.3f}"),
        ("generator top-1 accuracy, validation", f"{generator['val/accuracy']:.1%}"),
        (f"{len(images)} generated digits read as the class asked for", f"{on_generated:.1%}"),
        ("real validation digits read right by the same classifier", f"{on_real:.1%}"),
        ("FID to training digits, of generated | validation ones", f"{fid[0]:.2f} | {fid[1]:.2f}"),
        ("generated digits whose codes copy a training image's", f"{copies:.1%}"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    print(
        f"pictures: {folder / 'reconstructions.png'} (before | after), {folder / 'generated.png'}"
    )


def picture(images: torch.Tensor, path: Path, per_row: int) -> None:
    """A grid of (N, 3, H, W) in [0, 1], twice as large, as PNG."""
    grid = to_pil_image(make_grid(images, nrow=per_row, padding=2, pad_value=0.5))
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    run(main, sys.argv[1:])
