"""Speed of evaluation: `python -m benchmarks.evaluation [--images 50000]`.

The network alone on random tensors and the whole reading and summing of an .npz, in turn, so that
their ratio holds; then precision and recall, and the Fréchet distance, with the memory they take.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import machine
from evaluation.features import INCEPTION_FILE, Inception
from evaluation.metrics import frechet_distance_of_moments, precision_recall
from evaluation.sources import npz_images
from evaluation.statistics import measure
from runtime.processes import start_processes
from tests.inception import write_random_inception


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


def peak_mb() -> float:
    """The most memory so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="in the .npz (64)")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (256)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="pairs whose median ratio is shown")
    parser.add_argument("--manifold", type=int, default=10_000, help="features per set")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        write_random_inception(checkpoints / INCEPTION_FILE)  # as fast as the real weights
        processes = start_processes()
        device = processes.device
        assert device is not None  # accelerate's type hint allows it
        inception = Inception(device, checkpoints)
        shape = (args.images, args.size, args.size, 3)
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        np.savez(f"{folder}/images.npz", pixels)
        del pixels
        images = npz_images(Path(folder) / "images.npz")
        batch = torch.randint(256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
        batch = batch.to(device)
        batches = -(-args.images // args.batch_size)

        def network() -> None:
            for _ in range(batches):
                inception(batch)

        seconds(lambda: inception(batch))
        ratios, rates = [], []
        for _ in range(args.rounds):
            alone = seconds(network) / (batches * args.batch_size)
            whole = seconds(lambda: measure(images, inception, processes, args.batch_size, 8))
            rates.append(args.images / whole)
            ratios.append(alone * args.images / whole)
    print(f"features from .npz: {statistics.median(rates):.2f} images/s")
    print(f"share of the network's own rate: {statistics.median(ratios):.1%}")
    features = torch.randn(2, args.manifold, 2048)
    before = peak_mb()
    spent = seconds(lambda: precision_recall(features[0], features[1], device))
    print(
        f"precision and recall, {args.manifold} x {args.manifold}: {spent:.1f} s, "
        f"{peak_mb() - before:.0f} MB more"
    )
    a, b = torch.randn(2, 2500, 2048, dtype=torch.float64, device=device)
    moments = a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T)
    spent = seconds(lambda: frechet_distance_of_moments(*moments))
    print(f"Fréchet distance of 2048 features: {spent:.1f} s")


if __name__ == "__main__":
    main()
