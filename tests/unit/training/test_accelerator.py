"""Numerics, the environment of launchers, and DistributedDataParallel as two ranks see it."""

from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState

from configs.schema import TokenizerTraining, Training
from runtime.processes import set_tf32
from tests.integration.conftest import execute
from tests.refusals import refusal
from training import accelerator
from training.accelerator import (
    TABLE,
    Numerics,
    check_environment,
    numerics_of,
    start_training,
)

SCRIPT = """
import os
import sys

import torch
from configs.schema import Training
from training.accelerator import start_training

accelerator = start_training(Training())
model = accelerator.prepare(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
line = (
    type(model).__name__, model.bucket_bytes_cap >> 20, model.broadcast_buffers,
    model.gradient_as_bucket_view, model.module.weight.grad.tolist(),
)
sys.stdout.write("|".join(map(str, line)) + "\\n")  # at once: the ranks share a pipe
sys.stdout.flush()
# Without Python's own shutdown: gloo's thread may still hold the last all-reduce, which has a Python
# object in it, and would abort the rank. A program does more than enough in between.
os._exit(0)
"""


# What `accelerate launch` sets where nothing was asked for, and this project's FSDP config.
LAUNCHED = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "RANK": "0",
    "WORLD_SIZE": "1",
}


@pytest.fixture
def machine(monkeypatch):
    """`machine(cuda, bf16)`: whether this one has a GPU, and whether that computes in bf16."""

    def pretend(cuda, bf16=True):
        monkeypatch.setattr(accelerator, "uses_cuda", lambda: cuda)
        monkeypatch.setattr(accelerator, "has_bfloat16", lambda device: bf16)

    return pretend


# ---------------------------------------------------------------------- numerics
@pytest.mark.parametrize(
    "mode, on_cuda",
    [
        ("published", Numerics("fp16", False, True, True)),
        ("fast", Numerics("bf16", True, True, False)),
        ("auto", Numerics("bf16", True, True, False)),
        ("exact", Numerics("no", False, False, True)),
    ],
)
def test_modes_of_the_tokenizer(machine, mode, on_cuda):
    machine(cuda=True)
    assert numerics_of(TokenizerTraining(numerics=mode)) == on_cuda
    machine(cuda=False)
    assert numerics_of(TokenizerTraining(numerics=mode)).autocast == "no"


def test_the_generator_was_published_in_bf16(machine):
    machine(cuda=True)
    assert numerics_of(Training(numerics="published")) == TABLE["fast"]


@pytest.mark.parametrize("schema", [Training, TokenizerTraining])
def test_auto_is_fp16_on_a_gpu_without_bf16(machine, schema):
    machine(cuda=True, bf16=False)
    assert numerics_of(schema()) == TABLE["published"]
    for asked in (schema(numerics="fast"), schema(mixed_precision="bf16")):
        refusal(partial(numerics_of, asked), "bf16", "training.mixed_precision=fp16")


@pytest.mark.parametrize("word", [True, False])
def test_the_published_options_overrule_the_mode(machine, word):
    machine(cuda=True)
    training = TokenizerTraining(mixed_precision="fp16", enable_tf32=word)
    assert numerics_of(training) == Numerics("fp16", word, word, False)
    machine(cuda=False)
    assert numerics_of(TokenizerTraining(mixed_precision="bf16")).autocast == "bf16"
    refusal(lambda: numerics_of(training), "training.mixed_precision=fp16", "CUDA")


# ---------------------------------------------------------------------- the environment
def check(monkeypatch, training, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_environment(training, numerics_of(training))


@pytest.mark.parametrize(
    "variables",
    [
        {},
        LAUNCHED,
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2", "ACCELERATE_MIXED_PRECISION": "bf16"},
        {"NVIDIA_TF32_OVERRIDE": "1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"},
    ],
)
def test_an_environment_that_agrees_with_the_config_is_accepted(machine, monkeypatch, variables):
    machine(cuda=True)
    check(monkeypatch, Training(gradient_accumulation_steps=2), variables)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "training.gradient_accumulation_steps=2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "x", "training.gradient_accumulation_steps=2"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "training.mixed_precision=auto (bf16)"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "training.mixed_precision=auto (bf16)"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "training.compile=True"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "without DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "without Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "without a parallelism config"),
        ("NVIDIA_TF32_OVERRIDE", "0", "training.numerics=auto"),
        ("FSDP_VERSION", "1", "only FSDP 2"),
    ],
)
def test_a_contradiction_is_refused_by_the_names_of_both(machine, monkeypatch, name, value, words):
    machine(cuda=True)
    training = Training(gradient_accumulation_steps=2)
    refusal(
        lambda: check(monkeypatch, training, {**LAUNCHED, name: value}), f"{name}={value}", words
    )


@pytest.mark.parametrize(
    "training, name, value, option",
    [
        (Training(enable_tf32=False), "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", "training.enable_tf32=False"),
        # Its numerics want TF32 in convolutions only.
        (TokenizerTraining(numerics="published"), "NVIDIA_TF32_OVERRIDE", "0", "training.numerics=published"),
        (TokenizerTraining(numerics="published"), "NVIDIA_TF32_OVERRIDE", "1", "training.numerics=published"),
    ],
)  # fmt: skip
def test_tf32_that_the_environment_overrides_is_refused_on_cuda(
    machine, monkeypatch, training, name, value, option
):
    machine(cuda=True)
    refusal(lambda: check(monkeypatch, training, {name: value}), f"{name}={value}", option)
    machine(cuda=False)  # which knows no TF32
    check(monkeypatch, training, {name: value})


def test_the_trainers_accelerator_checks_the_environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    refusal(lambda: start_training(Training()), "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4")


# ---------------------------------------------------------------------- the accelerator
@pytest.mark.parametrize(
    "mode, tf32", [("published", (False, True)), ("fast", (True, True)), ("exact", (False, False))]
)
def test_tf32_is_that_of_the_numerics(mode, tf32):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    set_tf32(not tf32[0], not tf32[1])
    AcceleratorState._reset_state(True)
    try:
        start_training(TokenizerTraining(numerics=mode))
        assert tuple(backend.allow_tf32 for backend in backends) == tf32
    finally:
        set_tf32(*before)


@pytest.mark.parametrize("on", ["true", "True", "TRUE"])
def test_fsdp_has_the_numerics_of_ddp_however_it_is_switched_on(monkeypatch, on):
    """accelerate reads the variable without regard to case."""
    started = []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", on)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr(accelerator, "start_fsdp", started.append)
    monkeypatch.setattr(accelerator.Accelerator, "num_processes", 2)
    AcceleratorState._reset_state(True)
    start_training(Training())
    assert len(started) == 1
    refusal(lambda: start_training(TokenizerTraining()), "FSDP", "torchrun")


def test_two_ranks_use_no_broadcasts_and_views(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(SCRIPT)
    done = execute(script, ranks=2, timeout=120)
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    expected = ["DistributedDataParallel", "25", "False", "True"]
    assert lines == 2 * [[*expected, "[[1.0, 1.0], [1.0, 1.0]]"]]
