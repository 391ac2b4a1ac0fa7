"""How codes and image rows depend on each other: what masking, cutting and replacing change.

All functions take a tokenizer in eval mode. Shape suffixes: B images, g grid, K prefix tokens, T = K + g²
codes. A row is a row of patches; the code of image token (r, c) is at position K + r·g + c.
"""

import torch
from einops import reduce
from torch import Tensor

from data.images import CenterImages, ImagePath
from data.subset import evenly_spaced
from evaluation.reconstruction import image_batches
from modeling.pixels import to_float
from modeling.tokenizer import Tokenizer, TokenizerConfig

BATCH = 64  # images at once


def encode_files(tokenizer: Tokenizer, paths: list[ImagePath]) -> Tensor:
    """Codes (N, T), int64, on the CPU, of the centre crops of N image files."""
    device = tokenizer.latent_tokens.device
    batches = image_batches(paths, tokenizer.config.image_size, BATCH, workers=0)
    with torch.no_grad():
        codes = [tokenizer.encode(to_float(pixels.to(device))).cpu() for _, pixels in batches]
    return torch.cat(codes)


def read_images(tokenizer: Tokenizer, paths: list[ImagePath]) -> Tensor:
    """The centre crops of N image files: (N, 3, S, S) in [0, 1], on the tokenizer's device."""
    crops = CenterImages(paths, tokenizer.config.image_size)
    pixels = torch.stack([crops[index] for index in range(len(crops))])
    return to_float(pixels.to(tokenizer.latent_tokens.device))


@torch.no_grad()
def encode(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Codes (B, T), int64, of images (B, 3, S, S) in [0, 1]."""
    return torch.cat([tokenizer.encode(part) for part in images.split(BATCH)])


def code_rows(config: TokenizerConfig) -> Tensor:
    """The image row of every code: (T,), int64; -1 for the prefix."""
    rows = torch.arange(config.grid).repeat_interleave(config.grid)
    return torch.cat([rows.new_full((config.num_prefix_tokens,), -1), rows])


# ---------------------------------------------------------------------- encoder
@torch.no_grad()
def masked_changes(tokenizer: Tokenizer, images: Tensor, fill: Tensor) -> Tensor:
    """Share of images whose code j changes when every row below row r is replaced: (g - 1, T).

    Images (B, 3, S, S) in [0, 1]; `fill`, of a shape that broadcasts to theirs, replaces them.
    Line r of the result keeps rows 0 … r. An encoder whose codes depend on nothing below their own row
    changes no code of these rows.
    """
    config = tokenizer.config
    codes, changes = encode(tokenizer, images), []
    for row in range(config.grid - 1):
        top = (row + 1) * config.patch_size
        masked = fill.expand_as(images).clone()
        masked[:, :, :top] = images[:, :, :top]
        changes.append((encode(tokenizer, masked) != codes).double().mean(0))
    return torch.stack(changes).cpu()


def earlier_changes(changes: Tensor, config: TokenizerConfig) -> dict[str, Tensor]:
    """Means of `masked_changes` over three kinds of codes, each (g - 1,).

    `earlier`: codes of the rows that were kept. `later`: those of the replaced rows, to show that the
    replacement itself is seen. `prefix`: the K prefix codes, absent where K = 0.
    """
    rows = code_rows(config)
    kept = (rows >= 0) & (rows <= torch.arange(config.grid - 1)[:, None])  # (g - 1, T)
    kinds = {"earlier": kept, "later": (rows >= 0) & ~kept}
    if config.num_prefix_tokens:
        kinds["prefix"] = (rows < 0).expand_as(kept)
    return {name: (changes * kind).sum(1) / kind.sum(1) for name, kind in kinds.items()}


# ---------------------------------------------------------------------- decoder
def row_means(x: Tensor, grid: int) -> Tensor:
    """The mean over images, channels and pixels of (B, 3, S, S), by row: (g,), float64."""
    return reduce(x.double(), "b c (g p) w -> g", "mean", g=grid)


def cut_lengths(config: TokenizerConfig) -> list[int]:
    """The numbers of first codes to decode from: 0, K, K + g, …, T."""
    prefix, grid = config.num_prefix_tokens, config.grid
    return sorted({0, *range(prefix, config.num_tokens + 1, grid)})


@torch.no_grad()
def cut_errors(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Mean squared error by row of images decoded from their first n codes: (numbers n, g).

    The numbers are those of `cut_lengths`. Every other code vector is the mean, over these images, of
    the vectors at its position. Images (B, 3, S, S) in [0, 1].
    """
    grid, lengths = tokenizer.config.grid, cut_lengths(tokenizer.config)
    vectors = tokenizer.quantize.lookup(encode(tokenizer, images))  # (B, T, token_size)
    mean = vectors.mean(0)
    errors = torch.zeros(len(lengths), grid, dtype=torch.float64, device=images.device)
    for known, originals in zip(vectors.split(BATCH), images.split(BATCH)):
        for line, length in enumerate(lengths):
            cut = torch.cat([known[:, :length], mean[length:].expand(len(known), -1, -1)], 1)
            difference = tokenizer.decoder(cut)[0] - originals
            errors[line] += row_means(difference.square(), grid) * len(known) / len(images)
    return errors.cpu()


def psnr(errors: Tensor) -> Tensor:
    """10·log10(1 / MSE) in dB; errors below 1e-10 count as that, as in evaluation.reconstruction."""
    return -10 * errors.clamp(min=1e-10).log10()


@torch.no_grad()
def replaced_changes(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Root mean square change of decoded row i when code j is replaced: (g, T), on the scale 0 … 1.

    Codes (B, T) of B ≥ 2 images; code j becomes that of the image before. The mean is over the images
    whose code this changes; NaN if it changes none. A causal decoder changes no row before code j's.
    """
    grid = tokenizer.config.grid
    before, others = tokenizer.decode(codes), codes.roll(1, 0)
    columns = []
    for position in range(codes.shape[1]):
        replaced = codes.clone()
        replaced[:, position] = others[:, position]
        differs = replaced[:, position] != codes[:, position]
        # All images, changed or not: another batch size could round differently.
        difference = tokenizer.decode(replaced) - before
        columns.append(row_means(difference[differs].square(), grid).sqrt())
    return torch.stack(columns, 1).cpu()


def change_shares(changes: Tensor, config: TokenizerConfig) -> dict[str, float]:
    """How the squared change of `replaced_changes` is divided among rows, for the image codes.

    `earlier`, `own` and `later`: rows before, of and after the replaced code; they add up to 1. The mean
    over codes, of shares, so that codes of large and small effect count alike; codes that were never
    replaced do not count. Empty where no code has any effect.
    """
    rows = code_rows(config)
    image = changes[:, rows >= 0].square()
    image, own = image[:, image.sum(0) > 0], rows[rows >= 0][image.sum(0) > 0]  # NaN > 0 is False
    if not len(own):
        return {}
    share = image / image.sum(0)
    line = torch.arange(config.grid)[:, None]
    kinds = {"earlier": line < own, "own": line == own, "later": line > own}
    return {name: (share * kind).sum(0).mean().item() for name, kind in kinds.items()}


def evenly(paths: list[ImagePath], count: int) -> list[ImagePath]:
    """At most `count` of the paths, evenly spaced: a listing is sorted by class."""
    return [paths[i] for i in evenly_spaced(len(paths), min(count, len(paths)))]
