"""How well a tokenizer reconstructs: PSNR and use of the codebook."""

from collections.abc import Callable, Iterable
from typing import Optional

import torch
from torch import Tensor

from data.images import to_float
from modeling.tokenizer import Tokenizer


def codebook_use(counts: Tensor) -> tuple[float, float]:
    """Share of codes that occur, and perplexity exp(entropy), of counts (codebook_size,)."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


class ReconstructionSums:
    """Sums over images, on the device, that add up over ranks: [PSNR sum, images, code counts]."""

    def __init__(self, codebook_size: int, device: torch.device):
        self.values = torch.zeros(2 + codebook_size, dtype=torch.float64, device=device)

    def add(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """Images and reconstructions (B, 3, S, S) in [0, 1], codes (B, T)."""
        mse = (images - reconstructions).double().square().mean((1, 2, 3))
        self.values[0] += (-10 * mse.clamp(min=1e-10).log10()).sum()
        self.values[1] += len(images)
        self.values[2:] += torch.bincount(codes.flatten(), minlength=len(self.values) - 2)

    def metrics(self) -> dict[str, float]:
        """`psnr`: mean over images of 10·log10(1 / MSE), in dB; `codebook_use`; `perplexity`."""
        use, perplexity = codebook_use(self.values[2:])
        psnr = (self.values[0] / self.values[1]).item()
        return {"psnr": psnr, "codebook_use": use, "perplexity": perplexity}


@torch.no_grad()
def reconstruct_all(
    tokenizer: Tokenizer,
    batches: Iterable[Tensor],
    device: torch.device,
    also: Optional[Callable[[Tensor, Tensor], None]] = None,
) -> tuple[ReconstructionSums, Tensor, Tensor]:
    """Encode and decode uint8 batches (B, 3, S, S); returns sums and the first batch, before and
    after, in [0, 1]. `also(images, reconstructions)` is called with every batch. The tokenizer is
    left in its mode."""
    was_training = tokenizer.training
    tokenizer.eval()
    sums = ReconstructionSums(tokenizer.config.codebook_size, device)
    first = torch.empty(0), torch.empty(0)  # a rank may have no images
    for batch in batches:
        images = to_float(batch.to(device))
        codes = tokenizer.encode(images)
        reconstructions = tokenizer.decode(codes)
        sums.add(images, reconstructions, codes)
        if also is not None:
            also(images, reconstructions)
        if not len(first[0]):
            first = images, reconstructions
    tokenizer.train(was_training)
    return sums, *first
