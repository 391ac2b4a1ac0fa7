"""How much sooner does fine-tuning arrive? `python -m experiments.finetuning`.

By the real commands, on scikit-learn's digits: a tokenizer (stage 1) and a generator are trained on the
digits 0–4, others on 5–9 from scratch in half as many steps, and a third kind on 5–9 from the weights
for 0–4 (`experiment.init_weights`), in a third of the steps of those from scratch. All generators learn the codes of the tokenizer of 0–4, as a generator that is fine-tuned
keeps the published tokenizer. The fine-tuned generators start their new classes in two ways: every row
at the mean of the old ones, or drawn from the normal distribution of a new generator. Run it again to
resume.
"""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import pretokenization
import train_ar
from experiments.alignment.charts import need_matplotlib
from modeling.generator import GeneratorConfig
from modeling.weights.tensors import read_state_dict, write_state_dict
from quickstart.digits import write_digits
from runtime.arguments import Parser, as_path, new_file, number
from runtime.errors import InputError
from runtime.files import write_whole, writing
from runtime.program import run
from train_tokenizer import __main__ as train_tokenizer
from training.plot import curve, run_records

if TYPE_CHECKING:  # not needed by anything but plots
    from matplotlib.figure import Figure

SETS = {"old": range(5), "new": range(5, 10)}  # digits
CODES, CLASSES = 256, 5  # of configs/digits_generator.yaml, and of either set
QUANTITIES = {"tokenizer": "tokenizer, PSNR in dB", "generator": "generator, nats per code"}
RUNS = {"scratch": "from scratch", "finetuned": "from the weights for 0–4"}
STARTS = {"mean": "at the mean of the old classes", "normal": "normal, as a new generator"}
SEEDS = (42, 43, 44)
LONGER = 2  # the digits 0–4 are learnt for this many times as long: published weights are finished
REPORTS = 24  # evaluations of a run from scratch; a short run has as many per step

Curve = dict[float, float]


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m experiments.finetuning", description=__doc__)
    parser.add_argument("--output", type=as_path, default="output/finetuning", metavar="DIR")
    parser.add_argument(
        "--steps", type=number(REPORTS, 100_000), default=600, metavar="N",
        help="steps of a run from scratch (600)",
    )  # fmt: skip
    parser.add_argument("--figure", type=new_file(".png"), default="output/finetuning.png")
    args = parser.parse_args(argv)
    out: Path = args.output
    need_matplotlib()  # now, not after the training
    split_digits(out)
    train_tokenizers(out, args.steps)
    train_generators(out, args.steps)
    results = measure(out, args.steps)
    write_whole(out / "results.json", json.dumps(results, indent=1).encode())
    for line in rows_of(results):
        print(line)
    figure = draw(results)
    with writing(Path(args.figure)):
        figure.savefig(args.figure, dpi=80)
    print(f"wrote {args.figure}")


# ---------------------------------------------------------------------- the runs
def split_digits(out: Path) -> None:
    """Image folders old/{train,val} and new/{train,val} with one folder per digit."""
    if (out / "new/val/9").is_dir():  # the last one below
        return
    write_digits(out / "digits")
    for split in ("train", "val"):
        for name, digits in SETS.items():
            for digit in digits:
                target = out / name / split / str(digit)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.is_dir():
                    (out / "digits" / split / str(digit)).rename(target)


def execute(program: Callable[[list[str]], None], *words: Any) -> None:
    """Run one of the project's programs to its end, in a fork: its imports take longer than it does."""
    argv = list(map(str, words))
    print("$", program.__module__, *argv, flush=True)
    child = multiprocessing.get_context("fork").Process(target=run, args=(program, argv))
    child.start()
    child.join()
    if child.exitcode:
        raise InputError(f"{program.__module__} ended with status {child.exitcode}: see above")


