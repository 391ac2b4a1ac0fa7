"""All figures that need a GPU, step by step: `bash benchmarks/h100.sh`.

Every step is a command with a time limit of its own. Its output is shown as it comes, and what it
measured is written into benchmarks/README.md before the next step begins, so that a cut costs the
step that it hits. `--tiny` runs the same steps at small sizes on a CPU and fills a copy of the README.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.common import machine
from benchmarks.tables import Cell, fill

ROOT = Path(__file__).parents[1]
README = ROOT / "benchmarks/README.md"
LIMIT = 25 * 60  # seconds of all steps
SIZES = ("B", "L", "XL")
TRAINED = {"B": "B, 128", "L": "L, 64", "XL": "XL, 32"}
RUNS = {
    "B": "B, 500,000 steps × 2048",
    "L": "L, 500,000 steps × 2048",
    "XL": "XL, 250,000 steps × 2048",
}


class Step(NamedTuple):
    """One command of the run."""

    name: str
    limit: int  # seconds
    command: list[str]  # arguments of Python
    tiny: list[str]  # the same on a CPU, cut down
    read: Callable[[str], list[Cell]]  # output -> what it says about cells


# ---------------------------------------------------------------------- reading the outputs
def find(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of the first match; what did not match is an empty string."""
    found = re.search(pattern, text, re.M)
    return found.groups("") if found else ("",) * re.compile(pattern).groups


def read_tests(output: str) -> list[Cell]:
    (summary,) = find(r"^=*\s*(\d+ (?:passed|failed|skipped|deselected).*?) in ", output)
    return [("## CUDA device", 'pytest -m "gpu or kernel"', 1, summary)]


def read_attention(output: str) -> list[Cell]:
    cells = []
    for size in (48, 64, 80):
        values = find(
            rf"^head size {size}: .*difference ([\d.]+)"
            r"(?:, fused (\d+) GB/s, PyTorch (\d+) GB/s, copy (\d+) GB/s)?",
            output,
        )
        cells += [("Attention of one step", str(size), i + 1, v) for i, v in enumerate(values)]
    return cells


def read_sampling(size: str, batch: int) -> Callable[[str], list[Cell]]:
    column = 1 + SIZES.index(size)

    def read(output: str) -> list[Cell]:
        (rate,) = find(r"^\s+ours .*?: ([\d.]+) images/s", output)
        (ratio,) = find(r"^\s+ratio\s+([\d.]+)", output)
        (share,) = find(r"ours reaches (\d+%) of it", output)
        (least,) = find(r"^\s+roofline ([\d.]+) images/s", output)
        rows = {"images/s": rate, "of the roofline": share, "roofline, images/s": least}
        if batch == 256:
            rows["against the plain way"] = ratio and f"{ratio}×"
        return [("## Sampling", f"{name}, batch {batch}", column, v) for name, v in rows.items()]

    return read


def read_training(size: str) -> Callable[[str], list[Cell]]:
    def read(output: str) -> list[Cell]:
        plain, plain_memory = find(
            r"plain: ([\d.]+) images/s(?:, MFU [\d.]+%, ([\d.]+) GiB)?", output
        )
        ours, use, memory = find(
            r"ours: ([\d.]+) images/s(?:, MFU ([\d.]+%), ([\d.]+) GiB)?", output
        )
        (ratio,) = find(r"ours is ([\d.]+) x as fast", output)
        hours, gpu_hours, cost = find(r": (\d+) h, (\d+) GPU-hours, (\d+) USD", output)
        both = f"{plain_memory or ''} / {memory}" if memory else ""
        row = TRAINED[size]
        values = [ours and machine(), plain, ours, ratio, use, both]
        cells = [("## Generator training", row, i + 1, v) for i, v in enumerate(values)]
        paper = [hours, gpu_hours, cost and f"{cost} USD"]
        return cells + [
            ("## Generator training", RUNS[size], i + 2, v or "") for i, v in enumerate(paper)
        ]

    return read


def read_tokenizer(table: str, columns: list[int]) -> Callable[[str], list[Cell]]:
    """`columns` of the benchmark's own table, in the order of the README's."""

    def read(output: str) -> list[Cell]:
        found = {}
        for line in output.splitlines():
            values = [part.strip() for part in line.strip().strip("|").split("|")]
            if len(values) > max(columns):
                found[values[0]] = [values[i] for i in columns]
        return [
            (table, mode, i + 1, value)
            for mode in ("exact", "fast, compiled")
            for i, value in enumerate(found.get(mode, [""] * len(columns)))
        ]

    return read


