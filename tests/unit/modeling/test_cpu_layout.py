"""How matrices lie in memory for products with a few rows on a CPU."""

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modeling import cpu_layout as module
from modeling.cpu_layout import (
    HUGE_PAGE,
    PANEL,
    PANEL_ROWS,
    HugePages,
    cpu_layout,
    huge_pages,
    linear,
    onednn_multiplies,
)

has_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL")
bfloat16_unit = 2**-7


# ---------------------------------------------------------------------- products
@pytest.mark.parametrize("rows", [1, 8, 2 * PANEL_ROWS + 1])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out", [96, 100], ids=["panels", "no_panels"])
def test_arranged_matrices_multiply_as_they_are(out, dtype, compiled, biased, rows):
    weight = torch.randn(out, 48).to(dtype)
    bias = torch.randn(out).to(dtype) if biased else None
    x = torch.randn(rows, 48).to(dtype)
    with torch.inference_mode():
        y = linear(x, cpu_layout(rows, compiled)(weight), bias)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.shape == (rows, out) and y.dtype == dtype and y.is_contiguous()
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2 * bfloat16_unit}[dtype]
    assert ((y - expected).abs() / (1 + expected.abs())).max() < allowed


@has_mkl
@pytest.mark.parametrize("compiled", [False, True])
def test_float32_matrices_lie_in_contiguous_panels(compiled):
    weight = torch.randn(96, 48)
    arranged = cpu_layout(8, compiled)(weight)
    assert arranged.shape == (96 // PANEL, 48, PANEL) and arranged.is_contiguous()
    assert torch.equal(arranged[1], weight[PANEL : 2 * PANEL].T)


@pytest.mark.parametrize("out, dtype", [(100, torch.float32), (96, torch.bfloat16)])
def test_other_matrices_are_packed_for_onednn_unless_compiled(out, dtype):
    assert onednn_multiplies(torch.float32) == torch.backends.mkldnn.is_available()
    weight = torch.randn(out, 48).to(dtype)
    eager = cpu_layout(8, False)(weight)
    assert eager.is_mkldnn if onednn_multiplies(dtype) else eager is weight
    assert cpu_layout(8, True)(weight) is weight


def test_without_libraries_a_matrix_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weight = torch.randn(96, 48)
    assert cpu_layout(8, False)(weight) is weight


# ---------------------------------------------------------------------- memory
def test_copies_lie_apart_and_outlive_the_object():
    memory = HugePages()
    tensors = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.randn(2, 2, 2)]
    copies = [memory.copy(x) for x in tensors]
    del memory
    gc.collect()
    for x, copy in zip(tensors, copies):
        assert torch.equal(x, copy) and copy.is_contiguous() and copy.data_ptr() % 64 == 0
    copies[0].zero_()
    assert all(torch.equal(*pair) for pair in list(zip(tensors, copies))[1:])


def test_memory_is_made_anew_when_it_is_used_up(monkeypatch):
    monkeypatch.setattr(module, "HUGE_PAGES_AT_ONCE", 256)
    memory, sizes = HugePages(), []
    monkeypatch.setattr(module, "huge_pages", lambda n: sizes.append(n) or huge_pages(n))
    tensors = [torch.randn(n) for n in (32, 32, 1, 100)]
    copies = [memory.copy(x) for x in tensors]
    assert sizes == [256, 256, 400]
    assert all(map(torch.equal, tensors, copies))


def smaps_entry(address: int) -> str:
    """What the kernel says of the mapping that holds an address."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(x, 16) for x in entry.split(" ", 1)[0].split("-"))
        if first <= address < last:
            return entry
    raise AssertionError(f"{address:x} is not mapped")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_memory_begins_a_huge_page_and_the_kernel_is_asked_for_them():
    memory = huge_pages(3 * HUGE_PAGE)
    assert memory.data_ptr() % HUGE_PAGE == 0 and len(memory) == 3 * HUGE_PAGE
    entry = smaps_entry(memory.data_ptr())
    if "VmFlags" not in entry:
        pytest.skip("a kernel that does not say how it maps memory")
    # Asked for; and private, because shared memory has a setting of its own, which is off.
    flags = entry.split("VmFlags:")[1].split()
    assert "hg" in flags and "sh" not in flags


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux")
def test_a_kernel_without_huge_pages_gives_ordinary_memory(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert huge_pages(100).fill_(7).sum() == 700


def test_a_system_without_huge_pages_gives_ordinary_memory(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_pages(100).fill_(7).sum() == 700
