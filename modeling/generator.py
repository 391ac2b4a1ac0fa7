"""The AliTok generator: a decoder-only transformer over [class, code 0, …, code T-1].

Shape suffixes: B images, T codes, N positions in this call, D hidden size, H heads, h head size,
V codebook size. Attribute names are the keys of the published state dicts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attention
from .fields import Contradictions, Options, for_training, option
from .rotary import rotary_table, rotate, token_layout

# The label of an image without a class, far from others, so that an off-by-one label is refused.
NO_CLASS = -(2**31)
EPS = 1e-5  # of the norms


# fmt: off
@dataclass
class GeneratorConfig(Options):
    """Sizes and dropout of a generator; the defaults are AliTok-B."""

    hidden_size: int = option(768, "Channels.", at_least=1, at_most=65536)
    num_hidden_layers: int = option(24, "Blocks.", at_least=1, at_most=1024)
    num_attention_heads: int = option(16, "Attention heads.", at_least=1, at_most=1024)
    codebook_size: int = option(
        4096, "Codes of the tokenizer's codebook.", at_least=1, at_most=65536)
    image_seq_len: int = option(273, "Codes per image, T.", at_least=1, at_most=2**20)
    condition_num_classes: int = option(
        1000, "Number of classes; if it is not set, training uses that of its data.", at_least=1,
        at_most=2**20)
    dropout: float = for_training(
        0.1, "Dropout after the attention's projection and after the MLP.", at_least=0, below=1)
    attn_drop: float = for_training(0.1, "Dropout of attention weights.", at_least=0, below=1)
    tok_dropout: float = for_training(0.1, "Dropout of input embeddings.", at_least=0, below=1)
    class_label_dropout: float = for_training(
        0.1, "Share of training images shown without their class.", at_least=0, at_most=1)
    use_checkpoint: bool = for_training(
        False, "Recompute activations in the backward pass: less memory, more time.", resumes=True)
    # fmt: on

    def contradictions(self) -> Contradictions:
        grid, prefix = token_layout(self.image_seq_len)
        yield (
            "image_seq_len",
            prefix not in (grid + 1, grid, 0),
            f"it is neither g²+g+1, g²+g nor g²; for a {grid}x{grid} grid set "
            f"{grid * grid + grid + 1}, or {grid * grid} for codes without prefix tokens",
        )
        heads = self.num_attention_heads
        remedy = f"rotary positions need a multiple of 4 x num_attention_heads={heads}; change one"
        yield "hidden_size", self.hidden_size % (4 * heads), remedy

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rows(self) -> int:
        """Rows of the embedding: the codes, one that nothing uses, the classes, "no class"."""
        return self.codebook_size + 1 + self.condition_num_classes + 1

    def condition_rows(self, labels: Tensor) -> Tensor:
        """The embedding's rows of labels, 0…classes - 1 or `NO_CLASS`, which is row 5097 as published."""
        labels = labels.masked_fill(labels == NO_CLASS, self.condition_num_classes)
        return labels + self.codebook_size + 1


Cache = dict[Any, Any]  # what `step` keeps of earlier positions; empty at the first


