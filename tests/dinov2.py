"""A weight file of DINOv2's ViT-L/14 by the authors' names, with random weights and fewer layers."""

import math

import torch

WIDTH, PATCH, GRID = 1024, 14, 37  # pretrained at 518 pixels


def random_state(layers=2, width=WIDTH, seed=0):
    """Tensors under the published names and shapes; signals stay alive and positions matter."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + GRID**2, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(layers):
        for name, shape in (
            ("norm1.weight", (width,)), ("norm1.bias", (width,)),
            ("attn.qkv.weight", (3 * width, width)), ("attn.qkv.bias", (3 * width,)),
            ("attn.proj.weight", (width, width)), ("attn.proj.bias", (width,)),
            ("ls1.gamma", (width,)),
            ("norm2.weight", (width,)), ("norm2.bias", (width,)),
            ("mlp.fc1.weight", (4 * width, width)), ("mlp.fc1.bias", (4 * width,)),
            ("mlp.fc2.weight", (width, 4 * width)), ("mlp.fc2.bias", (width,)),
            ("ls2.gamma", (width,)),
        ):  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 and "weight" in name else 4
        state[name] = torch.randn(shape, generator=generator) / math.sqrt(fan_in)
    return state


def write_random_dinov2(path, **options):
    state = random_state(**options)
    torch.save(state, path)
    return state
