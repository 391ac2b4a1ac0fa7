"""The fast sampler: cached autoregressive sampling with weights laid out for the device.

`sampling.ReferenceEngine` is its short, readable twin and draws the same codes. Shape suffixes: B images,
N rows (B, or 2B with guidance), D hidden size, H heads, h head size, T codes per image, V codebook
size.

One step is a chain of functions, each of which is one compiled program on CUDA:

    enter → attention → between → attention → … → leave → output layer → choose

`between` holds everything from one attention to the next, so that a block costs four products, three
other kernels and the attention. On a CPU an attention and the `between` after it are one function,
`layer`.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiling import compile_function
from .cpu_layout import cpu_layout, linear
from .decode_attention import (
    AttentionFunction,
    Cache,
    choose_attention,
    empty_cache,
    plain_attention,
    prefill_attention,
    write_positions,
)
from .devices import check_type
from .errors import describe
from .generator import EPS, NO_CLASS, Block, Generator, GeneratorConfig
from .sampling import DRAWN, Sampling, choose

# Positions of all rows together that `Engine._prefill` computes at once; more need more memory and save no time.
PREFILLED_AT_ONCE = 2**14


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


# ---------------------------------------------------------------------- the parts of a step
def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[1],), weight, EPS)


def enter(rows: Tensor, embeddings: Tensor, block: BlockWeights) -> tuple[Tensor, Tensor]:
    """Rows (N,) of the embedding table -> x (N, D) float32 and the first block's qkv (N, 3D)."""
    x = F.embedding(rows, embeddings)
    return x, linear(norm(x, block.norm1).to(block.qkv.dtype), block.qkv, block.qkv_bias)


def after_attention(x: Tensor, y: Tensor, block: BlockWeights) -> Tensor:
    """x (N, D) and the attention's y (N, D) -> the block's output (N, D), as `generator.Block`.

    The residual sums stay in float32 whatever the type of the matrices, as in training under
    autocast.
    """
    x = x + linear(y, block.proj, block.proj_bias)
    gate, up = linear(norm(x, block.norm2).to(block.w13.dtype), block.w13).chunk(2, -1)
    return x + linear(F.silu(gate) * up, block.w2)


def between(
    x: Tensor, y: Tensor, block: BlockWeights, following: BlockWeights
) -> tuple[Tensor, Tensor]:
    """Everything between the attentions of two blocks -> x (N, D) and the next qkv (N, 3D)."""
    x = after_attention(x, y, block)
    qkv = linear(
        norm(x, following.norm1).to(following.qkv.dtype), following.qkv, following.qkv_bias
    )
    return x, qkv


def layer(
    x: Tensor,
    qkv: Tensor,
    turns: Tensor,
    block: BlockWeights,
    following: BlockWeights,
    cache: Cache,
) -> tuple[Tensor, Tensor]:
    """The plain attention and `between` as one function: x (N, D) and qkv (N, 3D) -> the next ones.

    The position p follows from `turns`, those of positions 0…p. Its length is marked dynamic, so that one
    program serves all positions but the first and the last; an int p would make one per value.
    """
    y = plain_attention(qkv, block.qk_norm, turns, len(turns) - 1, cache)
    return between(x, y, block, following)


def leave(x: Tensor, y: Tensor, block: BlockWeights, final_norm: Tensor) -> Tensor:
    """From the last attention's output to the output layer's input: (N, D) float32."""
    return norm(after_attention(x, y, block), final_norm)


class StepFunctions(NamedTuple):
    """The functions of a step, eager or compiled."""

    enter: Callable[..., tuple[Tensor, Tensor]] = enter
    between: Callable[..., tuple[Tensor, Tensor]] = between
    leave: Callable[..., Tensor] = leave
    choose: Callable[..., Tensor] = choose
    layer: Callable[..., tuple[Tensor, Tensor]] = layer


def block_weights(
    block: Block, dtype: torch.dtype, lay_out: Callable[[Tensor], Tensor]
) -> BlockWeights:
    """The engine's form of a block's weights; `lay_out` arranges a matrix for its device."""
    attn, mlp = block.attn, block.mlp
    return BlockWeights(
        norm1=block.norm1.weight.detach().float(),
        qkv=lay_out(attn.qkv.weight.detach().to(dtype)),
        qkv_bias=attn.qkv.bias.detach().to(dtype),
        qk_norm=torch.stack([attn.q_norm.weight, attn.k_norm.weight]).float().unsqueeze(1),
        proj=lay_out(attn.proj.weight.detach().to(dtype)),
        proj_bias=attn.proj.bias.detach().to(dtype),
        norm2=block.norm2.weight.detach().float(),
        w13=lay_out(torch.cat([mlp.w1.weight, mlp.w3.weight]).to(dtype)),
        w2=lay_out(mlp.w2.weight.detach().to(dtype)),
    )