class Backbone(Protocol):
    """The interface of a generator for training, `sampling.ReferenceEngine` and scoring: a module that
    has these members too."""

    config: GeneratorConfig
    blocks: nn.ModuleList  # compiled one by one, if training is compiled; may be empty

    def __call__(self, codes: Tensor, labels: Tensor, targets: Optional[Tensor] = None) -> Any:
        """As `Generator.forward`: logits or, with targets, their loss and accuracy."""
        ...

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...  # compiled likewise

    def step(self, rows: Tensor, position: int, cache: Cache) -> Tensor:
        """Rows (B,) at a position -> logits (B, V), computed in float32, as `Generator.step`."""
        ...

    def decayed(self) -> list[Tensor]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class RMSNorm(nn.Module):
    """Normalise in float32, cast back, then scale, in the order of the published training."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
        return y.type_as(x) * self.weight


class Attention(nn.Module):
    """Causal attention with per-head RMSNorm of q and k and rotary positions."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.attn_drop = config.attn_drop
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = RMSNorm(config.head_size)
        self.k_norm = RMSNorm(config.head_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: Tensor, cache: Optional[Cache] = None) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).unbind(2)
        q = rotate(self.q_norm(q), table[:, None]).type_as(v)
        k = rotate(self.k_norm(k), table[:, None]).type_as(v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # each (B, H, N, h)
        if cache is not None:
            if self in cache:
                k, v = (torch.cat([old, new], 2) for old, new in zip(cache[self], (k, v)))
            cache[self] = k, v
        y = attention(q, k, v, N > 1, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(B, N, D)))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) · w3 x); the hidden layer is ⌊8D/3⌋ rounded up to a multiple of 256."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        size = config.hidden_size
        hidden = -(-(8 * size // 3) // 256) * 256
        self.w1 = nn.Linear(size, hidden, bias=False)  # gate
        self.w3 = nn.Linear(size, hidden, bias=False)  # up
        self.w2 = nn.Linear(hidden, size, bias=False)  # down
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            # A single product reads x once, and its backward writes x's gradient once. Without gradients,
            # joining the weights costs more.
            w13 = torch.cat([self.w1.weight, self.w3.weight])
            gate, up = F.linear(x, w13).chunk(2, -1)
        else:
            gate, up = self.w1(x), self.w3(x)
        return self.drop(self.w2(F.silu(gate) * up))


class Block(nn.Module):
    """x + attention(norm1(x)), then x + MLP(norm2(x)); (B, N, D) -> (B, N, D)."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, table: Tensor, cache: Optional[Cache] = None) -> Tensor:
        x = x + self.attn(self.norm1(x), table, cache)
        return x + self.mlp(self.norm2(x))


class Generator(nn.Module):
    """Predicts code i from the class and codes 0…i-1."""

    rotary: Tensor  # (1 + T, 2, h), see rotary_table

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.rows, config.hidden_size)
        self.tok_drop = nn.Dropout(config.tok_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.codebook_size)
        table = rotary_table(config.image_seq_len, config.head_size)
        self.register_buffer("rotary", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)  # starts from the uniform distribution

    def forward(self, codes: Tensor, labels: Tensor, targets: Optional[Tensor] = None) -> Any:
        """Codes (B, N), N <= T, and labels (B,) -> logits (B, 1 + N, V); output i predicts code i.

        Labels are those of `condition_rows`; training gives `NO_CLASS` for a dropped class. With the true
        codes (B, 1 + N) as targets: their loss and accuracy (`next_code_loss`).
        """
        rows = torch.cat([self.config.condition_rows(labels).unsqueeze(1), codes], 1)
        x = self.tok_drop(self.embeddings(rows))  # (B, 1 + N, D)
        table = self.rotary[: x.shape[1]]
        for block in self.blocks:
            if self.config.use_checkpoint and self.training:
                x = checkpoint(block, x, table, use_reentrant=False)
            else:
                x = block(x, table)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def logits(self, x: Tensor) -> Tensor:
        """The last block's output (B, N, D) -> logits (B, N, V)."""
        return self.output(self.norm(x))

    def loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`next_code_loss` of the last block's output (B, N, D). Compiled, it is one program with logits in
        the autocast type, which accelerate would convert to float32 outside `forward`."""
        return next_code_loss(self.logits(x), targets)

    def decayed(self) -> list[Tensor]:
        """The parameters with weight decay: the matrices of attention, MLP and output."""
        return [m.weight for m in self.modules() if isinstance(m, nn.Linear)]

    def step(self, rows: Tensor, position: int, cache: Cache) -> Tensor:
        """Rows (B,) of the embedding at a position -> logits (B, V), float32; the cache grows.

        The rows are `condition_rows` at position 0, then the codes.
        """
        x = self.embeddings(rows).unsqueeze(1)  # (B, 1, D)
        for block in self.blocks:
            x = block(x, self.rotary[position : position + 1], cache)
        # In float32 under autocast too: guidance amplifies errors of logits.
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(x.float())[:, 0]


def build_generator(config: GeneratorConfig) -> Generator:
    """A generator of these sizes. Another backbone is built here."""
    return Generator(config)


def next_code_loss(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (nats per code) and top-1 accuracy of logits (B, T, V) for codes (B, T)."""
    logits = logits.float().flatten(0, 1)
    target = codes.flatten()
    return F.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