def train_tokenizers(out: Path, steps: int) -> None:
    """Stage 1: of the old digits; of the new ones from scratch, and from the old ones' weights."""

    def train(name: str, digits: str, length: int, rate: float, *options: str) -> None:
        phase = f"{{name: mse, steps: {length}, learning_rate: {rate}, end_lr: 3.0e-5}}"
        execute(
            train_tokenizer.main, "config=configs/digits_stage1.yaml", f"phases=[{phase}]",
            f"experiment.output_dir={out}/tokenizer_{name}", *reports(steps),
            f"dataset.params.train_dir={out}/{digits}/train",
            f"dataset.params.val_dir={out}/{digits}/val", *options,
        )  # fmt: skip

    train("old", "old", LONGER * steps, 1.5e-3)
    train("scratch", "new", steps, 1.5e-3)
    init = f"experiment.init_weights={out}/tokenizer_old"
    train("finetuned", "new", steps // 3, 7.5e-4, init, "optimizer.params.warmup_steps=10")


def train_generators(out: Path, steps: int) -> None:
    """Train generators on the old tokenizer's codes, with either start of the new classes' rows."""
    for cache, folder in (("old", "old/train"), ("new", "new/train"), ("val", "new/val")):
        execute(
            pretokenization.main, "--tokenizer_checkpoint", out / "tokenizer_old", "--five_crop",
            "--img_size", 32, "--num_workers", 0, "--data_path", out / folder,
            "--cached_path", out / f"cache_{cache}",
        )  # fmt: skip

    def train(name: str, cache: str, length: int, *options: str) -> None:
        execute(
            train_ar.main, "config=configs/digits_generator.yaml", *reports(steps),
            f"experiment.output_dir={out}/generator_{name}", f"training.max_train_steps={length}",
            f"experiment.tokenizer_checkpoint={out}/tokenizer_old",
            f"dataset.params.pretokenization={out}/cache_{cache}", *options,
        )  # fmt: skip

    val = f"dataset.params.val_pretokenization={out}/cache_val"
    train("old", "old", LONGER * steps, "dataset.params.val_pretokenization=null")
    train("scratch", "new", steps, val)
    brief = ["lr_scheduler.params.warmup_steps=20", val]
    old = read_state_dict(out / "generator_old/generator.safetensors")
    for seed in SEEDS:
        file = out / f"normal_{seed}.safetensors"
        if not file.is_file():
            write_state_dict(with_normal_rows(old, seed), file)
        for start, source in (("mean", out / "generator_old"), ("normal", file)):
            options = [*brief, f"experiment.init_weights={source}", f"training.seed={seed}"]
            train(f"{start}_{seed}", "new", steps // 3, *options)


def reports(steps: int) -> list[str]:
    """Options of all runs: what is logged and saved, and no pictures."""
    return [
        f"experiment.eval_every={steps // REPORTS}", "experiment.log_every=50",
        "experiment.generate_every=0", "experiment.save_every=100",
    ]  # fmt: skip


def with_normal_rows(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A generator's tensors with rows of `CLASSES` new classes, N(0, 0.02), in place of its own."""
    rows = state["embeddings.weight"]
    noise = torch.Generator().manual_seed(seed)
    new = 0.02 * torch.randn(CLASSES, rows.shape[1], generator=noise)
    first = int(GeneratorConfig(codebook_size=CODES).condition_rows(torch.tensor(0)))
    return {**state, "embeddings.weight": torch.cat([rows[:first], new, rows[-1:]])}


# ---------------------------------------------------------------------- what they show
def measure(out: Path, steps: int) -> dict[str, Any]:
    """The validation curves {step: value} by kind of model and run, and when fine-tuning arrives.

    It arrives at the first evaluation that is at least as good as the last one of the run from
    scratch; None if there is none.
    """

    def read(folder: str, name: str) -> Curve:
        return curve(run_records(out / folder), name)

    starts = {
        start: [read(f"generator_{start}_{seed}", "val/loss") for seed in SEEDS] for start in STARTS
    }
    curves = {
        "tokenizer": {name: read(f"tokenizer_{name}", "val/psnr") for name in RUNS},
        "generator": {
            "scratch": read("generator_scratch", "val/loss"),
            "finetuned": starts["mean"][0],
        },
    }
    results: dict[str, Any] = {"steps": steps, "starts": starts}
    for kind, better in (("tokenizer", 1), ("generator", -1)):
        goal = last(curves[kind]["scratch"])
        arrives = arrival(curves[kind]["finetuned"], goal, better)
        results[kind] = {"goal": goal, "arrives": arrives, "curves": curves[kind]}
    return results


def last(values: Curve) -> float:
    """The value at the last step."""
    return values[max(values)]


def arrival(values: Curve, goal: float, better: int) -> float | None:
    """The first step whose value is at least as good as `goal`; `better` 1: higher is, -1: lower."""
    return min((s for s, v in values.items() if better * (v - goal) >= 0), default=None)


def rows_of(results: dict[str, Any]) -> list[str]:
    """The results as lines of Markdown tables."""
    steps = results["steps"]
    lines = [
        f"| on validation digits 5–9 | from scratch, {steps} steps | fine-tuned, {steps // 3} steps | "
        f"as good as from scratch at step |",
        "| --- " * 4 + "|",
    ]
    for kind in QUANTITIES:
        curves, arrives = results[kind]["curves"], results[kind]["arrives"]
        cells = " | ".join(f"{last(curves[name]):.3f}" for name in RUNS)
        lines.append(f"| {QUANTITIES[kind]} | {cells} | {arrives or 'none'} |")
    starts = results["starts"]
    reported = sorted(starts["mean"][0])
    lines += [
        "",
        f"| new classes start, mean of {len(starts['mean'])} seeds: loss after | "
        + " | ".join(f"{step} steps" for step in reported)
        + " |",
        "| --- " * (1 + len(reported)) + "|",
    ]
    for start, curves in starts.items():
        means = [sum(values[step] for values in curves) / len(curves) for step in reported]
        lines.append(f"| {STARTS[start]} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
    return lines


def draw(results: dict[str, Any]) -> "Figure":
    """Validation curves of tokenizer and generator, and of both starts of new classes."""
    from matplotlib.figure import Figure  # draws without a display

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, kind in zip(axes, QUANTITIES):
        for name, label in RUNS.items():
            values = results[kind]["curves"][name]
            axis.plot(list(values), list(values.values()), "-o", markersize=3, label=label)
        axis.axhline(results[kind]["goal"], color="gray", linewidth=0.8, linestyle="--")
        axis.axvline(results["steps"] / 3, color="gray", linewidth=0.8, linestyle=":")
        axis.set_title(f"{QUANTITIES[kind]}, digits 5–9")
    for (start, curves), color in zip(results["starts"].items(), ("C1", "C2")):
        for values in curves:
            label = STARTS[start] if values is curves[0] else None
            axes[2].plot(
                list(values), list(values.values()), "-o", color=color, markersize=3, label=label
            )
    axes[2].set_title("the same, by the start of new classes")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run(main)
