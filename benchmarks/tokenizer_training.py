"""Stage-1 training: images/s, model FLOPs utilisation and where the time goes, exact against fast.

    python -m benchmarks.tokenizer_training [--no-perceptual] [--compile]

At the published size and batch 48 on CUDA, at a small size on a CPU. The modes run in turn, round
after round; a speed-up is the median of the rounds' ratios. MFU is against the device's bf16 peak. Images are random JPEGs through the
trainer's own loader; the perceptual network has random weights, which costs the same.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import explain_failures, machine, median_seconds
from configs.schema import Losses, Phase
from data.images import TrainImages, list_paths, to_float
from data.order import SampleOrder
from modeling.compiling import compile_blocks
from modeling.tokenizer import Tokenizer, TokenizerConfig, TokenizerOutput
from train_tokenizer.discriminator import Discriminator, hinge_loss
from train_tokenizer.losses import FrozenNetworks, tokenizer_terms
from training.utilisation import peak_flops

STAGE1: dict[str, Any] = dict(num_buffer_tokens=1, causal=True, prefix_head=True, clustering=True)
SMALL: dict[str, Any] = dict(
    codebook_size=1024, token_size=16, image_size=64, patch_size=8, encoder_width=128,
    encoder_layers=3, encoder_heads=4, decoder_width=128, decoder_layers=4, decoder_heads=4,
)  # fmt: skip
MODES = ("exact", "fast")
PARTS = ("data", "encoder", "decoder", "losses", "backward", "optimizer")


class Mode:
    """A tokenizer with its optimizer, and one training step in the trainer's order.

    exact: float32 throughout, TF32 off. fast: bf16.
    """

    def __init__(
        self,
        name: str,
        sizes: dict[str, Any],
        networks: FrozenNetworks,
        phase: Phase,
        device: torch.device,
    ):
        self.name, self.networks, self.phase, self.device = name, networks, phase, device
        torch.manual_seed(0)
        self.config = TokenizerConfig(**sizes, **STAGE1)
        self.model = Tokenizer(self.config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.name != "exact")

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[part] += time.perf_counter() - began

    def step(self, batches: Iterator[Tensor]) -> None:
        images = to_float(next(batches).to(self.device, non_blocking=True))
        with self.autocast():
            out = self.model(images)
        self.loss(out, images).backward()
        self.update(out)

    def step_in_parts(self, batches: Iterator[Tensor]) -> None:
        """The same step, waiting for the device after each part."""
        with self.timed("data"):
            images = to_float(next(batches).to(self.device, non_blocking=True))
        with self.timed("encoder"), self.autocast():
            latents = self.model.encoder(images, self.model.latent_tokens).float()
            vectors, codes, quantizer_loss = self.model.quantize(latents)
        with self.timed("decoder"), self.autocast():
            reconstructions, strip = self.model.decoder(vectors)
        out = TokenizerOutput(reconstructions, strip, latents, codes, quantizer_loss)
        with self.timed("losses"):
            loss = self.loss(out, images)
        with self.timed("backward"):
            loss.backward()
        with self.timed("optimizer"):
            self.update(out)

    def loss(self, out: TokenizerOutput, images: Tensor) -> Tensor:
        terms = tokenizer_terms(
            out, images, self.config, 1, self.phase, Losses(), self.networks, None
        )
        return torch.stack([weight * value for weight, value in terms.values()]).sum()

    def update(self, out: TokenizerOutput) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.model.quantize.before_update(out.latents.detach().flatten(0, 1))
        self.optimizer.step()
        self.optimizer.zero_grad()


def critic_ms(mode: Mode, batch: int, steps: int, compiled: bool) -> tuple[float, float]:
    """Milliseconds of the discriminator's forward and backward pass, eager and compiled (else NaN)."""
    critic: Any = Discriminator(exact=mode.name == "exact").to(mode.device)
    side = mode.config.image_size
    images = torch.rand(2 * batch, 3, side, side, device=mode.device)

    def step() -> None:
        with mode.autocast():
            real, fake = critic(images).chunk(2)
        hinge_loss(real, fake).backward()

    eager, ours = median_seconds(step, steps), math.nan
    if compiled:
        critic.logits = torch.compile(critic.logits, dynamic=False)
        ours = median_seconds(step, steps)
    return 1e3 * eager, 1e3 * ours


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def flops_per_image(mode: Mode) -> int:
    """FLOPs of a forward and backward pass of the tokenizer alone, at batch 1, counted by PyTorch."""
    size = mode.config.image_size
    with FlopCounterMode(display=False) as counter:
        out = mode.model(torch.rand(1, 3, size, size, device=mode.device))
        (out.images.mean() + out.strip.mean()).backward()
    mode.optimizer.zero_grad()
    return counter.get_total_flops()


