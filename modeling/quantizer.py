"""Vector quantizer with online codebook clustering (CVQ-VAE, Zheng & Vedaldi 2023)."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

EMBED_PROB_DECAY = 0.99  # of the running share of tokens that choose each code
COMMITMENT = 0.25
# The operations whose float32 precision torch can set; those of cuDNN must be equal.
backends: Any = torch.backends  # declares no types of some
FLOAT32_SETTINGS = (
    backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul,
    backends.mkldnn.conv,
)  # fmt: skip
SETTINGS = threading.RLock()


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Products and convolutions of float32 tensors in full float32: no autocast, TF32 or bfloat16.

    For eager code: a compiled graph keeps the setting of its compilation. Code that uses this must be
    excluded from compilation.
    """
    with ExitStack() as stack:
        stack.enter_context(SETTINGS)  # process-wide: threads would undo each other's
        stack.enter_context(torch.autocast(device_type, enabled=False))
        # Torch has old names for these settings too, and kernels raise if the two disagree.
        matmul, cudnn = old_settings()
        for setting in FLOAT32_SETTINGS:
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
        stack.callback(torch.set_float32_matmul_precision, matmul)
        stack.callback(setattr, torch.backends.cudnn, "allow_tf32", cudnn)
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for setting in FLOAT32_SETTINGS:
            setting.fp32_precision = "ieee"
        yield


def old_settings() -> tuple[str, bool]:
    """The precision of products, and whether cuDNN may use TF32, by torch's old names; torch's defaults if
    a program has set only the new ones, which makes torch refuse to read the old."""
    matmul, cudnn = "highest", True
    with suppress(RuntimeError):
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn = torch.backends.cudnn.allow_tf32
    return matmul, cudnn


def squared_distances(z: Tensor, codebook: Tensor) -> Tensor:
    """Squared L2 distance of vectors (N, C) to every code (K, C): (N, K)."""
    return z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.T


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of `codebook_size` codes by L2, without normalising them.

    Everything is computed in full float32, even under autocast or with TF32. `clustering` adds the buffer
    `embed_prob`, which the inference format lacks. Other modules use only `forward`, `encode`, `lookup`,
    `before_update` and `training_only`.
    """

    embed_prob: Tensor
    training_only = ("embed_prob",)  # tensors that do not affect codes or vectors

    def __init__(self, codebook_size: int, token_size: int, clustering: bool):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, token_size)
        if clustering:
            self.register_buffer("embed_prob", torch.zeros(codebook_size))

    # `torch.compiler.disable` would import TorchDynamo, as slow as torch itself, together with this module;
    # this imports it at the first call.
    @_disable_dynamo
    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes (B, T), int64, of vectors (B, T, token_size)."""
        with full_float32(z.device.type):
            distances = squared_distances(z.float().flatten(0, 1), self.embedding.weight.float())
            return distances.argmin(1).view(z.shape[:2])

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors (…, token_size) of codes (…)."""
        return self.embedding(codes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize (B, T, token_size); returns float32 vectors of that shape, codes and loss.

        The gradient of the vectors passes straight through to `z`. The loss is the mean of
        0.25·(sg[zq] - z)² + (zq - sg[z])².
        """
        z = z.float()
        codes = self.encode(z)
        zq = self.lookup(codes).float()
        loss = COMMITMENT * F.mse_loss(z, zq.detach()) + F.mse_loss(zq, z.detach())
        return z + (zq - z).detach(), codes, loss

    @torch.no_grad()
    def before_update(self, z: Tensor) -> None:
        """Clustering: move rarely used codes towards the encoder's output, in place.

        `z` (N, token_size) is this rank's share of the batch. Every code e moves towards the closest
        vector of the whole batch, e <- (1-a)·e + a·closest with
        a = exp(-10·codebook_size·p / (1-decay) - 1e-3) and p the running share of its tokens, so codes in
        use hardly move. Ranks exchange one candidate per code; the result equals that of one process.

        Published training does this at the end of every forward pass. The backward pass does not read the
        codebook, so any time before the optimizer's step is equivalent.
        """
        z, codebook = z.float(), self.embedding.weight
        with full_float32(z.device.type):
            distances = squared_distances(z, codebook.float())
        codes = distances.argmin(1)
        # Not bincount, which syncs with the host.
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
        reuse = 10 * len(codebook) * self.embed_prob / (1 - decay)
        a = torch.exp(-reuse - 1e-3).unsqueeze(1)
        codebook.copy_((1 - a) * codebook + a * closest)
