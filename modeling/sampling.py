"""The rules of sampling: random numbers, guidance, the draw of a code, and the plain loop that applies them.

Shape suffixes are those of `modeling.generator`; N is B, or 2B with guidance (the images with their classes,
then with "no class").
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from .fields import Options, option
from .generator import NO_CLASS, Backbone
from .modes import eval_mode

SCHEDULES = ("power-cosine", "constant", "linear")
# Options of `engine.Engine`: its attention, and the type of its cache.
ENGINES = ("auto", "fused", "plain")
CACHES = ("auto", "int8")
DRAWN = -1  # marks codes to draw among given ones


# fmt: off
@dataclass
class Sampling(Options):
    """How codes are drawn from logits; the names are those of the published configs."""

    guidance_scale: float = option(
        1.0, "Scale of classifier-free guidance; 0 or 1: none.", at_least=0, at_most=10_000,
        resumes=True)
    guidance_scale_pow: float = option(
        1.0, "Power of the power-cosine schedule.", at_least=0, at_most=1000, resumes=True)
    guidance_schedule: str = option(
        "power-cosine", "How the scale depends on the token.", choices=SCHEDULES, resumes=True)
    randomize_temperature: float = option(
        1.0, "Softmax temperature; 1e-5 takes the most likely code.", at_least=1e-6, resumes=True)
    top_k: int = option(
        0, "Draw among this many most likely codes; 0: all.", at_least=0, resumes=True)
    top_p: float = option(
        1.0, "Draw among the fewest codes that hold this probability; 1: all.", above=0, at_most=1,
        resumes=True)
    # fmt: on

    @property
    def guided(self) -> bool:
        return self.guidance_scale not in (0.0, 1.0)

    def scales(self, steps: int) -> Tensor:
        """Guidance scale of every step, (steps,), float32.

        power-cosine, as published: s_t = 1 + (S-1)·½·(1 - cos(π·(t/T)^P)); linear: 1 + (S-1)·t/T;
        constant: S.
        """
        t = torch.arange(steps, dtype=torch.float64) / steps
        if self.guidance_schedule == "power-cosine":
            t = 0.5 * (1 - torch.cos(math.pi * t**self.guidance_scale_pow))
        elif self.guidance_schedule == "constant":
            t = torch.ones_like(t)
        return (1 + (self.guidance_scale - 1) * t).float()


def image_uniforms(seed: int, indices: Sequence[int], steps: int) -> Tensor:
    """Uniforms in [0, 1) of the images `indices`: (len(indices), steps), float32, on the CPU.

    Row i depends on (seed, indices[i]) alone, never on the rank, the batch, the device or the machine.
    """
    rows = np.empty((len(indices), steps), np.float32)
    for row, index in zip(rows, indices):
        sequence = np.random.SeedSequence(seed, spawn_key=(index,))
        np.random.Generator(np.random.Philox(sequence)).random(dtype=np.float32, out=row)
    return torch.from_numpy(rows)


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits (B, V) of all codes outside the top k, then of all outside the top p, to -inf.

    The top-p set is the smallest set of most likely codes with a probability of at least `top_p`
    (Holtzman et al. 2020). Codes as likely as the last one of the top k are kept too.
    """
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k, 1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        # Stable, so that ties do not depend on the device.
        ordered, place = logits.sort(dim=1, descending=True, stable=True)
        p = torch.softmax(ordered, 1)
        dropped = p.double().cumsum(1) - p >= top_p  # the more likely codes are enough without it
        dropped = dropped.scatter(1, place, dropped)  # back to the order of the codes
        logits = logits.masked_fill(dropped, -math.inf)
    return logits


def draw_codes(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """One code per row: logits (B, V) float32 and uniforms (B,) in [0, 1) -> codes (B,).

    Inverts the cumulative distribution, so the codes of an image depend only on its own uniform numbers.
    """
    logits = keep_likely(logits / temperature, top_k, top_p)
    # In float64, so that the device's order of additions does not matter.
    cumulative = torch.softmax(logits, 1).double().cumsum(1)
    threshold = uniform.unsqueeze(1) * cumulative[:, -1:]
    codes = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    # Rounding can make the threshold the total itself, one past the last code.
    return codes.clamp(max=logits.shape[1] - 1)


def choose(
    logits: Tensor,
    given: Tensor,
    uniform: Tensor,
    scale: Tensor,
    guided: bool,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """Logits (N, V), given codes (B,), uniforms (B,) and a guidance scale -> codes (B,).

    With guidance the first B rows of logits, c, are with class, the others, u, without: u + s·(c - u).
    """
    if guided:
        cond, uncond = logits.chunk(2)
        logits = uncond + scale * (cond - uncond)
    drawn = draw_codes(logits, uniform, temperature, top_k, top_p)
    return torch.where(given == DRAWN, drawn, given)


class ReferenceEngine:
    """The slow, readable twin of `engine.Engine`, for any backbone: the same codes; bfloat16 by autocast."""

    def __init__(
        self, model: Backbone, batch: int, sampling: Sampling, dtype: torch.dtype = torch.float32
    ):
        self.model, self.batch, self.sampling, self.dtype = model, batch, sampling, dtype
        self.config, self.device = model.config, next(model.parameters()).device

    @torch.inference_mode()
    def sample(self, labels: Tensor, uniforms: Tensor, prefix: Optional[Tensor] = None) -> Tensor:
        """Labels (B,) and uniforms (B, T) -> codes (B, T), int64, as `engine.Engine.sample`."""
        config, s, T = self.config, self.sampling, self.config.image_seq_len
        labels, uniforms = labels.to(self.device), uniforms.to(self.device)
        codes = torch.full_like(uniforms, DRAWN, dtype=torch.int64)
        if prefix is not None:
            codes[:, : prefix.shape[1]] = prefix
        scales, rows, cache = s.scales(T).to(self.device), config.condition_rows(labels), {}
        if s.guided:
            rows = torch.cat([rows, config.condition_rows(torch.full_like(labels, NO_CLASS))])
        branches, bf16 = len(rows) // len(labels), self.dtype == torch.bfloat16
        rules = s.guided, s.randomize_temperature, s.top_k, s.top_p
        # In training mode dropout would be on.
        with eval_mode(self.model), torch.autocast(self.device.type, torch.bfloat16, bf16):
            for t in range(T):
                logits = self.model.step(rows, t, cache)  # (N, V)
                codes[:, t] = choose(logits, codes[:, t], uniforms[:, t], scales[t], *rules)
                rows = codes[:, t].repeat(branches)
        return codes
