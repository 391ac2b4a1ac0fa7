import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_ar
from configs.schema import OptimizerParams
from data.writer import TokenWriter
from modeling.generator import Generator, GeneratorConfig
from runtime.errors import InputError

TINY = """
model:
  vq_model: {codebook_size: 32, image_size: 16, patch_size: 4}
  generator:
    {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, image_seq_len: 21,
     condition_num_classes: 3, dropout: 0, attn_drop: 0, tok_dropout: 0}
dataset: {params: {num_workers_per_gpu: 0}}
optimizer: {params: {learning_rate: 1.0e-2}}
lr_scheduler: {params: {warmup_steps: 5}}
experiment: {log_every: 1, eval_every: 10, generate_every: 0, save_every: 100}
training:
  {per_gpu_batch_size: 4, gradient_accumulation_steps: 2, max_train_steps: 20,
   mixed_precision: 'no'}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Codes that follow class and place, but for noise, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("cache")
    rng = np.random.Generator(np.random.Philox(7))
    writer = TokenWriter(folder, 2, 21, 32)
    labels = [i % 3 for i in range(24)]
    line = np.array(labels)[:, None, None] * 5 + np.arange(21) * 3
    writer.append((line + rng.integers(0, 3, (24, 2, 21))) % 32)
    about = {"image_size": 16, "crops": "center_flip", "tokenizer": "none"}
    writer.finish(labels, [str(i) for i in range(24)], ["a", "b", "c"], about)
    return folder


@pytest.fixture
def train(cache, tmp_path):
    """Run the program in this process; the records of metrics.jsonl come back."""

    def start(*options, run="run"):
        (tmp_path / "tiny.yaml").write_text(TINY)
        arguments = [f"config={tmp_path}/tiny.yaml", f"experiment.output_dir={tmp_path / run}"]
        for name in ("pretokenization", "val_pretokenization"):
            arguments.append(f"dataset.params.{name}={cache}")
        train_ar.main([*arguments, *options])
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return start


# ---------------------------------------------------------------------- the recipe
def test_decayed_parameters_are_exactly_the_papers():
    model = Generator(GeneratorConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    groups = train_ar.adamw(model, OptimizerParams()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in groups)
    matrices = ("attn.qkv", "attn.proj", "mlp.w1", "mlp.w2", "mlp.w3")
    rest = ("norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight",
            "attn.qkv.bias", "attn.proj.bias")  # fmt: skip
    assert decayed == {f"blocks.{i}.{m}.weight" for i in (0, 1) for m in matrices} | {
        "output.weight"
    }
    assert others == {f"blocks.{i}.{name}" for i in (0, 1) for name in rest} | {
        "embeddings.weight",
        "norm.weight",
        "output.bias",
    }
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0]
    assert all(group["betas"] == (0.9, 0.96) and group["fused"] for group in groups)


def test_losses_are_the_golden_ones(train, golden):
    records = train()
    figures = golden("generator_training.json")
    for name in ("loss", "val/loss"):
        values = [record[name] for record in records if name in record]
        np.testing.assert_allclose(values, figures[name], rtol=1e-4, err_msg=name)


# ---------------------------------------------------------------------- what a person watches
def test_records_say_how_fast_and_how_long(train, capsys):
    records = train("training.max_train_steps=3")
    assert {"lr", "images/s", "images/s per device", "data wait", "hours left"} <= records[0].keys()
    assert records[0]["hours left"] > records[1]["hours left"] > 0
    assert "mfu" not in records[0]  # no peak is known of a CPU
    header = capsys.readouterr().out
    for words in ("24 images x 2 views; 8 images a step = 4 x 1 ranks x 2", "steps 1 to 3",
                  "1.0 epochs of the images or 0.5 of all views", "expected time"):  # fmt: skip
        assert words in header


class HostSyncs(TorchDispatchMode):
    """Counts the reads of a tensor's value, each of which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.steps = {}
        self.step = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.steps[self.step] = self.steps.get(self.step, 0) + 1
        return func(*args, **(kwargs or {}))


def test_only_reporting_steps_wait_for_the_device(train, monkeypatch):
    syncs = HostSyncs()

    def seed_step(seed, rank, step):
        syncs.step = step

    monkeypatch.setattr(train_ar, "seed_step", seed_step)
    with syncs:
        train("experiment.log_every=4", "training.max_train_steps=8", "training.use_ema=True")
    assert set(syncs.steps) - {0} == {4, 8}


