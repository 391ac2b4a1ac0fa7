"""Runs the real commands, in subprocesses, on a miniature of everything."""

import atexit
import functools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from tests.integration.warm import Warm
from train_tokenizer import __main__ as trainer
from train_tokenizer import losses
from train_tokenizer.losses import FrozenNetworks

ROOT = Path(__file__).resolve().parents[2]
# Programs find a network's file there before those that a test puts elsewhere.
without_weights = pytest.mark.skipif(
    any(file.suffix in (".pth", ".npz") for file in (ROOT / "weights").iterdir()),
    reason="weights/ holds published files",
)

VQ_MODEL = """
    codebook_size: 32
    token_size: 4
    image_size: 16
    patch_size: 4
    encoder_width: 16
    encoder_layers: 1
    encoder_heads: 2
    decoder_width: 16
    decoder_layers: 1
    decoder_heads: 2
"""
STAGE1 = f"""
model:
  stage: 1
  vq_model: {VQ_MODEL}
    num_buffer_tokens: 1
    causal: true
    prefix_head: true
    clustering: true
optimizer: {{params: {{warmup_steps: 2, count_from: 1}}}}
phases: [{{name: mse, steps: 6, learning_rate: 1.0e-3}}]
dataset: {{params: {{num_workers_per_gpu: 0}}}}
experiment: {{log_every: 1, eval_every: 3, save_every: 3}}
training: {{per_gpu_batch_size: 4}}
"""
STAGE2 = f"""
model:
  stage: 2
  vq_model: {VQ_MODEL}
    num_buffer_tokens: 2
optimizer: {{params: {{warmup_steps: 2, count_from: 1}}}}
phases: [{{name: mse, steps: 4, learning_rate: 1.0e-3}}]
dataset: {{params: {{num_workers_per_gpu: 0}}}}
experiment: {{log_every: 1, eval_every: 3, save_every: 3}}
training: {{per_gpu_batch_size: 4}}
"""
GENERATOR = f"""
model:
  vq_model: {VQ_MODEL}
    num_buffer_tokens: 2
  generator:
    hidden_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
    image_seq_len: 21
    condition_num_classes: 3
    guidance_scale: 2.0
dataset: {{params: {{num_workers_per_gpu: 0}}}}
optimizer: {{params: {{learning_rate: 1.0e-2}}}}
lr_scheduler: {{params: {{warmup_steps: 2, count_from: 1}}}}
experiment: {{log_every: 1, eval_every: 3, generate_every: 3, save_every: 3, per_proc_batch_size: 3}}
training: {{per_gpu_batch_size: 4, max_train_steps: 6}}
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def target(program):
    """A program as Python and the launchers name it."""
    return [program] if program.endswith(".py") else ["-m", program]


def launch(launcher, ranks):
    """A launcher and its options."""
    if launcher == "torchrun":
        return ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    # One process: on a CPU, accelerate's launcher starts more through MPI only.
    return [
        "accelerate.commands.launch", "--cpu", "--num_processes=1",
        f"--main_process_port={free_port()}", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no",
    ]  # fmt: skip


@functools.cache
def server():
    """Starts programs in milliseconds: `tests.integration.warm`."""
    folder = tempfile.TemporaryDirectory()
    started = Warm(ROOT, Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(started.close)  # comes first
    return started


def execute(
    program, *args, check=True, env=None, timeout=1200, ranks=1, launcher=None, fresh=False
):
    """Run a program to its end; its output comes back, and is shown where it fails. `server` starts
    its ranks, or a launcher, which is met in a few tests. A `fresh` run starts interpreters, for
    variables that are read before the programs."""
    if launcher:
        line = [*launch(launcher, ranks), *target(program), *args]
        done = server().completed(*line, env=env, timeout=timeout, forks=not fresh)
    elif fresh:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *target(program), *map(str, args)], cwd=ROOT,
            env={**variables, **(env or {})}, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    else:
        done = server().completed(program, *args, ranks=ranks, env=env, timeout=timeout)
    if check and done.returncode:
        line = " ".join(map(str, (program, *args)))
        pytest.fail(f"{line} exited {done.returncode}:\n{done.stderr[-3000:]}")
    return done


class Workspace:
    """A miniature image folder, configs, and what the programs make of them, made when asked."""

    def __init__(self, root):
        self.root = root
        rng = np.random.default_rng(0)
        for split, count in (("train", 14), ("val", 5)):
            for i in range(count):
                path = root / split / f"class{i % 3}" / f"{i:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                small = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
                Image.fromarray(small).resize((23, 20), Image.Resampling.BICUBIC).save(path)
        for name, text in (("stage1", STAGE1), ("stage2", STAGE2), ("generator", GENERATOR)):
            (root / f"{name}.yaml").write_text(text)

    def stage1(self, output, *options, **kwargs):
        return execute(
            "train_tokenizer", f"config={self.root}/stage1.yaml", f"experiment.output_dir={output}",
            f"dataset.params.train_dir={self.root}/train",
            f"dataset.params.val_dir={self.root}/val", *options, **kwargs,
        )  # fmt: skip

    def stage2(self, output, stage1, *options, **kwargs):
        return execute(
            "train_tokenizer", f"config={self.root}/stage2.yaml", f"experiment.output_dir={output}",
            f"dataset.params.train_dir={self.root}/train",
            f"dataset.params.val_dir={self.root}/val",
            f"experiment.stage1_checkpoint={stage1}", *options, **kwargs,
        )  # fmt: skip

    def pretokenize(self, cache, *options, split="train", **kwargs):
        return execute(
            "pretokenization.py", "--config", self.root / "generator.yaml", "--img_size", 16,
            "--batch_size", 3, "--data_path", self.root / split, "--cached_path", cache,
            "--tokenizer_checkpoint", self.tokenizer, "--num_workers", 1, "--ten_crop", *options,
            **kwargs,
        )  # fmt: skip

    def train_ar(self, output, *options, **kwargs):
        return execute(
            "train_ar.py", f"config={self.root}/generator.yaml", f"experiment.output_dir={output}",
            f"experiment.tokenizer_checkpoint={self.tokenizer}",
            f"dataset.params.pretokenization={self.cache}",
            f"dataset.params.val_pretokenization={self.cache}", *options, **kwargs,
        )  # fmt: skip

    def sample(self, output, *options, **kwargs):
        return execute(
            "sample_imagenet.py", f"config={self.root}/generator.yaml",
            f"experiment.output_dir={output}",
            f"experiment.generator_checkpoint={self.generator}",
            f"experiment.tokenizer_checkpoint={self.tokenizer}", *options, **kwargs,
        )  # fmt: skip

    @property
    def stage1_run(self):
        return self.made("run1", self.stage1)

    @property
    def tokenizer(self):
        run = self.made("run2", lambda output: self.stage2(output, self.stage1_run))
        return run / "tokenizer.pth"

    @property
    def cache(self):
        return self.made("cache", self.pretokenize)

    @property
    def generator(self):
        return self.made("run_ar", self.train_ar) / "generator.bin"

    def made(self, name, make):
        path = self.root / name
        if not path.exists():
            try:
                make(path)
            except BaseException:  # later tests would take what is half-made
                shutil.rmtree(path, ignore_errors=True)
                raise
        return path


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def warm():
    return server()


@pytest.fixture
def random_networks(monkeypatch):
    """Random perceptual networks in place of those that training reads from files."""

    def built(phases, weights, device):
        return FrozenNetworks(phases, None, device)

    for name in ("ConvNeXtLogits", "LPIPS"):
        kind = getattr(losses, name)
        monkeypatch.setattr(losses, name, lambda _, kind=kind: random_network(kind))
    monkeypatch.setattr(trainer, "FrozenNetworks", built)


@functools.cache
def random_network(kind):
    """One of a kind for all tests: its random start takes seconds, and training leaves it as it is."""
    with pytest.MonkeyPatch.context() as patch:  # the layers' own start is enough
        patch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)
        patch.setattr(nn.init, "normal_", lambda tensor, *_, **__: tensor)
        return kind(None)
