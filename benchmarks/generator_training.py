"""Generator training against the plain way: `python -m benchmarks.generator_training [b l xl small]`.

Both train the same model on the same random codes in one process: ours first, then the plain way, then
both in turn for their ratio. Plain is what the published code does: eager, a dense float mask, AdamW
that is not fused. On CUDA the published sizes run at their batch per GPU, in bf16; on a CPU a small model
in float32. All parameters decay, which costs the same.
"""

import argparse
import copy
import statistics
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import (
    explain_failures,
    inductor_argument,
    machine,
    profile,
    with_inductor,
)
from benchmarks.sampling import SIZES
from modeling.compiling import compile_training
from modeling.generator import Attention, Generator, GeneratorConfig, SwiGLU
from training.optim import FiniteGuard, adamw, set_learning_rate
from training.utilisation import peak_flops, training_flops

# GPUs, steps, images per GPU
PUBLISHED = {"b": (16, 500_000, 128), "l": (32, 500_000, 64), "xl": (64, 250_000, 32)}
SMALL = GeneratorConfig(
    hidden_size=128, num_hidden_layers=6, num_attention_heads=4, codebook_size=256,
    image_seq_len=73, condition_num_classes=10,
)  # fmt: skip
OPTIMIZER: Any = SimpleNamespace(beta1=0.9, beta2=0.96, weight_decay=0.03)


def plain_attention(self: Attention, x: Tensor, table: Tensor, cache: None = None) -> Tensor:
    """`Attention.forward` with a dense float mask, and the pairs of q and k rotated in halves."""
    B, N, D = x.shape
    qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)

    def rotated(y: Tensor) -> Tensor:
        a, b = y.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = table[:, 0, ::2], table[:, 1, 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(v)

    mask = torch.full((N, N), float("-inf"), device=x.device, dtype=q.dtype).triu(1)
    q, k = rotated(self.q_norm(q)), rotated(self.k_norm(k))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.attn_drop)
    return self.proj_drop(self.proj(y.transpose(1, 2).reshape(B, N, D)))


def plain_mlp(self: SwiGLU, x: Tensor) -> Tensor:
    """`SwiGLU.forward` with two products."""
    return self.drop(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Way:
    """One way to train: its model, optimizer and step."""

    def __init__(self, model: Generator, plain: bool, compiled: bool):
        self.model, self.plain = model.train(), plain
        self.device = model.output.weight.device
        self.guard = FiniteGuard(Accelerator(cpu=self.device.type == "cpu"))
        if plain:
            blocks: Any = model.blocks
            for block in blocks:
                block.attn.forward = partial(plain_attention, block.attn)
                block.mlp.forward = partial(plain_mlp, block.mlp)
            self.optimizer = torch.optim.AdamW(
                model.parameters(), lr=1e-4, betas=(0.9, 0.96), fused=False
            )
        else:
            self.optimizer = adamw(model.parameters(), OPTIMIZER)
            if compiled:
                compile_training(model)

    def step(self, codes: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, _ = self.model(codes[:, :-1], labels, codes)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not self.plain:
            self.guard.watch(1, norm, self.optimizer, {"loss": loss.detach()})
            set_learning_rate(self.optimizer, 1e-4)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def seconds(self, steps: int, codes: Tensor, labels: Tensor) -> float:
        """Mean seconds of one step over `steps`."""
        began = time.perf_counter()
        loss = self.step(codes, labels)
        for _ in range(steps - 1):
            loss = self.step(codes, labels)
        loss.item()  # waits for the device
        return (time.perf_counter() - began) / steps


def measure(name: str, config: GeneratorConfig, batch: int, args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Generator(config).to(device)
    codes = torch.randint(config.codebook_size, (batch, config.image_seq_len), device=device)
    labels = torch.randint(config.condition_num_classes, (batch,), device=device)
    ways, times = {}, {}
    for key in ("ours", "plain")[: 2 if args.plain else 1]:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        way = ways[key] = Way(copy.deepcopy(model), key == "plain", args.compile)
        way.seconds(3, codes, labels)  # warm-up, compiling included
        memory = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
        times[key] = [way.seconds(args.steps, codes, labels) for _ in range(args.rounds)]
        rate = batch / statistics.median(times[key])
        line = f"{name} batch {batch} {key}: {rate:.1f} images/s"
        if peak := peak_flops(device, "bf16"):
            line += f", MFU {rate * training_flops(config) / peak:.1%}, {memory / 2**30:.1f} GiB"
        print(line, flush=True)
        if key == "ours" and name in PUBLISHED:
            gpus, steps, _ = PUBLISHED[name]
            hours = steps * 2048 / gpus / rate / 3600
            print(
                f"{name}: {steps} steps on {gpus} such GPUs, if they scale without loss: {hours:.0f} h, "
                f"{hours * gpus:.0f} GPU-hours, {hours * gpus * args.price:.0f} USD at {args.price} USD "
                f"per GPU-hour",
                flush=True,
            )
        if args.profile and device.type == "cuda" and key == "ours":
            profile(lambda: way.step(codes, labels))  # noqa: B023
    if args.plain:
        pairs = [
            (ways["plain"].seconds(args.steps, codes, labels),
             ways["ours"].seconds(args.steps, codes, labels))
            for _ in range(args.rounds)
        ]  # fmt: skip
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name}: ours is {ratio:.2f} x as fast (median of {len(pairs)})", flush=True)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("models", nargs="*", default=["b", "l", "xl"] if cuda else ["small"])
    parser.add_argument("--batches", type=int, nargs="+", help="instead of the published one")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="per round")
    parser.add_argument("--price", type=float, default=2.5, help="USD per GPU-hour")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true", help="a GPU's time of a step, by kernel")
    parser.add_argument(
        "--cudnn", action="store_true", help="cuDNN's attention before PyTorch's, to try"
    )
    inductor_argument(parser)
    args = parser.parse_args()
    explain_failures()
    if unknown := [name for name in args.models if name not in ("small", *SIZES)]:
        parser.error(f"model {unknown[0]}: choose from small, {', '.join(SIZES)}")
    print(machine())
    first = [SDPBackend.CUDNN_ATTENTION] * args.cudnn
    backends = [*first, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    for name in args.models:
        config, published = (SMALL, 64) if name == "small" else (SIZES[name][0], PUBLISHED[name][2])
        for batch in args.batches or [published]:
            torch._dynamo.reset()
            with sdpa_kernel(backends, set_priority=True), with_inductor(args.inductor):
                measure(name, config, batch, args)


if __name__ == "__main__":
    main()
