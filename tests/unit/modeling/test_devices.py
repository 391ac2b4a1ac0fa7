"""Which device is used, and what is refused where a GPU is there that torch cannot use."""

import pytest
import torch

from modeling import devices
from modeling.devices import check_type, default_dtype, find_device, uses_cuda
from tests.refusals import refusal


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, whose user did not ask for the CPU; returns its GPU's device file."""
    for name in devices.CPU_ASKED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "GPU_FILES", (str(tmp_path / "nvidia[0-9]*"),))
    return tmp_path / "nvidia0"


def test_without_a_gpu_the_cpu_is_used():
    assert not uses_cuda() and find_device() == torch.device("cpu")


def test_a_gpu_that_torch_cannot_use_is_refused_with_the_driver_as_reason(machine, monkeypatch):
    machine.touch()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for use in (uses_cuda, find_device, lambda: find_device("cuda")):
        refusal(use, "nvidia0", "driver", "CUDA 13.0")
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    refusal(uses_cuda, "nvidia0", "without CUDA")


@pytest.mark.parametrize(
    "name, value",
    [
        ("ACCELERATE_USE_CPU", "true"),
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
    ],
)
@pytest.mark.parametrize("works", [True, False])
def test_the_environment_can_ask_for_the_cpu(machine, monkeypatch, name, value, works):
    machine.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
    monkeypatch.setenv(name, value)
    assert find_device() == torch.device("cpu")


@pytest.mark.parametrize(
    "name, value", [("ACCELERATE_USE_CPU", "False"), ("CUDA_VISIBLE_DEVICES", "0")]
)
def test_other_values_of_these_variables_ask_for_nothing(machine, monkeypatch, name, value):
    machine.touch()
    monkeypatch.setenv(name, value)
    refusal(find_device, "CUDA_VISIBLE_DEVICES=-1")


def test_a_gpu_that_the_environment_hides_is_not_blamed(machine, monkeypatch):
    machine.touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    refusal(lambda: find_device("cuda"), "device=cuda", "CUDA_VISIBLE_DEVICES=-1", "nvidia0")


def test_bfloat16_is_refused_before_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda")
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        check_type(torch.float32, gpu)
        if capability < (8, 0):
            refusal(lambda: check_type(torch.bfloat16, gpu), "Tesla T4", "bfloat16", "float32")
        else:
            check_type(torch.bfloat16, gpu)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_refused_by_name(dtype):
    refusal(lambda: check_type(dtype, torch.device("cpu")), str(dtype), "torch.bfloat16")


def test_default_type_is_what_the_device_computes_in(monkeypatch):
    assert default_dtype(torch.device("cpu")) == torch.float32
    for capability, dtype in (((7, 5), torch.float32), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert default_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    "gpus, name, there",
    [(0, "cuda", "cpu"), (1, "cuda:1", "cuda:0"), (8, "cuda:9", "cuda:7"), (1, "gpu", "cuda:N")],
)
def test_device_that_is_not_there_is_refused(monkeypatch, gpus, name, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    refusal(lambda: find_device(name), f"device={name}", there)
    assert find_device() == torch.device("cuda" if gpus else "cpu")
    if gpus > 1:
        assert find_device("cuda:7").index == 7
