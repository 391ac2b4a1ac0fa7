"""All figures that need a GPU, the most telling first: `bash benchmarks/h100.sh --output DIR`.

Every step is a command with a time limit of its own. DIR gets what a step printed as soon as it has
ended, the log of all, and a copy of benchmarks/README.md with the cells that are known. After
`--minutes` no step begins and the running one is cut; another call with the same DIR resumes with the
steps that are not done. `--tiny` runs all steps at small sizes on a CPU.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from benchmarks.common import machine
from benchmarks.tables import Cell, fill

ROOT = Path(__file__).parents[1]
README = ROOT / "benchmarks/README.md"
SIZES = ("B", "L", "XL")
RUNS = {
    "B": "B, 500,000 steps × 2048",
    "L": "L, 500,000 steps × 2048",
    "XL": "XL, 250,000 steps × 2048",
}
# Inductor may keep more reads in a kernel, and join reductions along rows and columns that read more.
LARGER_FUSIONS = ["realize_reads_threshold=8", "triton.mix_order_reduction_max_reads=20"]
KERNEL_TESTS = [
    f"tests/unit/{name}.py"
    for name in (
        "modeling/test_fused_attention", "modeling/test_parity", "modeling/test_quantizer",
        "encoding/test_encoder",
    )
]  # fmt: skip


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
    return [("## CUDA device", "pytest of the kernels and of parity", 1, summary)]


def read_limits(output: str) -> list[Cell]:
    copy, product = find(r"copy ([\d.]+) GB/s, product ([\d.]+) TFLOP/s", output)
    cells = [("copy of 1 GiB", copy), ("product of 8,192² in bf16", product)]
    return [("## CUDA device", row, 1, value) for row, value in cells]


def read_attention(output: str) -> list[Cell]:
    cells = []
    for size in (48, 64, 80):
        for cache in ("bf16", "int8"):
            off, one, four, plain, copy = find(
                rf"^head size {size}, {cache} cache: .*difference ([\d.]+)"
                r"(?:; GB/s at [\d ]+: 1 warps ([\d ]+), 4 warps ([\d ]+)"
                r"(?:; PyTorch at \d+ (\d+))?; copy (\d+))?",
                output,
            )
            values = {1: off, 2: one, 3: four, 5: copy} | ({4: plain} if cache == "bf16" else {})
            row = f"{size}, {cache}"
            cells += [("Attention of one step", row, i, value) for i, value in values.items()]
    return cells


def sampled(output: str, batch: int, streams: int = 1) -> str:
    """Images/s of our sampling."""
    (rate,) = find(rf"^\s+ours +batch {batch}, .* {streams} streams: ([\d.]+) images/s", output)
    return rate


def read_sampling(size: str, streams: bool = False) -> Callable[[str], list[Cell]]:
    column = 1 + SIZES.index(size)

    def read(output: str) -> list[Cell]:
        rows = {}
        for batch in (256, 512):
            least, share = find(
                rf"^\s+roofline batch {batch}, 1 streams: ([\d.]+) images/s.* reaches (\d+%)",
                output,
            )
            rows |= {
                f"images/s, batch {batch}": sampled(output, batch),
                f"roofline, images/s, batch {batch}": least,
                f"of the roofline, batch {batch}": share,
            }
        if streams:
            rows["images/s, batch 256 in two streams"] = sampled(output, 256, 2)
        return [("## Sampling", name, column, value) for name, value in rows.items()]

    return read


def read_dependent_launch(output: str) -> list[Cell]:
    return [("## Sampling", "images/s, batch 512, dependent launch", 1, sampled(output, 512))]


def read_plain_sampling(output: str) -> list[Cell]:
    (ratio,) = find(r"^\s+ratio\s+([\d.]+)", output)
    return [("## Sampling", "against the plain way", 1, ratio and f"{ratio}×")]


def trained(output: str, batch: int) -> dict[int, str]:
    """Images/s, MFU and memory of our training, by column."""
    rate, use, memory = find(
        rf"batch {batch} ours: ([\d.]+) images/s(?:, MFU ([\d.]+%), ([\d.]+ GiB))?", output
    )
    return {3: rate, 5: use, 6: memory}


def read_training(size: str, batches: tuple[int, ...]) -> Callable[[str], list[Cell]]:
    def read(output: str) -> list[Cell]:
        cells = []
        for batch in batches:
            found = trained(output, batch)
            values = {1: found[3] and machine(), **found}
            row = f"{size}, {batch}"
            cells += [("## Generator training", row, i, value) for i, value in values.items()]
        paper = find(r": (\d+) h, (\d+) GPU-hours, (\d+ USD)", output)
        return cells + [
            ("## Generator training", RUNS[size], i + 2, value) for i, value in enumerate(paper)
        ]

    return read


def read_trial(row: str) -> Callable[[str], list[Cell]]:
    def read(output: str) -> list[Cell]:
        values = trained(output, 128).items()
        return [("## Generator training", row, i, value) for i, value in values]

    return read


def read_plain_training(output: str) -> list[Cell]:
    (rate,) = find(r"plain: ([\d.]+) images/s", output)
    (ratio,) = find(r"ours is ([\d.]+) x as fast", output)
    return [("## Generator training", "B, 128", i, v) for i, v in ((2, rate), (4, ratio))]


def read_critic(output: str) -> list[Cell]:
    values = find(r"eager ([\d.]+) ms, compiled ([\d.]+) ms", output)
    return [("A discriminator's step", "H100", i + 1, value) for i, value in enumerate(values)]


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
        "Fréchet distance": find(r"^Fréchet distance of \d+ features: ([\d.]+ s)", output)[0],
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
    """All steps, the most telling first; in `tiny`, equal commands run once."""
    sample = ["--rounds", 1, "--precisions", "fp32", "--layers", 1, "--batches", 1]
    tiny_sampling = module("sampling", "--sizes", "b", *sample, "--plain-batch", 1)
    tiny_training = module(
        "generator_training", "small", "--batches", 2, "--rounds", 1, "--steps", 1
    )
    tiny_tokenizer = module(
        "tokenizer_training", "--batch", 1, "--steps", 1, "--rounds", 1, "--no-perceptual", "--critic"
    )  # fmt: skip

    def sampling(size: str, limit: int, *more: object) -> Step:
        command = module(
            "sampling", "--sizes", size.lower(), "--batches", 256, 512, "--rounds", 2,
            "--plain-batch", 0, *more,
        )  # fmt: skip
        reader = read_sampling(size, "--streams" in more)
        return Step(f"sampling {size}", limit, command, tiny_sampling, reader)

    def training(size: str, limit: int, batches: tuple[int, ...], *more: object) -> Step:
        command = module(
            "generator_training", size.lower(), "--batches", *batches, "--rounds", 3, "--no-plain",
            *more,
        )  # fmt: skip
        return Step(f"training {size}", limit, command, tiny_training, read_training(size, batches))

    def trial(name: str, *more: object) -> Step:
        step = training("B", 60, (128,), *more)
        return step._replace(name=f"training B, {name}", read=read_trial(f"B, 128, {name}"))

    def tokenizer(name: str, limit: int, reader: Callable, *more: object) -> Step:
        # A step in float32 is 39 TFLOP.
        command = module("tokenizer_training", "--compile", "--steps", 4, "--rounds", 2, *more)
        return Step(name, limit, command, tiny_tokenizer, reader)

    return [
        Step("rates of the device", 20, module("common"), module("common"), read_limits),
        Step(
            "tests of the kernels", 60,
            ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors",
             "-m", "gpu or kernel", *KERNEL_TESTS],
            ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/runtime/test_parts.py"],
            read_tests,
        ),
        Step(
            "attention", 40, module("attention"),
            module("attention", "--head-sizes", 48, "--positions", 3), read_attention,
        ),
        sampling("B", 110, "--streams", 1, 2, "--profile"),
        training("B", 70, (128,), "--profile"),
        training("XL", 70, (32, 64)),
        tokenizer(
            "tokenizer, fast mode and discriminator", 70, read_critic, "--modes", "fast", "--no-perceptual", "--critic"
        ),
        sampling("XL", 80),
        Step(
            "sampling, the plain way", 60,
            module("sampling", "--sizes", "b", "--rounds", 1, "--plain-batch", 125), tiny_sampling,
            read_plain_sampling,
        ),
        Step(
            "training, the plain way", 60, module("generator_training", "b", "--rounds", 2),
            tiny_training, read_plain_training,
        ),
        trial("cuDNN's attention first", "--cudnn"),
        trial("larger fusions", "--inductor", *LARGER_FUSIONS),
        sampling("B", 60, "--batches", 512, "--inductor", "triton.enable_pdl=True")._replace(
            name="sampling B, dependent launch", read=read_dependent_launch
        ),
        training("L", 80, (64, 128)),
        sampling("L", 80),
        tokenizer(
            "tokenizer, MFU", 105, read_tokenizer("The same without ConvNeXt-S", [1, 2, 3]), "--no-perceptual"
        ),
        tokenizer(
            "tokenizer with ConvNeXt-S", 105, read_tokenizer("Published size", [1, 2, 4, 5, 6, 7, 8, 9])
        ),
        *evaluation_steps(),
    ]  # fmt: skip


def evaluation_steps() -> list[Step]:
    """Pretokenization, and what scores images and generators."""
    return [
        Step(
            "pretokenization", 90,
            module(
                "tokens", "--images", 500, "--encode", 256, "--batch_size", 32, "--views",
                "ten_crop", "--turns", 2, "--plain", 64, "--num_workers", os.cpu_count() or 8,
            ),
            module(
                "tokens", "--images", 4, "--encode", 0, "--plain", 1, "--turns", 1, "--layers", 1,
            ),
            read_pretokenization,
        ),
        Step(
            "evaluation", 80,
            module("evaluation", "--images", 5000, "--rounds", 3, "--manifold", 5000),
            module(
                "evaluation", "--images", 2, "--batch_size", 2, "--rounds", 1, "--manifold", 50,
                "--width", 64,
            ),
            read_evaluation,
        ),
        Step(
            "DINOv2", 50,
            module(
                "evaluation", "--features", "dinov2", "--images", 1000, "--rounds", 2, "--manifold", 0
            ),
            module(
                "evaluation", "--features", "dinov2", "--layers", 1, "--images", 2, "--batch_size", 2,
                "--rounds", 1, "--manifold", 0,
            ),
            read_dinov2,
        ),
        Step(
            "loss of a generator", 40, module("likelihood", "--rounds", 2),
            module("likelihood", "--batches", 1, "--batch_size", 2, "--rounds", 1), read_likelihood,
        ),
    ]  # fmt: skip


# ---------------------------------------------------------------------- running
def run(command: list[str], limit: float, log: TextIO) -> tuple[str, str]:
    """Show and log a command's output as it comes; returns it, and how it ended.

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
            say(f"    {line}", log)
            lines.append(line)
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # interrupted
            os.killpg(process.pid, signal.SIGKILL)
    state = f"cut after {limit:.0f} s" if cut.is_set() else "done" if not code else f"exit {code}"
    return "".join(lines), state


