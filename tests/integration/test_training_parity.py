"""The real training programs reach the figures of the published ones, step by step.

`tests/golden/README-training.md` says how the figures were made and what tolerances they have. The
programs run in this process with tiny models, filled weights and samples in order; everything else
is theirs. The numerics are the published ones: float32 on a CPU, as in the published programs. `Recorder` watches them from outside.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_ar
import train_tokenizer.__main__ as train_tokenizer
from modeling.tokenizer import Tokenizer, TokenizerConfig, prefix_target
from modeling.weights.tensors import read_state_dict
from tests.golden.fill import fill_value, generator_inputs, images
from tests.integration.recorder import Recorder, records, starting_weights
from tests.tiny import tiny_cache
from train_tokenizer.discriminator import Discriminator
from training import checkpoint

SIZES = """
    {codebook_size: 4096, token_size: 32, image_size: 64, patch_size: 16, encoder_width: 128,
     encoder_layers: 2, encoder_heads: 2, decoder_width: 192, decoder_layers: 2, decoder_heads: 3"""
TOKENIZER = """
model: {{stage: {stage}, {loop}, vq_model: {sizes}, {own}}}}}
dataset: {{params: {{num_workers_per_gpu: 0, random_flip: false}}}}
experiment: {{log_every: 1, eval_every: 0, generate_every: 0, save_every: 1000, log_grad_norm_every: 1}}
training: {{per_gpu_batch_size: 4, numerics: published}}
# The published weight of the strip, 10 * 17 / 256, at this grid of 4 x 4.
losses: {{aux_weight: 2.125}}
"""
STAGE_OWN = {
    1: "num_buffer_tokens: 1, causal: true, prefix_head: true, clustering: true",
    2: "num_buffer_tokens: 32",
}
GENERATOR = """
model:
  generator:
    {hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, dropout: 0, attn_drop: 0,
     tok_dropout: 0, class_label_dropout: 0, condition_num_classes: 1000}
