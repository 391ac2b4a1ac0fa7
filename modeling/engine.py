"""The fast sampler: cached autoregressive sampling with weights laid out for the device."""

import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .generator import Block, Generator, GeneratorConfig
from .pixels import to_uint8
from .sampling import Sampling, check_classes, draw, guidance_schedule, guide
from .tokenizer import Tokenizer

BUCKET = 32  # compiled steps attend to a multiple of so many positions: a few shapes, little waste
DECODED_AT_ONCE = 64  # images; more fills no GPU better and takes more memory


class BlockWeights(NamedTuple):
    """Weights of one block as the engine reads them: norms float32, matrices in its dtype."""

    norm1: Tensor  # (D,)
    qkv: Tensor  # (3D, D)
    qkv_bias: Tensor
    qk_norm: Tensor  # (2, 1, h): of q, of k
    proj: Tensor
    proj_bias: Tensor
    norm2: Tensor
    w13: Tensor  # gate above up: one product instead of two
    w2: Tensor


def pack(weight: Tensor, rows: int) -> Tensor:
    """Lay a matrix (out, in) out in the blocks that oneDNN multiplies a few `rows` by.

    A step reads every weight for a few rows; reordering them anew each time costs as much as the
    product. Only on a CPU that oneDNN supports; elsewhere the matrix comes back as it is.
    """
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query a head: q (N, H, h), k and v (N, H, L, h), mask (L,) added -> (N, H, h).

    Compiled, this is products and sums that read the cache once, with sums and softmax in float32:
    with one query there is nothing for matrix units to do.
    """
    if not torch.compiler.is_compiling():
        y = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, mask.to(q.dtype)[None, None, None])
        return y.squeeze(2)
    scores = (q.float().unsqueeze(2) * k.float()).sum(-1) * q.shape[-1] ** -0.5 + mask  # (N, H, L)
    weights = torch.softmax(scores, -1)
    return (weights.unsqueeze(-1) * v.float()).sum(2).to(q.dtype)


def block_step(
    x: Tensor,
    weights: BlockWeights,
    cache: Tensor,
    length: int,
    position: Tensor,
    turn: Tensor,
    mask: Tensor,
) -> Tensor:
    """One block at one position, as `generator.Block` on (N, 1, D): x (N, D) float32 -> same.

    The sums of x stay in float32 whatever the type of the matrices, as in training under autocast.
    `cache` (2, N, H, S, h) gets k and v at `position` (1,); its first `length` positions are read.
    `turn` (2, h) are cosines and signed sines of the rotation at this position.
    """
    N, D = x.shape
    heads, size = cache.shape[2], cache.shape[4]
    dtype = cache.dtype
    y = F.rms_norm(x, (D,), weights.norm1, 1e-5).to(dtype)
    qkv = linear(y, weights.qkv, weights.qkv_bias).view(N, 3, heads, size)
    qk = F.rms_norm(qkv[:, :2].float(), (size,), None, 1e-5) * weights.qk_norm  # (N, 2, H, h)
    swapped = qk.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # within each rotated pair
    q, k = (qk * turn[0] + swapped * turn[1]).to(dtype).unbind(1)  # (N, H, h)
    cache[0].index_copy_(2, position, k.unsqueeze(2))
    cache[1].index_copy_(2, position, qkv[:, 2].unsqueeze(2))
    y = attend(q, cache[0, :, :, :length], cache[1, :, :, :length], mask[:length])
    x = x + linear(y.reshape(N, D), weights.proj, weights.proj_bias)
    y = F.rms_norm(x, (D,), weights.norm2, 1e-5).to(dtype)
    gate, up = linear(y, weights.w13).chunk(2, -1)
    return x + linear(F.silu(gate) * up, weights.w2)


class Engine:
    """Samples batches of `batch` images with the weights of a generator, on its device.

    One step is a function of fixed shapes whose whole state (position, last codes, cache) lives on
    the device, so nothing waits for the host. It runs in one of two ways, with the same numbers up
    to rounding: eager, reading exactly the filled part of the cache; or compiled, for lengths of
    multiples of `BUCKET`, on CUDA captured as one graph a length.

    `dtype` is that of matrices and cache. Norms, residual sums, output layer and softmax are
    float32: guidance multiplies differences of logits by its scale, and their errors with them.
    The generator's own weights are not needed, nor changed, afterwards.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Generator,
        batch: int,
        sampling: Sampling,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        bucket: Optional[int] = None,
    ):
        self.config, self.batch, self.sampling = model.config, batch, sampling
        self.compiled = compiled
        # Positions read are rounded up to a multiple of it.
        self.bucket = bucket or (BUCKET if compiled else 1)
        config, device = model.config, model.output.weight.device
        rows = 2 * batch if sampling.guided else batch  # N
        laid_out = (lambda w: w) if compiled else (lambda w: pack(w, rows))
        self.embeddings = model.embeddings.weight.to(dtype)
        self.blocks = [block_weights(block, dtype, laid_out) for block in model.blocks]
        self.norm = model.norm.weight.float()
        self.output = laid_out(model.output.weight.float())
        self.output_bias = model.output.bias.float()
        cos, sin = model.rotary.float().unbind(-1)  # (1 + T, h / 2)
        turns = [torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)]
        self.turns = torch.stack(turns, 1).flatten(2)  # (1 + T, 2, h)

        T, size = config.image_seq_len, config.head_size
        positions = -(-T // self.bucket) * self.bucket
        # Zeros: what is masked is still multiplied, and must be finite.
        self.caches = [
            torch.zeros(
                2, rows, config.num_attention_heads, positions, size, dtype=dtype, device=device
            )
            for _ in self.blocks
        ]
        self.places = torch.arange(positions, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.scales = guidance_schedule(
            sampling.guidance_scale, sampling.guidance_power, T, sampling.guidance_schedule
        ).to(device)
        self.rows = torch.zeros(rows, dtype=torch.int64, device=device)  # of the embedding, next
        self.uniforms = torch.zeros(batch, T, device=device)
        self.codes = torch.zeros(batch, T, dtype=torch.int64, device=device)
        # Compiled block by block: the blocks differ in their weights only and share one program.
        self.block, self.finish = block_step, self._finish
        if compiled:
            self.block = torch.compile(block_step)
            self.finish = torch.compile(self._finish)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if compiled and device.type == "cuda":
            self._capture()

    def _finish(self, x: Tensor, uniform: Tensor, scale: Tensor) -> Tensor:
        """Last states (N, D) -> codes (B,)."""
        sampling = self.sampling
        x = F.rms_norm(x, (x.shape[1],), self.norm, 1e-5)
        logits = linear(x, self.output, self.output_bias)  # (N, V)
        if sampling.guided:
            logits = guide(logits, scale)
        return draw(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)

    def _step(self, length: int) -> None:
        """Draw the code of the current position, of which there are fewer than `length`."""
        position = self.position
        x = F.embedding(self.rows, self.embeddings).float()  # (N, D)
        turn = self.turns.index_select(0, position)[0]  # (2, h)
        mask = torch.zeros(len(self.places), device=x.device)
        mask.masked_fill_(self.places > position, -math.inf)
        for weights, cache in zip(self.blocks, self.caches):
            x = self.block(x, weights, cache, length, position, turn, mask)
        uniform = self.uniforms.index_select(1, position)[:, 0]
        codes = self.finish(x, uniform, self.scales.index_select(0, position))  # (B,)
        self.codes.index_copy_(1, position, codes.unsqueeze(1))
        self.rows.copy_(codes.repeat(len(self.rows) // self.batch))
        self.position += 1

    def _capture(self) -> None:
        """One CUDA graph a length; they share memory, for only one runs at a time."""
        side = torch.cuda.Stream()
        pool = torch.cuda.graph_pool_handle()
        for length in range(self.bucket, len(self.places) + 1, self.bucket):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles and warms up, outside the capture
                for _ in range(2):
                    self.position.zero_()
                    self._step(length)
            torch.cuda.current_stream().wait_stream(side)
            self.position.zero_()
            self.graphs[length] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[length], pool=pool):
                self._step(length)

    @torch.inference_mode()
    def sample(self, labels: Tensor, uniforms: Tensor) -> Tensor:
        """Labels (B,), B up to the batch, and uniforms (B, T) -> codes (B, T), int64.

        On CUDA this returns before the codes are there, as every operation on them does.
        """
        B, T, config = len(labels), self.config.image_seq_len, self.config
        if self.batch < B:
            raise ValueError(f"{B} images for an engine of batch {self.batch}")
        check_classes(int(labels.min()), int(labels.max()), config.condition_num_classes)
        if (
            self.rows.is_cuda and not labels.is_cuda
        ):  # a copy from other memory waits for the device
            labels, uniforms = labels.pin_memory(), uniforms.pin_memory()
        # Shapes are fixed: a smaller batch is filled up with images of "no class".
        self.rows.fill_(config.codebook_size + 1 + config.no_class)
        self.rows[:B].copy_(labels + config.codebook_size + 1, non_blocking=True)
        self.uniforms[:B].copy_(uniforms, non_blocking=True)
        self.position.zero_()
        for t in range(T):
            length = -(-(t + 1) // self.bucket) * self.bucket
            if self.graphs:
                self.graphs[length].replay()
            else:
                self._step(length)
        return self.codes[:B].clone()


def block_weights(block: Block, dtype: torch.dtype, laid_out) -> BlockWeights:
    """The engine's form of a block's weights; `laid_out` arranges a matrix for its device."""
    attn, mlp = block.attn, block.mlp
    return BlockWeights(
        norm1=block.norm1.weight.float(),
        qkv=laid_out(attn.qkv.weight.to(dtype)),
        qkv_bias=attn.qkv.bias.to(dtype),
        qk_norm=torch.stack([attn.q_norm.weight, attn.k_norm.weight]).float().unsqueeze(1),
        proj=laid_out(attn.proj.weight.to(dtype)),
        proj_bias=attn.proj.bias.to(dtype),
        norm2=block.norm2.weight.float(),
        w13=laid_out(torch.cat([mlp.w1.weight, mlp.w3.weight]).to(dtype)),
        w2=laid_out(mlp.w2.weight.to(dtype)),
    )


def cache_bytes(config: GeneratorConfig, sampling: Sampling, dtype: torch.dtype) -> int:
    """Bytes of the engine's cache an image."""
    positions = -(-config.image_seq_len // BUCKET) * BUCKET
    branches = 2 if sampling.guided else 1
    return 2 * branches * config.num_hidden_layers * positions * config.hidden_size * dtype.itemsize


@torch.inference_mode()
def decode_images(tokenizer: Tokenizer, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (B, T) -> images (B, S, S, 3), uint8, by ×255 and truncation as published.

    `dtype` bfloat16 computes under autocast on CUDA; CPUs multiply large matrices faster in float32.
    """
    images = []
    for part in codes.split(DECODED_AT_ONCE):
        with torch.autocast("cuda", torch.bfloat16, codes.is_cuda and dtype == torch.bfloat16):
            pixels = tokenizer.decode(part)
        images.append(to_uint8(pixels).permute(0, 2, 3, 1))
    return torch.cat(images)
