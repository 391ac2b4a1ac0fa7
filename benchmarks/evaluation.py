"""Speed of evaluation: `python -m benchmarks.evaluation [--images 50000]`.

The network alone on random tensors and the whole reading and summing of an .npz, in turn, so that
their ratio holds; then precision and recall, and the Fréchet distance, with the memory they take.
"""

import argparse
import functools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from accelerate import PartialState

from benchmarks.common import machine
from evaluation.evaluator import NETWORKS
from evaluation.features import (
    DINOV2_FILE,
    INCEPTION_FILE,
    DINOv2,
    FeatureNetwork,
    Inception,
)
from evaluation.metrics import frechet_distance_of_moments, precision_recall
from evaluation.sources import open_images
from evaluation.statistics import measure
from runtime.processes import start_processes
from tests.dinov2 import write_random_dinov2
from tests.inception import write_random_inception

WIDTHS = {"inception": Inception.widths[0], "dinov2": DINOv2.widths[0]}  # of features


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call on a GPU; processor time on a CPU, whatever else runs there."""
    if not torch.cuda.is_available():
        started = time.process_time()
        work()
        return time.process_time() - started
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_mb(restart: bool = False) -> float:
    """The most memory in use, of the GPU where there is one, else of the process, in MB.

    `restart` forgets what was used before, so that the peak is what is in use now. The kernel does so for a
    process on Linux; elsewhere the peak is that of the whole process.
    """
    if torch.cuda.is_available():
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if restart:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 2**10


def open_random(name: str, layers: int, device: torch.device, folder: Path) -> FeatureNetwork:
    """A feature network with random weights, which are as fast as the real ones."""
    if name == "dinov2":
        write_random_dinov2(folder / DINOV2_FILE, layers=layers)
    else:
        write_random_inception(folder / INCEPTION_FILE)
    # Used by DINOv2 alone, whose depth is fixed.
    shallow = functools.partial(timm.create_model, depth=layers)
    with mock.patch.object(timm, "create_model", shallow):
        return NETWORKS[name](device, folder)


def feature_rates(args: argparse.Namespace, processes: PartialState, folder: Path) -> None:
    """Print the rate of features from an .npz, and its share of the network's own."""
    device = processes.device
    assert device is not None  # accelerate's type hint allows it
    features_of = open_random(args.features, args.layers, device, folder)
    shape = (args.images, args.size, args.size, 3)
    np.savez(
        folder / "images.npz", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    )
    images = open_images(folder / "images.npz")
    batch = torch.randint(256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
    batch = batch.to(device)
    batches = -(-args.images // args.batch_size)

    def network() -> None:
        for _ in range(batches):
            features_of(batch)

    seconds(lambda: features_of(batch))
    ratios, rates = [], []
    for _ in range(args.rounds):
        alone = seconds(network) / (batches * args.batch_size)
        whole = seconds(lambda: measure(images, features_of, args.batch_size, 8))
        rates.append(args.images / whole)
        ratios.append(alone * args.images / whole)
    print(f"features from .npz: {statistics.median(rates):.2f} images/s")
    print(f"share of the network's own rate: {statistics.median(ratios):.1%}", flush=True)


def distances(args: argparse.Namespace, device: torch.device) -> None:
    """Print time and memory of precision and recall, and the time of a Fréchet distance."""
    width = args.width or WIDTHS[args.features]
    features = torch.randn(2, args.manifold, width)
    before = peak_mb(restart=True)
    spent = seconds(lambda: precision_recall(features[0], features[1], device))
    print(
        f"precision and recall, {args.manifold} x {args.manifold}: {spent:.1f} s, "
        f"{peak_mb() - before:.0f} MB more"
    )
    a, b = torch.randn(2, 2500, width, dtype=torch.float64, device=device)
    moments = a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T)
    spent = seconds(lambda: frechet_distance_of_moments(*moments))
    print(f"Fréchet distance of {width} features: {spent:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", default="inception", choices=list(WIDTHS))
    parser.add_argument("--layers", type=int, default=24, help="of DINOv2 (24)")
    parser.add_argument("--images", type=int, default=64, help="in the .npz (64); 0: none")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (256)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="pairs whose median ratio is shown")
    parser.add_argument(
        "--manifold", type=int, default=10_000, help="features per set (10000); 0: no distances"
    )
    parser.add_argument("--width", type=int, help="of the distances' features (the network's)")
    args = parser.parse_args()
    print(machine())
    processes = start_processes()
    if args.images:
        with tempfile.TemporaryDirectory() as folder:
            feature_rates(args, processes, Path(folder))
    if args.manifold:
        distances(args, processes.device or torch.device("cpu"))


if __name__ == "__main__":
    main()
