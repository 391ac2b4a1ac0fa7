"""Models, caches and configs that a test builds in milliseconds; a test names what differs."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from data.tokens import write_packed_store
from modeling.generator import GeneratorConfig
from modeling.sampling import ReferenceEngine
from modeling.tokenizer import TokenizerConfig

# What stage 1 has that stage 2 has not.
STAGE1 = dict(causal=True, prefix_head=True, num_buffer_tokens=1, clustering=True)


def tiny_tokenizer(**changes) -> TokenizerConfig:
    """Stage 2's layout on 2x2 patches: 7 codes of 16 per image of 16 pixels, with prefix tokens."""
    sizes = dict(
        codebook_size=16, token_size=4, image_size=16, patch_size=8,
        encoder_width=16, encoder_layers=1, encoder_heads=2,
        decoder_width=16, decoder_layers=1, decoder_heads=2, num_buffer_tokens=32,
    )  # fmt: skip
    return TokenizerConfig(**{**sizes, **changes})


def tiny_generator(**changes) -> GeneratorConfig:
    """Of `tiny_tokenizer`'s codes, three classes."""
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        codebook_size=16, image_seq_len=7, condition_num_classes=3,
    )  # fmt: skip
    return GeneratorConfig(**{**sizes, **changes})


def sample_codes(model, labels, uniforms, sampling, prefix=None):
    """The codes of the plain loop."""
    return ReferenceEngine(model, len(labels), sampling).sample(labels, uniforms, prefix)


def tiny_cache(folder, codes, labels, classes=("a", "b", "c"), codebook=32, paths=None, **about):
    """A packed cache of codes (images, views, codes of an image), in a new folder; returns it."""
    codes = np.asarray(codes)
    sizes = {"views": codes.shape[1], "tokens": codes.shape[2], "codebook_size": codebook}
    about = {"image_size": 16, "crops": "center_flip", "tokenizer": "none", **about}
    paths = [str(i) for i in range(len(codes))] if paths is None else paths
    entries = {**sizes, **about, "classes": list(classes)}
    write_packed_store(folder, [codes], list(labels), list(paths), entries)
    return folder


def sizes_file(file: Path, **models) -> Path:
    """A config file that states the sizes of these models: vq_model=…, generator=…"""
    file.write_text(yaml.safe_dump({"model": {name: asdict(m) for name, m in models.items()}}))
    return file
