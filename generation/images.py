"""Codes to images, batch by batch, for samplers and scores."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from generation.job import SamplingJob
from modeling.engine import Engine
from modeling.image_decoder import DECODED_AT_ONCE, ImageDecoder
from modeling.sampling import ReferenceEngine, image_uniforms
from modeling.tokenizer import Tokenizer


class ImageBatch(NamedTuple):
    """Finished images of consecutive indices, on the CPU."""

    indices: range
    images: np.ndarray  # (B, S, S, 3), uint8
    codes: np.ndarray  # (B, T), int64


def sample_images(
    engine: Engine | ReferenceEngine,
    tokenizer: Tokenizer,
    job: SamplingJob,
    batches: Iterable[range],
) -> Iterator[ImageBatch]:
    """The images of a job at the given indices; a batch has at most `engine.batch`."""

    def sample(indices: range) -> Tensor:
        uniforms = image_uniforms(job.seed, indices, engine.config.image_seq_len)
        return engine.sample(job.labels(indices), uniforms, job.beginnings(indices))

    compiled = job.compiled and engine.device.type == "cuda"
    decoder = ImageDecoder(tokenizer, job.dtype, compiled, min(engine.batch, DECODED_AT_ONCE))
    return images_of(sample, decoder, batches)


def decode_stored(
    codes: Tensor, tokenizer: Tokenizer, job: SamplingJob, batches: Iterable[range]
) -> Iterator[ImageBatch]:
    """The images of stored codes (N, T), int64, at the given indices."""
    decoder = ImageDecoder(tokenizer, job.dtype)
    return images_of(lambda i: codes[i.start : i.stop].to(decoder.device), decoder, batches)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device: each stream on which products ran keeps their workspace until the process ends."""
    return torch.cuda.Stream(device)


Pending = Callable[[], ImageBatch]  # returns a batch once it is on the CPU


def images_of(
    codes_of: Callable[[range], Tensor], decoder: ImageDecoder, batches: Iterable[range]
) -> Iterator[ImageBatch]:
    """Images of the codes (B, T) that `codes_of(indices)` returns on the decoder's device.

    On CUDA a batch is decoded while the next is sampled, so it is yielded one batch later.
    """
    stream = side_stream(decoder.device) if decoder.device.type == "cuda" else None
    previous = None
    for indices in batches:
        pending = start_decoding(decoder, indices, codes_of(indices), stream)
        if previous is not None:
            yield previous()
        previous = pending
    if previous is not None:
        yield previous()


def start_decoding(
    decoder: ImageDecoder, indices: range, codes: Tensor, stream: Optional[torch.cuda.Stream]
) -> Pending:
    """Decode on `stream`, concurrently with the current one; without it, at once."""
    if stream is None:
        images = decoder(codes)
        return lambda: ImageBatch(indices, images.numpy(), codes.numpy())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        codes.record_stream(stream)
        images = decoder(codes)
        on_host = [
            torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            for x in (images, codes)
        ]
        decoded = torch.cuda.Event()
        decoded.record()

    def wait() -> ImageBatch:
        decoded.synchronize()
        return ImageBatch(indices, on_host[0].numpy(), on_host[1].numpy())

    return wait