def write_images(folder: Path, count: int, size: int) -> None:
    """JPEGs of the proportions and, at 256 px, about the size of ImageNet's."""
    rng = np.random.default_rng(0)
    (folder / "class").mkdir()
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (size // 8, size // 6, 3), dtype=np.uint8))
        photo = noise.resize((2 * size, 3 * size // 2), Image.Resampling.BICUBIC)
        photo.save(folder / f"class/{i:04d}.jpg", quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--no-perceptual", action="store_true", help="without ConvNeXt-S (MFU)")
    parser.add_argument("--compile", action="store_true", help="the fast mode with torch.compile")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--critic", action="store_true", help="time the discriminator too")
    parser.add_argument("--batch", type=int, help="images per step (48 on CUDA, 8 on a CPU)")
    parser.add_argument("--steps", type=int, help="per round (20 on CUDA, 3 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    explain_failures()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    batch, steps = args.batch or (48 if cuda else 8), args.steps or (20 if cuda else 3)
    phase = Phase("main", 1, 1e-4, perceptual_weight=0.0 if args.no_perceptual else 1.0)
    networks = FrozenNetworks([phase], weights=None, device=device)
    sizes: dict[str, Any] = {} if cuda else SMALL
    modes = [Mode(name, sizes, networks, phase, device) for name in args.modes]
    flops = flops_per_image(modes[0])
    if args.compile and "fast" in args.modes:
        fast: Any = modes[args.modes.index("fast")].model
        compile_blocks(fast.encoder.transformer, fast.decoder.transformer)

    def measure(mode: Mode, batches: Iterator[Tensor], in_parts: bool = False) -> float:
        """Images/s over a round."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
            mode.name != "exact"
        )
        step = mode.step_in_parts if in_parts else mode.step
        wait(device)
        began = time.perf_counter()
        for _ in range(steps):
            step(batches)
        wait(device)
        return steps * batch / (time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder:
        size = modes[0].config.image_size
        write_images(Path(folder), 4 * batch, size)
        workers = 8 if cuda else 0
        loader = DataLoader(
            TrainImages(list_paths(folder), size, size, True, 0),
            batch_sampler=SampleOrder(4 * batch, batch, 0), num_workers=workers, pin_memory=cuda,
        )  # fmt: skip
        batches = iter(loader)
        for mode in modes:
            measure(mode, batches)  # compiles, chooses kernels, fills the loader
        rounds = [[measure(mode, batches) for mode in modes] for _ in range(args.rounds)]
        for mode in modes:
            measure(mode, batches, in_parts=True)
        critics = [critic_ms(mode, batch, steps, args.compile) for mode in modes * args.critic]
        del batches  # ends the workers before their folder goes

    peak = peak_flops(device, "bf16")
    print(
        f"{machine()}; batch {batch}, {'without' if args.no_perceptual else 'with'} ConvNeXt-S, "
        f"{flops / 1e9:.1f} GFLOP per image and step in the tokenizer"
    )
    print(f"| mode | images/s | over exact | MFU | {' | '.join(PARTS)} |")
    print("| --- " * (4 + len(PARTS)) + "|")
    for i, mode in enumerate(modes):
        speed = statistics.median(r[i] for r in rounds)
        gain = statistics.median(r[i] / r[0] for r in rounds)  # over the first mode
        use = f"{speed * flops / peak:.1%}" if peak and args.no_perceptual else ""
        total = sum(mode.seconds.values())
        shares = " | ".join(f"{mode.seconds[part] / total:.0%}" for part in PARTS)
        name = "fast, compiled" if args.compile and mode.name == "fast" else mode.name
        print(f"| {name} | {speed:.1f} | {gain:.2f}× | {use} | {shares} |")
    for mode, (eager, ours) in zip(modes, critics):
        print(
            f"{mode.name}: the discriminator on {batch} images and as many reconstructions, forward "
            f"and backward: eager {eager:.1f} ms, compiled {ours:.1f} ms"
        )


if __name__ == "__main__":
    main()
