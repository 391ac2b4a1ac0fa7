"""Finds what makes the host wait for a GPU, in a training step that runs on a CPU."""

import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
# Operators whose result the host reads, or whose output size it must know.
WAITING_OPERATORS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount,
}  # fmt: skip
# Calls that read a tensor back. On a CPU some of them reach no operator.
READS = {"item", "tolist", "cpu", "numpy", "__array__", "nonzero"}
# Calls that make a tensor of Python's values: pageable memory, whose copy to a GPU is waited for.
CONSTANTS = {"tensor", "new_tensor", "as_tensor", "asarray", "from_numpy"}


def from_python(name: str, args: tuple) -> bool:
    """Whether a call turns Python's values into a tensor."""
    if name in CONSTANTS:
        return not isinstance(args[-1], torch.Tensor)
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, list) for i in index)
    return False


def masks(args: tuple) -> bool:
    """Whether an indexing operator is given a mask, whose number of True it must know."""
    indices = [i for i in args[1] if i is not None]
    return any(i.dtype in (torch.bool, torch.uint8) for i in indices)


class HostSyncs(TorchFunctionMode):
    """Collects, per `step`, what would wait on CUDA: (name, lines of this project that led there).

    The caller sets `step`; None counts nothing, as for the data workers' part of a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: int | None = None
        self.found: dict[int, list[tuple[str, str]]] = {}
        self._operators = Operators(self)

    def note(self, name: str) -> None:
        if self.step is None:
            return
        ours = [
            f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if frame.filename.startswith(str(ROOT)) and "tests" not in frame.filename
        ]
        self.found.setdefault(self.step, []).append((name, " ".join(ours)))

    def __enter__(self):
        self._operators.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._operators.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS or from_python(name, args):
            self.note(name)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """The part of HostSyncs that sees what library code and backward passes call."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        indexed = packet in (aten.index, aten.index_put, aten.index_put_) and masks(args)
        repeats = func is aten.repeat_interleave.Tensor
        if packet in WAITING_OPERATORS or indexed or repeats:
            self.syncs.note(func.name())
        return func(*args, **(kwargs or {}))


def count_in(program, monkeypatch) -> HostSyncs:
    """Counts the steps of a trainer from its call of `seed_step` on, but for `Run.next_batch`."""
    from training.run import Run

    syncs, seed_step, next_batch = HostSyncs(), program.seed_step, Run.next_batch

    def begin(seed, rank, step):
        syncs.step = None
        seed_step(seed, rank, step)
        syncs.step = step

    def batch(run):
        step, syncs.step = syncs.step, None
        arrived = next_batch(run)
        syncs.step = step
        return arrived

    monkeypatch.setattr(program, "seed_step", begin)
    monkeypatch.setattr(Run, "next_batch", batch)
    return syncs
