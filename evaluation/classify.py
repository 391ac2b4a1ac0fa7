"""`evaluate.py --generator … --classify`: the class under which a generator finds an image's codes most likely.

By Bayes' rule with equally frequent classes that is the most probable class. Every view is scored under every class,
so the work is that of `--generator` times the number of classes.
"""

import csv
import json
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor

from data.tokens import TokenCache, open_tokens
from evaluation.generator_scores import (
    about,
    about_cache,
    find_source,
    open_generator,
    ready,
    warnings_of,
)
from evaluation.likelihood import eager, view_batches
from evaluation.metrics import summed
from modeling.generator import Generator
from runtime.errors import InputError
from runtime.files import whole_file


@torch.no_grad()
def class_nats(
    model: Generator,
    store: TokenCache,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    compiled: bool = False,
) -> Tensor:
    """-log p(codes | class), in nats, of every view under every class: (images, views, classes), float32.

    Those of this process's share, on the model's device, and 0 elsewhere. At most `batch` sequences run at
    once; a sequence is a view under a class.
    """
    device, classes = next(model.parameters()).device, model.config.condition_num_classes
    nats = torch.zeros(store.images * store.views, classes, device=device)
    at_once = max(batch // classes, 1)  # views
    parts = torch.arange(classes, device=device).split(batch)
    for places, codes, _ in view_batches(store, at_once, rank, world, workers, device):
        for part in parts:
            rows = codes.repeat_interleave(len(part), 0)  # (B · part, T)
            with eager(compiled and len(rows) < at_once * len(parts[0])):
                logits = model(rows[:, :-1], part.repeat(len(codes)))  # (B · part, T, V)
            each = F.cross_entropy(logits.float().flatten(0, 1), rows.flatten(), reduction="none")
            nats[places.start : places.stop, part] = each.view(len(codes), len(part), -1).sum(2)
    return nats.view(store.images, store.views, classes)


def classify_cache(
    given: str,
    cache: str,
    answers: str | None,
    processes: PartialState,
    batch: int,
    workers: int = 0,
    precision: str = "auto",
) -> dict[str, Any]:
    """How often the likeliest class of a cache's images is theirs; empty but on the main process.

    Top-1 accuracy of single views, and of images, whose views' likelihoods are multiplied. `answers` is the .csv of
    all answers to write. Raises InputError for a generator with one class.
    """
    store, source = open_tokens(cache), find_source(given)
    generator = open_generator(source, store)
    classes = generator.config.condition_num_classes
    if classes == 1:
        raise InputError(f"{given} has one class: --classify needs a generator of two or more")
    rank, world = processes.process_index, processes.num_processes
    sequences = store.images * store.views * classes
    with ready(generator, processes, precision, sequences) as (compiled, conditions):
        nats = class_nats(generator, store, batch, rank, world, workers, compiled)
    nats = summed(nats).double().cpu()
    if not nats.isfinite().all():
        raise InputError(
            f"likelihoods of {given} on {cache} are NaN or infinite: its weights are damaged"
        )
    if not processes.is_main_process:
        return {}
    labels = torch.tensor(store.labels, dtype=torch.int64)
    of_images = nats.sum(1)
    if answers:
        # A cache's labels are numbered as the generator's; names are known of those that the cache has.
        names = store.classes + [str(label) for label in range(len(store.classes), classes)]
        write_answers(answers, store.paths(store.images), labels, of_images, names)
    return {
        "generator": about(source),
        "metrics": {
            "top1": hits(of_images, labels),
            "top1_of_views": hits(nats.flatten(0, 1), labels.repeat_interleave(store.views)),
        },
        "classes": classes,
        "cache": about_cache(store),
        **({"answers": answers} if answers else {}),
        **conditions,
        "batch_size": batch,
        "warnings": warnings_of(store, generator),
    }


def hits(nats: Tensor, labels: Tensor) -> float:
    """The share of rows of (N, classes) whose smallest entry is at their label (N,)."""
    return (nats.argmin(1) == labels).double().mean().item()


def write_answers(
    file: str, paths: list[str], labels: Tensor, nats: Tensor, names: list[str]
) -> None:
    """A line per image: its path, its class, the answer, and -log p(codes of its views | class), in nats, of both."""
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


def show_classification(result: dict[str, Any]) -> None:
    """Warnings, the figures and, as the last line, JSON; silent for an empty result."""
    if not result:
        return
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    metrics, cache = result["metrics"], result["cache"]
    print(
        f"{result['generator']['path']}: the likeliest of {result['classes']} classes is right for"
    )
    print(f"  {metrics['top1']:.2%} of {cache['images']} images")
    if cache["views"] > 1:
        print(
            f"  {metrics['top1_of_views']:.2%} of their {cache['views']} views each, one at a time"
        )
    print(json.dumps(result, ensure_ascii=False))