dataset: {params: {num_workers_per_gpu: 0}}
experiment: {log_every: 1, eval_every: 0, generate_every: 0, save_every: 1000, log_grad_norm_every: 1}
optimizer: {params: {learning_rate: 1.0e-3, beta1: 0.9, beta2: 0.96, weight_decay: 0.03}}
lr_scheduler: {params: {warmup_steps: 3, end_lr: 1.0e-5}}
training: {per_gpu_batch_size: 2, numerics: published, max_train_steps: 7}
"""
# What "as published" takes, of the recipe that the figures show.
PUBLISHED_TOKENIZER = [
    "optimizer.params.beta1=0.9", "optimizer.params.beta2=0.999",
    "optimizer.params.weight_decay=0.01", "optimizer.params.count_from=0",
    "losses.critic_weight=0.1",
    "training.max_grad_norm=0",
]  # fmt: skip
PUBLISHED_GENERATOR = ["lr_scheduler.params.count_from=0", "training.max_grad_norm=1.0"]


def small_share(name, tensor):
    """Start of quantize.embed_prob: clustering moves a fifth of the codes noticeably."""
    value = np.abs(fill_value(name, tuple(tensor.shape), 1)) + np.float32(0.1)
    return torch.from_numpy((value / 204800).astype(np.float32))


def doubled(name, tensor):
    return torch.from_numpy(2 * fill_value(name, tuple(tensor.shape), 1))


# ---------------------------------------------------------------------- runs
def image_folder(root, steps):
    """Batches of 4 images as PNGs, whose order is that of the steps."""
    pixels = np.round(255 * images(4 * steps, 64, 1)).astype(np.uint8)
    folder = root / "train" / "class"
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:03d}.png")
    return root / "train"


def stage1_run(root):
    """The run folder that stage 2 starts from: a checkpoint of filled weights."""
    sizes = dict(image_size=64, encoder_width=128, encoder_layers=2, encoder_heads=2)
    sizes |= dict(decoder_width=192, decoder_layers=2, decoder_heads=3)
    own = dict(num_buffer_tokens=1, causal=True, prefix_head=True, clustering=True)
    models = {"tokenizer": Tokenizer(TokenizerConfig(**sizes, **own))}
    models["discriminator"] = Discriminator()
    weights = {
        name: ({**model.state_dict(), **starting_weights(model)}, None)
        for name, model in models.items()
    }
    checkpoint.save(root / "stage1", 1, weights, {}, keep=2)
    return root / "stage1"


def train_the_tokenizer(root, monkeypatch, stage, warm, options):
    """One run of `train_tokenizer`: its recorder, the figures' prefix and the run's folder."""
    root.mkdir(exist_ok=True)
    loop = {1: "cluster_in_critic_steps: true", 2: "critic_init: stage1"}[stage]
    config = TOKENIZER.format(stage=stage, loop=loop, sizes=SIZES, own=STAGE_OWN[stage])
    (root / "tiny.yaml").write_text(config)
    arguments = [f"config={root}/tiny.yaml", f"experiment.output_dir={root}/run"]
    arguments.append(f"dataset.params.train_dir={image_folder(root, 8 if warm else 6)}")
    if stage == 2:
        arguments += [
            f"experiment.stage1_checkpoint={stage1_run(root)}",
            "model.critic_init=stage1",
        ]
    phase = "{name: gan, learning_rate: 1.0e-4, gan_weight: 0.005, steps: 6"
    if warm:
        # The discriminator enters the loss at step 3 and takes its first step two steps later.
        before = "{name: before, learning_rate: 1.0e-4, steps: 2}"
        arguments += [f"phases=[{before}, {phase}, critic_after: 2}}]"]
        arguments += ["optimizer.params.warmup_steps=4"]
    else:
        arguments += [f"phases=[{phase}}}]", "optimizer.params.warmup_steps=0"]
    changes = {"quantize.embed_prob": small_share}
    if warm and stage == 1:
        changes["encoder.conv_out.weight"] = doubled
    recorder = Recorder(changes)
    with recorder.watching(monkeypatch):
        train_tokenizer.main([*arguments, *options])
    return recorder, root / "run"


def train_the_generator(root, monkeypatch, accumulation, options):
    """One run of `train_ar`: its recorder and the run's folder."""
    (root / "tiny.yaml").write_text(GENERATOR)
    codes = np.concatenate([generator_inputs(m + 1)[0] % 64 for m in range(7 * accumulation)])
    names = [f"{i:04d}" for i in range(len(codes))]
    codes = np.stack([codes, codes], 1)  # both views alike: either may be drawn
    tiny_cache(root / "cache", codes, range(len(codes)), names, 4096, names, image_size=256)
    recorder = Recorder()
    with recorder.watching(monkeypatch):
        train_ar.main([
            f"config={root}/tiny.yaml", f"experiment.output_dir={root}/run",
            f"dataset.params.pretokenization={root}/cache",
            f"training.gradient_accumulation_steps={accumulation}", *options,
        ])  # fmt: skip
    return recorder, root / "run"


# ---------------------------------------------------------------------- comparisons
def near(actual, expected, relative, absolute=0.0, what=""):
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=relative, atol=absolute, err_msg=what
    )


