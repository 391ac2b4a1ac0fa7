"""Digits whose middle is drawn anew by the quickstart's models, and how often the other pixels stay:

    python -m quickstart.editing output/quickstart docs/editing.png

The picture: the first validation digit of every class, what is kept of its reconstruction, and edits of
it, first as its own class, then as the next one. The table: all validation digits, edited as their own
class. A pixel stays if no channel of it differs by more than a tolerance between the image of the edited
codes and that of the digit's own codes.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.images import photo_crop, scan_images, to_float
from data.pictures import captioned, enlarged, picture_grid, to_pixels, write_png
from evaluation.report import table_of
from generation.prefix import edited_codes
from modeling.engine import Engine
from modeling.sampling import DRAWN, image_uniforms
from modeling.tokenizer import Tokenizer
from quickstart.completion import load_models, places
from runtime.program import run

EDITS, SEED = 3, 0
ENLARGED, MARGIN, GREY = 2, 2, 127
TOLERANCES = (1, 8, 32)  # of 255


def groups_of(drawn: Tensor) -> dict[str, Tensor]:
    """The kept patches (g, g), bool, by where they lie; `drawn` (g, g) are the others."""
    order = torch.arange(drawn.numel()).view_as(drawn)
    earlier = order < order[drawn].min()
    beside = ~drawn & (F.max_pool2d(drawn[None].float(), 3, 1, 1)[0] > 0)  # corners touch too
    groups = {
        "all": ~drawn,
        "with codes before the region's": earlier,
        "later, beside the region": ~earlier & beside,
        "later, farther off": ~earlier & ~beside & ~drawn,
    }
    return {name: patches for name, patches in groups.items() if patches.any()}


@torch.inference_mode()
def change(tokenizer: Tokenizer, codes: Tensor, edited: Tensor) -> Tensor:
    """The greatest difference of a channel between the images of two sets of codes: (N, S, S), of 255."""
    before, after = (to_pixels(tokenizer.decode(x)).astype(np.int16) for x in (codes, edited))
    return torch.from_numpy(np.abs(after - before).max(3))


def rows_of(name: str, changed: Tensor, drawn: Tensor) -> list[list[str]]:
    """The table's rows of one decoder, of its changes (N, S, S)."""
    rows, patch = [], changed.shape[-1] // len(drawn)
    for where, patches in groups_of(drawn).items():
        values = changed[:, patches.repeat_interleave(patch, 0).repeat_interleave(patch, 1)]
        shares = (f"{(values <= t).float().mean():.1%}" for t in TOLERANCES)
        rows.append([name, where, str(int(patches.sum())), *shares])
    return rows


def main(argv: list[str]) -> None:
    description = "Edit the quickstart's digits: a picture, and how often pixels stay."
    folder, picture = places(argv, "editing", description)
    stage2, generator, options = load_models(folder)
    stage1 = Tokenizer.from_pretrained(folder / "stage1", device="cpu")
    config, listing = stage2.config, scan_images(folder / "data/val")
    paths, labels = listing.paths, torch.from_numpy(listing.labels)
    start, stop = config.image_size // 4, config.image_size - config.image_size // 4
    region = f"{start},{start},{stop},{stop}"
    given = torch.cat([edited_codes(stage2, str(path), region) for path in paths])
    codes = stage2.encode_photos(*paths)
    drawn = (given[0, config.num_prefix_tokens :] == DRAWN).view(config.grid, config.grid)

    def edit(which: Tensor, classes: Tensor) -> Tensor:
        """Codes of the edits of these digits as these classes; edit i draws from (SEED, i)."""
        engine = Engine(generator, len(which), options.model.generator.sampling)
        uniforms = image_uniforms(SEED, range(len(which)), config.num_tokens)
        return engine.sample(classes, uniforms, given[which])

    edited = edit(torch.arange(len(paths)), labels)
    rows = rows_of("stage 1, causal", change(stage1, codes, edited), drawn)
    rows += rows_of("stage 2", change(stage2, codes, edited), drawn)
    headers = ["decoder", "kept patches", "number", *(f"within {t}/255" for t in TOLERANCES)]
    print(f"{len(paths)} digits, {int(drawn.sum())} of {drawn.numel()} patches drawn")
    print(table_of(rows, headers))

    classes = labels.unique()
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in classes])
    which = first.repeat_interleave(2 * EDITS)
    asked = torch.stack([classes, classes.roll(-1)], 1).repeat_interleave(EDITS, 1).flatten()
    with torch.inference_mode():
        kept = stage2.decode(codes[first])
        kept[:, :, start:stop, start:stop] = GREY / 255
        made = stage2.decode(edit(which, asked)).unflatten(0, (len(first), 2 * EDITS))
    digits = [photo_crop(paths[i], config.image_size) for i in first.tolist()]
    panels = torch.cat([to_float(torch.stack(digits))[:, None], kept[:, None], made], 1)
    images = enlarged(to_pixels(panels.flatten(0, 1)), ENLARGED * config.image_size)
    grid = picture_grid(images, 2 + 2 * EDITS, MARGIN, background=GREY)
    text = f"digit, kept part, {EDITS} edits as its own class, {EDITS} as the next one"
    write_png(captioned(grid, text), picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    run(main, sys.argv[1:])
