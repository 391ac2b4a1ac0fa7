"""The processes of a job and their devices."""

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from modeling.devices import find_device, uses_cuda
from modeling.weights.opened import Opened, open_file
from modeling.weights.runs import find_weights
from runtime.errors import InputError
from runtime.parts import differing

T = TypeVar("T")

# How long a process of a job waits for the others, which may have larger shares or slower devices. If a
# process dies, its launcher stops those of its machine, and `srun --kill-on-bad-exit=1` those of the others.
TIMEOUT = timedelta(hours=24)


def start_processes(device: str | None = None) -> PartialState:
    """Join the processes of a job, by NCCL on CUDA and by gloo on CPUs; one process without a launcher."""
    refuse_leftovers()
    # accelerate joins several CPU processes (by gloo) only if told to use the CPU.
    return PartialState(cpu=find_device(device).type == "cpu", timeout=TIMEOUT)


def refuse_leftovers() -> None:
    """Refuse a launcher's variables without the launcher: torch would wait for processes or fail."""
    left = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
    if left and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"the environment has {', '.join(left)}, but no launcher's MASTER_ADDR: unset "
            f"{' '.join(left)}, or start with torchrun or accelerate launch"
        )


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on the main process; all processes return its result or raise its InputError."""
    outcome: list = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = work()
        except InputError as e:
            outcome[1] = str(e)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]


def open_on_all(path: str, kind: str) -> Opened:
    """`modeling.weights.opened.open_weights` on all processes, which call this together.

    Only the main process searches for the file and verifies its hash.
    """
    return open_file(on_main(lambda: find_weights(path, kind)), kind)


def check_same(facts: dict[str, Any], what: str) -> None:
    """Raise InputError on a process whose facts differ from those of the main process; all call this."""
    changed = differing(on_main(lambda: facts), facts, ("on the main process", "here"))
    if changed:
        raise InputError(
            f"a process has {what} than the main process: {changed}; run the same command with the same files "
            f"on all machines"
        )


def progress(total: int, unit: str, task: str, items: Iterable | None = None) -> tqdm:
    """A progress bar of the main process, around `items` if given; hidden without a terminal."""
    hidden = None if PartialState().is_main_process else True  # None: without a terminal
    return tqdm(items, task, total, unit=unit, disable=hidden)


def local_processes() -> int:
    """How many processes of the job share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def compiles(setting: bool | str, option: str) -> bool:
    """Whether to use torch.compile; "auto" means on CUDA.

    If a compiler or Python's headers are missing, or this Python is too new for it, "auto" warns and returns False, and True raises
    InputError. Messages call the setting `option`.
    """
    if not (uses_cuda() if setting == "auto" else setting):
        return False
    lacks = missing_to_compile()
    if lacks and setting is True:
        raise InputError(
            f"{option}=True: torch.compile needs {lacks}. Otherwise leave the option out"
        )
    if lacks and PartialState().is_main_process:
        warnings.warn(f"{option}: not compiled, which is slower: it needs {lacks}", stacklevel=2)
    return not lacks


def missing_to_compile() -> str:
    """What torch.compile needs but cannot find, with a Debian package; empty if nothing is missing.

    Triton builds a C module for CUDA, Inductor C++ modules for a CPU; both include Python.h.
    """
    language, *known = (
        ("C", "CC", "gcc", "clang") if uses_cuda() else ("C++", "CXX", "g++", "clang++")
    )
    if not any(shutil.which(os.environ.get(name, name)) for name in known):
        return f"a {language} compiler: install build-essential"
    try:
        torch.compile(lambda: None, backend="eager")
    except RuntimeError as e:  # this Python is too new for this torch
        return f"another Python or torch ({e})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"{header}: install python3-dev"


def set_tf32(products: bool, convolutions: bool) -> None:
    """Whether float32 products and convolutions use TensorFloat-32 on CUDA."""
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Float32 products and convolutions within a block: in full (fp32), or by TensorFloat-32 on CUDA (tf32,
    bf16). The earlier setting is restored after it."""
    before = bool(torch.backends.cuda.matmul.allow_tf32), torch.backends.cudnn.allow_tf32
    set_tf32(precision != "fp32", precision != "fp32")
    try:
        yield
    finally:
        set_tf32(*before)
