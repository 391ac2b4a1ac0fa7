"""The fused attention against PyTorch's and against a copy: `python -m benchmarks.attention`.

One block's attention of one step, by head size, type of the cache and position, with the engine's
shape of a program and the other one (`fused_attention.WIDE`). GB/s count keys and values up to the
position once. PyTorch's attention reads a cache that is written already, so that its time leaves out
norm, rotation and writing. On a CPU the kernel runs in Triton's interpreter, at one row, where only
its result means something.
"""

import argparse
import os
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import copy_rate, explain_failures, machine
from modeling.decode_attention import empty_cache, filled, plain_attention, quantize

HEADS, CODES = 16, 273


def milliseconds(work: Callable[[], object], calls: int = 20, rounds: int = 5) -> float:
    """Milliseconds of one call on the GPU: the median of several replays of a graph of calls."""
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


def measure(size: int, int8: bool, positions: list[int], rows: int, device: torch.device) -> None:
    from modeling.fused_attention import SHAPE, WIDE, fused_attention

    torch.manual_seed(0)
    stored = torch.int8 if int8 else torch.bfloat16
    cache = empty_cache((rows, HEADS, CODES, size), stored, device)
    for values, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        if scales is None:
            values.normal_()
        else:
            for row in range(rows):  # the float32 states of all rows would be large
                values[row], scales[row] = quantize(
                    torch.randn_like(values[row], dtype=torch.float32)
                )
    qkv = torch.randn(rows, 3 * HEADS * size, device=device).bfloat16()
    qk_norm = torch.rand(2, 1, size, device=device) + 0.5
    angles = torch.randn(CODES, size, device=device)
    turns = torch.stack([angles.cos(), angles.sin()], 1)
    error, rates = 0.0, {SHAPE: [], WIDE[int8]: []}
    last = positions[-1]
    for p in positions:
        position = torch.tensor([p], device=device)
        plain = plain_attention(qkv, qk_norm, turns, p, cache).float()
        for shape in rates:
            work = lambda: fused_attention(qkv, qk_norm, turns, position, cache, shape)  # noqa: B023, E731
            off = (work().float() - plain).abs() / (1 + plain.abs())
            error = max(error, off.max().item())
            if device.type == "cuda":  # bytes / ms / 1e6 are GB/s
                moved = 2 * rows * HEADS * p * size * cache.k.element_size()
                rates[shape].append(f"{moved / milliseconds(work) / 1e6:.0f}")
    line = f"head size {size}, {'int8' if int8 else 'bf16'} cache: rows {rows}, largest difference {error:.4f}"
    if device.type == "cuda":
        ours = ", ".join(f"{warps} warps {' '.join(rates[block, warps])}" for block, warps in rates)
        line += f"; GB/s at {' '.join(map(str, positions))}: {ours}"
        if not int8:
            q = torch.randn(rows, HEADS, 1, size, device=device).bfloat16()
            K, V = filled(cache, last)
            spent = milliseconds(lambda: F.scaled_dot_product_attention(q, K, V))
            line += f"; PyTorch at {last} {4 * rows * HEADS * last * size / spent / 1e6:.0f}"
        line += f"; copy {copy_rate(device) / 1e9:.0f}"
    print(line, flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=512 if cuda else 1, help="images x branches")
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[48, 64, 80])
    parser.add_argument(
        "--positions", type=int, nargs="+", default=[16, 64, 137, 272] if cuda else [17]
    )
    args = parser.parse_args()
    explain_failures()
    if not cuda:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is loaded
    device = torch.device("cuda" if cuda else "cpu")
    print(machine())
    for size in args.head_sizes:
        for int8 in (False, True):
            measure(size, int8, args.positions, args.rows, device)


if __name__ == "__main__":
    main()
