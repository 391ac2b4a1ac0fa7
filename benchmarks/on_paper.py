"""What one H100 would do, worked out without one: `python -m benchmarks.on_paper [b l xl]`.

Inductor and Triton make their code for an H100 here, and the arithmetic of `benchmarks.paper.model`
turns what that code moves, computes and launches into times. Every time it prints is modelled, none
is measured. `--json FILE` also writes what was counted, for the tests.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import inductor_argument, with_inductor
from benchmarks.paper.inductor import InternalsMoved, Program, emit, fake
from benchmarks.paper.kernel import fused_attention
from benchmarks.paper.model import (
    FLOAT32,
    LAUNCH,
    OVERLAPPED,
    Attention,
    Part,
    sampling_roofline,
    sampling_step,
    shapes,
    total,
    training_step,
    utilisation,
)
from benchmarks.paper.training import programs_of_step
from modeling import engine
from modeling import fused_attention as kernel
from modeling.generator import Generator, GeneratorConfig

# The generator, and its published training batch per GPU.
SIZES = {
    "b": (GeneratorConfig(hidden_size=768, num_hidden_layers=24), 128),
    "l": (GeneratorConfig(hidden_size=1024, num_hidden_layers=24), 64),
    "xl": (GeneratorConfig(hidden_size=1280, num_hidden_layers=32), 32),
}
LARGER = {"b": 256, "l": 128, "xl": 64}  # images per GPU that 80 GB hold
CHOICES = {"plain": (0, 1.0), "top-k": (100, 1.0), "top-p": (0, 0.9), "both": (100, 0.9)}
INT8 = 1.0 + 2 / 64  # bytes per element of an int8 cache: one, and its share of a bf16 scale


def fake_block(config: GeneratorConfig) -> engine.BlockWeights:
    D, inner, h, real = config.hidden_size, shapes(config).inner, config.head_size, torch.float32
    return engine.BlockWeights(
        norm1=fake(D, dtype=real), qkv=fake(3 * D, D), qkv_bias=fake(3 * D),
        qk_norm=fake(2, 1, h, dtype=real), proj=fake(D, D), proj_bias=fake(D),
        norm2=fake(D, dtype=real), w13=fake(2 * inner, D), w2=fake(D, inner),
    )  # fmt: skip


def between_attentions(config: GeneratorConfig, rows: int) -> Program:
    """What the engine runs between two attentions, for rows of two branches."""
    D = config.hidden_size

    def arguments() -> tuple:
        x, y = fake(rows, D, dtype=torch.float32), fake(rows, D)
        return x, y, fake_block(config), fake_block(config)

    return emit(engine.between, arguments, {"deterministic": True})


def choice(
    config: GeneratorConfig, rows: int, top_k: int, top_p: float, deterministic: bool = True
) -> Program:
    """From logits to codes, with guidance; `deterministic` as the engine compiles it."""

    def arguments() -> tuple:
        real = torch.float32
        logits = fake(rows, config.codebook_size, dtype=real)
        given, uniform = fake(rows // 2, dtype=torch.int64), fake(rows // 2, dtype=real)
        return logits, given, uniform, fake(1, dtype=real), True, 1.0, top_k, top_p

    # Folding constants would compute them on the device.
    options = {"deterministic": deterministic, "joint_graph_constant_folding": False}
    return emit(engine.choose, arguments, options)


def show(parts: list[Part]) -> str:
    return ", ".join(f"{part.name} {part.seconds * 1e3:.2f}" for part in parts)


def sampling(size: str, batches: list[int]) -> dict[str, Any]:
    """Print the modelled sampling of one size; return what was counted at the first batch."""
    config, _ = SIZES[size]
    code, attention = fused_attention(config.head_size)
    _, wide = fused_attention(config.head_size, False, kernel.WIDE[False])
    int8_code, int8 = fused_attention(config.head_size, True)
    counted: dict[str, Any] = {
        name: {"instructions": a.instructions, "registers": c.registers, "spilled": c.spilled,
               "programs": a.programs}
        for name, c, a in (("bf16", code, attention), ("int8", int8_code, int8))
    }  # fmt: skip
    print(
        f"{size.upper()} sampling with guidance; counted of the attention, bf16 and int8 cache: "
        f"{attention.instructions:.1f} and {int8.instructions:.1f} instructions per element, "
        f"{code.registers} and {int8_code.registers} registers, {code.spilled} and "
        f"{int8_code.spilled} bytes spilled, {attention.programs} and {int8.programs} programs per "
        f"multiprocessor"
    )
    for batch in batches:
        between = between_attentions(config, 2 * batch)
        choose = choice(config, 2 * batch, *CHOICES["plain"])
        # Every element of a cache takes part; nothing between the attentions may write as much.
        cache = 2 * batch * config.hidden_size * config.image_seq_len
        if batch == batches[0]:
            counted |= {
                "kernels": len(between.kernels), "products": len(between.products),
                "others": between.others, "copies": between.copies(cache),
                "bytes": between.bytes, "undetermined": between.undetermined,
            }  # fmt: skip
        print(
            f"  batch {batch}: counted between two attentions: {len(between.kernels)} kernels, "
            f"{len(between.products)} products, {between.bytes / 1e6:.0f} MB"
        )
        show_sampling(config, batch, "bf16 cache", 2.0, attention, between, choose)
        show_sampling(config, batch, "int8 cache", INT8, int8, between, choose)
        show_changes(config, batch, wide, attention, between, choose)
    return counted


def show_sampling(
    config: GeneratorConfig, batch: int, name: str, per_element: float, attention: Attention,
    between: Program, choose: Program,
) -> None:  # fmt: skip
    roofline = sampling_roofline(config, batch, per_element)
    parts = sampling_step(config, batch, attention, between, choose, per_element)
    rate = batch / (config.image_seq_len * total(parts))
    print(
        f"    {name}: modelled: roofline: codes of {roofline:.0f} images/s; {rate:.0f} "
        f"({rate / roofline:.0%}); ms per step: {show(parts)}"
    )


def show_changes(
    config: GeneratorConfig, batch: int, wide: Attention, attention: Attention, between: Program,
    choose: Program,
) -> None:  # fmt: skip
    """One change after another, each with those before it; the last three are not built."""
    ways: dict[str, dict[str, Any]] = {
        "attention of four warps, output layer in float32": {"attention": wide, "output": FLOAT32},
        "attention of one warp": {"output": FLOAT32},
        "output layer in TF32": {},
        "not built: dependent launch": {"launch": OVERLAPPED},
        "not built: silu·up and the norms in the products' epilogues": {
            "launch": OVERLAPPED, "fewer": 2,
        },
        "not built: a persistent grid": {"launch": 0.0, "fewer": 2},
    }  # fmt: skip
    roofline = sampling_roofline(config, batch)
    found = []
    for name, change in ways.items():
        chosen = {"attention": attention, "launch": LAUNCH, **change}
        parts = sampling_step(config, batch, between=between, choose=choose, **chosen)
        rate = batch / (config.image_seq_len * total(parts))
        found.append(f"{name} {rate:.0f} ({rate / roofline:.0%})")
    print(f"    modelled, images/s (codes alone): {'; '.join(found)}")


def training(size: str, larger: bool = True) -> dict[str, Any]:
    """Print the modelled training of one size, of a `larger` batch too; return what was counted per layer."""
    config, published = SIZES[size]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Generator(config).parameters())
    counted: dict[str, Any] = {}
    for batch in (published, LARGER[size])[: 1 + larger]:
        block, loss = (compiled.counted for compiled in programs_of_step(config, batch))
        parts = training_step(config, batch, block, loss, parameters)
        seconds = total(parts)
        print(
            f"{size.upper()} training, batch {batch}, bf16; counted per layer: "
            f"{block.moved['kernels'] / 1e9:.2f} GB by generated kernels, "
            f"{block.moved['products'] / 1e9:.2f} by products, {block.moved['others'] / 1e9:.2f} by "
            f"attention, {block.launches} launches; output and loss {loss.moved['kernels'] / 1e9:.2f} "
            f"and {loss.moved['products'] / 1e9:.2f} GB\n"
            f"  modelled: {batch / seconds:.0f} images/s, MFU "
            f"{utilisation(config, batch, seconds):.0%} ; ms per step: {show(parts)}"
        )
        counted = counted or block.moved
    return counted


def choosing(name: str, rows: int) -> dict[str, Any]:
    """Print what choosing codes launches; return what was counted."""
    config, _ = SIZES["b"]
    try:
        program = choice(config, rows, *CHOICES[name])
    except InternalsMoved as e:
        print(f"choosing codes, {name}: cannot be worked out: {e}", file=sys.stderr)
        return {"moved": str(e).splitlines()[0]}
    print(
        f"choosing codes, {name}: counted {len(program.kernels)} kernels, "
        f"{len(program.others)} other calls {sorted(set(program.others))}"
    )
    return {
        "kernels": len(program.kernels), "others": program.others,
        "undetermined": program.undetermined, "bytes": program.bytes,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help="of b, l and xl")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[256, 512, 1024], help="images sampled at once"
    )
    parser.add_argument("--json", help="write what was counted to this file")
    larger = "also model training with a larger batch"
    parser.add_argument(
        "--larger", action=argparse.BooleanOptionalAction, default=True, help=larger
    )
    inductor_argument(parser)
    args = parser.parse_args()
    if unknown := [size for size in args.sizes if size not in SIZES]:
        parser.error(f"size {unknown[0]}: choose from {', '.join(SIZES)}")
    print(
        f"Modelled for one H100 from code made by torch {torch.__version__} on this machine. "
        f"No time below is measured."
    )
    counted: dict[str, Any] = {"torch": torch.__version__, "sampling": {}, "training": {}}
    works: list[tuple[str, Callable[[str], dict]]] = [
        ("sampling", lambda size: sampling(size, args.batches)),
        ("training", lambda size: training(size, args.larger)),
    ]
    for size in args.sizes:
        for name, work in works:
            try:
                with with_inductor(args.inductor):
                    counted[name][size] = work(size)
            except InternalsMoved as e:
                print(f"{size.upper()} {name}: cannot be worked out: {e}", file=sys.stderr)
                counted[name][size] = {"moved": str(e).splitlines()[0]}
            sys.stdout.flush()
    counted["choosing"] = {name: choosing(name, 2 * args.batches[0]) for name in CHOICES}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(counted, file, indent=1)


if __name__ == "__main__":
    main()
