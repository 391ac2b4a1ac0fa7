"""The layout of the engine's matrices on a CPU, and products of a few rows with them.

A step reads every matrix once for a few rows, so reading takes most of its time. `cpu_layout` arranges
matrices for fast reading; `linear` multiplies by such a matrix or a plain one.
"""

import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

# Outputs per panel: MKL multiplies panels of 32 faster than of 16, 24, 48 or 64 (on a Xeon with
# AVX-512; others were not measured). With more rows than PANEL_ROWS at once it is slower.
PANEL = 32
PANEL_ROWS = 512
HUGE_PAGE = 2**21
HUGE_PAGES_AT_ONCE = 2**26  # bytes


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """x (N, in) times a matrix (out, in), which `cpu_layout` may have arranged: (N, out)."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    if len(x) > PANEL_ROWS:
        return torch.cat([linear(part, weight, bias) for part in x.split(PANEL_ROWS)])
    y = torch.bmm(x.expand(len(weight), -1, -1), weight)  # (panels, N, PANEL)
    y = y.transpose(0, 1).flatten(1)
    return y if bias is None else y + bias


def cpu_layout(rows: int, compiled: bool) -> Callable[[Tensor], Tensor]:
    """A function that arranges matrices (out, in) of one engine for products with `rows` rows.

    float32: panels (out / PANEL, in, PANEL), if torch has MKL and PANEL divides the number of outputs.
    Otherwise oneDNN's packing, if it supports the type on this processor; compiled functions cannot use
    that and take the plain matrix.
    """
    memory = HugePages()

    def arrange(weight: Tensor) -> Tensor:
        out, width = weight.shape
        if weight.dtype == torch.float32 and out % PANEL == 0 and torch.backends.mkl.is_available():
            return memory.copy(weight.view(-1, PANEL, width).transpose(1, 2))
        if compiled or not onednn_multiplies(weight.dtype):
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    return arrange


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this type, float32 or bfloat16, on this processor; bfloat16 needs
    AVX-512 or AVX-NE-CONVERT."""
    if not torch.backends.mkldnn.is_available():  # the function below is then missing too
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class HugePages:
    """Places tensors in pages of 2 MiB, if the system has them, which saves address translation: two cores
    of a Xeon read 840 MB at 30 GB/s instead of 23. The tensors own the memory, not this object."""

    def __init__(self):
        self.free = torch.empty(0, dtype=torch.uint8)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor."""
        size = tensor.numel() * tensor.itemsize
        if size > len(self.free):
            self.free = huge_pages(max(size, HUGE_PAGES_AT_ONCE))
        place = self.free[:size].view(tensor.dtype).view(tensor.shape)
        self.free = self.free[-(-size // 64) * 64 :]  # the next one begins a cache line
        return place.copy_(tensor)


def huge_pages(size: int) -> Tensor:
    """`size` bytes, uint8, on Linux aligned to 2 MiB; untouched pages take no memory."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]
