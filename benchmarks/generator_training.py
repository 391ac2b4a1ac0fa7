"""Generator training against the plain way: `python -m benchmarks.generator_training [b l xl small]`.

Both train the same model on the same random codes, in turn, in one process. Plain is what the
published code does: eager, a dense float mask, AdamW that is not fused. On CUDA the presets run at
their published batch a GPU, in bf16; on a CPU a small model in float32.
"""

import argparse
import copy
import statistics
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

import configs.load
from benchmarks.common import machine
from configs.schema import GeneratorRun, OptimizerParams
from modeling.compiling import compile_training
from modeling.generator import Attention, Generator, GeneratorConfig, SwiGLU
from train_ar import parameter_groups
from training.optim import FiniteGuard, adamw, set_learning_rate
from training.utilisation import peak_flops, training_flops

PUBLISHED = {"b": (16, 500_000), "l": (32, 500_000), "xl": (64, 250_000)}  # GPUs, steps
SMALL = GeneratorConfig(
    hidden_size=128, num_hidden_layers=6, num_attention_heads=4, codebook_size=256,
    image_seq_len=73, condition_num_classes=10,
)  # fmt: skip
OPTIMIZER = OptimizerParams()


def plain_attention(self: Attention, x: Tensor, table: Tensor, cache: None = None) -> Tensor:
    """`Attention.forward` with a dense float mask, q and k apart and their pairs rotated in halves."""
    B, N, D = x.shape
    qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)

    def rotated(y: Tensor) -> Tensor:
        a, b = y.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = table.unbind(-1)
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
            groups = parameter_groups(model, OPTIMIZER.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.96), fused=False)
        else:
            groups = parameter_groups(model, OPTIMIZER.weight_decay)
            self.optimizer = adamw(groups, OPTIMIZER)
            if compiled:
                compile_training(model)

    def step(self, codes: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, _ = self.model(codes[:, :-1], labels, codes)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not self.plain:
            self.guard.add(loss=loss)
            self.guard.watch(1, norm, self.optimizer)
            set_learning_rate(self.optimizer, 1e-4)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def seconds(self, steps: int, codes: Tensor, labels: Tensor) -> float:
        """Of one step, mean over `steps`."""
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
    ways = {
        "plain": Way(copy.deepcopy(model), True, False),
        "ours": Way(model, False, args.compile),
    }
    codes = torch.randint(config.codebook_size, (batch, config.image_seq_len), device=device)
    labels = torch.randint(config.condition_num_classes, (batch,), device=device)
    memory = {}
    for key, way in ways.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        way.seconds(3, codes, labels)  # warm-up, compiling included
        if device.type == "cuda":
            weights = sum(p.numel() * 4 for p in way.model.parameters())
            memory[key] = (torch.cuda.max_memory_allocated() - before + weights) / 2**30
    times = {key: [] for key in ways}
    for _ in range(args.rounds):
        for key, way in ways.items():
            times[key].append(way.seconds(args.steps, codes, labels))
    peak = peak_flops(device, "bf16")
    rates = {key: batch / statistics.median(times[key]) for key in ways}
    for key, rate in rates.items():
        line = f"{name} batch {batch} {key}: {rate:.1f} images/s"
        if peak:
            line += f", MFU {rate * training_flops(config) / peak:.1%}, {memory[key]:.1f} GiB"
        print(line)
    ratios = [a / b for a, b in zip(times["plain"], times["ours"])]
    print(f"{name}: ours is {statistics.median(ratios):.2f} x as fast (median of {len(ratios)})")
    if name in PUBLISHED:
        gpus, steps = PUBLISHED[name]
        hours = steps * batch / rates["ours"] / 3600
        print(
            f"{name}: {steps} steps on {gpus} such GPUs, if they scale without loss: {hours:.0f} h, "
            f"{hours * gpus:.0f} GPU-hours, {hours * gpus * args.price:.0f} USD at {args.price} USD "
            f"a GPU-hour"
        )


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("models", nargs="*", default=["b", "l", "xl"] if cuda else ["small"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="a round")
    parser.add_argument("--price", type=float, default=2.5, help="USD a GPU-hour")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    args = parser.parse_args()
    print(machine())
    for name in args.models:
        if name == "small":
            measure(name, SMALL, 64, args)
            continue
        preset = configs.load.load(GeneratorRun, [f"config=configs/alitok_{name}.yaml"])
        measure(name, preset.model.generator, preset.training.per_gpu_batch_size, args)


if __name__ == "__main__":
    main()
