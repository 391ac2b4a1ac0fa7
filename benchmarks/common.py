"""What benchmarks share: the machine by name, and what it does at best."""

import argparse
import ast
import contextlib
import logging
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def machine() -> str:
    """The device by name, with PyTorch's version, for the tables in benchmarks/README.md."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} cores of {processor()}"
    return f"{device}, torch {torch.__version__}"


def explain_failures() -> None:
    """Log why something is not compiled, with its traceback."""
    logging.basicConfig()
    logging.getLogger("modeling").setLevel(logging.DEBUG)


def inductor_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inductor", nargs="+", default=[], metavar="NAME=VALUE", help="Inductor's options, to try"
    )


def with_inductor(options: list[str]) -> contextlib.AbstractContextManager:
    """A context with options of Inductor, such as `triton.enable_pdl=True`."""
    import torch._inductor.config as config

    pairs = (option.split("=", 1) for option in options)
    return config.patch({name: ast.literal_eval(value) for name, value in pairs})


def processor() -> str:
    """The processor by name."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a large copy, read and written, measured now: the median of nine."""
    source = torch.empty(
        1 << (30 if device.type == "cuda" else 27), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source))


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of square matrices, measured now: the median of nine."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b)


def median_seconds(work: Callable[[], object], times: int = 9) -> float:
    """Median seconds of one call, by the wall clock; the first call, a warm-up, does not count."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def profile(work: Callable[[], object], rows: int = 20) -> None:
    """Print the GPU's time of one call by kernel."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        work()
        torch.cuda.synchronize()
    print(profiler.key_averages().table("self_device_time_total", rows, max_name_column_width=70))


if __name__ == "__main__":
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(machine())
    print(
        f"copy {copy_rate(here) / 1e9:.0f} GB/s, product "
        f"{product_rate(here, torch.bfloat16) / 1e12:.2f} TFLOP/s"
    )
