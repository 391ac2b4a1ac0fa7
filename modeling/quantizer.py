"""Vector quantizer with online codebook clustering (CVQ-VAE, Zheng & Vedaldi 2023)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

EMBED_PROB_DECAY = 0.99  # of the running share of tokens that choose each code
COMMITMENT = 0.25


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of `codebook_size` codes, by L2, always in float32.

    On CUDA a trainer's `enable_tf32` reaches the products of the distances too, as published.
    `clustering` adds the buffer `embed_prob` that `cluster` needs; the inference format has none.
    """

    def __init__(self, codebook_size: int, token_size: int, clustering: bool):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, token_size)
        if clustering:
            self.register_buffer("embed_prob", torch.zeros(codebook_size))

    def distances(self, z: Tensor) -> Tensor:
        """Squared L2 distance of vectors (N, token_size) to every code: (N, codebook_size)."""
        e = self.embedding.weight.float()
        return z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * z @ e.T

    def nearest(self, z: Tensor) -> Tensor:
        """Codes (B, T), int64, of vectors (B, T, token_size)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.distances(z.float().flatten(0, 1)).argmin(1).view(z.shape[:2])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize (B, T, token_size); returns float32 vectors of that shape, codes and loss.

        The gradient of the vectors passes straight through to `z`. The loss is the mean of
        0.25·(sg[zq] - z)² + (zq - sg[z])².
        """
        z = z.float()
        codes = self.nearest(z)
        zq = self.embedding(codes).float()
        loss = COMMITMENT * F.mse_loss(z, zq.detach()) + F.mse_loss(zq, z.detach())
        return z + (zq - z).detach(), codes, loss

    @torch.no_grad()
    def cluster(self, z: Tensor) -> None:
        """Move rarely used codes towards the encoder's output: one update, in place.

        `z` (N, token_size) is this rank's share of the batch. Every code e moves towards the vector
        of the whole batch that is closest to it, e <- (1-a)·e + a·closest with
        a = exp(-10·codebook_size·p / (1-decay) - 1e-3) and p the running share of its tokens, so a
        code in use stays where it is. Ranks exchange one candidate a code, never their distances;
        the result is that of one process holding the concatenated batch.
        """
        z = z.float()
        distances = self.distances(z)
        codes = distances.argmin(1)
        # Not bincount, which makes the host wait for the device.
        counts = torch.zeros_like(self.embed_prob)
        counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype))
        best, index = distances.min(0)
        closest = z[index]  # (codebook_size, token_size)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
            best_of = [torch.empty_like(best) for _ in range(dist.get_world_size())]
            closest_of = [torch.empty_like(closest) for _ in best_of]
            dist.all_gather(best_of, best)
            dist.all_gather(closest_of, closest)
            rank = torch.stack(best_of).argmin(0)  # ties: the lowest rank, as in one process
            closest = torch.stack(closest_of)[rank, torch.arange(len(rank), device=rank.device)]

        decay = EMBED_PROB_DECAY
        self.embed_prob.mul_(decay).add_(counts / counts.sum(), alpha=1 - decay)
        reuse = 10 * self.embed_prob.numel() * self.embed_prob / (1 - decay)
        a = torch.exp(-reuse - 1e-3).unsqueeze(1)
        self.embedding.weight.copy_((1 - a) * self.embedding.weight + a * closest)
