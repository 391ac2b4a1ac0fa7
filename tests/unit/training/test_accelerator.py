"""The settings of DistributedDataParallel, as two ranks see them."""

import pytest
import torch
from accelerate.state import AcceleratorState

from configs.schema import TokenizerTraining, Training
from runtime.processes import set_tf32
from tests.integration.conftest import execute
from training import accelerator
from training.accelerator import describe_precision

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


@pytest.mark.parametrize(
    "mode, tf32", [("published", (False, True)), ("fast", (True, True)), ("exact", (False, False))]
)
def test_tf32_is_that_of_the_numerics(mode, tf32):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    set_tf32(not tf32[0], not tf32[1])
    AcceleratorState._reset_state(True)
    try:
        accelerator.start_training(TokenizerTraining(numerics=mode))
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
    accelerator.start_training(Training())
    assert len(started) == 1


def test_two_ranks_use_no_broadcasts_and_views(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(SCRIPT)
    done = execute(script, ranks=2, timeout=120)
    lines = [line.split("|") for line in done.stdout.splitlines() if "|" in line]
    expected = ["DistributedDataParallel", "25", "False", "True"]
    assert lines == 2 * [[*expected, "[[1.0, 1.0], [1.0, 1.0]]"]]


@pytest.mark.parametrize(
    "capability, options, words",
    [
        ((7, 5), {}, "fp16 (this GPU does not compute in bf16)"),
        ((7, 5), {"mixed_precision": "fp16"}, "fp16"),
        ((8, 0), {}, "bf16"),
    ],
)
def test_the_header_says_why_a_gpu_before_ampere_trains_in_fp16(
    monkeypatch, capability, options, words
):
    monkeypatch.setattr(accelerator, "uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert describe_precision(Training(**options)) == words
