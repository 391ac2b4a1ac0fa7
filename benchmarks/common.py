"""What every benchmark prints first: the machine and the software."""

import platform
from pathlib import Path

import torch


def machine() -> str:
    """The device by name, with PyTorch's version, for the tables in benchmarks/README.md."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} cores of {processor()}"
    return f"{device}, torch {torch.__version__}"


def processor() -> str:
    """The processor by name."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()