class Tensors:
    """The figures of one model's tensors: key `moved` of `prefix` for name n at step s, and so on."""

    def __init__(self, figures, prefix, run=""):
        self.figures, self.prefix, self.run = figures, prefix, run
        self.names = [str(name) for name in figures[f"{prefix}names"]]

    def of(self, key):
        return self.figures[f"{self.prefix}{self.run}{key}"]

    def check_start(self, start):
        assert set(self.names) == {n for n in start if not n.endswith(".kernel")}
        for i, name in enumerate(self.names):
            value = start[name].double()
            near(value.sum(), self.figures[f"{self.prefix}start_sum"][i], 1e-6, 1e-5, name)
            near(value.square().sum(), self.figures[f"{self.prefix}start_sumsq"][i], 1e-6, 0, name)

    def check_moves(self, start, after, relative, except_for=()):
        """The way of every tensor from its start, after every step."""
        for step, weights in enumerate(after):
            for i, name in enumerate(self.names):
                if name not in except_for:
                    way = (weights[name].double() - start[name].double()).norm()
                    what = f"{name} after step {step + 1}"
                    near(way, self.of("moved")[step, i], relative, 1e-9, what)

    def check_end(self, end, relative_sum, relative_final, except_for=()):
        last = self.of("moved")[-1]
        for i, name in enumerate(self.names):
            if name in except_for:
                continue
            value = end[name].double()
            limit = relative_sum * last[i] * value.numel() ** 0.5 + 1e-6
            near(value.sum(), self.of("sum")[i], 0, limit, f"{name}, sum at the end")
            for key in (
                k for k in self.figures if k.startswith(f"{self.prefix}{self.run}final/{name}")
            ):
                rows = key.partition("[")[2].rstrip("]")
                part = end[name] if not rows else eval(f"t[{rows}]", {"t": end[name]})
                distance = np.linalg.norm(part.double().numpy() - self.figures[key])
                assert distance <= relative_final * last[i] + 1e-9, key


CRITIC_LOOSE = ("to_logits.2.bias",)  # its gradient is rounding noise, which Adam amplifies
# Of the mean logits once the discriminator has stepped: README-training.md, "Processors".
LOGITS_LOOSE = 2e-3


def check_tokenizer(golden, recorder, run, stage, warm):
    """Every figure of one run. Steps of the tokenizer are G, those of the discriminator D."""
    figures = golden(f"training_stage{stage}.npz")
    prefix = "warm_" if warm else ""
    figure = {k.removeprefix(prefix): figures[k] for k in figures if k.startswith(prefix)}
    if not warm:
        figure = {k: v for k, v in figure.items() if not k.startswith("warm_")}
    tokenizer, critic = Tensors(figure, "tok_"), Tensors(figure, "disc_")
    start, after = recorder.passes[0]["weights"], recorder.weights_after_each_step()
    tokenizer.check_start(start["tokenizer"])
    critic.check_start(start["critic"])

    kinds = ["G" if step["kind"] == "tokenizer" else "D" for step in recorder.steps]
    assert kinds == list(figure["kind"])
    assert len(recorder.passes) == len(kinds)
    critic_steps = np.cumsum([0] + [kind == "D" for kind in kinds])
    for s, (step, made, record) in enumerate(zip(recorder.steps, recorder.passes, records(run))):
        (group,) = step["groups"]
        hyper = [*group["betas"], group["eps"], group["weight_decay"]]
        near(hyper, figure["hyper"], 1e-12)
        near(group["lr"], figure["lr"][s], 1e-9, what=f"rate of step {s + 1}")
        (batch,), out = made["inputs"], made["output"]
        assert (out.codes.flatten().numpy() == figure["codes"][s]).all(), f"codes of step {s + 1}"
        near(F.mse_loss(out.images, batch).detach(), figure["mse"][s], 1e-5)
        near(out.quantizer_loss.detach(), figure["quantizer"][s], 1e-5)
        if stage == 1:
            target = prefix_target(batch, recorder.models["tokenizer"].config)
            near(F.mse_loss(out.strip, target).detach(), figure["aux_mse"][s], 1e-5)
        noise = 1e-4 * critic_steps[s] + 1e-5  # of the discriminator's loose bias
        loose_logits = LOGITS_LOOSE if critic_steps[s] else 0.0
        loose_gradients = 3e-3 if kinds[s] == "D" else 2e-4 if critic_steps[s] else 1e-4
        norm = record["grad_norm" if kinds[s] == "G" else "critic grad_norm"]
        near(norm, figure["grad_norm"][s], loose_gradients)
        if kinds[s] == "G":
            near(record["mse"], figure["mse"][s], 1e-5)
            gan = 0.005 * record.get("gan", 0.0)
            near(gan, figure["gan"][s], loose_logits, 0.005 * noise)
            near(record["loss"] - gan, figure["total"][s] - figure["gan"][s], 1e-5)
            if stage == 1:
                near(record["quantizer"], figure["quantizer"][s], 1e-5)
                whole = record["mse"] + 2.125 * 5 / 16 * record["aux"]
                near(whole, figure["reconstruction"][s], 1e-5)
        else:
            near(record["critic"], figure["critic"][s], 1e-4)
            near(record["real"], figure["real"][s], loose_logits, noise)
            near(record["fake"], figure["fake"][s], loose_logits, noise)
        of = tokenizer if kinds[s] == "G" else critic
        loose = () if kinds[s] == "G" else CRITIC_LOOSE
        for i, name in enumerate(of.names):
            if name not in loose:
                found = step["gradients"].get(name, 0.0)
                near(found, of.of("grad")[s, i], loose_gradients, 1e-9, name)

    trained = {name for step, kind in zip(recorder.steps, kinds) if kind == "G"
               for name in step["gradients"]}  # fmt: skip
    assert trained == {n for n, t in zip(tokenizer.names, figure["tok_trained"]) if t}
    path = [weights["tokenizer"] for weights in after]
    tokenizer.check_moves(start["tokenizer"], path, 5e-4)
    path = [weights["critic"] for weights in after]
    critic.check_moves(start["critic"], path, 2e-3, CRITIC_LOOSE)

    # The checkpoint of the last step, and the exported tokenizer
    saved = run / f"checkpoints/step-{len(kinds):08d}"
    end = read_state_dict(saved / "tokenizer.safetensors")
    # The keys' biases, which softmax does not see, are noise.
    keys = [name for name in tokenizer.names if name.endswith("attn.in_proj.bias")]
    tokenizer.check_end(end, 3e-3, 1e-3, keys)
    critic.check_end(read_state_dict(saved / "discriminator.safetensors"), 1e-2, 1e-2, CRITIC_LOOSE)
    exported = read_state_dict(run / "tokenizer.pth")
    assert all(torch.equal(exported[name], end[name]) for name in end)


