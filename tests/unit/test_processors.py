"""That the programs also work on processors with fewer instructions than this one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# For oneDNN, torch and NumPy: what they choose on a processor with AVX2.
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "OPENBLAS_CORETYPE": "Haswell",
}


def test_matrices_multiply_on_a_processor_without_avx512(tmp_path):
    # oneDNN has no products in bfloat16 there. docs/platforms.md says what else passed so.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/unit/modeling/test_cpu_layout.py"],
        cwd=ROOT,
        # Programs compiled for one kind of processor must not be taken for those of another.
        env=os.environ | AVX2 | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
