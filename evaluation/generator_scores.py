"""`evaluate.py --generator`: the likelihood of a cache's codes under one or several generators.

With `--classify`, the class under which a generator finds an image's codes most likely. If all classes are equally
frequent, Bayes' rule makes this the most probable class. Every view is scored under every class, so classifying a
cache takes as many times the work as there are classes.
"""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from data.classes import misnumbered
from data.tokens import TokenCache, open_tokens
from evaluation.likelihood import Likelihood, Share, class_nats, likelihood_sums
from evaluation.metrics import summed
from evaluation.report import table_of
from generation.job import sampling_precision
from modeling.compiling import compile_blocks
from modeling.generator import Generator, GeneratorConfig, build_generator
from modeling.weights.metadata import GENERATOR
from modeling.weights.opened import Opened
from modeling.weights.runs import all_checkpoints, is_checkpoint, step_of
from modeling.weights.tensors import load_tensors
from runtime.errors import InputError
from runtime.files import file_sha256, whole_file
from runtime.processes import compiles, device_name, matmul_precision, open_on_all

PRECISIONS = ("auto", "fp32", "bf16")  # auto: bf16 on GPUs from Ampere on, else fp32
COMPILED_VIEWS = 50_000  # for fewer, compiling takes longer than it saves


def checkpoint_step(file: Path) -> int | None:
    """The step of the checkpoint that a file lies in, if any."""
    folder = file.parent.resolve()  # it may be a link, or the current folder
    return step_of(folder) if is_checkpoint(folder) else None


def find_generators(given: str, others: list[str]) -> dict[str, Opened]:
    """The weights of the generator and of the runs to compare it with, by the names that the user gave, each once.

    If there are others, all are of one step: that of the generator or, if it is a run, the newest at which
    all hold a checkpoint.
    """
    if not others:
        return {given: open_on_all(given, GENERATOR)}
    runs: dict[str, dict[int, str]] = {}  # the checkpoints of each by their steps
    for run in [given, *others]:
        runs[run] = {step_of(path): str(path) for path in all_checkpoints(Path(run))}
        if run == given and not runs[run]:  # a checkpoint, or a weights file in one
            step = checkpoint_step(open_on_all(run, GENERATOR).file)
            runs[run] = {} if step is None else {step: run}
        if not runs[run]:
            raise InputError(f"{run} is not a run folder with checkpoints, which --compare needs")
    common = set.intersection(*map(set, runs.values()))
    if not common:
        held = "; ".join(f"{run}: {', '.join(map(str, steps))}" for run, steps in runs.items())
        raise InputError(
            f"the runs have no checkpoint of a common step ({held}); experiment.keep_every keeps more"
        )
    return {run: open_on_all(steps[max(common)], GENERATOR) for run, steps in runs.items()}


def open_generator(opened: Opened, store: TokenCache) -> Generator:
    """A generator in eval mode on the CPU. If its file names classes, the cache's labels are matched to
    them by name.

    Raises InputError if the cache is another tokenizer's, is damaged, or has more or other classes.
    """
    store.refuse_joined_views(GeneratorConfig().image_seq_len)  # no config has their length
    try:
        config = opened.config(GeneratorConfig(image_seq_len=store.tokens))
    except InputError as e:
        raise InputError(f"{store.folder} holds {store.tokens} codes per image: {e}") from e
    store.check(config.codebook_size, config.image_seq_len, opened.about.tokenizer)
    if len(store.classes) > config.condition_num_classes:
        raise InputError(
            f"{store.folder} has {len(store.classes)} classes, more than the "
            f"{config.condition_num_classes} of {opened.file}: use a cache of the generator's data"
        )
    store.check_labels()
    if opened.about.classes is not None:
        store.use_classes(list(opened.about.classes))
    generator = build_generator(config)
    load_tensors(generator, opened.state, str(opened.file))
    return generator.eval()