# ---------------------------------------------------------------------- averages and export
def test_the_average_starts_with_the_weights_and_follows_them(train, tmp_path):
    from modeling.weights import read_state_dict

    options = ["training.use_ema=True", "training.max_train_steps=1", "training.ema_decay"]
    weights = {}
    for decay in ("0.0", "0.75", "1.0"):
        train(*options[:2], f"{options[2]}={decay}", run=decay)
        average = read_state_dict(tmp_path / decay / "generator_ema.bin")["output.bias"]
        weights[decay] = average
    last = read_state_dict(tmp_path / "1.0/generator.bin")["output.bias"]
    assert torch.equal(weights["0.0"], last) and last.abs().max() > 0
    assert (weights["1.0"] == 0).all()
    torch.testing.assert_close(weights["0.75"], 0.25 * last)


def test_last_best_and_average_are_exported_in_both_formats(train, tmp_path):
    from modeling.weights import read_state_dict

    train("training.use_ema=True", "training.ema_decay=0.5", "training.max_train_steps=2")
    for name in ("generator", "generator_best", "generator_ema"):
        a, b = (read_state_dict(tmp_path / f"run/{name}{s}") for s in (".bin", ".safetensors"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # What was evaluated is the average, and so is the best.
    best, average, last = (
        read_state_dict(tmp_path / f"run/{name}.bin")
        for name in ("generator_best", "generator_ema", "generator")
    )
    assert all(torch.equal(best[k], average[k]) for k in average)
    assert not torch.equal(best["output.bias"], last["output.bias"])


# ---------------------------------------------------------------------- bad input
def test_non_finite_loss_stops_without_a_report_due(train, tmp_path):
    with pytest.raises(InputError, match="not finite at step 2: loss"):
        train("optimizer.params.learning_rate=1e38", "experiment.log_every=100",
              "experiment.save_every=5")  # fmt: skip
    assert not (tmp_path / "run/checkpoints").exists()


def test_resume_with_another_recipe_lists_what_differs(train, tmp_path):
    train("training.max_train_steps=2")
    with pytest.raises(InputError) as error:
        train("training.max_train_steps=4", "optimizer.params.beta2=0.99")
    for words in ("training.max_train_steps (2 there, 4 now)", "experiment.resume=",
                  "optimizer.params.beta2 (0.96 there, 0.99 now)"):  # fmt: skip
        assert words in str(error.value)
    assert "training.max_train_steps=2" not in str(error.value)


def test_resume_with_another_batch_or_data_is_refused(train):
    train("training.max_train_steps=2")
    with pytest.raises(InputError, match=r"batch in all \(8 there, 4 now\)"):
        train("training.max_train_steps=2", "training.gradient_accumulation_steps=1")
    with pytest.raises(InputError, match=r"images \(24 there, 16 now\)"):
        train("training.max_train_steps=2", "experiment.max_train_examples=16")


def test_resume_goes_on_where_the_weights_are_not_concerned(train):
    records = train("training.max_train_steps=2", "experiment.save_every=1")
    again = train(
        "training.max_train_steps=2", "experiment.log_every=2", "training.per_gpu_batch_size=8",
        "training.gradient_accumulation_steps=1", "model.generator.guidance_scale=3.0",
    )  # fmt: skip
    assert [r["step"] for r in again] == [r["step"] for r in records]


def test_a_checkpoint_named_on_purpose_starts_another_run(train, tmp_path, capsys):
    train("training.max_train_steps=2")
    records = train(
        "training.max_train_steps=3", f"experiment.resume={tmp_path}/run", run="other"
    )  # fmt: skip
    assert [r["step"] for r in records if "loss" in r] == [3]
    assert "training.max_train_steps (2 there, 3 now)" in capsys.readouterr().out


def test_learning_rate_of_a_step_is_the_same_from_one_batch_or_two(train):
    one = train("training.max_train_steps=3")
    two = train(
        "training.max_train_steps=3", "training.per_gpu_batch_size=8",
        "training.gradient_accumulation_steps=1", run="two",
    )  # fmt: skip
    assert [r["lr"] for r in one if "lr" in r] == [r["lr"] for r in two if "lr" in r]
    losses = [[r["loss"] for r in records if "loss" in r] for records in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
