"""`evaluate.py --generator … --classify`: the class under which a generator finds an image's codes most likely.

If all classes are equally frequent, Bayes' rule makes this the most probable class. Every view is scored under every
class, so classifying a cache takes as many times the work of `--generator` as there are classes.
"""

import csv
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.tokens import TokenCache, open_tokens
from evaluation.generator_scores import find_source, measured, open_generator
from evaluation.likelihood import Share, eager, view_batches
from modeling.generator import Generator
from runtime.errors import InputError
from runtime.files import whole_file


@torch.no_grad()
def class_nats(model: Generator, store: TokenCache, share: Share) -> Tensor:
    """-log p(codes | class), in nats, of every view under every class: (images, views, classes), float32.

    Computed for this process's share, 0 for other views; on the model's device. Each of the
    `share.batch` sequences is a view under one class.
    """
    device, classes = next(model.parameters()).device, model.config.condition_num_classes
    nats = torch.zeros(store.images * store.views, classes, device=device)
    views = replace(share, batch=max(share.batch // classes, 1))
    parts = torch.arange(classes, device=device).split(share.batch)
    for places, codes, _ in view_batches(store, views, device):
        for part in parts:
            rows = codes.repeat_interleave(len(part), 0)  # (B · part, T)
            with eager(share.compiled and len(rows) < views.batch * len(parts[0])):
                logits = model(rows[:, :-1], part.repeat(len(codes)))  # (B · part, T, V)
            each = F.cross_entropy(logits.float().flatten(0, 1), rows.flatten(), reduction="none")
            nats[places.start : places.stop, part] = each.view(len(codes), len(part), -1).sum(2)
    return nats.view(store.images, store.views, classes)


def classify_cache(
    given: str, cache: str, answers: str | None, share: Share, precision: str = "auto"
) -> tuple[dict[str, Any], str]:
    """How often the likeliest class of a cache's images is their own, as a result and as text; empty except
    on the main process.

    The result has the top-1 accuracy of single views and that of images, whose class is the one with the highest
    product of their views' likelihoods. All answers are written to the .csv `answers`. Raises InputError for a
    generator with one class.
    """
    store, source = open_tokens(cache), find_source(given)
    generator = open_generator(source, store)
    classes = generator.config.condition_num_classes
    if classes == 1:
        raise InputError(f"{given} has one class: --classify needs a generator of two or more")
    nats, conditions = measured(source, generator, store, share, precision, class_nats, classes)
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
