"""Codes that sampling is given: those that it only decodes, the beginning of images that it completes,
the rest of one that it edits.

The encoder is bidirectional: every code of a whole image may depend on all of its pixels, so the
given codes also carry information about the rest, which `experiment.prefix_mask` hides from the encoder.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from configs.schema import GeneratorExperiment
from data.images import load_upright, photo_crop, to_float
from modeling.photos import crop_geometry
from modeling.sampling import DRAWN
from modeling.tokenizer import Tokenizer, TokenizerConfig
from runtime.errors import InputError

FILES_OF_CODES = (".npy", ".npz")
KEYS = ("arr_0", "codes")  # in an .npz: of OUTPUT_DIR_codes.npz; of a cache's published layout


def prefix_codes(experiment: GeneratorExperiment, tokenizer: Tokenizer) -> Optional[Tensor]:
    """The codes (M, n), int64, that image i begins with: row i mod M; None: all codes are drawn.

    n is K + prefix_rows·g or, for an edited image, T; codes in the mask are `DRAWN`. Raises InputError for
    a file without such codes, and for an image smaller than the tokenizer's.
    """
    if experiment.edit is not None and experiment.mask is not None:
        return edited_codes(tokenizer, experiment.edit, experiment.mask)
    path, rows, config = experiment.prefix, experiment.prefix_rows, tokenizer.config
    if path is None:
        return None
    if rows is not None and rows >= config.grid:
        raise InputError(
            f"experiment.prefix_rows={rows} leaves nothing to sample: images have {config.grid} rows "
            f"of codes, set 0 to {config.grid - 1}"
        )
    if Path(path).suffix.lower() not in FILES_OF_CODES:
        shown = config.grid // 2 if rows is None else rows
        pixels = photo_crop(path, config.image_size)
        return encode_beginning(tokenizer, pixels, shown, experiment.prefix_mask)
    if experiment.prefix_mask:
        raise InputError(
            f"experiment.prefix_mask=True masks an image, but experiment.prefix={path} holds codes: "
            f"set the image, or leave the mask out"
        )
    return cut_codes(load_codes("prefix", path, config), path, rows, config)


# ---------------------------------------------------------------------- codes of a file
def load_codes(option: str, path: str, config: TokenizerConfig, whole: bool = False) -> Tensor:
    """Codes (M, n), int64, of an .npy or .npz with integers (M, n) or (n,); n <= T, or T of `whole` images.

    Raises InputError, naming `option`, for another file and for codes of another tokenizer.
    """
    source, remedy = f"experiment.{option}={path}", "use codes of this tokenizer"
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.ndarray):
                loaded = next(loaded[key] for key in KEYS if key in loaded)
        codes = np.atleast_2d(loaded)
    except Exception as e:  # a damaged archive raises almost anything
        raise InputError(
            f"{source} is not a file of codes ({type(e).__name__}): use an OUTPUT_DIR_codes.npz or an .npy"
        ) from e
    tokens, known = config.num_tokens, config.codebook_size
    integers = codes.dtype.kind in "iu"
    if not integers or codes.ndim != 2 or not codes.size or codes.shape[1] > tokens:
        raise InputError(
            f"{source} holds {codes.dtype} {codes.shape} instead of integers (images, up to {tokens} codes): "
            f"{remedy}"
        )
    if codes.min() < 0 or codes.max() >= known:
        raise InputError(
            f"{source} holds codes {codes.min()}…{codes.max()}, but this tokenizer has 0…{known - 1}: "
            f"{remedy}"
        )
    if whole and codes.shape[1] < tokens:
        raise InputError(
            f"{source} holds {codes.shape[1]} codes per image, not {tokens}: use experiment.prefix to "
            f"complete images"
        )
    return torch.from_numpy(codes.astype(np.int64))


def cut_codes(codes: Tensor, path: str, rows: Optional[int], config: TokenizerConfig) -> Tensor:
    """The first K + rows·g of codes (M, n); without `rows` all of them, which must leave some."""
    n, K, g = codes.shape[1], config.num_prefix_tokens, config.grid
    wanted = n if rows is None else K + rows * g
    if wanted > n or wanted not in range(K, config.num_tokens, g):
        given = "" if rows is None else f", too few for experiment.prefix_rows={rows}"
        raise InputError(
            f"experiment.prefix={path} holds {n} codes per image{given}; a beginning has {K} prefix tokens "
            f"and 0 to {g - 1} whole rows of {g}: set experiment.prefix_rows to rows that the file has, or "
            f"use codes of this image size"
        )
    return codes[:, :wanted].contiguous()


# ---------------------------------------------------------------------- codes of an image
def encode_beginning(tokenizer: Tokenizer, pixels: Tensor, rows: int, mask: bool) -> Tensor:
    """The first K + rows·g codes (1, n), int64, on the CPU, of an image (3, S, S), uint8.

    With `mask` the encoder sees the first `rows` rows of patches only (`masked_below`). It computes
    in float32, as pretokenization does.
    """
    config = tokenizer.config
    image = to_float(pixels.to(tokenizer.latent_tokens.device))
    if mask:
        image = masked_below(image, rows * config.patch_size)
    latents: Any = tokenizer.exact_latents(image.unsqueeze(0))
    codes = tokenizer.quantize.encode(latents)
    return codes[:, : config.num_prefix_tokens + rows * config.grid].cpu()


def masked_below(image: Tensor, row: int) -> Tensor:
    """An image (3, H, W) whose pixels from `row` on have the image's mean colour."""
    masked = image.clone()
    masked[:, row:] = image.mean((1, 2), keepdim=True)
    return masked


