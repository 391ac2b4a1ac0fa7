"""What every program does around its work: errors in one line, processes, devices, precision."""

import errno
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
)

from configs.schema import Training
from modeling.errors import InputError

T = TypeVar("T")

# Long enough for one rank to load weights or assemble a file alone, short enough to notice a death.
TIMEOUT = timedelta(minutes=30)
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a program's `main(arguments)`; a user's mistake ends it with one line and status 2.

    So does a full disk or a closed folder, wherever the program meets it.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except Exception as e:
        if isinstance(e, InputError):
            # A DataLoader's worker wraps the message into its traceback; the line itself comes last.
            message = str(e).rsplit("InputError: ")[-1].strip()
        elif isinstance(e, OSError) and e.errno in NO_PLACE:
            message = f"{e.filename or 'a file'}: {e.strerror}; make room or rights, and try again"
        else:
            traceback.print_exc()
            leave(1)
        # Every rank finds the same mistake. Rank 0 says it first, and the launcher ends the others
        # while they wait; a mistake that only another rank found is still said.
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a trainer only notes the launcher's
            time.sleep(3)
        print(f"error: {message}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
        leave(130)


def leave(status: int) -> NoReturn:
    """Exit at once: neither for a collective that others still wait in, nor for data workers.

    These outlive the one signal that the interpreter sends them on its own way out
    (`training.signals`), and it would wait for them for ever.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_processes(device: str | None = None) -> PartialState:
    """Join the job's processes (plain, torchrun or accelerate), on CUDA with NCCL or CPU, gloo."""
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device {device}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is usable here: leave out the device or choose cpu")
    # Told to use the CPU, accelerate joins several processes with gloo; left alone it does not.
    cpu = device == "cpu" or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=TIMEOUT)


def on_main(work: Callable[[], T]) -> T:
    """What `work()` gives on the main process, on all; its InputError is raised on all."""
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


def precision(training: Training) -> str:
    """The autocast type by accelerate's name; auto is bf16 on CUDA and float32 on a CPU."""
    if training.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("training.mixed_precision=fp16 needs a CUDA device: choose bf16 or no")
    if training.mixed_precision != "auto":
        return training.mixed_precision
    return "bf16" if torch.cuda.is_available() else "no"


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def compiles(asked: bool | str, option: str) -> bool:
    """Whether to use torch.compile; auto is on CUDA, where there is a C compiler.

    CUDA programs, too, are linked with it. Raises InputError where it lacks and True was asked for.
    """
    compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    if asked is True and not compiler:
        raise InputError(f"{option}=True needs a C compiler: install gcc or leave it out")
    return torch.cuda.is_available() and compiler if asked == "auto" else asked


def set_matmul_precision(precision: str) -> None:
    """Float32 products in full (fp32) or by TensorFloat-32 on CUDA (tf32, bf16)."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def start_training(training: Training) -> Accelerator:
    """The accelerator of a training program, with the run's matmul precision."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision(training),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        log_with="wandb" if training.enable_wandb else None,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=training.timeout_minutes))
        ],
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1:
        start_fsdp(accelerator)
    set_matmul_precision("tf32" if training.enable_tf32 else "fp32")
    return accelerator


def start_fsdp(accelerator: Accelerator) -> None:
    """Make the FSDP that accelerate's config asks for run on CPUs too, and compute as DDP does."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:  # accelerate leaves FSDP to GPUs
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads the launcher's environment
    # Autocast alone decides the types. FSDP's own policy would round what enters each block too:
    # the rotary table and the residual stream.
    state.fsdp_plugin.mixed_precision_policy = None
