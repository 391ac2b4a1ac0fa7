"""Codes from classes: cached autoregressive sampling with classifier-free guidance."""

import math

import torch
from torch import Tensor

from modeling.errors import InputError
from modeling.generator import Generator, KVCache


def guidance_schedule(scale: float, power: float, steps: int) -> Tensor:
    """Guidance scale of every step, (steps,): s_t = 1 + (S-1)·½·(1 - cos(π·(t/T)^P))."""
    t = torch.arange(steps, dtype=torch.float64) / steps
    return (1 + (scale - 1) * 0.5 * (1 - torch.cos(math.pi * t**power))).float()


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """One code a row: logits (B, V) float32 and uniforms (B,) in [0, 1) -> codes (B,).

    Inverts the cumulative distribution, so that one number an image and a step is all the
    randomness there is: an image's codes depend on its own numbers alone.
    """
    cumulative = torch.softmax(logits / temperature, 1).cumsum(1)
    threshold = uniform.unsqueeze(1) * cumulative[:, -1:]
    codes = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    # Rounding can put the threshold on the total itself, one past the last code.
    return codes.clamp_(max=logits.shape[1] - 1)


@torch.inference_mode()
def sample_codes(
    model: Generator,
    labels: Tensor,
    uniforms: Tensor,
    guidance_scale: float,
    guidance_power: float,
    temperature: float = 1.0,
) -> Tensor:
    """Draw the codes of one image a label: labels (B,) and uniforms (B, T) -> codes (B, T), int64.

    `guidance_scale` 0 or 1 samples without guidance. With guidance both branches run in one batch:
    logits = u + s_t·(c - u), where u is the "no class" branch. The model must be in eval mode.
    """
    T = model.config.image_seq_len
    B = len(labels)
    if labels.min() < 0 or labels.max() >= model.config.condition_num_classes:
        raise InputError(
            f"class {int(labels.min())}…{int(labels.max())} asked for: this model knows classes "
            f"0…{model.config.condition_num_classes - 1}"
        )
    guided = guidance_scale not in (0.0, 1.0)
    scales = guidance_schedule(guidance_scale, guidance_power, T).to(labels.device)
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.config.no_class)])
    cache = KVCache(model, len(labels))
    codes = torch.empty(B, T, dtype=torch.int64, device=labels.device)
    x = model.embed_class(labels)
    for t in range(T):
        logits = model.step(x, cache)  # (B or 2B, V)
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + scales[t] * (cond - uncond)
        codes[:, t] = draw(logits, uniforms[:, t], temperature)
        x = model.embeddings(codes[:, t : t + 1])  # (B, 1, D)
        if guided:
            x = x.repeat(2, 1, 1)
    return codes
