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

from benchmarks.paper.inductor import InternalsMoved, Program, emit, fake
from benchmarks.paper.kernel import fused_attention
from benchmarks.paper.model import (
    Part,
    sampling_roofline,
    sampling_step,
    shapes,
    total,
    training_step,
    utilisation,
)
from benchmarks.paper.training import bytes_per_layer
from modeling import engine
from modeling.generator import GeneratorConfig

# The generator, and its published training batch per GPU.
SIZES = {
    "b": (GeneratorConfig(hidden_size=768, num_hidden_layers=24), 128),
    "l": (GeneratorConfig(hidden_size=1024, num_hidden_layers=24), 64),
    "xl": (GeneratorConfig(hidden_size=1280, num_hidden_layers=32), 32),
}
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
        return logits, fake(rows // 2, dtype=real), fake(1, dtype=real), True, 1.0, top_k, top_p

    # Folding constants would compute them on the device.
    options = {"deterministic": deterministic, "joint_graph_constant_folding": False}
    return emit(engine.choose, arguments, options)


def show(parts: list[Part]) -> str:
    return ", ".join(f"{part.name} {part.seconds * 1e3:.2f}" for part in parts)


def sampling(size: str, batch: int) -> dict[str, Any]:
    """Print the modelled sampling of one size; return what was counted."""
    config, _ = SIZES[size]
    between = between_attentions(config, 2 * batch)
    # Every element of a cache takes part; nothing between the attentions may write as much.
    cache = 2 * batch * config.hidden_size * config.image_seq_len
    counted: dict[str, Any] = {
        "kernels": len(between.kernels), "products": len(between.products),
        "others": between.others, "copies": between.copies(cache), "bytes": between.bytes,
        "undetermined": between.undetermined,
    }  # fmt: skip
    print(
        f"{size.upper()} sampling, batch {batch} with guidance; counted between two attentions: "
        f"{len(between.kernels)} kernels, {len(between.products)} products, "
        f"{between.bytes / 1e6:.0f} MB"
    )
    for name, int8, per_element in (("bf16", False, 2.0), ("int8", True, INT8)):
        code, instructions = fused_attention(config.head_size, int8)
        counted[name] = {
            "instructions": instructions, "registers": code.registers, "spilled": code.spilled,
        }  # fmt: skip
        roofline = sampling_roofline(config, batch, per_element)
        parts = sampling_step(config, batch, instructions, between, per_element)
        rate = batch / (config.image_seq_len * total(parts))
        print(
            f"  {name} cache: counted {instructions:.1f} instructions per element, "
            f"{code.registers} registers, {code.spilled} bytes spilled\n"
            f"    modelled: roofline {roofline:.0f} codes of images/s; one stream {rate:.0f} "
            f"({rate / roofline:.0%}); ms per step: {show(parts)}"
        )
    return counted


def training(size: str) -> dict[str, Any]:
    """Print the modelled training of one size; return the bytes per layer."""
    config, batch = SIZES[size]
    moved = bytes_per_layer(config, batch)
    parts = training_step(config, batch, moved)
    seconds = total(parts)
    print(
        f"{size.upper()} training, batch {batch}, bf16; counted per layer: "
        f"{moved['kernels'] / 1e9:.2f} GB by generated kernels, "
        f"{moved['products'] / 1e9:.2f} by products, {moved['others'] / 1e9:.2f} by attention\n"
        f"  modelled: at most {batch / seconds:.0f} images/s, MFU "
        f"{utilisation(config, batch, seconds):.0%} (products at their full rate, no optimizer, no "
        f"loss, no gaps); ms per step: {show(parts)}"
    )
    return {name: value for name, value in moved.items()}


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
    parser.add_argument("--batch", type=int, default=256, help="images sampled at once")
    parser.add_argument("--json", help="write what was counted to this file")
    args = parser.parse_args()
    if unknown := [size for size in args.sizes if size not in SIZES]:
        parser.error(f"size {unknown[0]}: choose of {', '.join(SIZES)}")
    print(
        f"Modelled for one H100 from code made by torch {torch.__version__} on this machine. "
        f"No time below is measured."
    )
    counted: dict[str, Any] = {"torch": torch.__version__, "sampling": {}, "training": {}}
    works: list[tuple[str, Callable[[str], dict]]] = [
        ("sampling", lambda size: sampling(size, args.batch)),
        ("training", training),
    ]
    for size in args.sizes:
        for name, work in works:
            try:
                counted[name][size] = work(size)
            except InternalsMoved as e:
                print(f"{size.upper()} {name}: cannot be worked out: {e}", file=sys.stderr)
                counted[name][size] = {"moved": str(e).splitlines()[0]}
            sys.stdout.flush()
    counted["choosing"] = {name: choosing(name, 2 * args.batch) for name in CHOICES}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(counted, file, indent=1)


if __name__ == "__main__":
    main()