def check_generator(golden, recorder, run, accumulation, clip=1.0):
    figures = golden("training_generator.npz")
    start = recorder.passes[0]["weights"]["generator"]
    after = [weights["generator"] for weights in recorder.weights_after_each_step()]
    tensors = Tensors({k: figures[k] for k in figures}, "", f"a{accumulation}_")
    tensors.check_start(start)
    assert len(recorder.steps) == 7 and len(recorder.passes) == 7 * accumulation
    for s, (step, record) in enumerate(zip(recorder.steps, records(run))):
        for group in step["groups"]:
            near([*group["betas"], group["eps"]], figures["hyper"], 1e-12)
            near(group["lr"], tensors.of("lr")[s], 1e-9, what=f"rate of update {s + 1}")
        assert [step["decay"][name] for name in tensors.names] == list(figures["decay"])
        near(record["loss"], tensors.of("loss")[s].mean(), 1e-5, what=f"loss of update {s + 1}")
        near(record["accuracy"], tensors.of("accuracy")[s].mean(), 1e-6)
        norm = tensors.of("grad_norm")[s]
        near(record["grad_norm"], norm, 1e-4)
        used = tensors.of("grad")[s] * min(1.0, clip / (norm + 1e-6))
        found = [step["gradients"][name] for name in tensors.names]
        near(found, used, 1e-4, 1e-9, what=f"gradients of update {s + 1}")
    tensors.check_moves(start, after, 5e-4)
    tensors.check_end(read_state_dict(run / "generator.bin"), 3e-3, 1e-3)


# ---------------------------------------------------------------------- tests
@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True], ids=["constant rate", "warm-up"])
@pytest.mark.parametrize("stage", [1, 2])
def test_tokenizer_trains_as_published(golden, monkeypatch, tmp_path, stage, warm):
    recorder, run = train_the_tokenizer(tmp_path, monkeypatch, stage, warm, PUBLISHED_TOKENIZER)
    check_tokenizer(golden, recorder, run, stage, warm)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_generator_trains_as_published(golden, monkeypatch, tmp_path, accumulation):
    recorder, run = train_the_generator(tmp_path, monkeypatch, accumulation, PUBLISHED_GENERATOR)
    check_generator(golden, recorder, run, accumulation)