def read_pretokenization(output: str) -> list[Cell]:
    published, ours, times = find(
        r"published forward ([\d.]+) images/s, ours ([\d.]+), ratio ([\d.]+)", output
    )
    cells = [
        ("published forward pass", "H100", i, v) for i, v in enumerate((published, ours, times), 1)
    ]
    for name in ("fp32", "tf32", "bf16"):
        alone, gain, ratio = find(
            rf"^\s+{name}: encoder alone ([\d.]+) images/s \(([\d.]+) x fp32\).*ratio ([\d.]+)",
            output,
        )
        cells += [
            ("compares pretokenization", name, i + 1, v) for i, v in enumerate((alone, gain, ratio))
        ]
    return cells


def read_evaluation(output: str) -> list[Cell]:
    (rate,) = find(r"^features from .npz: ([\d.]+) images/s", output)
    rows = {
        "features from an .npz, images/s": rate,
        "share of the network's own rate": find(r"own rate: ([\d.]+%)", output)[0],
        "precision and recall": ", ".join(
            filter(None, find(r"^precision and recall, .*: ([\d.]+ s), (\d+ MB) more", output))
        ),
        "Fréchet distance": find(r"^Fréchet distance of 2048 features: ([\d.]+ s)", output)[0],
        "50,000 images": f"{50_000 / float(rate):.0f} s" if rate else "",
    }
    return [("## Evaluation", row, 2, value) for row, value in rows.items()]


def read_dinov2(output: str) -> list[Cell]:
    (rate,) = find(r"^features from .npz: ([\d.]+) images/s", output)
    rows = {
        "DINOv2 features from an .npz, images/s": rate,
        "share of DINOv2's own rate": find(r"own rate: ([\d.]+%)", output)[0],
        "50,000 images, from DINOv2's rate": f"{50_000 / float(rate):.0f} s" if rate else "",
    }
    return [("## Evaluation", row, 2, value) for row, value in rows.items()]


def read_likelihood(output: str) -> list[Cell]:
    _, score, share = find(r"forward (\d+) codes/s, score (\d+) codes/s, share ([\d.]+%)", output)
    rows = {"loss of a generator, codes/s": score, "share of its forward rate": share}
    return [("## Evaluation", row, 2, value) for row, value in rows.items()]


# ---------------------------------------------------------------------- the steps
def module(name: str, *arguments: object) -> list[str]:
    return ["-m", f"benchmarks.{name}", *map(str, arguments)]


def steps() -> list[Step]:
    """All steps, the ones that others depend on first."""
    return [
        Step(
            "tests on the GPU", 210, ["-m", "pytest", "-q", "-m", "gpu or kernel"],
            ["-m", "pytest", "-q", "tests/unit/runtime/test_parts.py"], read_tests,
        ),
        Step(
            "fused attention", 40, module("attention"), module("attention", "--head-sizes", 48),
            read_attention,
        ),
        *sampling_steps(),
        *generator_steps(),
        *tokenizer_steps(),
        *evaluation_steps(),
    ]  # fmt: skip


def sampling_steps() -> list[Step]:
    found = []
    tiny = ["--batch", 1, "--plain-batch", 1, "--layers", 1, "--rounds", 1, "--precisions", "fp32"]
    for batch, limits in ((256, (100, 120, 140)), (512, (50, 60, 70))):
        for size, limit in zip(SIZES, limits):
            # The ratio to the plain way is that of batch 256; at 512 the plain way is kept short.
            # Its growing cache at XL's size leaves no room for batches of 125.
            if batch == 256:
                plain = ["--rounds", 2, "--plain-batch", 32 if size == "XL" else 125]
            else:
                plain = ["--rounds", 1, "--plain-batch", 8]
            chosen = ["--sizes", size.lower()]
            full = module("sampling", *chosen, "--batch", batch, *plain)
            found.append(
                Step(
                    f"sampling {size}, batch {batch}", limit, full,
                    module("sampling", *chosen, *tiny), read_sampling(size, batch),
                )
            )  # fmt: skip
    return found


