"""Photos through a tokenizer and back, as one picture per photo.

    python -m evaluation.look --tokenizer weights/AliTok.pth photo.jpg folder/

OUTPUT/NAME.png shows, from top to bottom,

    original | reconstruction | difference, magnified, with PSNR and SSIM
    of a stage-1 tokenizer: the strip that the prefix tokens decode to, below its target
    what the first n codes alone decode to, n = K, K + g, …, T (K prefix tokens, g codes per row)

For the last part the decoder gets only the first n codes. A causal decoder makes the same rows from them
as from all codes. A bidirectional decoder was not trained with fewer codes, so its rows show how much it
needs the others.
"""

import runtime.openmp  # noqa: F401  # isort: skip (before torch loads OpenMP)

import os
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from configs.sizes import tokenizer_of
from data.classes import printable
from data.images import photo_crop, to_float
from data.pictures import WHITE, captioned, enlarged, picture_grid, stacked, to_pixels, write_png
from data.tree import describe_left_out, read_tree
from evaluation.reconstruction import MAGNIFICATION, psnr, ssim
from modeling.tokenizer import Tokenizer, TokenizerConfig, prefix_target
from runtime.arguments import Parser, path
from runtime.errors import InputError
from runtime.processes import matmul_precision, start_processes
from runtime.program import run

WIDTH = 192  # pixels of an image at least
COLUMNS = 6  # of the pictures from the first codes
MARGIN = 6  # pixels around pictures
EMPTY = 224  # grey value of rows that are not decoded


# ---------------------------------------------------------------------- photos
def list_photos(sources: list[str], output: Optional[Path] = None) -> dict[str, str]:
    """Paths of files, and of all images below folders, by picture name."""
    photos: dict[str, str] = {}
    for source in sources:
        if os.path.isdir(source):
            tree = read_tree(source, output)
            found = {name: os.path.join(source, name) for name in tree.images()}
            if tree.left_out:
                print(f"{source}: {len(found)} images{describe_left_out(tree.left_out)}")
        elif os.path.exists(source):
            found = {os.path.basename(source): source}
        else:
            raise InputError(f"no photo or folder {source}")
        for name in found.keys() & photos.keys():
            raise InputError(
                f"{photos[name]} and {found[name]} would both be written to {name}.png: use separate calls "
                f"with different --output"
            )
        photos |= found
    return photos


class Look(NamedTuple):
    """An image (3, S, S) in [0, 1], its codes and its reconstructions."""

    image: Tensor
    codes: Tensor  # (T,)
    strip: Optional[Tensor]  # (3, p, K·p), of the prefix tokens alone
    # {n: the rows (3, r·p, S) that the first n = K + r·g codes make}; for n = K, the strip's first row of patches
    rows: dict[int, Tensor]

    @property
    def reconstruction(self) -> Tensor:
        return self.rows[len(self.codes)]


@torch.no_grad()
def look_at(tokenizer: Tokenizer, pixels: Tensor) -> Look:
    """Encode an image (3, S, S), uint8, in float32, and decode growing numbers of its codes."""
    config, decoder = tokenizer.config, tokenizer.decoder
    image = to_float(pixels.to(tokenizer.latent_tokens.device))
    with matmul_precision("fp32"):
        codes = tokenizer.encode(image.unsqueeze(0))  # (1, T)
        vectors = tokenizer.quantize.lookup(codes)
        K, g, T = config.num_prefix_tokens, config.grid, config.num_tokens
        strip = decoder.strip(decoder.tokens(vectors[:, :K])) if config.prefix_head else None
        rows = {} if strip is None else {K: strip[0, :, :, -config.image_size :]}
        rows |= {n: decoder(vectors[:, :n])[0][0] for n in range(K + g, T + 1, g)}
    return Look(image, codes[0], None if strip is None else strip[0], rows)


# ---------------------------------------------------------------------- the picture
def picture_of(look: Look, config: TokenizerConfig, name: str) -> np.ndarray:
    """The picture described in the module's docstring: (height, width, 3), uint8."""
    difference = (look.image - look.reconstruction).abs() * MAGNIFICATION
    panels = [
        captioned(shown(look.image), "original"),
        captioned(shown(look.reconstruction), "reconstruction"),
        captioned(shown(difference), f"difference x {MAGNIFICATION}"),
    ]
    top = picture_grid(np.stack(panels), 3, MARGIN)
    parts = [top, title(f"{name}: {described(look)}", top.shape[1])]
    if look.strip is not None:
        parts.append(strip_picture(look, look.strip, config))
    kind = "causal" if config.causal else "bidirectional"
    parts.append(title(f"decoded by the {kind} decoder from the first codes alone:", top.shape[1]))
    parts.append(picture_grid(np.stack([first_codes(look, n) for n in look.rows]), COLUMNS, MARGIN))
    return stacked(parts)


