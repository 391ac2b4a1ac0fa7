"""The device to compute on, and the types that it supports."""

import os
from glob import glob
from typing import Optional

import torch

from .errors import InputError

GPU_FILES = ("/dev/nvidia[0-9]*", "/dev/nvidiactl")
CPU_ASKED = {  # variables that hide GPUs, in lower case; accelerate sets its own for --cpu
    "ACCELERATE_USE_CPU": ("1", "true", "t", "yes", "y", "on"),
    "CUDA_VISIBLE_DEVICES": ("", "-1", "nodevfiles"),
}


def uses_cuda() -> bool:
    """Whether to compute on CUDA: if it works and the environment does not ask for the CPU.

    Raises InputError if there is a GPU, but CUDA does not work: a silent fallback to the CPU would be a
    hundred times slower.
    """
    if cpu_asked():
        return False
    problem = "" if torch.cuda.is_available() else unusable_gpu()
    if problem:
        raise InputError(f"{problem}; to use the CPU, set CUDA_VISIBLE_DEVICES=-1")
    return torch.cuda.is_available()


def cpu_asked() -> str:
    """The variable of the environment that asks for the CPU, as NAME=value; empty if there is none."""
    values = ((name, os.environ.get(name, "?")) for name in CPU_ASKED)
    return next(
        (f"{name}={value}" for name, value in values if value.lower() in CPU_ASKED[name]), ""
    )


def unusable_gpu() -> str:
    """Why torch cannot use a GPU of this machine; empty if there is none."""
    file = next((file for pattern in GPU_FILES for file in glob(pattern)), None)
    if file is None:
        return ""
    if cpu_asked():
        return f"the environment hides {file} ({cpu_asked()}): unset the variable"
    if torch.version.cuda is None:
        return f"{file} is a GPU, but torch {torch.__version__} comes without CUDA: install a CUDA build"
    return (
        f"{file} is a GPU, but torch cannot use it; probably its driver is too old for CUDA "
        f"{torch.version.cuda}: update the driver or install an older torch (README.md)"
    )


def find_device(name: Optional[str] = None) -> torch.device:
    """A device by its name ("cpu", "cuda", "cuda:1"); None: `uses_cuda` decides.

    Raises InputError for an unknown name or GPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if uses_cuda() else "cpu"))
    except RuntimeError as e:
        raise InputError(f"device={name} is not a device: choose cpu, cuda or cuda:N") from e
    if device.type not in ("cpu", "cuda", "meta"):
        raise InputError(f"device={name} is not supported: choose cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        if not gpus:
            problem = unusable_gpu() or "no CUDA device is usable here"
            raise InputError(f"device={name}: {problem}; or use cpu")
        raise InputError(
            f"device={name}: GPUs here are cuda:0 to cuda:{gpus - 1}; choose one of them"
        )
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device computes in bfloat16 (Ampere and later) instead of emulating it."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs that compute in it, else float32."""
    fast = device.type == "cuda" and has_bfloat16(device)
    return torch.bfloat16 if fast else torch.float32


def check_type(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse types other than float32 and bfloat16, and bfloat16 on a GPU that only emulates it."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"dtype={dtype}: choose torch.float32 or torch.bfloat16")
    if device.type == "cuda" and dtype == torch.bfloat16 and not has_bfloat16(device):
        raise InputError(
            f"{torch.cuda.get_device_name(device)} does not compute in bfloat16: use float32 (fp32)"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still use on a GPU: free, or reserved by it and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