# ---------------------------------------------------------------------- the engine
class Engine:
    """Samples batches of `batch` images with the weights of a generator, on its device.

    `dtype` is the type of matrices and cache. `compiled` compiles the functions of a step. With the
    fused attention, one step is captured as a CUDA graph that serves all positions. `engine` selects the
    attention: "fused", "plain" or, with "auto", the fused one on CUDA if it passes its check. `cache` "int8"
    stores keys and values in one byte each, with a scale per row and head.

    The TF32 setting at construction holds, also for the output layer, where it adds less than a
    thousandth to the error of logits after bf16 blocks. Tensors of the engine's type are shared with the
    generator, except matrices on a CPU; after further training, build another engine. The caller checks options,
    labels and prefixes, as `Pipeline` and the programs do. Raises InputError for an attention or type that the
    device does not support.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: Generator,
        batch: int,
        sampling: Sampling,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        engine: str = "auto",
        cache: str = "auto",
    ):
        self.config, self.batch, self.sampling = model.config, batch, sampling
        self.dtype, self.device = dtype, model.output.weight.device
        check_type(dtype, self.device)
        T, stored = model.config.image_seq_len, torch.int8 if cache == "int8" else dtype
        rows, on_cpu = batch * (2 if sampling.guided else 1), self.device.type == "cpu"
        with self.on_device():
            shape = model.config.num_attention_heads, T, model.config.head_size
            self.fused = choose_attention(engine, shape, (dtype, stored), self.device)
            lay_out = cpu_layout(rows, compiled) if on_cpu else lambda weight: weight
            self.blocks = [block_weights(block, dtype, lay_out) for block in model.blocks]  # type: ignore[arg-type]
            # In float32, like the norms, because guidance amplifies errors of logits.
            self.embeddings = model.embeddings.weight.detach().float()
            self.norm, self.turns = model.norm.weight.detach().float(), model.rotary.float()
            self.output = lay_out(model.output.weight.detach().float())
            self.output_bias = model.output.bias.detach().float()
            self.scales = sampling.scales(T).to(self.device)
            # The state of a batch is on the device, so that nothing waits for the host. The caches are
            # uninitialised: only filled positions are read.
            self.caches = [empty_cache((rows, *shape), stored, self.device) for _ in model.blocks]
            self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
            # Embedding rows (N,) of the next step.
            self.rows = torch.zeros(rows, dtype=torch.int64, device=self.device)
            self.uniforms = torch.zeros(batch, T, dtype=torch.float32, device=self.device)
            self.given = torch.full((batch, T), DRAWN, dtype=torch.int64, device=self.device)
            self.codes = torch.zeros(batch, T, dtype=torch.int64, device=self.device)
            # On CUDA no compiled function may see the cache: Inductor would copy it whole.
            self.layers_whole = on_cpu and not self.fused
            self.functions, self.compiled = StepFunctions(), False
            self.graph: Optional[torch.cuda.CUDAGraph] = None
            if compiled:
                self._compile()
            if self.device.type == "cuda" and self.fused:
                self._capture()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Makes the engine's GPU current, for graphs and Triton kernels, and ends the caller's autocast."""
        gpu = self.device if self.device.type == "cuda" else -1  # -1: no change
        with torch.cuda.device(gpu), torch.autocast(self.device.type, enabled=False):
            yield

    def _compile(self) -> None:
        """Compile by taking steps; if that fails, warn once and stay eager.

        `layer` needs programs for the first position, the last one, whose cache is full, and all between.
        """
        last = self.config.image_seq_len - 1
        try:
            self.functions = StepFunctions(*map(compile_function, StepFunctions()))
            self.compiled = True
            for t in sorted({0, min(1, last), last}):
                self.position.fill_(t)
                self._step(t)
        except Exception as e:
            self.functions, self.compiled = StepFunctions(), False
            warnings.warn(f"sampling is not compiled, which is slower: {describe(e)}", stacklevel=3)

    def _capture(self) -> None:
        """Capture one step as a CUDA graph, which serves all positions, because the position is read on
        the device. If that fails, warn once and launch kernels one by one."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        self.position.zero_()  # on the current stream
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries initialise outside the capture
            self._step(0)
        current.wait_stream(side)
        self.position.zero_()
        graph = torch.cuda.CUDAGraph()
        try:
            # torch's default capture stream is on the GPU of the process's first graph. Other threads, such
            # as a data loader's, may keep using the GPU.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._step(0)
            self.graph = graph
        except RuntimeError as e:
            torch.cuda.set_stream(current)  # a capture that fails to end leaves its stream current
            warnings.warn(
                f"sampling uses no CUDA graph, which is slower: {describe(e)}", stacklevel=4
            )

    def _step(self, t: int) -> None:
        """Draw code t of every image; `position` is t."""
        blocks, functions, position = self.blocks, self.functions, self.position
        attend: AttentionFunction = self.fused or plain_attention
        at, turns = position if self.fused else t, self.turns
        if self.layers_whole:
            turns = turns[: t + 1]
            if self.compiled:
                torch._dynamo.maybe_mark_dynamic(turns, 0)
        x, qkv = functions.enter(self.rows, self.embeddings, blocks[0])
        for block, following, cache in zip(blocks, blocks[1:], self.caches):
            if self.layers_whole:
                x, qkv = functions.layer(x, qkv, turns, block, following, cache)
            else:
                y = attend(qkv, block.qk_norm, turns, at, cache)  # (N, D)
                x, qkv = functions.between(x, y, block, following)
        y = attend(qkv, blocks[-1].qk_norm, self.turns, at, self.caches[-1])
        x = functions.leave(x, y, blocks[-1], self.norm)
        logits = linear(x, self.output, self.output_bias)  # (N, V)
        given = self.given.index_select(1, position)[:, 0]
        uniform = self.uniforms.index_select(1, position)[:, 0]
        scale, s = self.scales.index_select(0, position), self.sampling
        rules = s.guided, s.randomize_temperature, s.top_k, s.top_p
        codes = functions.choose(logits, given, uniform, scale, *rules)  # (B,)
        self.codes.index_copy_(1, position, codes.unsqueeze(1))
        self.rows.copy_(codes.repeat(len(self.rows) // self.batch))
        position += 1

    def _prefill(self, n: int) -> None:
        """Advance past the first n codes of the images, which are in `codes`, in one pass.

        The same mathematics as n steps, with the plain attention and without logits. Eager, because each n
        would need another program.
        """
        codes = self.codes[:, :n].repeat(len(self.rows) // self.batch, 1)  # (N, n)
        # The inputs of the first n steps: the class, then all codes but the last.
        inputs = torch.cat([self.rows.unsqueeze(1), codes[:, :-1]], 1)
        blocks, turns, at_once = self.blocks, self.turns, max(PREFILLED_AT_ONCE // n, 1)
        for start in range(0, len(inputs), at_once):
            part = slice(start, start + at_once)
            rows, caches = inputs[part], [cache.of(part) for cache in self.caches]
            x, qkv = enter(rows.flatten(), self.embeddings, blocks[0])  # (N·n, …)
            for block, following, cache in zip(blocks, blocks[1:], caches):
                y = prefill_attention(qkv.unflatten(0, rows.shape), block.qk_norm, turns, cache)
                x, qkv = between(x, y.flatten(0, 1), block, following)
            # Later steps need only keys and values of the last block.
            write_positions(qkv.unflatten(0, rows.shape), blocks[-1].qk_norm, turns, 0, caches[-1])
        self.rows.copy_(codes[:, -1])
        self.position.fill_(n)

    @torch.inference_mode()
    def sample(self, labels: Tensor, uniforms: Tensor, prefix: Optional[Tensor] = None) -> Tensor:
        """Labels (B,), B up to the batch, and uniforms (B, T) -> codes (B, T), int64.

        Guidance does not change images with the label `NO_CLASS`. `prefix` (B, n), n <= T, gives the first
        n codes, except those that are `DRAWN`; the others are drawn as if n steps had drawn the prefix, up
        to rounding. Asynchronous on CUDA.
        """
        B, T = len(labels), self.config.image_seq_len
        if self.batch < B:
            raise ValueError(f"{B} images for an engine of batch {self.batch}")
        if prefix is None:
            prefix = torch.empty(B, 0, dtype=torch.int64, device=labels.device)
        n = int((prefix != DRAWN).all(0).cumprod(0).sum()) if prefix.numel() else 0
        # Shapes are fixed: a smaller batch is padded with "no class", which all of a second branch is.
        labels = F.pad(labels, (0, len(self.rows) - B), value=NO_CLASS)
        given = F.pad(prefix, (0, T - prefix.shape[1], 0, self.batch - B), value=DRAWN)
        with self.on_device():
            copy_to(self.rows, self.config.condition_rows(labels))
            copy_to(self.uniforms, F.pad(uniforms, (0, 0, 0, self.batch - B)))
            copy_to(self.given, given)
            self.position.zero_()
            if n:
                copy_to(self.codes[:, :n], given[:, :n].clamp(min=0))
                self._prefill(n)
            for t in range(n, T):
                if self.graph is None:
                    self._step(t)
                else:
                    self.graph.replay()
            return self.codes[:B].clone()


def copy_to(target: Tensor, source: Tensor) -> None:
    """Copy without waiting for the device, through pinned memory if the source is on the host."""
    if target.is_cuda and not source.is_cuda:
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


def cache_bytes(
    config: GeneratorConfig, sampling: Sampling, dtype: torch.dtype, cache: str = "auto"
) -> int:
    """Bytes of the engine's cache per image."""
    rows, stored = 2 if sampling.guided else 1, torch.int8 if cache == "int8" else dtype
    shape = rows, config.num_attention_heads, config.image_seq_len, config.head_size
    block = empty_cache(shape, stored, torch.device("meta"))
    return config.num_hidden_layers * sum(x.nbytes for x in block if x is not None)
