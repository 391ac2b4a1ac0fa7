"""Machine code of a Triton kernel for an H100, made by the assembler that comes with Triton."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.inductor import H100, InternalsMoved
from benchmarks.paper.model import Attention

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^\s*(\.L_\w+):")
BRANCH = re.compile(r"\bBRA\b.*?(\.L_\w+)")


@dataclass(frozen=True)
class MachineCode:
    registers: int  # per thread
    spilled: int  # bytes of local memory per thread
    loop: list[str]  # the instructions of the longest loop
    warps: int

    @property
    def programs(self) -> int:
        """Programs that share a multiprocessor: registers come in blocks of 256 per warp."""
        per_warp = -(-32 * self.registers // 256) * 256
        return min(H100.regs_per_multiprocessor // (per_warp * self.warps), 64 // self.warps, 32)


def assemble(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int
) -> MachineCode:
    """Compile a `triton.jit` function for sm_90. Pointers are taken to be aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**signature, **{name: "constexpr" for name in constants}}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"
    }
    try:
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        target = GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        binary = compiled.asm["cubin"]
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage = output(tools / "cuobjdump", "--dump-resource-usage", file.name)
            code = output(tools / "nvdisasm", "-c", "-hex", file.name)
        found = re.search(r"REG:(\d+).*?LOCAL:(\d+)", usage)
        if found is None:
            raise ValueError("cuobjdump names no registers")
        return MachineCode(int(found[1]), int(found[2]), longest_loop(code), warps)
    except Exception as e:
        raise InternalsMoved(f"triton {triton.__version__}: {type(e).__name__}: {e}") from e


def output(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout


def longest_loop(code: str) -> list[str]:
    """The instructions between the target of a backward branch and the branch, the most of them."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    longest: list[str] = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[2])
            branch = BRANCH.search(found[2])
            start = labels.get(branch[1]) if branch else None
            if start is not None and len(instructions) - start > len(longest):
                longest = instructions[start:]
    return longest


def fused_attention(
    head_size: int, int8: bool = False, shape: tuple[int, int] | None = None
) -> tuple[MachineCode, Attention]:
    """The engine's attention, bf16 or with an int8 cache, as it is compiled and for the model.

    `shape` is (positions per tile, warps), by default the engine's. An instruction is one thread's. Per pass of the loop, `BLOCK` positions of K and V are read.
    """
    from modeling import fused_attention as module
    from modeling.decode_attention import head_parts
    from modeling.generator import EPS

    parts = head_parts(head_size)
    if parts is None:
        raise ValueError(f"head size {head_size} has no fused attention")
    cache, scale = ("*i8", "*bf16") if int8 else ("*bf16", "*bf16")
    signature = {
        "qkv": "*bf16", "qk_norm": "*fp32", "turns": "*fp32", "position": "*i64",
        "k_cache": cache, "v_cache": cache, "k_scale": scale, "v_scale": scale, "out": "*bf16",
        "S": "i32",
    }  # fmt: skip
    block, warps = shape or module.SHAPE
    constants = {
        "H": 16, "h": head_size, "A": parts[0], "B": parts[1], "BLOCK": block, "EPS": EPS,
        "INT8": int8,
    }  # fmt: skip
    code = assemble(module.fused_kernel, signature, constants, warps)
    instructions = len(code.loop) * 32 * warps / (2 * block * head_size)
    return code, Attention(instructions, code.programs, block, warps)