def say(text: str, log: TextIO) -> None:
    print(text, end="", flush=True)
    print(text, end="", flush=True, file=log)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), help="folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps of this call")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--only", help="steps whose name contains this")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("there is no CUDA device here: --tiny tries the steps on a CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends its command too
    deadline = time.monotonic() + 60 * args.minutes
    args.output.mkdir(parents=True, exist_ok=True)
    readme, states_file = args.output / "README.md", args.output / "steps.json"
    if not readme.exists():
        readme.write_text(README.read_text())
    states = json.loads(states_file.read_text()) if states_file.exists() else {}
    device = machine() + (" (tiny: figures mean nothing)" if args.tiny else "")
    known = args.output / "device.txt"
    if known.exists() and known.read_text() != device:
        print(
            f"{args.output} holds figures of {known.read_text()}: pass another --output",
            file=sys.stderr,
        )
        return 2
    known.write_text(device)
    fill(readme, [("## CUDA device", "device", 1, device)])
    chosen = [step for step in steps() if not args.only or args.only in step.name]
    outputs: dict[tuple[str, ...], tuple[str, str]] = {}  # by command
    with open(args.output / "log.txt", "a") as log:
        say(f"{device}: {len(chosen)} steps, {args.minutes:g} minutes\n", log)
        for number, step in enumerate(chosen, 1):
            left = deadline - time.monotonic()
            if states.get(step.name, "").startswith("done") or left < 1:
                continue
            command = step.tiny if args.tiny else step.command
            say(f"[{number}/{len(chosen)}] {step.name}: python {' '.join(command)}\n", log)
            began = time.monotonic()
            if tuple(command) not in outputs:
                limit = left if args.tiny else min(step.limit, left)
                outputs[tuple(command)] = run(command, limit, log)
            output, state = outputs[tuple(command)]
            (args.output / f"{step.name}.txt").write_text(output)
            missing = fill(readme, step.read(output))
            state += f", {time.monotonic() - began:.0f} s"
            if missing:
                state += f", not measured: {'; '.join(missing)}"
            say(f"[{number}/{len(chosen)}] {step.name}: {state}\n", log)
            states[step.name] = state
            states_file.write_text(json.dumps(states, indent=1))
        for step in chosen:
            say(f"  {step.name}: {states.get(step.name, 'not begun')}\n", log)
        say(f"written to {args.output}\n", log)
    return 0 if all(states.get(s.name, "").startswith("done") for s in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
