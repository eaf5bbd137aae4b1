"""The same tests with Triton's interpreter in place of the compiler, in a process of their own.

The interpreter is chosen when triton is imported, so it cannot be had in this process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from strategies import INTERPRETING

pytest.importorskip("triton", reason="Triton has no build for this platform")
HERE = Path(__file__).parent
LEFT_OUT = {  # what takes long, and is covered otherwise: by test_attention.py's smaller calls, and by holes
    "test_ops.py": "not attention", "test_attention.py": "not (holds_does_not_matter and (left or right))",
}  # fmt: skip


@pytest.mark.skipif(INTERPRETING, reason="this is the process it starts")
@pytest.mark.parametrize(
    "file",
    [
        "test_ops.py", "test_rms_norm.py", "test_algebra.py", "test_dequantize_4bit.py", "test_lora_products.py",
        "test_linear_cross_entropy.py", "test_attention.py",
    ],
)  # fmt: skip
def test_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", str(HERE / file)]
    command += ["-k", LEFT_OUT[file]] if file in LEFT_OUT else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTFT_HYPOTHESIS_PROFILE": "interpreter"}
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
