"""Inductor's code for an H100, emitted on a machine without a GPU.

Dynamo, AOTAutograd and Inductor run as they would on the GPU, on fake tensors that have a device but no
memory. Only what would ask a driver is replaced while they run, and the compilation ends when the
source text is there. This leans on internals of PyTorch; where they have moved, `InternalsMoved` is
raised, and what depends on it cannot be told from this machine.
"""

import contextlib
import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# What Inductor asks of the device, from the maker's data sheet of the SXM5 board.
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, warp_size=32,
    total_memory=80 * 2**30, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
    is_integrated=0, gcnArchName="", uuid="",
)  # fmt: skip
CAPABILITY = (H100.major, H100.minor)


class InternalsMoved(RuntimeError):
    """PyTorch's or Triton's internals are not where this release of the instrument looks."""


class Emitted(BaseException):
    """Ends a compilation. Not an Exception, so that no handler on the way takes it for a failure."""


class Kernel(NamedTuple):
    """One launch of a generated Triton kernel."""

    name: str
    written: int  # elements of its output: one per point, or one per row of a reduction


@dataclass
class Program:
    """One compiled function: its source, and what a call launches and moves."""

    source: str
    kernels: list[Kernel]  # in order of their launch
    products: list[str]  # matrix products of the library
    others: list[str]  # other operations of the library: copies, fallbacks
    moved: dict[str, float] = field(default_factory=dict)  # bytes read and written, by kind

    @property
    def bytes(self) -> float:
        return sum(self.moved.values())

    def copies(self, elements: int) -> list[str]:
        """Kernels that write at least this number of elements: of a cache, that is a copy of it."""
        return [kernel.name for kernel in self.kernels if kernel.written >= elements]

    @property
    def undetermined(self) -> list[str]:
        """What leaves the order of its sums to a timing: on another day, or GPU, they round otherwise.

        Kernels that reduce or scan are tuned by timing unless Inductor is told to be deterministic. A
        scan of few long rows is split among programs that wait for each other, and takes what
        arrives first; atomic additions come in any order; a template of a product is always tuned.
        """
        return [name for name, text in self.definitions.items() if not determined(text)]

    @property
    def definitions(self) -> dict[str, str]:
        """The source of every generated kernel, by its name."""
        kernels, *_ = self.source.partition("\nasync_compile.wait")
        _, *parts = re.split(r"^(\w+) = async_compile\.\w+\(", kernels, flags=re.M)
        return dict(zip(parts[::2], parts[1::2]))

    @property
    def launches(self) -> int:
        return len(self.kernels) + len(self.products) + len(self.others)


def determined(definition: str) -> bool:
    """Whether the order of the sums of a kernel is fixed by its source."""
    kind = re.search(r"@triton_heuristics\.(\w+)\(", definition)
    if kind is None or "atomic_add" in definition.replace("'atomic_add_found': False", ""):
        return False
    if kind[1] == "pointwise":
        return True
    fixed = kind[1] in ("reduction", "persistent_reduction")
    return fixed and "'deterministic': True" in definition


def parse(source: str, moved: dict[str, float]) -> Program:
    """The launches in a generated wrapper, in order."""
    kernels = []
    for name, arguments in re.findall(r"^\s+(triton_\w+)\.run\((.*)\)$", source, re.M):
        sizes = [int(a) for a in arguments.split(", ") if a.isdigit()]
        rows = sizes if name.startswith("triton_poi") else sizes[:-1]  # the last one is reduced
        kernels.append(Kernel(name, math.prod(rows)))
    calls = re.findall(r"\b((?:extern_kernels|torch\.ops|(?<!\.)aten)\.[\w.]+)\(", source)
    calls = [c for c in calls if "_foreach" not in c]
    product = re.compile(r"extern_kernels\.(addmm|mm|bmm|baddbmm|bias_addmm|_scaled_mm)$")
    products = [c for c in calls if product.match(c)]
    others = [c for c in calls if not product.match(c)]
    return Program(source, kernels, products, others, moved)


class NoDevice:
    """Stands for contexts that select a device."""

    def __init__(self, *args: object):
        pass

    def __enter__(self) -> "NoDevice":
        return self

    def __exit__(self, *args: object) -> None:
        pass