def score_generator(
    given: str, others: list[str], cache: str, picture: str, share: Share, precision: str = "auto"
) -> tuple[dict[str, Any], str]:
    """The result of a generator on every view of a cache, and its tables; empty except on the main process.

    `others` are run folders, scored at the same step. `picture` shows all of them by position.
    """
    scored: dict[str, Likelihood] = {}
    results = []
    for name, opened in find_generators(given, others).items():
        store, sums, conditions = measured(name, opened, cache, share, precision, likelihood_sums)
        scored[name] = Likelihood(sums, store.images * store.views)
        results.append({**conditions, **scored[name].result()})
    if share.rank:
        return {}, ""
    plot_positions(scored, picture)
    warnings = [*dict.fromkeys(warning for one in results for warning in one["warnings"])]
    text = "\n".join(table(one["generator"], scored[one["generator"]["path"]]) for one in results)
    compared = {"compared": results[1:], "picture": picture, "warnings": warnings}
    return {**results[0], **compared}, text


def measured(
    name: str,
    opened: Opened,
    cache: str,
    share: Share,
    precision: str,
    measure: Callable[[Generator, TokenCache, Share], Tensor],
    classes: int = 1,
) -> tuple[TokenCache, Tensor, dict[str, Any]]:
    """The cache, the sum over all processes, on the CPU, of `measure(generator, store, share)`, and what it
    depends on, empty except on the main process.

    On CUDA the generator is compiled if there are many sequences, views times `classes`. Raises InputError if
    generator and cache do not fit (`open_generator`) or a sum is not finite.
    """
    device = torch.device(PartialState().device or "cpu")
    store = open_tokens(cache)  # anew: a generator may number its classes in another way
    generator = open_generator(opened, store).to(device)
    sequences = store.images * store.views * classes
    many = device.type == "cuda" and sequences >= COMPILED_VIEWS * share.world
    share = replace(share, compiled=many and compiles("auto", "--generator"))
    if share.compiled:
        compile_blocks(generator.blocks)
    precision = sampling_precision(precision, device)
    bf16 = precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16) if bf16 else matmul_precision("fp32"):
        sums = summed(measure(generator, store, share)).cpu()
    if not sums.isfinite().all():
        raise InputError(
            f"likelihoods of {name} on {store.folder} are NaN or infinite: its weights are damaged"
        )
    if share.rank:
        return store, sums, {}
    return store, sums, {
        "generator": {
            "path": name, "step": checkpoint_step(opened.file), "hash": file_sha256(opened.file)[:16]
        },
        "cache": {
            "path": str(store.folder), "images": store.images, "views": store.views,
            "codes": store.tokens, "classes": len(store.classes),
            "tokenizer": store.manifest["tokenizer"],
        },
        "precision": precision,
        "device": device_name(device),
        "batch_size": share.batch,
        "warnings": warnings_of(store, generator),
    }  # fmt: skip


def warnings_of(store: TokenCache, generator: Generator) -> list[str]:
    """Reasons to doubt the figures."""
    known = generator.config.condition_num_classes
    unlike = misnumbered(store.classes)
    warnings = [] if unlike is None else [f"{store.folder}: {unlike}"]
    if len(store.classes) != known:
        warnings.append(
            f"{store.folder} has {len(store.classes)} of the generator's {known} classes; a label is the "
            f"rank of a folder's name, so missing folders shift the labels after them; images without "
            f"folders need pretokenization's --labels"
        )
    return warnings


# ---------------------------------------------------------------------- output
def table(generator: dict[str, Any], found: Likelihood) -> str:
    """A line per group of positions, one for all and the bits per image."""
    step = "" if generator["step"] is None else f", step {generator['step']}"
    whole, tokens = found.figures(), found.sums.shape[1]
    rows = [
        [name, str(codes), f"{x['nats']:.4f}", f"{x['bits']:.4f}", f"{x['top1']:.2%}", f"{x['top5']:.2%}"]
        for name, codes, x in [*found.groups(), ("all", tokens, whole)]
    ]  # fmt: skip
    headers = ["position", "codes", "nats/code", "bits/code", "top-1", "top-5"]
    return (
        f"{generator['path']}{step}: {found.views} views\n{table_of(rows, headers)}\n"
        f"bits per image: {whole['bits'] * tokens:.2f}"
    )