# ---------------------------------------------------------------------- an image that is edited
def edited_codes(tokenizer: Tokenizer, path: str, mask: str) -> Tensor:
    """Codes (1, T), int64, on the CPU, of an image; `DRAWN` if the mask touches their patch.

    The prefix tokens describe the first row of patches: all are drawn if the mask touches it.
    """
    config = tokenizer.config
    drawn = masked_patches(path, mask, config)
    drawn = torch.cat([drawn[0].any().expand(config.num_prefix_tokens), drawn.flatten()])
    codes = tokenizer.encode_photos(path).cpu()
    return codes.where(~drawn, DRAWN)


def masked_patches(path: str, mask: str, config: TokenizerConfig) -> Tensor:
    """Which patches (g, g), bool, of an image's crop a mask of the whole image touches."""
    size = load_upright(path).size
    try:
        x0, y0, x1, y1 = (int(number) for number in mask.split(","))
    except ValueError:
        shown = load_upright(mask).convert("L")
        if shown.size != size:
            raise InputError(
                f"experiment.mask={mask} has {shown.width}x{shown.height} pixels, but experiment.edit="
                f"{path} has {size[0]}x{size[1]}: draw the mask over that image"
            ) from None
    else:
        shown = Image.new("L", size)
        if not (0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]):
            raise InputError(
                f"experiment.mask={mask} is not a part of {size[0]}x{size[1]} pixels: set x0,y0,x1,y1 "
                f"with 0 <= x0 < x1 <= {size[0]} and 0 <= y0 < y1 <= {size[1]}"
            )
        shown.paste(255, (x0, y0, x1, y1))
    # At the photo's resolution: a mark of a few pixels would vanish in a resized mask.
    marked = torch.from_numpy(np.array(shown)) >= 128  # (H, W)
    resized, begin = crop_geometry(*size, config.image_size)
    columns, rows = (pixels_of_patches(config, *along) for along in zip(begin, resized, size))
    bands = torch.stack([marked[row].any(0) for row in rows])  # (g, W)
    drawn = torch.stack([bands[:, column].any(1) for column in columns], 1)
    if marked.any() and not drawn.any():
        raise InputError(
            f"experiment.mask={mask} does not touch the centre crop of experiment.edit={path}: "
            f"choose another part, or crop the image first"
        )
    return drawn


def pixels_of_patches(config: TokenizerConfig, begin: int, resized: int, side: int) -> list[slice]:
    """Along one side of a photo, the pixels that each patch of its crop covers, if only in part.

    The crop begins at pixel `begin` of the photo resized from `side` to `resized` pixels.
    """
    edges = [(begin + i * config.patch_size) * side for i in range(config.grid + 1)]
    return [slice(a // resized, -(-b // resized)) for a, b in pairwise(edges)]