class Driver:
    """What Triton asks its driver while it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


def constant(value: object) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def device_answers() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, stand-in) for everything that would ask the driver about the device."""
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad
    import torch._inductor.graph as graph
    import torch._inductor.scheduler as scheduler
    import torch._inductor.utils as inductor_utils
    import torch.utils._triton as triton_utils
    from torch._dynamo.device_interface import CudaInterface

    state = torch.zeros(16, dtype=torch.uint8)
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, name, constant(value))
        for name, value in {
            "is_available": True, "device_count": 1, "current_device": 0,
            "get_device_properties": H100, "get_device_capability": CAPABILITY,
            "get_device_name": H100.name, "is_bf16_supported": True, "synchronize": None,
            "set_device": None, "_lazy_init": None, "is_initialized": True,
            "get_rng_state": state, "set_rng_state": None, "is_current_stream_capturing": False,
        }.items()
    ]  # fmt: skip
    answers += [(torch.cuda, "device", NoDevice), (CudaInterface, "device", NoDevice)]
    answers += [
        (CudaInterface, name, staticmethod(constant(value)))
        for name, value in {
            "is_available": True, "current_device": 0, "get_compute_capability": 90,
            "is_bf16_supported": True, "get_device_properties": H100, "synchronize": None,
            "get_raw_stream": 0, "raise_if_triton_unavailable": None,
        }.items()
    ]  # fmt: skip
    worker = CudaInterface.Worker
    answers += [
        (worker, "get_device_properties", staticmethod(constant(H100))),
        (worker, "current_device", staticmethod(constant(0))),
        (torch.cuda.random, "get_rng_state", constant(state)),
        (torch.cuda.random, "set_rng_state", constant(None)),
        (torch._C, "_cuda_getCurrentRawStream", constant(0)),
        (triton_utils, "has_triton_package", constant(True)),
        (triton_utils, "triton_hash_with_backend", constant("h100")),
        (triton_utils, "triton_hash_to_path_key", constant("h100")),
    ]
    for module in (triton_utils, inductor_utils, scheduler, graph):
        if hasattr(module, "has_triton"):
            answers.append((module, "has_triton", constant(True)))
    # Their patterns are traced on the device that asks first; a CPU's serve as well.
    for passes in (joint_graph, post_grad):
        passes.lazy_init(torch.device("cpu"))
        answers.append((passes, "lazy_init", constant(None)))
    return answers


@contextlib.contextmanager
def pretended_h100(record: list[Program]) -> Iterator[None]:
    """Within it, Inductor compiles for an H100 and stops with `Emitted` when the source is there.

    Every compilation adds its `Program` to `record`.
    """
    import torch._inductor.config as inductor_config
    from torch._inductor.graph import GraphLowering
    from triton.runtime import driver

    def emit(self: Any) -> None:
        code, *_ = self.codegen()
        source = getattr(code, "value", code)
        record.append(parse(source, moved_bytes(self)))
        raise Emitted

    settings = {"compile_threads": 1, "fx_graph_cache": False, "force_disable_caches": True}
    with contextlib.ExitStack() as stack:
        for owner, name, value in device_answers():
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        for name in ("compile_to_module", "_compile_to_module"):
            stack.enter_context(mock.patch.object(GraphLowering, name, emit, create=True))
        # Not set_active: leaving by reset_active would look for the driver that is not there.
        stack.enter_context(mock.patch.object(driver, "_active", Driver(), create=True))
        stack.enter_context(inductor_config.patch(settings))
        yield


def moved_bytes(graph: Any) -> dict[str, float]:
    """Bytes that a lowered graph reads and writes, by kind of node.

    Those of a Triton kernel are Inductor's own count: what it must touch at least. A library call is counted here, every operand
    and result once: Inductor leaves out operands that are views, which weights always are.
    """
    from torch._inductor import ir

    moved = {"products": 0.0, "kernels": 0.0, "others": 0.0}
    for node in graph.scheduler.nodes:
        call = node.node
        if not isinstance(call, ir.ExternKernel):
            moved["kernels"] += node.get_read_write_buffers_sizes()
        elif isinstance(call, ir.MultiOutput):  # one of the results of a fallback
            moved["others"] += size_in_bytes(call)
        elif isinstance(call, ir.FallbackKernel):
            moved["others"] += sum(map(size_in_bytes, [*call.inputs, call]))
        else:
            moved["products"] += sum(map(size_in_bytes, [*call.inputs, call]))
    return moved


def size_in_bytes(operand: Any) -> float:
    """Bytes of a tensor in Inductor's representation; 0 for what stands for several or for none."""
    from torch._inductor import ir

    if isinstance(getattr(operand, "layout", None), (ir.MultiOutputLayout, ir.NoneLayout)):
        return 0.0
    return int(operand.get_numel()) * operand.get_dtype().itemsize


def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An empty CUDA tensor; only inside a FakeTensorMode."""
    return torch.empty(*shape, dtype=dtype, device="cuda")


def emit(
    function: Callable, arguments: Callable[[], tuple], options: dict[str, Any] | None = None
) -> Program:
    """The program that torch.compile makes of `function` on an H100.

    `arguments` makes its arguments with `fake`. `options` are Inductor's, as for torch.compile.
    """
    import torch._inductor.config as inductor_config
    from torch._inductor.compile_fx import compile_fx

    record: list[Program] = []

    def backend(module: torch.fx.GraphModule, inputs: list) -> Callable:
        with (
            pretended_h100(record),
            inductor_config.patch(options or {}),
            contextlib.suppress(Emitted),
        ):
            compile_fx(module, inputs)
        return module.forward  # on fake tensors

    torch._dynamo.reset()
    try:
        with FakeTensorMode(), torch.inference_mode():
            compiled = torch.compile(function, backend=backend, dynamic=False, fullgraph=True)
            compiled(*arguments())
    except Exception as e:
        raise InternalsMoved(f"torch {torch.__version__}: {type(e).__name__}: {e}") from e
    if len(record) != 1:
        raise InternalsMoved(f"torch {torch.__version__}: {len(record)} programs, not 1")
    return record[0]
