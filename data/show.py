"""A picture of a token cache's first images, decoded, for `python -m data.tokens show`."""

import math
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from configs.sizes import tokenizer_of
from data.cache import TokenCache
from data.pictures import captioned, enlarged, picture_grid, write_png
from modeling.devices import find_device
from modeling.image_decoder import ImageDecoder
from modeling.weights.tensors import fingerprint
from runtime.processes import start_processes

COLUMNS, MARGIN = 8, 6  # images side by side at most, and pixels between them


def show_cache(
    cache: TokenCache, weights: str, config: Optional[str], count: int, picture: Path
) -> int:
    """Draw the first views of at most `count` images; returns their number.

    `weights` is a file or run of the tokenizer that wrote the cache, `config` a YAML file with sizes that
    the weights do not show. Raises InputError for another tokenizer.
    """
    start_processes()
    tokenizer = tokenizer_of(weights, config)
    sizes, mark = tokenizer.config, fingerprint(tokenizer.state_dict())
    cache.check(sizes.codebook_size, sizes.num_tokens, mark, sizes.encoder_heads)
    cache.check_labels()
    count = min(count, cache.images)
    codes = torch.from_numpy(np.stack([cache.codes(image, 0) for image in range(count)]))
    device = find_device()
    images = ImageDecoder(tokenizer.to(device), torch.float32)(codes.to(device))
    pictures = [
        captioned(image, cache.classes[label], path)
        for image, label, path in zip(
            enlarged(images.cpu().numpy()), cache.labels[:count].tolist(), cache.paths(count)
        )
    ]
    columns = min(math.isqrt(count - 1) + 1, COLUMNS)
    write_png(picture_grid(np.stack(pictures), columns, MARGIN), picture)
    return count