def title(text: str, width: int) -> np.ndarray:
    """A line of text of this width, with some space around it."""
    line = captioned(np.empty((0, width - MARGIN, 3), np.uint8), text)
    return np.pad(line, ((MARGIN, 0), (MARGIN, 0), (0, 0)), constant_values=WHITE)


def shown(image: Tensor) -> np.ndarray:
    """An image (3, H, W) in [0, 1] as pixels, WIDTH wide or more."""
    return enlarged(to_pixels(image.unsqueeze(0))[0], WIDTH)


def decibels(image: Tensor, other: Tensor) -> str:
    """The PSNR of two images (3, H, W), as text."""
    return f"{psnr(image.unsqueeze(0), other.unsqueeze(0)).item():.2f} dB"


def described(look: Look) -> str:
    """The figures of one photo, as text."""
    similarity = ssim(look.image.unsqueeze(0), look.reconstruction.unsqueeze(0)).item()
    codes = f"codes {len(look.codes)} ({len(look.codes.unique())} different)"
    return f"PSNR {decibels(look.image, look.reconstruction)}, SSIM {similarity:.4f}, {codes}"


def strip_picture(look: Look, strip: Tensor, config: TokenizerConfig) -> np.ndarray:
    """The target of the prefix tokens' strip above the strip, enlarged as the image is."""
    target = prefix_target(look.image.unsqueeze(0), config)[0]
    width = strip.shape[-1] * (shown(look.image).shape[1] // config.image_size)
    pair = picture_grid(enlarged(to_pixels(torch.stack([target, strip])), width), 1, MARGIN)
    parts = "corner patch and first row" if config.num_prefix_tokens > config.grid else "first row"
    text = f"top: {parts}; below: the {config.num_prefix_tokens} prefix tokens decoded alone, "
    return stacked([pair, title(f"{text}PSNR {decibels(target, strip)}", 3 * width)])


def first_codes(look: Look, n: int) -> np.ndarray:
    """The picture of the first n codes with its PSNR; rows that are not decoded are grey."""
    rows = look.rows[n]
    height = rows.shape[1]
    alone, whole = (
        decibels(look.image[:, :height], other[:, :height]) for other in (rows, look.reconstruction)
    )
    canvas = torch.full_like(look.image, EMPTY / 255)
    canvas[:, :height] = rows
    return captioned(shown(canvas), f"{n} codes: {alone}", f"with all codes: {whole}")


# ---------------------------------------------------------------------- the program
def main(argv: list[str]) -> None:
    description = "Draw what a tokenizer makes of photos, one picture per photo."
    parser = Parser(prog="python -m evaluation.look", description=description)
    add, output = parser.add_argument, "output/look"
    add("images", nargs="+", type=path, help="photos, or folders of them")
    add("--tokenizer", type=path, default="weights/AliTok.pth", help="weights or a run folder")
    add("--config", type=path, help="YAML whose model.vq_model describes another tokenizer")
    add("--output", type=path, default=output, help=f"folder of the pictures ({output})")
    add("--device", choices=["cpu", "cuda"], help="by default CUDA if there is a GPU")
    args = parser.parse_args(argv)
    photos = list_photos(args.images, Path(args.output))
    processes = start_processes(args.device)
    tokenizer = tokenizer_of(args.tokenizer, args.config).to(processes.device)
    config = tokenizer.config
    # All of them first, so that an unusable photo is refused before any picture is written.
    crops = {name: photo_crop(file, config.image_size) for name, file in photos.items()}
    for name, pixels in crops.items():
        look = look_at(tokenizer, pixels)
        picture = Path(args.output) / f"{name}.png"
        write_png(picture_of(look, config, name), picture)
        print(f"{printable(name)}, {described(look)}")
    print(f"wrote {len(crops)} picture{'s' * (len(crops) > 1)} to {printable(args.output)}")


if __name__ == "__main__":
    run(main)
