"""The fused attention against PyTorch's and against a copy: `python -m benchmarks.attention`.

One block's attention of one step, bf16, at the last position, by head size. GB/s count the cache once:
keys and values up to the position. PyTorch's attention reads a cache that is written already, so that
its time leaves out norm, rotation and writing. On a CPU the kernel runs in Triton's interpreter, at
one row, where only its result means something.
"""

import argparse
import os
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import machine
from modeling.decode_attention import empty_cache, plain_attention

HEADS, POSITIONS = 16, 273


def milliseconds(work: Callable[[], object], calls: int = 20, rounds: int = 5) -> float:
    """Of one call on the GPU: the median of several replays of a graph of calls."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    graph.replay()
    times = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / calls)
    return statistics.median(times)


def measure(size: int, rows: int, device: torch.device, copied: float) -> None:
    from modeling.fused_attention import fused_attention

    torch.manual_seed(0)
    last = POSITIONS - 1
    cache = empty_cache(rows, HEADS, POSITIONS, size, torch.bfloat16, device)
    cache.k.normal_()
    cache.v.normal_()
    qkv = torch.randn(rows, 3 * HEADS * size, device=device).bfloat16()
    qk_norm = torch.rand(2, 1, size, device=device) + 0.5
    angles = torch.randn(POSITIONS, size, device=device)
    turns = torch.stack([angles.cos(), angles.sin()], 1)
    position = torch.tensor([last], device=device)
    fused = fused_attention(qkv, qk_norm, turns, position, cache).float()
    plain = plain_attention(qkv, qk_norm, turns, last, cache).float()
    error = ((fused - plain).abs() / (1 + plain.abs())).max().item()
    line = f"head size {size}: rows {rows}, largest difference {error:.4f}"
    if device.type == "cuda":
        q = torch.randn(rows, HEADS, 1, size, device=device).bfloat16()
        moved = 2 * cache.k.numel() * cache.k.element_size() / 1e6  # MB, and MB / ms is GB/s
        ours = moved / milliseconds(lambda: fused_attention(qkv, qk_norm, turns, position, cache))
        sdpa = moved / milliseconds(lambda: F.scaled_dot_product_attention(q, cache.k, cache.v))
        line += f", fused {ours:.0f} GB/s, PyTorch {sdpa:.0f} GB/s, copy {copied:.0f} GB/s"
    print(line, flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=512 if cuda else 1, help="images x branches")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[48, 64, 80])
    args = parser.parse_args()
    if not cuda:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is loaded
    device = torch.device("cuda" if cuda else "cpu")
    print(machine())
    copied = 0.0
    if cuda:
        source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copied = 2 * source.numel() / 1e6 / milliseconds(lambda: target.copy_(source))
    for size in args.head_sizes:
        measure(size, args.rows, device, copied)


if __name__ == "__main__":
    main()
