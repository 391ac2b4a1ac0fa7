import json
import re
import shutil

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_ar
from configs.schema import OptimizerParams
from data.writer import TokenWriter
from modeling.generator import Generator, GeneratorConfig
from runtime.errors import InputError
from runtime.files import file_sha256
from training import checkpoint, optim, run

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
    groups = optim.adamw(train_ar.parameter_groups(model, 0.03), OptimizerParams()).param_groups
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
    for words in ("24 images x 2 views; 8 images per step = 4 x 1 ranks x 2", "steps 1 to 3",
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


def test_warm_up_of_the_averages_decay_resumes_where_it_was(train, tmp_path):
    from modeling.weights import read_state_dict

    options = ["training.use_ema=True", "training.ema_warmup=True", "training.max_train_steps=4"]
    options += ["experiment.save_every=2", "experiment.keep_checkpoints=9"]
    train(*options, run="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves/checkpoints/step-00000004")
    train(*options, run="halves")
    whole, halves = (
        read_state_dict(tmp_path / run / "generator_ema.bin") for run in ("whole", "halves")
    )
    assert all(torch.equal(whole[k], halves[k]) for k in whole)


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


# ---------------------------------------------------------------------- checkpoints come first
def without_clock(records):
    clock = ("images/s", "images/s per device", "data wait", "hours left")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


@pytest.mark.parametrize("moment", ["before the report", "after validation", "after the report"])
def test_reports_that_a_kill_prevented_are_made_on_resuming(train, tmp_path, monkeypatch, moment):
    options = ["experiment.save_every=10", "experiment.eval_every=10"]
    whole = train(*options, run="whole")

    def killed(name, at):
        original = getattr(train_ar, name) if at == "after" else None
        module = run if name == "write_whole" else train_ar

        def function(*args):
            if original is not None:
                original(*args)
            if name != "report" or args[1] == 10:
                raise KeyboardInterrupt

        return module, name, function

    with monkeypatch.context() as patch:
        if moment == "before the report":
            patch.setattr(*killed("report", "before"))
        elif moment == "after validation":
            patch.setattr(*killed("report", "after"))
        else:
            patch.setattr(*killed("write_whole", "before"))
        with pytest.raises(KeyboardInterrupt):
            train(*options)
    assert (tmp_path / "run/checkpoints/step-00000010").is_dir()
    assert without_clock(train(*options)) == without_clock(whole)
    names = [f"generator_best.{suffix}" for suffix in ("bin", "safetensors")]
    assert all(
        (tmp_path / f"run/{name}").read_bytes() == (tmp_path / f"whole/{name}").read_bytes()
        for name in names
    )


def test_best_of_a_resumed_run_is_still_the_best(train, tmp_path):
    options = ["experiment.save_every=10", "experiment.eval_every=10"]
    train(*options)
    best = (tmp_path / "run/generator_best.bin").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines) if '"step": 10, "val/loss"' in line]
    lines[number] = json.dumps({"step": 10, "val/loss": 0.0, "val/accuracy": 1.0})
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run/generator_best.bin").write_bytes(b"the best")
    train(*options)
    assert (tmp_path / "run/generator_best.bin").read_bytes() == b"the best" != best


def test_validation_that_fails_is_said_and_training_continues(train, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise InputError("code 99 out of range in cache")

    monkeypatch.setattr(train_ar, "validation_sums", fail)
    records = train("experiment.save_every=10")
    assert [r["step"] for r in records] == list(range(1, 21))
    said = capsys.readouterr().out
    assert said.count("warning: validation failed: code 99 out of range in cache; training ") == 2
    assert (tmp_path / "run/generator.bin").exists()


def test_training_data_that_fails_ends_training(train, monkeypatch):
    def fail(self, key):
        raise InputError("code 99 out of range in cache")

    monkeypatch.setattr(train_ar.TrainTokens, "__getitem__", fail)
    with pytest.raises(InputError, match="code 99"):
        train()


def test_checkpoint_of_the_version_before_resumes_and_says_what_differs(train, tmp_path, capsys):
    train("experiment.save_every=10")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    folder = tmp_path / "run/checkpoints/step-00000010"
    state = checkpoint.load_state(folder)
    del state["streams"]
    state["run"]["batch in all"] = state["run"].pop("global batch")
    torch.save(state, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry["sha256"] = file_sha256(folder / entry["name"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert train("experiment.save_every=10")[-1]["step"] == 20
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "the order of the images" in warnings[0]
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000010")
    train()  # of this version: nothing to say
    assert "warning" not in capsys.readouterr().out


# ---------------------------------------------------------------------- dry run
@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_dry_run_says_what_the_run_needs_and_writes_nothing(cache, tmp_path, capsys, flag):
    (tmp_path / "tiny.yaml").write_text(TINY)
    before = sorted(tmp_path.rglob("*"))
    train_ar.main([
        f"config={tmp_path}/tiny.yaml", f"experiment.output_dir={tmp_path}/run", flag,
        f"dataset.params.pretokenization={cache}", "training.max_train_steps=3600",
    ])  # fmt: skip
    said = capsys.readouterr().out
    parameters = sum(p.numel() for p in Generator(GeneratorConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_seq_len=21,
        condition_num_classes=3, codebook_size=32,
    )).parameters())  # fmt: skip
    assert f"parameters of the generator: {parameters:,} trained, 0 frozen" in said
    assert re.search(r"memory: [\d.]+ GiB of host memory", said)
    seconds = float(re.search(r"images/s, ([\d.e-]+) s per step", said)[1])
    hours = float(re.search(r"expected time: ([\d.e-]+) hours for the 3600 steps left", said)[1])
    assert hours == pytest.approx(seconds, rel=0.02)
    assert "nothing was written" in said and sorted(tmp_path.rglob("*")) == before


def test_dry_run_refuses_what_the_run_would(train, tmp_path):
    train("training.max_train_steps=2")
    with pytest.raises(InputError, match=r"training\.max_train_steps \(2 there, 4 now\)"):
        train("training.max_train_steps=4", "--dry-run")


# ---------------------------------------------------------------------- bad input
def test_non_finite_loss_stops_without_a_report_due(train, tmp_path):
    with pytest.raises(InputError, match="not finite at step 2: loss"):
        train("optimizer.params.learning_rate=9e18", "lr_scheduler.params.warmup_steps=1", "optimizer.params.weight_decay=1000", "experiment.log_every=100",
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
    with pytest.raises(InputError, match=r"global batch \(8 there, 4 now\)"):
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
