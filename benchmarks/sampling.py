"""Sampling speed against the plain way and against what the machine could do at best.

    python -m benchmarks.sampling                     # B, L and XL on a CUDA device
    python -m benchmarks.sampling --sizes b --batches 4 --plain-batch 4 --layers 6   # on a CPU

Weights are random, guidance is on. Ours is timed first, for every batch and number of streams; then the
last of ours and the plain way, in turn. Each is timed `--rounds` times; times are medians and the speed-up is
the median of the rounds' ratios. The plain way is the published sampler's: float32 (TF32
on CUDA), a cache grown by concatenation, eager, then decoding all at once. `--layers` cuts generator
and decoder down to that many layers where a whole run takes too long; ms per step and images/s are
then those of the smaller models. `--clock processor` counts the processor time of one thread instead of
the wall clock, for a CPU that is shared with other work.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import modeling.engine
from benchmarks.common import (
    copy_rate,
    explain_failures,
    inductor_argument,
    machine,
    product_rate,
    profile,
    with_inductor,
)
from data.pictures import write_png
from modeling.engine import Engine, cache_bytes
from modeling.generator import Generator, GeneratorConfig
from modeling.image_decoder import ImageDecoder
from modeling.sampling import CACHES, ENGINES, ReferenceEngine, Sampling
from modeling.tokenizer import Tokenizer, TokenizerConfig
from runtime.parts import Parts
from runtime.processes import set_tf32

SIZES = {
    "b": (GeneratorConfig(hidden_size=768, num_hidden_layers=24), Sampling(16.0, 1.8)),
    "l": (GeneratorConfig(hidden_size=1024, num_hidden_layers=24), Sampling(6.0, 0.7)),
    "xl": (GeneratorConfig(hidden_size=1280, num_hidden_layers=32), Sampling(13.0, 1.4)),
}


def plain_codes(model: Generator, sampling: Sampling, labels: Tensor, uniforms: Tensor) -> Tensor:
    """The plain way: every step copies the cache into a longer one."""
    return ReferenceEngine(model, len(labels), sampling).sample(labels, uniforms)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = CLOCKS["wall"]  # what `seconds` reads; --clock sets it


def seconds(work: Callable[..., object], *arguments: object) -> float:
    synchronize()
    began = clock()
    work(*arguments)
    synchronize()
    return clock() - began


def limits(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes/s of a large copy and FLOP/s of a large product, measured here.

    Many CPUs multiply bf16 matrices faster after a conversion to float32.
    """
    return copy_rate(device), max(product_rate(device, kind) for kind in {dtype, torch.float32})


def roofline(
    config: GeneratorConfig, sampling: Sampling, tokenizer: Tokenizer, batch: int,
    dtype: torch.dtype, device: torch.device,
) -> tuple[float, float]:  # fmt: skip
    """The least seconds of a batch, for its codes and for its images.

    A step reads the weights and the filled cache once, and does 2 FLOPs per weight and row; decoding
    is compute alone. Whichever of reading and computing takes longer counts.
    """
    bandwidth, flops = limits(device, dtype)
    print(f"  measured: {bandwidth / 1e9:.1f} GB/s copied, {flops / 1e12:.2f} TFLOP/s ({dtype})")
    with torch.device("meta"):
        model = Generator(config)
    weights = sum(p.numel() for p in model.parameters()) - model.embeddings.weight.numel()
    rows, T = 2 * batch, config.image_seq_len
    position = 2 * config.num_hidden_layers * config.hidden_size * dtype.itemsize  # of the cache
    codes = 0.0
    for filled in range(1, T + 1):
        read = (weights * dtype.itemsize + rows * filled * position) / bandwidth
        codes += max(read, 2 * weights * rows / flops)
    decoder = sum(p.numel() for p in tokenizer.decoder.transformer.parameters())
    tokens = tokenizer.config.num_tokens + tokenizer.config.num_buffer_tokens
    return codes, 2 * decoder * tokens * batch / flops


def writing_seconds(images: Tensor, codes: Tensor) -> float:
    """Seconds to write the pictures and the part of one batch, as sample_imagenet.py does."""
    arrays = images.cpu().numpy()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        paths = [Path(folder) / f"{i:06d}.png" for i in range(len(arrays))]
        began = time.perf_counter()
        list(pool.map(write_png, arrays, paths))
        Parts(Path(folder) / "chunks", 1).write(
            0, images=arrays, codes=codes.cpu().numpy().astype(np.uint16)
        )
        return time.perf_counter() - began


