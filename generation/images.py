"""The images of a sampling job, batch by batch."""

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
    engine: Optional[Engine | ReferenceEngine],
    tokenizer: Tokenizer,
    job: SamplingJob,
    batches: Iterable[range],
) -> Iterator[ImageBatch]:
    """The images of a job at the given indices; a batch has at most `engine.batch`.

    Without an engine, the job's prefix holds all codes of image i in row i. On CUDA a batch is decoded while
    the next is sampled, so it is yielded one batch later.
    """
    cuda = tokenizer.latent_tokens.device.type == "cuda"
    batch = DECODED_AT_ONCE if engine is None else engine.batch
    decoder = ImageDecoder(tokenizer, job.dtype, job.compiled and cuda, batch)
    stream, previous = side_stream(decoder.device) if cuda else None, None
    for indices in batches:
        codes = job.beginnings(indices)
        if engine is not None:
            uniforms = image_uniforms(job.seed, indices, engine.config.image_seq_len)
            codes = engine.sample(job.labels(indices), uniforms, codes)
        assert codes is not None, "without an engine there are codes to decode"
        pending = start_decoding(decoder, indices, codes.to(decoder.device), stream)
        if previous is not None:
            yield previous()
        previous = pending
    if previous is not None:
        yield previous()


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device: the libraries keep a workspace for each stream that they ran on."""
    return torch.cuda.Stream(device)


def start_decoding(
    decoder: ImageDecoder, indices: range, codes: Tensor, stream: Optional[torch.cuda.Stream]
) -> Callable[[], ImageBatch]:
    """Decode on `stream`, concurrently with the current one; without it, at once.

    The returned function waits until the batch is on the CPU.
    """
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
