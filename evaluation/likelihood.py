"""How well a generator predicts the codes of a cache: nats per code and accuracy, by position.

The teacher-forced loss needs no sampling, decoder or features, so it reveals a wrong crop, tokenizer, token
layout or weight file within minutes.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from data.loader import batch_loader
from data.tokens import AllTokens, TokenCache
from modeling.generator import Generator
from modeling.modes import eval_mode
from modeling.rotary import token_layout
from runtime.parts import batches_of

TOP = 5  # of top-5 accuracy


@dataclass(frozen=True)
class Share:
    """Which of a cache's views a process scores, and how."""

    batch: int  # sequences at once
    rank: int = field(default_factory=lambda: PartialState().process_index)
    world: int = field(default_factory=lambda: PartialState().num_processes)
    workers: int = 0  # processes that read
    compiled: bool = False  # the model is compiled; a smaller last batch runs eagerly


@dataclass
class Likelihood:
    """Sums (3, T), float64, over the views of a cache or one process's share: nats, top-1 and top-5 hits."""

    sums: Tensor
    views: int  # of the cache

    @property
    def positions(self) -> Tensor:
        """(3, T): nats per code, top-1 and top-5 accuracy of every position."""
        return self.sums / self.views

    def figures(self, start: int = 0, stop: int | None = None) -> dict[str, float]:
        """Means over the codes at positions `start` … `stop` - 1."""
        nats, top1, top5 = self.positions[:, start:stop].mean(1).tolist()
        return {"nats": nats, "bits": nats / math.log(2), "top1": top1, "top5": top5}

    def groups(self) -> list[tuple[str, int, dict[str, float]]]:
        """(name, number of codes, figures) of the prefix, if any, and of every row of image tokens."""
        grid, prefix = token_layout(self.sums.shape[1])
        found = [("prefix", prefix, self.figures(0, prefix))] if prefix else []
        for row in range(grid):
            start = prefix + row * grid
            found.append((f"row {row + 1}", grid, self.figures(start, start + grid)))
        return found

    def result(self) -> dict[str, Any]:
        """All figures, for JSON."""
        whole, positions = self.figures(), self.positions.tolist()
        return {
            "metrics": {
                "nats_per_code": whole["nats"],
                "bits_per_code": whole["bits"],
                "bits_per_image": whole["bits"] * self.sums.shape[1],
                "top1": whole["top1"],
                "top5": whole["top5"],
            },
            "views": self.views,
            "by_group": [
                {"name": name, "codes": codes, **figures} for name, codes, figures in self.groups()
            ],
            "by_position": dict(zip(("nats", "top1", "top5"), positions)),
        }


@torch.no_grad()
def likelihood_sums(model: nn.Module, store: TokenCache, share: Share) -> Tensor:
    """`Likelihood.sums` of a cache's views under a generator: this process's share, on the model's device.

    `model` maps codes (B, T - 1) and labels (B,) to logits (B, T, V). Batches are consecutive views, so
    the number of processes changes only the order of float64 sums. Within autocast it computes like the
    validation of a training run.
    """
    device = next(model.parameters()).device
    sums_of = torch.compile(position_sums, dynamic=False) if share.compiled else position_sums
    sums = torch.zeros(3, store.tokens, dtype=torch.float64, device=device)
    with eval_mode(model):
        for _, codes, labels in view_batches(store, share, device):
            with eager(share.compiled and len(codes) < share.batch):
                sums += sums_of(model(codes[:, :-1], labels), codes)
    return sums


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


def view_batches(
    store: TokenCache, share: Share, device: torch.device
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """This process's share of batches of consecutive views: their places among all views of the cache,
    codes (B, T) and labels (B,) on the device."""
    dataset = AllTokens(store)
    batches = batches_of(len(dataset), share.batch, share.rank, share.world)
    loader = batch_loader(dataset, batches, share.workers, device)
    for places, (codes, labels) in zip(batches, loader):
        yield places, codes.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def eager(wanted: bool) -> contextlib.AbstractContextManager:
    """A context in which compiled functions run eagerly, if `wanted`."""
    if wanted:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def position_sums(logits: Tensor, codes: Tensor) -> Tensor:
    """Logits (B, T, V), codes (B, T) -> sums over B of nats, top-1 and top-5 hits: (3, T), float64.

    The first of equal logits ranks highest, as in argmax, so that ties do not count as hits.
    """
    target = codes.unsqueeze(2)  # (B, T, 1)
    nats = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten(), reduction="none")
    own = logits.gather(2, target)  # (B, T, 1)
    earlier = torch.arange(logits.shape[2], device=logits.device) < target  # (B, T, V)
    rank = ((logits > own) | ((logits == own) & earlier)).sum(2)  # (B, T)
    hits = torch.stack([rank < 1, rank < TOP])  # (2, B, T)
    return torch.cat([nats.view(1, *codes.shape).double(), hits.double()]).sum(1)
