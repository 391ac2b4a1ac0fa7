"""The packed token store beside the published layout, and pretokenization beside its encoder.

python -m benchmarks.tokens                         the tables in benchmarks/README.md
python -m benchmarks.tokens --images 10000 --encode 512 --batch_size 32 --views ten_crop
python -m benchmarks.tokens --images 0 --encode 0 --plain 2        only the published forward pass
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from benchmarks.common import machine
from data.cache import write_manifest
from data.images import VIEWS
from data.npz import NpzStore, write_npz_files
from data.order import EpochDraws
from data.tokens import IMAGES_PER_SHARD, TokenStore, TrainTokens, write_packed_store
from encoding.job import BATCHES_PER_PART, EncodingPlan, ReadableCrops, encode, encode_parts
from modeling.tokenizer import Tokenizer, TokenizerConfig
from runtime.parts import Parts, batches_of
from runtime.processes import start_processes

IMAGENET, CODES = 1_281_167, (10, 273)
TURNS = 5


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = CLOCKS["wall"]  # what `seconds` reads; --clock sets it


def seconds(work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def stores(folder: Path, images: int) -> None:
    """Bytes per image, writing, opening and random reading of both layouts, on the same codes."""
    codes = np.random.default_rng(0).integers(0, 4096, (images, *CODES), dtype=np.uint16)
    paths = [f"n{i // 1300:08d}/n{i // 1300:08d}_{i}.JPEG" for i in range(images)]
    labels, classes = [i // 1300 for i in range(images)], sorted({p.split("/")[0] for p in paths})
    about = {"views": CODES[0], "tokens": CODES[1], "codebook_size": 4096, "classes": classes}
    packed, npz = folder / "packed", folder / "npz"

    def write_packed() -> None:
        parts = Parts(folder / "parts", -(-images // 512))
        for number in range(parts.count):
            parts.write(number, codes=codes[512 * number : 512 * (number + 1)])
        blocks = (parts.read(number, "codes") for number in range(parts.count))
        write_packed_store(packed, blocks, labels, paths, about)

    writing = {
        "packed": seconds(write_packed),  # parts and shards, as pretokenization does
        "npz": seconds(lambda: write_npz_files(npz, paths, codes)),
    }
    opening = {"packed": [], "npz": []}
    reading = {"packed": [], "npz": []}
    for turn in range(TURNS):
        for name, kind, path in (("packed", TokenStore, packed), ("npz", NpzStore, npz)):
            started = time.perf_counter()
            store = kind(path)
            opening[name].append(time.perf_counter() - started)
            draws = EpochDraws(store.labels, store.views, 0, 0.1, 1000)
            samples = TrainTokens(store, draws)
            samples[turn, 0]  # the epoch's draw
            order = np.random.default_rng(turn).permutation(images).tolist()
            took = seconds(lambda s=samples, o=order, t=turn: [s[t, i] for i in o])
            reading[name].append(images / took)
    print(f"{images} images x {CODES[0]} views x {CODES[1]} codes, files in the page cache")
    for name, path in (("packed", packed), ("npz", npz)):
        print(
            f"  {name:7}{size(path) / images:10.1f} bytes per image{images / writing[name]:10.0f} "
            f"images/s written{median(reading[name]):10.0f} random samples/s"
            f"{1e3 * median(opening[name]):10.2f} ms to open"
        )
    ratios = [a / b for a, b in zip(reading["packed"], reading["npz"])]
    print(f"  packed / npz: {median(ratios):.1f} x the random samples/s")
    print(f"  packed: {size(packed) / codes.nbytes - 1:.3%} over the raw codes")


def imagenet_open(folder: Path) -> None:
    """Open a sparse store of ImageNet's size and read one sample."""
    files, row = [], 2 * CODES[0] * CODES[1]
    for first in range(0, IMAGENET, IMAGES_PER_SHARD):
        count = min(IMAGES_PER_SHARD, IMAGENET - first)
        files.append({"name": f"codes-{len(files):05d}.bin", "bytes": count * row})
    files += [{"name": "labels.bin", "bytes": 4 * IMAGENET}, {"name": "paths.txt", "bytes": 0}]
    folder.mkdir()
    for entry in files:
        (folder / entry["name"]).touch()
        os.truncate(folder / entry["name"], entry["bytes"])
    shape = {"images": IMAGENET, "views": CODES[0], "tokens": CODES[1], "codebook_size": 4096}
    classes = [f"n{i:08d}" for i in range(1000)]
    about = {"images_per_shard": IMAGES_PER_SHARD, "classes": classes, "files": files}
    write_manifest(folder, {**shape, **about})
    took = [seconds(lambda: TokenStore(folder).codes(IMAGENET - 1, 9)) for _ in range(TURNS)]
    print(f"{IMAGENET} images: {1e3 * median(took):.1f} ms to open and read one sample")
    store = TokenStore(folder)
    samples = TrainTokens(store, EpochDraws(store.labels, CODES[0], 0, 0.1, 1000))
    print(f"  {1e3 * seconds(lambda: samples[0, 0]):.1f} ms to draw the views of an epoch")


