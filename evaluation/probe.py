"""A linear probe on a tokenizer's encoder: how well a linear map tells an image's class from its features.

    python -m evaluation.probe --tokenizer weights/AliTok.pth --data_path imagenet

DATA_PATH holds train/ and val/ with one folder per class. The probe is a multinomial logistic regression on features
of ADM's centre crops (`Tokenizer.features`), each scaled to mean 0 and variance 1 over the training images. Every
fifth training image is held out to choose the weight of the L2 penalty. The final probe is fitted to all of them.
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

import copy
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from configs.sizes import tokenizer_of
from data.classes import map_labels, printable
from data.images import scan_images
from data.loader import worker_count
from data.tree import ImagePath
from evaluation.reconstruction import image_batches, weights_hash
from evaluation.report import show, table_of
from modeling.pixels import to_float
from modeling.tokenizer import Tokenizer
from runtime.arguments import Parser, number, path
from runtime.errors import InputError
from runtime.processes import start_processes
from runtime.program import run

PENALTIES = tuple(10.0**power for power in range(0, -7, -1))  # each fit starts from the one before
HELD_OUT = 5  # every fifth training image
STEPS = 300  # of L-BFGS at most


# ---------------------------------------------------------------------- features
def features_of(
    tokenizer: Tokenizer, paths: list[ImagePath], layer: int, batch: int, workers: int
) -> dict[str, Tensor]:
    """Three kinds of features of N images: {name: (N, width)}, float32, on the CPU."""
    device, found = tokenizer.latent_tokens.device, defaultdict(list)
    batches = image_batches(paths, tokenizer.config.image_size, batch, workers)
    for _, pixels in tqdm(batches, "encode", -(-len(paths) // batch), unit="batch", disable=None):
        tokens, latents = tokenizer.features(to_float(pixels.to(device)), layer)
        found[f"tokens after block {layer}, mean"].append(tokens.mean(1).cpu())
        found["latents, mean"].append(latents.mean(1).cpu())
        found["latents, all"].append(latents.flatten(1).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


# ---------------------------------------------------------------------- the probe
def fit(probe: nn.Linear, features: Tensor, labels: Tensor, penalty: float) -> None:
    """Minimise the mean cross-entropy of labels (N,) given features (N, D) + penalty / 2 · |weights|².

    L-BFGS starts at the current weights and bias of `probe`. The bias has no penalty.
    """
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=STEPS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        squares = probe.weight.square().sum()
        value = F.cross_entropy(probe(features), labels) + penalty / 2 * squares
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType] - a tensor serves too


@torch.no_grad()
def top1(probe: nn.Linear, features: Tensor, labels: Tensor) -> float:
    return (probe(features).argmax(1) == labels).float().mean().item()


def probe_features(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, classes: int
) -> dict[str, float]:
    """`top1` on val (M, D) of a probe fitted to train (N, D), its `penalty`, and the `held_out_top1` that chose
    the penalty."""
    deviation, mean = torch.std_mean(train, 0, correction=0)
    train, val = ((x - mean) / deviation.clamp(min=1e-6) for x in (train, val))
    held_out = torch.arange(len(train), device=train.device) % HELD_OUT == HELD_OUT - 1

    final = nn.Linear(train.shape[1], classes, device=train.device)
    nn.init.zeros_(final.weight)
    nn.init.zeros_(final.bias)
    probe, scores = copy.deepcopy(final), {}
    for penalty in PENALTIES:
        fit(probe, train[~held_out], train_labels[~held_out], penalty)
        scores[penalty] = top1(probe, train[held_out], train_labels[held_out])
    best = max(PENALTIES, key=lambda penalty: scores[penalty])  # of equals the strongest
    fit(final, train, train_labels, best)
    return {"top1": top1(final, val, val_labels), "penalty": best, "held_out_top1": scores[best]}


# ---------------------------------------------------------------------- the program
def main(argv: list[str]) -> None:
    description = "Train a linear probe on a tokenizer's tokens and latents, and print its top-1."
    parser = Parser(prog="python -m evaluation.probe", description=description)
    add = parser.add_argument
    add("--tokenizer", type=path, default="weights/AliTok.pth", help="weights or a run folder")
    add("--config", type=path, help="YAML whose model.vq_model describes another tokenizer")
    folders = "folder of train/ and val/ with class folders"
    add("--data_path", type=path, required=True, help=folders)
    add("--layer", type=number(1, 1024), help="block of the encoder, from 1 (the last)")
    add("--batch_size", type=number(1, 65_536), default=64, help="images (64)")
    add("--num_workers", type=number(0, 1024), default=worker_count(), help="reading processes")
    add("--device", choices=["cpu", "cuda"], help="by default CUDA if there is a GPU")
    args = parser.parse_args(argv)
    device = start_processes(args.device).device
    tokenizer = tokenizer_of(args.tokenizer, args.config).to(device)
    layer = args.layer or tokenizer.config.encoder_layers
    train, val = (scan_images(Path(args.data_path) / split) for split in ("train", "val"))
    if len(train.classes) < 2 or len(train.paths) < HELD_OUT:
        raise InputError(
            f"{printable(train.root)} holds {train.describe()}: a probe needs at least two classes "
            f"and {HELD_OUT} images"
        )
    val_labels = map_labels(val.labels, val.classes, train.classes, val.root)
    y, val_y = (torch.from_numpy(x).long().to(device) for x in (train.labels, val_labels))
    x, val_x = (
        features_of(tokenizer, listing.paths, layer, args.batch_size, args.num_workers)
        for listing in (train, val)
    )
    classes = len(train.classes)
    probes = {
        name: probe_features(x[name].to(device), y, val_x[name].to(device), val_y, classes)
        for name in x
    }
    rows = [
        [name, str(x[name].shape[1]), f"{one['penalty']:g}", f"{one['held_out_top1']:.1%}",
         f"{one['top1']:.1%}"]
        for name, one in probes.items()
    ]  # fmt: skip
    images = f"{len(y)} training and {len(val_y)} validation images"
    result = {
        "probes": probes, "layer": layer, "images": [len(y), len(val_y)], "classes": classes,
        "tokenizer": weights_hash(tokenizer),
    }  # fmt: skip
    headers = ["features", "width", "L2 penalty", "held-out top-1", "val top-1"]
    show(result, f"{args.tokenizer}: {images} of {classes} classes", table_of(rows, headers))


if __name__ == "__main__":
    run(main)
