"""The types that a real run of `train_tokenizer` computes in, per training.numerics.

A CPU has no fp16 autocast, so bf16 stands for the autocast type of every mode that has one.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import train_tokenizer.__main__ as train_tokenizer
from modeling import tokenizer as tokenizer_module
from training.accelerator import TABLE

CONFIG = """
model:
  vq_model:
    {codebook_size: 64, token_size: 8, image_size: 32, encoder_width: 32, encoder_layers: 1,
     encoder_heads: 2, decoder_width: 32, decoder_layers: 1, decoder_heads: 2, causal: true,
     num_buffer_tokens: 1, prefix_head: true, clustering: true}
phases: [{steps: 2, learning_rate: 1.0e-4, perceptual_weight: 0.1, lpips_weight: 0.1, gan_weight: 0.1}]
dataset: {params: {num_workers_per_gpu: 0}}
experiment: {eval_every: 0, generate_every: 0}
training: {per_gpu_batch_size: 1}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, random_networks):
    """`run(*options)`: a step of the tokenizer and one of the discriminator; the types by part."""
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "tiny.yaml").write_text(CONFIG)

    def start(*options):
        types, states = {}, []

        def seen(part, *tensors):
            types.setdefault(part, set()).update(t.dtype for t in tensors)

        def wrap(owner, name, part):
            original = getattr(owner, name)

            def recorded(*tensors, **kwargs):
                seen(part, *tensors)
                return original(*tensors, **kwargs)

            monkeypatch.setattr(owner, name, recorded)

        original = train_tokenizer.TrainState.__init__

        def built(state, *args, **kwargs):
            original(state, *args, **kwargs)
            networks = state.networks
            for part, model in (
                ("discriminator", state.discriminator), ("tokenizer", state.tokenizer),
                ("perceptual", networks.convnext), ("perceptual", networks.lpips),
            ):  # fmt: skip
                states.extend((part, id(m)) for m in model.modules() if is_product(m))

        def after(module, inputs, output):
            for part, wanted in states:
                if wanted == id(module):
                    turn = " in its own step" if turns["critic"] and part == "discriminator" else ""
                    seen(part + turn, output)

        def is_product(module):
            return isinstance(module, (nn.Conv2d, nn.Linear))

        turns = {"critic": False}
        own_step = train_tokenizer.critic_loss

        def critic_loss(*args):
            turns["critic"] = True
            try:
                return own_step(*args)
            finally:
                turns["critic"] = False

        monkeypatch.setattr(train_tokenizer.TrainState, "__init__", built)
        monkeypatch.setattr(train_tokenizer, "critic_loss", critic_loss)
        # Previews run the tokenizer in float32, outside the steps.
        monkeypatch.setattr(train_tokenizer, "report", lambda *args: None)
        wrap(tokenizer_module, "attention", "attention")
        wrap(F, "mse_loss", "losses")
        wrap(train_tokenizer, "hinge_loss", "losses")
        judge = train_tokenizer.TrainState.judge

        def judged(*args):
            logits = judge(*args)  # whose mean is the adversarial loss
            seen("losses", logits)
            return logits

        monkeypatch.setattr(train_tokenizer.TrainState, "judge", judged)
        handle = register_module_forward_hook(after)
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()  # of the tests before in this process
        try:
            train_tokenizer.main([
                f"config={tmp_path}/tiny.yaml", f"experiment.output_dir={tmp_path}/run",
                f"dataset.params.train_dir={tmp_path}/train", *options,
            ])  # fmt: skip
        finally:
            handle.remove()
            AcceleratorState._reset_state()  # it takes no other autocast type in this process
        return types

    return start


FULL, HALF = {torch.float32}, {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, attention, discriminator",
    [("published", HALF, FULL), ("fast", HALF, HALF), ("exact", FULL, FULL)],
)
def test_types_per_part(run, monkeypatch, mode, attention, discriminator):
    options = [f"training.numerics={mode}"]
    if mode != "exact":
        on_a_cpu = dataclasses.replace(TABLE[mode], autocast="bf16")
        monkeypatch.setitem(TABLE, mode, on_a_cpu)
        options.append("training.mixed_precision=bf16")
    types = run(*options)
    assert types["attention"] == attention
    assert types["tokenizer"] == attention
    assert types["discriminator"] == discriminator
    assert types["discriminator in its own step"] == discriminator
    assert types["perceptual"] == FULL
    assert types["losses"] == FULL


@pytest.mark.slow
def test_published_is_float32_on_a_cpu(run):
    types = run("training.numerics=published")
    assert set.union(*types.values()) == FULL