def plot_positions(scored: dict[str, Likelihood], path: str) -> None:
    """Nats per code and accuracy by position, a colour per generator."""
    # Draws without a display; takes a second, so imported on use.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, likelihood) in enumerate(scored.items()):
        (nats, top1, top5), colour = likelihood.positions, f"C{number}"
        sizes = [codes for _, codes, _ in likelihood.groups()]
        # Thin: every position. Thick: the mean of the prefix and of every row.
        for axis, values, style in ((left, nats, "-"), (right, top1, "-"), (right, top5, "--")):
            axis.plot(values, style, color=colour, linewidth=0.5, alpha=0.5)
            for places, group in zip(torch.arange(len(values)).split(sizes), values.split(sizes)):
                axis.plot(places, group.mean().expand(len(group)), style, color=colour)
        left.plot([], [], "-", color=colour, label=name)
    for axis, title in ((left, "nats per code"), (right, "accuracy: top-1 —, top-5 - -")):
        axis.set_title(title)
        axis.set_xlabel("position of the code")
        axis.grid(alpha=0.3)
    left.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


# ---------------------------------------------------------------------- a generator as a classifier
def classify_cache(
    given: str, cache: str, answers: str | None, share: Share, precision: str = "auto"
) -> tuple[dict[str, Any], str]:
    """How often the likeliest class of a cache's images is their own, as a result and as text; empty except
    on the main process.

    The result has the top-1 accuracy of single views and that of images, whose class is the one with the highest
    product of their views' likelihoods. All answers are written to the .csv `answers`. Raises InputError for a
    generator with one class.
    """
    opened = open_on_all(given, GENERATOR)
    classes = opened.about.config["condition_num_classes"]
    if classes == 1:
        raise InputError(f"{given} has one class: --classify needs a generator of two or more")
    store, nats, conditions = measured(given, opened, cache, share, precision, class_nats, classes)
    if share.rank:
        return {}, ""
    labels = torch.tensor(store.labels, dtype=torch.int64)
    nats = nats.double()
    of_images = nats.sum(1)
    if answers:
        # The cache's labels are the generator's; only the cache's own classes have known names.
        names = store.classes + [str(label) for label in range(len(store.classes), classes)]
        write_answers(answers, store.paths(store.images), labels, of_images, names)
    metrics = {
        "top1": hits(of_images, labels),
        "top1_of_views": hits(nats.flatten(0, 1), labels.repeat_interleave(store.views)),
    }
    lines = [
        f"{given}: the likeliest of {classes} classes is right for",
        f"  {metrics['top1']:.2%} of {store.images} images",
    ]
    if store.views > 1:
        lines.append(f"  {metrics['top1_of_views']:.2%} of single views ({store.views} per image)")
    result = {**conditions, "metrics": metrics, "classes": classes}
    return (result | {"answers": answers} if answers else result), "\n".join(lines)


def hits(nats: Tensor, labels: Tensor) -> float:
    """The share of the rows of `nats` (N, classes) whose smallest entry belongs to their label (N,)."""
    return (nats.argmin(1) == labels).double().mean().item()


def write_answers(
    file: str, paths: list[str], labels: Tensor, nats: Tensor, names: list[str]
) -> None:
    """Write a line per image: its path, its class, the answer, and the nats of all its views under both."""
    with (
        whole_file(file) as partial,
        open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="") as lines,
    ):
        table = csv.writer(lines)
        table.writerow(["image", "class", "answer", "nats", "answer_nats"])
        for path, label, row in zip(paths, labels.tolist(), nats.tolist()):
            least = min(row)
            answer = names[row.index(least)]
            table.writerow([path, names[label], answer, f"{row[label]:.4f}", f"{least:.4f}"])