def measure(size: str, precision: str, args: argparse.Namespace, device: torch.device) -> None:
    config, sampling = SIZES[size]
    tokenizer_config = TokenizerConfig()
    if args.layers:
        config = replace(config, num_hidden_layers=args.layers)
        tokenizer_config = TokenizerConfig(decoder_layers=args.layers)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    model = Generator(config).to(device).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    tokenizer = Tokenizer(tokenizer_config).to(device).eval()
    compiled = args.compile == "yes" or (args.compile == "auto" and cuda)

    def inputs(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(n, device=device) % config.condition_num_classes
        uniforms = torch.rand(n, config.image_seq_len, generator=torch.Generator().manual_seed(1))
        return labels, uniforms.to(device)

    last: Any = None
    engines: list[Engine] = []
    engine: Any = None
    sample: Any = None
    for batch, streams in itertools.product(args.batches, args.streams):
        last = engine = sample = None
        engines = []  # frees their caches for the next
        began = time.perf_counter()
        set_tf32(precision != "fp32", precision != "fp32")  # before the engine captures its graph
        engines = [
            Engine(model, batch // streams, sampling, dtype, compiled, args.engine, args.cache)
            for _ in range(streams)
        ]
        engine, sample = engines[0], partial(concurrently, engines)
        decoder = ImageDecoder(tokenizer, dtype, compiled, batch)
        ours = inputs(batch)
        codes = sample(*ours)
        images = decoder(codes)
        synchronize()
        print(f"  ready after {time.perf_counter() - began:.1f} s", flush=True)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        rounds = range(args.rounds)
        sampled = statistics.median(seconds(sample, *ours) for _ in rounds)
        decoded = statistics.median(seconds(decoder, codes) for _ in rounds)
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        least = roofline(config, sampling, tokenizer, batch, dtype, device)
        total = sampled + decoded
        print(
            f"  ours   batch {batch}, {'compiled' if engine.compiled else 'eager'}, "
            f"{'captured' if engine.graph else 'not captured'}, "
            f"{'fused' if engine.fused else 'plain'} attention, {streams} streams: "
            f"{batch / total:.3f} images/s; codes {batch / sampled:.3f}/s "
            f"({sampled / config.image_seq_len * 1e3:.2f} ms per step), decoding "
            f"{batch / decoded:.3f}/s, writing {batch / writing_seconds(images, codes):.1f}/s (beside "
            f"the others); cache "
            f"{batch * cache_bytes(config, sampling, dtype, args.cache) / 2**30:.2f} GiB"
            + (f", peak {peak / 2**30:.2f} GiB" if cuda else "")
        )
        print(
            f"  roofline batch {batch}, {streams} streams: {batch / sum(least):.3f} images/s (codes "
            f"{batch / least[0]:.3f}/s, decoding {batch / least[1]:.3f}/s): ours reaches "
            f"{sum(least) / total:.0%} of it",
            flush=True,
        )
        last = sample, decoder, ours, codes
        if args.profile and cuda and engine.graph is not None:
            profile(partial(replay, engine, 5))
    if args.plain_batch:
        against_plain(config, sampling, model, tokenizer, precision, args, last, inputs)


def concurrently(engines: list[Engine], labels: Tensor, uniforms: Tensor) -> Tensor:
    """The codes of a batch in equal parts, one per engine, on CUDA at the same time: products of one overlap with
    the attention of another, but each reads the weights."""
    cuda, parts = labels.is_cuda and len(engines) > 1, len(engines)
    streams = [torch.cuda.Stream() if cuda else None for _ in engines]
    codes = []
    for engine, stream, given in zip(
        engines, streams, zip(labels.chunk(parts), uniforms.chunk(parts))
    ):
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # None: the current one
            codes.append(engine.sample(*given))
    for stream in filter(None, streams):
        torch.cuda.current_stream().wait_stream(stream)
    return torch.cat(codes)


@torch.inference_mode()
def replay(engine: Engine, steps: int) -> None:
    """Steps of a captured engine from the middle position on; `sample` leaves it behind the last code."""
    assert engine.graph is not None
    engine.position.fill_(engine.config.image_seq_len // 2)
    for _ in range(steps):
        engine.graph.replay()


def against_plain(
    config: GeneratorConfig, sampling: Sampling, model: Generator, tokenizer: Tokenizer,
    precision: str, args: argparse.Namespace, last: Any, inputs: Callable[[int], tuple],
) -> None:  # fmt: skip
    """The plain way and the last of ours in turn, so that their ratio holds."""
    sample, decoder, ours, codes = last
    device, batch, plain_batch = codes.device, len(codes), args.plain_batch
    plain = inputs(plain_batch)
    plain_ids = torch.randint(config.codebook_size, (plain_batch, 273), device=device)
    times: dict[str, list[float]] = {k: [] for k in ("codes", "images", "plain", "plain images")}
    for _ in range(args.rounds):
        set_tf32(precision != "fp32", precision != "fp32")
        times["codes"].append(seconds(sample, *ours))
        times["images"].append(seconds(decoder, codes))
        set_tf32(True, True)  # without effect on a CPU
        times["plain"].append(seconds(plain_codes, model, sampling, *plain))
        times["plain images"].append(seconds(ImageDecoder(tokenizer, torch.float32), plain_ids))
    ratios = [
        (p + q) / plain_batch / ((c + i) / batch)
        for c, i, p, q in zip(
            times["codes"], times["images"], times["plain"], times["plain images"]
        )
    ]
    alone = [p / plain_batch / (c / batch) for c, p in zip(times["codes"], times["plain"])]
    t = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"  plain  batch {plain_batch}: {plain_batch / (t['plain'] + t['plain images']):.3f} "
        f"images/s; codes {plain_batch / t['plain']:.3f}/s "
        f"({t['plain'] / config.image_seq_len * 1e3:.2f} ms per step), "
        f"decoding {plain_batch / t['plain images']:.3f}/s"
    )
    print(
        f"  ratio  {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} … {max(ratios):.2f}), "
        f"codes alone {statistics.median(alone):.2f}",
        flush=True,
    )


def changes(args: argparse.Namespace) -> None:
    """One change after another on a CPU, each against the way before it.

    Processor time of one thread, which other work on the machine disturbs less than the clock.
    """
    torch.set_num_threads(1)
    config, sampling = SIZES["b"]
    config = replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    torch.manual_seed(0)
    model = Generator(config).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    batch = args.batches[0]
    labels, uniforms = torch.arange(batch), torch.rand(batch, config.image_seq_len)

    def engine(
        dtype: torch.dtype, arranged: bool = True, compiled: bool = False
    ) -> Callable[[], Tensor]:
        original = modeling.engine.cpu_layout
        if not arranged:
            modeling.engine.cpu_layout = lambda rows, compiled: lambda weight: weight
        made = Engine(model, batch, sampling, dtype, compiled)
        modeling.engine.cpu_layout = original
        return lambda: made.sample(labels, uniforms)

    ways = {
        "plain: cache grown by concatenation": lambda: plain_codes(
            model, sampling, labels, uniforms
        ),
        "engine: cache preallocated, w1 and w3 fused, fused norms": engine(torch.float32, False),
        "weights in panels and huge pages": engine(torch.float32),
        "compiled": engine(torch.float32, compiled=True),
        "eager, bf16 weights and cache": engine(torch.bfloat16),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            times[name].append(time.process_time() - began)
    for before, name in zip([None, *ways], ways):
        milliseconds = statistics.median(times[name]) / config.image_seq_len * 1e3
        gain = [b / n for b, n in zip(times[before or name], times[name])]
        print(f"  {name}: {milliseconds:.1f} ms per step, x {statistics.median(gain):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES) if cuda else ["b"])
    parser.add_argument("--precisions", nargs="+", default=["bf16"] if cuda else ["fp32", "bf16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[256 if cuda else 4])
    parser.add_argument("--plain-batch", type=int, default=125 if cuda else 4, help="0: ours alone")
    parser.add_argument("--compile", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="the attention")
    parser.add_argument("--cache", choices=CACHES, default="auto", help="type of keys and values")
    parser.add_argument(
        "--streams", type=int, nargs="+", default=[1], help="parts of a batch sampled concurrently"
    )
    parser.add_argument("--profile", action="store_true", help="a GPU's time of 5 steps, by kernel")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--changes", action="store_true", help="instead, time one change after another on a CPU"
    )
    inductor_argument(parser)
    args = parser.parse_args()
    if any(batch % streams for batch in args.batches for streams in args.streams):
        parser.error("--streams: set divisors of the batches")
    global clock
    clock = CLOCKS[args.clock]
    if args.clock == "processor":
        torch.set_num_threads(1)
    explain_failures()
    print(machine())
    if args.changes:
        return changes(args)
    for size in args.sizes:
        for precision in args.precisions:
            layers = f", cut down to {args.layers} layers" if args.layers else ""
            print(f"{size.upper()}, {precision}{layers}")
            with with_inductor(args.inductor):
                measure(size, precision, args, torch.device("cuda" if cuda else "cpu"))


if __name__ == "__main__":
    main()
