"""`evaluate.py --generator` beside the bare forward pass of the same model: `python -m benchmarks.likelihood`.

The models are those of benchmarks.generator_training: B on CUDA, in bf16 and compiled, a small one in
float32 on a CPU. Both ways run over the same number of batches, in turn; times on a CPU are processor
times. The score reads a cache of random codes, and adds losses and ranks by position to the forward pass.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import explain_failures, machine
from benchmarks.evaluation import seconds
from benchmarks.generator_training import SMALL
from benchmarks.sampling import SIZES
from data.tokens import TokenStore, write_packed_store
from evaluation.likelihood import Share, likelihood_sums
from evaluation.metrics import summed
from modeling.compiling import compile_blocks
from modeling.generator import Generator, GeneratorConfig


def random_cache(folder: Path, config: GeneratorConfig, images: int) -> TokenStore:
    """A cache of that many images of one view, of any codes."""
    sizes = {"views": 1, "tokens": config.image_seq_len, "codebook_size": config.codebook_size}
    shape = (images, 1, config.image_seq_len)
    codes = np.random.default_rng(0).integers(0, config.codebook_size, shape)
    labels = [i % config.condition_num_classes for i in range(images)]
    classes = [f"{i:04d}" for i in range(config.condition_num_classes)]
    about = {**sizes, "tokenizer": "none", "classes": classes}
    write_packed_store(folder, [codes], labels, [str(i) for i in range(images)], about)
    return TokenStore(folder)


@torch.no_grad()
def forward(model: Generator, codes: Tensor, labels: Tensor, batches: int) -> None:
    for _ in range(batches):
        model(codes[:, :-1], labels)


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", choices=["b", "l", "xl", "small"], default="b" if cuda else "small")  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=100 if cuda else 4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num_workers", type=int, default=8 if cuda else 0)
    args = parser.parse_args()
    explain_failures()
    config = SMALL
    if args.model != "small":
        config, _ = SIZES[args.model]
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    model = Generator(config).to(device).eval()
    torch.nn.init.normal_(model.output.weight, std=0.02)
    if cuda:
        compile_blocks(model.blocks)
    codes = torch.randint(config.codebook_size, (args.batch_size, config.image_seq_len)).to(device)
    labels = (torch.arange(args.batch_size) % config.condition_num_classes).to(device)
    bf16 = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, bf16:
        store = random_cache(Path(folder) / "cache", config, args.batch_size * args.batches)

        def score() -> None:
            share = Share(args.batch_size, workers=args.num_workers, compiled=cuda)
            summed(likelihood_sums(model, store, share)).cpu()

        def bare() -> None:
            forward(model, codes, labels, args.batches)

        score(), bare()
        pairs = [(seconds(bare), seconds(score)) for _ in range(args.rounds)]
    count = args.batch_size * args.batches * config.image_seq_len
    alone, whole = (count / median(times) for times in zip(*pairs))
    print(machine())
    print(
        f"{args.model}, batch {args.batch_size}: forward {alone:.0f} codes/s, score {whole:.0f} codes/s, "
        f"share {median(a / b for a, b in pairs):.1%}"
    )


if __name__ == "__main__":
    main()
