"""What every program does around its work: errors in one line, processes, devices, precision."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import set_seed

from configs.schema import Training
from modeling.errors import InputError

# Long enough for one rank to load weights or assemble a file alone, short enough to notice a death.
TIMEOUT = timedelta(minutes=30)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a program's `main(arguments)`; a user's mistake ends it with one line and status 2."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as e:
        # Every rank finds the same mistake. Rank 0 says it first, and the launcher ends the others
        # while they wait; a mistake that only another rank found is still said.
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(3)
        # A DataLoader's worker wraps the message into its traceback; the line itself comes last.
        print(f"error: {str(e).rsplit('InputError: ')[-1].strip()}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # not sys.exit: a collective that others still wait in must not hold us
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
        os._exit(130)


def start_processes(device: str | None = None) -> PartialState:
    """Join the job's processes (plain, torchrun or accelerate), on CUDA with NCCL or CPU, gloo."""
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device {device}: choose cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA device is usable here: leave out the device or choose cpu")
    # Told to use the CPU, accelerate joins several processes with gloo; left alone it does not.
    cpu = device == "cpu" or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=TIMEOUT)


def precision(training: Training) -> str:
    """The autocast type by accelerate's name; auto is bf16 on CUDA and float32 on a CPU."""
    if training.mixed_precision != "auto":
        return training.mixed_precision
    return "bf16" if torch.cuda.is_available() else "no"


def set_matmul_precision(precision: str) -> None:
    """Float32 products in full (fp32) or by TensorFloat-32 on CUDA (tf32, bf16)."""
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def start_training(training: Training) -> Accelerator:
    """The accelerator of a training program, with the run's seed and matmul precision."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision(training),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        log_with="wandb" if training.enable_wandb else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
    )
    torch.backends.cuda.matmul.allow_tf32 = training.enable_tf32
    torch.backends.cudnn.allow_tf32 = training.enable_tf32
    set_seed(training.seed)  # the same initial weights on every rank
    return accelerator
