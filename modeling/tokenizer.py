"""The AliTok tokenizer: images to codes that are predictable from left to right, and back.

One set of classes serves both training stages. Stage 1 decodes causally and reads the prefix tokens
through a second head; stage 2, the published format, decodes bidirectionally with buffer tokens.

Shape suffixes: B images, g grid (patches per side), K prefix tokens, T = K + g² tokens, D width, H heads,
h head size.
K is g + 1 as published, g without the corner token, or 0: no prefix tokens.
Attribute names are the keys of the published state dicts.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.checkpoint import checkpoint

from .attention import attention
from .devices import find_device
from .errors import InputError
from .fields import Contradictions, Options, option
from .pixels import to_float, to_pil
from .quantizer import VectorQuantizer, full_float32
from .weights import hub
from .weights.metadata import TOKENIZER
from .weights.runs import all_checkpoints

WEIGHT_STD = 0.02  # of all weights at the start, as published
PHOTOS_AT_ONCE = 64  # of `encode_photos`, which limits its memory


# fmt: off
@dataclass
class TokenizerConfig(Options):
    """Sizes of a tokenizer; the defaults are the published inference model.

    g = image_size / patch_size, K prefix tokens, T = K + g² codes per image.
    """

    codebook_size: int = option(4096, "Codes in the codebook.", at_least=1, at_most=65536)
    token_size: int = option(32, "Channels of a code vector.", at_least=1, at_most=4096)
    num_latent_tokens: Optional[int] = option(
        None, "Codes per image, T; null: g² + g + 1, so K = g + 1; g²: no prefix tokens.",
        at_least=1, at_most=2**20)
    image_size: int = option(256, "Side of the square images in pixels.", at_least=1, at_most=8192)
    patch_size: int = option(16, "Side of a patch in pixels.", at_least=1, at_most=1024)
    encoder_width: int = option(768, "Channels of the encoder.", at_least=1, at_most=65536)
    encoder_layers: int = option(12, "Blocks of the encoder.", at_least=1, at_most=1024)
    encoder_heads: int = option(12, "Attention heads of the encoder.", at_least=1, at_most=1024)
    decoder_width: int = option(1024, "Channels of the decoder.", at_least=1, at_most=65536)
    decoder_layers: int = option(24, "Blocks of the decoder.", at_least=1, at_most=1024)
    decoder_heads: int = option(16, "Attention heads of the decoder.", at_least=1, at_most=1024)
    num_buffer_tokens: int = option(
        32, "Learned tokens before the codes in the decoder; stage 1: 1.", at_least=0, at_most=4096)
    causal: bool = option(False, "Causal attention in the decoder; stage 1: true.")
    prefix_head: bool = option(
        False, "The auxiliary head that reads the prefix tokens; stage 1: true.")
    clustering: bool = option(False, "Codebook clustering in training; stage 1: true.")
    position_init: str = option(
        "normal", "Initial positions of the encoder: normal, as published, or own_patch: every "
        "latent attends to its own patch from the first step (it also sets the first block's "
        "attention).", choices=("normal", "own_patch"))
    # fmt: on

    def contradictions(self) -> Contradictions:
        remedy = f"it is not a multiple of patch_size={self.patch_size}"
        yield "image_size", self.image_size % self.patch_size, remedy
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            yield f"{part}_width", width % heads, f"it is not a multiple of {part}_heads={heads}"
        with_corner = self.grid**2 + self.grid + 1
        yield (
            "num_latent_tokens",
            self.num_prefix_tokens not in (self.grid + 1, self.grid, 0),
            f"it does not fit a {self.grid}x{self.grid} grid; set {with_corner} (with the corner "
            f"token, as published), {with_corner - 1} (without it) or {self.grid**2} (no prefix tokens)",
        )
        yield (
            "prefix_head",
            self.prefix_head and not self.num_prefix_tokens,
            f"num_latent_tokens={self.num_latent_tokens} leaves no prefix tokens for it; set "
            f"prefix_head=false, or num_latent_tokens={with_corner}",
        )

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """T, the codes of an image."""
        return self.num_latent_tokens or self.grid**2 + self.grid + 1

    @property
    def num_prefix_tokens(self) -> int:
        """K: g + 1, g or 0."""
        return self.num_tokens - self.grid**2


class TokenizerOutput(NamedTuple):
    """The results of one forward pass that a training step uses; images and strip in [0, 1]."""

    images: Tensor  # (B, 3, S, S) reconstructions
    strip: Optional[Tensor]  # (B, 3, patch, K·patch), read from the prefix tokens alone
    latents: Tensor  # (B, T, token_size) float32, before quantization
    codes: Tensor  # (B, T) int64
    quantizer_loss: Tensor  # scalar


class Features(NamedTuple):
    """The encoder's outputs for B images; D is its width (768 as published)."""

    tokens: Tensor  # (B, T, D) float32, of one block: one token for each code
    latents: Tensor  # (B, T, token_size) float32, what the quantizer sees