@torch.inference_mode()
def plain_codes(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Images (B, 3, S, S) in [0, 1] -> codes (B, T), as the published model's forward pass makes them.

    Eager and in float32: q, k and v apart, attention by scaled_dot_product_attention, every block on all
    patches and latents, and a quantizer that also looks the vectors up and computes its loss.
    """
    encoder = tokenizer.encoder
    x = encoder.patch_embed(images).flatten(2).transpose(1, 2) + encoder.positional_embedding
    patches = x.shape[1]
    latents = tokenizer.latent_tokens + encoder.latent_token_positional_embedding
    x = encoder.ln_pre(torch.cat([x, latents.expand(len(images), -1, -1)], 1))
    for block in encoder.transformer:
        attn: Any = block.attn
        qkv = attn.in_proj(block.ln_1(x)).chunk(3, -1)  # type: ignore[operator]
        q, k, v = (y.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + attn.out_proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))  # type: ignore[operator]
    x = encoder.ln_post(x[:, patches:]).transpose(1, 2).unsqueeze(2)
    return tokenizer.quantize(encoder.conv_out(x).squeeze(2).transpose(1, 2))[1]


def beside_plain(options: argparse.Namespace, device: torch.device) -> None:
    """Encoding as pretokenization does it in float32, and the published forward pass, in turn."""
    config = TokenizerConfig(encoder_layers=options.layers or TokenizerConfig.encoder_layers)
    tokenizer = Tokenizer(config, with_decoder=False).to(device).eval()
    images = torch.rand(options.plain, 3, 256, 256, device=device)
    ways = [
        lambda: plain_codes(tokenizer, images).cpu(),
        lambda: encode(tokenizer, images, "fp32").cpu(),
    ]
    plain, ours = (way() for way in ways)
    pairs = [tuple(map(seconds, ways)) for _ in range(options.turns)]
    rates = [options.plain / median(times) for times in zip(*pairs)]
    ratios = [a / b for a, b in pairs]
    print(
        f"{options.plain} views, fp32, {config.encoder_layers} layers: published forward {rates[0]:.3f} "
        f"images/s, ours {rates[1]:.3f}, ratio {median(ratios):.3f} ({min(ratios):.3f} … "
        f"{max(ratios):.3f}), {(plain == ours).double().mean().item():.2%} of codes equal"
    )


def end_to_end(folder: Path, options: argparse.Namespace, processes: PartialState) -> None:
    """Images to codes, end to end, and the encoder alone on random tensors, in turn."""
    rng, files = np.random.default_rng(0), []
    for i in range(options.encode):
        pixels = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)
        files.append(str(folder / f"{i}.JPEG"))
        image.save(files[-1], quality=90)
    device = processes.device
    assert device is not None  # accelerate's type hint allows it
    config = TokenizerConfig()
    tokenizer = Tokenizer(config, with_decoder=False).to(device).eval()
    views = VIEWS[options.views]
    batches = -(-options.encode // options.batch_size)
    random = torch.rand(options.batch_size * views, 3, 256, 256, device=device)
    ranges = batches_of(options.encode, BATCHES_PER_PART * options.batch_size)
    parts = Parts(folder / "encoded", len(ranges))

    def alone(dtype: str) -> float:
        started = time.perf_counter()
        codes = [encode(tokenizer, random, dtype) for _ in range(batches)]
        codes[-1].cpu()
        return time.perf_counter() - started

    def whole(dtype: str) -> float:
        started = time.perf_counter()
        plan = EncodingPlan(
            256, options.views, dtype, options.batch_size, num_workers=options.num_workers
        )
        source = ReadableCrops(files, plan)
        for number, (codes, _) in enumerate(encode_parts(tokenizer, source, plan, ranges)):
            parts.write(number, codes=codes)
        return time.perf_counter() - started

    print(
        f"{options.encode} JPEGs of 500 x 375, {options.views}, {options.batch_size} images per batch, "
        f"{options.num_workers} workers, the published encoder's sizes"
    )
    exact = None
    for dtype in ["fp32", "bf16"] if device.type == "cpu" else ["fp32", "tf32", "bf16"]:
        encode(tokenizer, random[:views], dtype)
        pairs = [(alone(dtype), whole(dtype)) for _ in range(options.turns)]
        rate = batches * options.batch_size / median(a for a, _ in pairs)
        exact = exact or rate
        print(
            f"  {dtype}: encoder alone {rate:.2f} images/s ({rate / exact:.2f} x fp32), end to end "
            f"{options.encode / median(b for _, b in pairs):.2f} images/s, ratio "
            f"{median(a / b for a, b in pairs):.3f}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure token caches and pretokenization.")
    parser.add_argument("--images", type=int, default=4000, help="in the compared stores; 0: none")
    parser.add_argument("--encode", type=int, default=8, help="images pretokenized; 0: none")
    parser.add_argument(
        "--plain", type=int, default=2, help="views encoded in the published way too; 0: none"
    )
    parser.add_argument("--layers", type=int, help="fewer layers of the encoder for --plain")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="processor: CPU time of one thread, for --plain",
    )
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--views", choices=list(VIEWS), default="center_flip")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3, help="repetitions of both timings")
    parser.add_argument("--folder", help="where to write the stores (default: a temporary folder)")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    if options.clock == "processor":
        torch.set_num_threads(1)
    processes = start_processes()
    print(machine())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.images:
            stores(Path(folder), options.images)
            imagenet_open(Path(folder) / "imagenet")
        if options.plain:
            beside_plain(options, processes.device or torch.device("cpu"))
        if options.encode:
            end_to_end(Path(folder), options, processes)