def generator_steps() -> list[Step]:
    return [
        Step(
            f"training {size}", limit, module("generator_training", size.lower(), "--rounds", 3),
            module("generator_training", "small", "--rounds", 1, "--steps", 1), read_training(size),
        )
        for size, limit in zip(SIZES, (60, 80, 100))
    ]  # fmt: skip


def tokenizer_steps() -> list[Step]:
    """Its training, and pretokenization with it."""
    small = ["--batch", 2, "--steps", 1, "--rounds", 1, "--no-perceptual"]
    brief = ["--compile", "--steps", 4, "--rounds", 2]  # a step in float32 is 39 TFLOP
    return [
        Step(
            "tokenizer, MFU", 105, module("tokenizer_training", *brief, "--no-perceptual"),
            module("tokenizer_training", *small),
            read_tokenizer("The same without ConvNeXt-S", [1, 2, 3]),
        ),
        Step(
            "tokenizer with ConvNeXt-S", 105, module("tokenizer_training", *brief),
            module("tokenizer_training", *small),
            read_tokenizer("Published size", [1, 2, 4, 5, 6, 7, 8, 9]),
        ),
        Step(
            "pretokenization", 90,
            module(
                "tokens", "--images", 500, "--encode", 256, "--batch_size", 32, "--views",
                "ten_crop", "--turns", 2, "--plain", 64, "--num_workers", os.cpu_count() or 8,
            ),
            module("tokens", "--images", 20, "--encode", 2), read_pretokenization,
        ),
    ]  # fmt: skip


def evaluation_steps() -> list[Step]:
    return [
        Step(
            "evaluation", 80,
            module("evaluation", "--images", 5000, "--rounds", 3, "--manifold", 5000),
            module("evaluation", "--images", 2, "--batch_size", 2, "--rounds", 1, "--manifold", 50),
            read_evaluation,
        ),
        Step(
            "DINOv2", 50,
            module(
                "evaluation", "--features", "dinov2", "--images", 1000, "--rounds", 2, "--manifold", 0
            ),
            module(
                "evaluation", "--features", "dinov2", "--images", 1, "--batch_size", 1, "--rounds", 1,
                "--manifold", 0,
            ),
            read_dinov2,
        ),
        Step(
            "loss of a generator", 40, module("likelihood", "--rounds", 2),
            module("likelihood", "--batches", 1, "--batch_size", 2, "--rounds", 1), read_likelihood,
        ),
    ]  # fmt: skip


# ---------------------------------------------------------------------- running
def run(command: list[str], limit: float) -> tuple[str, str]:
    """Show a command's output as it comes; returns it, and how it ended.

    After `limit` seconds the command and all that it started are ended; what it has printed counts.
    """
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    cut = threading.Event()

    def end() -> None:
        cut.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, end)
    timer.start()
    lines = []
    try:
        for line in process.stdout:
            print("   ", line, end="", flush=True)
            lines.append(line)
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # interrupted
            os.killpg(process.pid, signal.SIGKILL)
    state = f"cut after {limit:.0f} s" if cut.is_set() else "done" if not code else f"exit {code}"
    return "".join(lines), state


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes on a CPU, into a copy")
    parser.add_argument("--only", help="steps whose name contains this")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("there is no CUDA device here: --tiny tries the steps on a CPU", file=sys.stderr)
        return 2
    readme = README
    if args.tiny:
        readme = Path(tempfile.mkdtemp(prefix="alitok-benchmarks-")) / "README.md"
        readme.write_text(README.read_text())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends its command too
    device = machine() + (" (tiny: figures mean nothing)" if args.tiny else "")
    chosen = [step for step in steps() if not args.only or args.only in step.name]
    print(f"{device}: {len(chosen)} steps, at most {sum(s.limit for s in chosen) / 60:.0f} minutes")
    fill(readme, [("## CUDA device", "device", 1, device)])
    ended = []
    for number, step in enumerate(chosen, 1):
        command = step.tiny if args.tiny else step.command
        print(f"[{number}/{len(chosen)}] {step.name}: python {' '.join(command)}", flush=True)
        began = time.monotonic()
        output, state = run(command, step.limit)
        missing = fill(readme, step.read(output))
        state += f", {time.monotonic() - began:.0f} s"
        if missing:
            state += f", not measured: {'; '.join(missing)}"
        print(f"[{number}/{len(chosen)}] {step.name}: {state}", flush=True)
        ended.append(f"  {step.name}: {state}")
    print("\n".join(["", *ended, f"written to {readme}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