class TokenizerAttention(nn.Module):
    """Multi-head attention of the tokens from `first` on to all tokens: (B, T, D) -> (B, T - first, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj = nn.Linear(width, 3 * width)  # rows ordered q, k, v, each head-major
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        assert not (first and self.causal), "a causal mask needs the queries of all tokens"
        B, T, D = x.shape
        qkv = self.in_proj(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, T, h)
        y = attention(q[:, :, first:], k, v, causal=self.causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, T - first, D))


class MLP(nn.Module):
    """Linear, exact GELU, Linear; the hidden layer is four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class TokenizerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), of the same tokens: (B, T, D) -> (B, T - first, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = TokenizerAttention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        x = x[:, first:] + self.attn(self.ln_1(x), first)
        return x + self.mlp(self.ln_2(x))


def run_blocks(blocks: nn.ModuleList, x: Tensor, recompute: bool, first: int = 0) -> Tensor:
    """The output of the blocks for the tokens from `first` on; the last block computes no others.

    `recompute` keeps only the blocks' inputs for the backward pass.
    """
    for number, block in enumerate(blocks, 1):
        start = first if number == len(blocks) else 0
        x = checkpoint(block, x, start, use_reentrant=False) if recompute else block(x, start)
    return x


class Encoder(nn.Module):
    """Sends patches and learned latents through bidirectional blocks and returns the latents."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        width = config.encoder_width
        self.recompute = False  # gradient checkpointing
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.positional_embedding = nn.Parameter(torch.empty(config.grid**2, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(config.num_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            TokenizerBlock(width, config.encoder_heads, causal=False)
            for _ in range(config.encoder_layers)
        )
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, config.token_size, 1)

    def forward(self, images: Tensor, latent_tokens: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] and latent tokens (T, D) -> (B, T, token_size)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B, g², D), row-major
        patches = patches + self.positional_embedding
        latents = latent_tokens + self.latent_token_positional_embedding
        latents = latents.expand(len(images), -1, -1)  # (B, T, D)
        x = self.ln_pre(torch.cat([patches, latents], 1))  # (B, g² + T, D)
        recompute, first = self.recompute and self.training, patches.shape[1]
        x = run_blocks(self.transformer, x, recompute, first)  # (B, T, D)
        x = self.ln_post(x)
        x = self.conv_out(x.transpose(1, 2).unsqueeze(2))  # (B, token_size, 1, T)
        return x.squeeze(2).transpose(1, 2)


class Decoder(nn.Module):
    """Code vectors to pixels: causal (stage 1) or bidirectional with buffer tokens (stage 2)."""

    def __init__(self, config: TokenizerConfig):
        super().__init__()
        width, patch = config.decoder_width, config.patch_size
        self.patch, self.grid = patch, config.grid
        self.num_prefix_tokens = config.num_prefix_tokens
        self.recompute = False  # gradient checkpointing
        self.decoder_embed = nn.Linear(config.token_size, width)
        # The published name. It holds the buffer tokens, not classes.
        self.class_embedding = nn.Parameter(torch.empty(config.num_buffer_tokens, width))
        self.latent_token_positional_embedding = nn.Parameter(
            torch.empty(config.num_buffer_tokens + config.num_tokens, width)
        )
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            TokenizerBlock(width, config.decoder_heads, config.causal)
            for _ in range(config.decoder_layers)
        )
        self.ln_post = nn.LayerNorm(width)
        # Lists of one layer: the published keys are `ffn.0.*`.
        self.ffn = nn.Sequential(nn.Conv2d(width, 3 * patch * patch, 1))
        self.conv_out = nn.Conv2d(3, 3, 1)
        if config.prefix_head:
            self.ffn_aux = nn.Sequential(nn.Conv2d(width, 3 * patch * patch, 1))
            self.conv_out_aux = nn.Conv2d(3, 3, 1)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """Vectors (B, T, token_size) -> images (B, 3, S, S) and, with a prefix head, the strip.

        The first n = K + r·g vectors, r >= 1, give the first r rows of patches, (B, 3, r·p, S); a causal
        decoder makes the same pixels from all vectors.
        """
        x = self.tokens(vectors)  # (B, T, D)
        image = x[:, self.num_prefix_tokens :]
        images = self.to_pixels(image, image.shape[1] // self.grid, self.ffn, self.conv_out)
        return images, self.strip(x)

    def tokens(self, vectors: Tensor) -> Tensor:
        """Vectors (B, n, token_size) of the first n codes -> the heads' input, (B, n, D).

        The vectors attend only to each other and to the buffer tokens.
        """
        x = self.decoder_embed(vectors)  # (B, n, D)
        buffers = self.class_embedding.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([buffers, x], 1)
        x = self.ln_pre(x + self.latent_token_positional_embedding[: x.shape[1]])
        x = run_blocks(self.transformer, x, self.recompute and self.training)
        return self.ln_post(x[:, buffers.shape[1] :])

    def strip(self, x: Tensor) -> Optional[Tensor]:
        """The auxiliary head's image of the prefix tokens in x (B, n, D): (B, 3, p, K·p)."""
        if not hasattr(self, "ffn_aux"):
            return None
        prefix = x[:, : self.num_prefix_tokens]
        return self.to_pixels(prefix, 1, self.ffn_aux, self.conv_out_aux)

    def to_pixels(self, x: Tensor, rows: int, ffn: nn.Module, conv_out: nn.Module) -> Tensor:
        """Tokens (B, rows·columns, D) -> one patch each: (B, 3, rows·p, columns·p) in [0, 1]."""
        x = ffn(rearrange(x, "b (r c) d -> b d r c", r=rows))
        x = rearrange(x, "b (p q ch) r c -> b ch (r p) (c q)", p=self.patch, q=self.patch)
        return conv_out(x).float().sigmoid()


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder; `with_decoder=False` builds no decoder, for encoding only."""

    def __init__(self, config: TokenizerConfig, with_decoder: bool = True):
        super().__init__()
        self.config = config
        self.latent_tokens = nn.Parameter(torch.empty(config.num_tokens, config.encoder_width))
        self.encoder = Encoder(config)
        self.quantize = VectorQuantizer(
            config.codebook_size, config.token_size, clustering=config.clustering
        )
        self.decoder: Any = Decoder(config) if with_decoder else None
        self.encoder_frozen = False  # set by freeze_encoder
        self.reset_parameters()

    @property
    def training_only(self) -> tuple[str, ...]:
        """Tensors of stage 1 that do not affect codes or images."""
        return tuple(f"quantize.{name}" for name in self.quantize.training_only)

    def reset_parameters(self) -> None:
        """Start as published: weights trunc_normal(0, 0.02), biases 0, latent tokens, class
        embedding and positions normal(0, width^-0.5); the encoder's by `position_init`."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, 0.0, WEIGHT_STD)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        encoder, width = self.encoder, self.config.encoder_width
        nn.init.normal_(self.latent_tokens, std=width**-0.5)
        if self.config.position_init == "normal":
            nn.init.normal_(encoder.positional_embedding, std=width**-0.5)
            nn.init.normal_(encoder.latent_token_positional_embedding, std=width**-0.5)
        else:
            self.start_at_own_patch()
        if self.decoder is not None:
            width = self.config.decoder_width
            nn.init.normal_(self.decoder.class_embedding, std=width**-0.5)
            nn.init.normal_(self.decoder.latent_token_positional_embedding, std=width**-0.5)

    @torch.no_grad()
    def start_at_own_patch(self) -> None:
        """`own_patch`: in the first block every latent attends most to its own patch.

        A latent's position is that of its patch plus noise a quarter as large. The first block's
        projections start as identity matrices, so that its attention follows the positions. With the
        published initialisation all attention starts uniform, and a small tokenizer outputs the mean
        image for hundreds of steps. Not in the paper; after Trockman and Kolter (2023), "Mimetic
        Initialization of Self-Attention Layers".
        """
        encoder, grid, width = self.encoder, self.config.grid, self.config.encoder_width
        # At least as large as an embedded patch, so that positions outweigh pixels.
        embedded = WEIGHT_STD * encoder.patch_embed.weight[0].numel() ** 0.5
        std = max(2 * width**-0.5, embedded)
        patches = nn.init.normal_(encoder.positional_embedding, std=std)
        # The prefix shows the first row, after the corner; it may lack the corner, or both.
        own = torch.cat([patches[:1], patches[:grid], patches])[-self.config.num_tokens :]
        latents = nn.init.normal_(encoder.latent_token_positional_embedding, std=std / 4)
        latents.add_(own)
        attention: Any = encoder.transformer[0].attn
        for weight in (*attention.in_proj.weight.chunk(3), attention.out_proj.weight):
            nn.init.eye_(weight)

    def freeze_encoder(self) -> None:
        """For stage 2: only the decoder trains."""
        for part in (self.latent_tokens, self.encoder, self.quantize):
            part.requires_grad_(False)
        self.encoder_frozen = True

    # ------------------------------------------------------------------ for users
    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        config: Optional[TokenizerConfig] = None,
        device: Optional[str] = None,
        revision: Optional[str] = None,
    ) -> "Tokenizer":
        """A tokenizer in eval mode on `device` (`devices.find_device`).

        `name` is a weights file, a run folder, a folder of `Pipeline.save_pretrained`, or one on the hub
        (org/name) at `revision`, a commit, tag or branch. `config` is for files that do not state their
        sizes, by default the published ones. Raises InputError if there are no such weights, or they do
        not fit.
        """
        from .weights import opened  # it imports this module

        place = find_device(device)
        path = hub.local_or_downloaded(name, revision, (hub.TOKENIZER_FILE,))
        saved = path / hub.TOKENIZER_FILE
        if saved.is_file() and not all_checkpoints(path):  # a run's export may be older than they are
            path = saved
        weights = opened.open_weights(path, TOKENIZER)
        return opened.load_tokenizer(weights, opened.config_of(weights, config)).to(place)

    def encode_photos(self, *photos: Any) -> Tensor:
        """Photos, each a path or a PIL image, -> codes (B, T), int64, on the tokenizer's device.

        A photo is turned upright, cut to its middle square and encoded in float32 without gradients.
        Raises InputError if it is not an image, or smaller than the tokenizer's images.
        """
        from .photos import photo_crop  # needs Pillow, so imported on use

        if not photos:
            raise InputError("no photos: pass at least one path or PIL image")
        images = torch.stack([photo_crop(photo, self.config.image_size) for photo in photos])
        codes = []
        for part in images.split(PHOTOS_AT_ONCE):
            pixels = to_float(part.to(self.latent_tokens.device))
            latents: Any = self.exact_latents(pixels)  # pyright: ignore - as in `latents`
            codes.append(self.quantize.encode(latents))
        return torch.cat(codes)

    def decode_photos(self, codes: Tensor) -> list[Any]:
        """Codes (B, T), int64 -> B PIL images, without gradients. Raises InputError for invalid codes."""
        from .image_decoder import ImageDecoder  # it imports this module

        self.check_codes(codes)
        decoder = ImageDecoder(self, torch.float32)
        return to_pil(decoder(codes.to(decoder.device)))

    def features(self, images: Tensor, layer: int) -> Features:
        """Images (B, 3, S, S), float in [0, 1] -> the encoder's tokens after block `layer`, and the latents.

        Blocks count from 1 to `encoder_layers` (12 as published). It runs in full float32 without
        gradients. Raises InputError for another layer, and for images of another shape or of integers.
        """
        blocks, side = self.encoder.transformer, self.config.image_size
        if layer not in range(1, len(blocks) + 1):
            raise InputError(f"layer={layer}: the blocks of this encoder are 1…{len(blocks)}")
        if images.shape[1:] != (3, side, side) or not images.is_floating_point():
            raise InputError(
                f"images {tuple(images.shape)} of {images.dtype}: this tokenizer reads floats in [0, 1] "
                f"of shape (B, 3, {side}, {side})"
            )
        kept, caller = [], threading.get_ident()

        def keep(*call: Any) -> None:
            if threading.get_ident() == caller:  # not what another thread encodes meanwhile
                kept.append(call[-1])

        with blocks[layer - 1].register_forward_hook(keep):
            latents: Any = self.exact_latents(images)  # pyright: ignore - as in `latents`
        return Features(kept[0][:, -self.config.num_tokens :], latents)

    def check_codes(self, codes: Tensor) -> None:
        """Raise InputError unless `codes` are codes (B, T) of this tokenizer."""
        tokens, known = self.config.num_tokens, self.config.codebook_size
        if codes.ndim != 2 or codes.shape[1] != tokens or codes.dtype != torch.int64:
            raise InputError(
                f"codes {tuple(codes.shape)} of {codes.dtype}: images of this tokenizer have codes "
                f"(B, {tokens}) of torch.int64"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < known:
            raise InputError(
                f"codes {int(codes.min())}…{int(codes.max())}: this tokenizer has 0…{known - 1}"
            )

    # ------------------------------------------------------------------ computing
    def latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), float in [0, 1] -> latents (B, T, token_size), before quantization.

        A frozen encoder (`freeze_encoder`) runs in full float32, even under autocast or with TF32, so that
        the decoder learns the codes that pretokenization writes.
        """
        if self.encoder_frozen:
            return self.exact_latents(images)
        return self.encoder(images, self.latent_tokens)

    @_disable_dynamo  # a compiled graph would keep the precision of its compilation
    @torch.no_grad()
    def exact_latents(self, images: Tensor) -> Tensor:
        """`latents` in full float32, without gradients."""
        with full_float32(images.device.type):
            return self.encoder(images.float(), self.latent_tokens)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), float in [0, 1] -> codes (B, T), int64."""
        return self.quantize.encode(self.latents(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T), int64 -> images (B, 3, S, S), float32 in [0, 1].

        The first n = K + r·g codes, r >= 1, give the first r rows of patches (`Decoder`).
        """
        return self.decoder(self.quantize.lookup(codes))[0]

    def forward(self, images: Tensor) -> TokenizerOutput:
        """One training pass over images (B, 3, S, S) in [0, 1]."""
        latents = self.latents(images).float()  # (B, T, token_size)
        vectors, codes, quantizer_loss = self.quantize(latents)
        reconstructions, strip = self.decoder(vectors)
        return TokenizerOutput(reconstructions, strip, latents, codes, quantizer_loss)


def prefix_target(images: Tensor, config: TokenizerConfig) -> Tensor:
    """The target of the prefix tokens' strip: (B, 3, S, S) -> (B, 3, patch, K·patch), K > 0.

    [top-left patch | first row of patches]; without the corner token (K = g) the row alone.
    """
    row = images[:, :, : config.patch_size]
    if config.num_prefix_tokens == config.grid:
        return row
    return torch.cat([row[..., : config.patch_size], row], 3)
