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
CHOSEN = {  # in parts of a length; left out is what test_attention.py has smaller calls for, and holes cover
    "test_ops.py, lora": "lora_linear",
    "test_ops.py, experts": "expert_",
    "test_ops.py, others": "not attention and not lora_linear and not expert_",
    "test_launch_plan.py": "one_plan_gives",
    "test_experts.py": "not tiles or skewed",
    "test_attention.py": "not (holds_does_not_matter and (left or right))",
}


@pytest.mark.skipif(INTERPRETING, reason="this is the process it starts")
@pytest.mark.parametrize(
    "file",
    [
        "test_ops.py, lora", "test_ops.py, experts", "test_ops.py, others", "test_attention.py", "test_experts.py",
        "test_linear_cross_entropy.py", "test_linear_token_statistics.py", "test_rms_norm.py", "test_algebra.py",
        "test_dequantize_4bit.py", "test_lora_products.py", "test_launch_plan.py", "test_key_copies.py",
    ],
)  # fmt: skip
def test_in_the_interpreter(file: str) -> None:
    path = str(HERE / file.partition(",")[0])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", path]
    command += ["-k", CHOSEN[file]] if file in CHOSEN else []
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTFT_HYPOTHESIS_PROFILE": "interpreter"}
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
