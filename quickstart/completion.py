"""Digits completed from their upper half by the quickstart's models, as one picture:

    python -m quickstart.completion output/quickstart docs/completion.png

Left: the beginning is encoded with the whole image. Right: the lower half is masked before encoding. Rows:
the first validation digit of every class. Columns: the digit, what the encoder saw of it, and
completions of the same codes with other random numbers.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import configs.load
from configs.schema import GeneratorRun
from data.images import photo_crop, scan_images, to_float
from data.pictures import captioned, enlarged, picture_grid, to_pixels, write_png
from evaluation.reconstruction import psnr
from generation.prefix import encode_beginning, masked_below
from modeling.engine import Engine
from modeling.generator import Generator
from modeling.pipeline import Pipeline
from modeling.sampling import image_uniforms
from modeling.tokenizer import Tokenizer
from runtime.arguments import Parser, as_path
from runtime.program import run

COMPLETIONS, SEED = 5, 0
ENLARGED, MARGIN = 2, 2


def places(argv: list[str], program: str, description: str) -> tuple[Path, Path]:
    """The folder of the quickstart's models and the picture to write, from the command line."""
    parser = Parser(prog=f"python -m quickstart.{program}", description=description)
    parser.add_argument("folder", type=as_path, help="the models' folder: output/quickstart")
    parser.add_argument("picture", type=as_path, help="the .png to write")
    args = parser.parse_args(argv)
    return args.folder, args.picture


def load_models(folder: Path) -> tuple[Tokenizer, Generator, GeneratorRun]:
    """The quickstart's tokenizer of stage 2 and its generator, with the options of the latter's run."""
    options = configs.load.load(GeneratorRun, [f"config={folder / 'generator/config.yaml'}"])
    weights = folder / "generator/generator_best.bin", folder / "stage2/tokenizer.pth"
    pipeline = Pipeline(*weights, device="cpu")
    return pipeline.tokenizer, pipeline.generator, options


@torch.inference_mode()
def block(
    tokenizer: Tokenizer, engine: Engine, pixels: list[Tensor], classes: list[int], mask: bool
) -> np.ndarray:
    """One half of the picture, of digits (3, S, S), uint8, and their classes."""
    config, rows = tokenizer.config, tokenizer.config.grid // 2
    seen_rows = rows * config.patch_size
    codes = torch.cat([encode_beginning(tokenizer, image, rows, mask) for image in pixels])
    count = COMPLETIONS * len(pixels)
    uniforms = image_uniforms(SEED, range(count), config.num_tokens)
    labels = torch.tensor(classes).repeat_interleave(COMPLETIONS)
    sampled = engine.sample(labels, uniforms, codes.repeat_interleave(COMPLETIONS, 0))
    completed = tokenizer.decode(sampled).unflatten(0, (len(pixels), COMPLETIONS))
    originals = to_float(torch.stack(pixels))
    seen = torch.stack([masked_below(x, seen_rows) if mask else x for x in originals])
    panels = torch.cat([originals[:, None], seen[:, None], completed], 1).flatten(0, 1)
    images = enlarged(to_pixels(panels), ENLARGED * config.image_size)
    wanted = originals[:, None].expand_as(completed).flatten(0, 1)[:, :, seen_rows:]
    figure = psnr(wanted, completed.flatten(0, 1)[:, :, seen_rows:]).mean().item()
    return captioned(
        picture_grid(images, 2 + COMPLETIONS, MARGIN, background=127),
        "the lower half masked before encoding" if mask else "encoded with the whole image",
        f"PSNR of the sampled lower half: {figure:.2f} dB",
    )


def main(argv: list[str]) -> None:
    folder, picture = places(argv, "completion", "Complete the quickstart's digits: a picture.")
    tokenizer, generator, options = load_models(folder)
    listing = scan_images(folder / "data/val")
    first = dict(zip(listing.labels[::-1].tolist(), reversed(listing.paths)))
    classes = sorted(first)
    pixels = [photo_crop(first[label], tokenizer.config.image_size) for label in classes]
    engine = Engine(generator, COMPLETIONS * len(pixels), options.model.generator.sampling)
    halves = [block(tokenizer, engine, pixels, classes, mask) for mask in (False, True)]
    gap = np.full((halves[0].shape[0], 12, 3), 255, np.uint8)
    write_png(np.concatenate([halves[0], gap, halves[1]], 1), picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
