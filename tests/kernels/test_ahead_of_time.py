"""Every kernel, in every configuration, compiles for every generation of GPUs; none is needed here."""

import re
from typing import Any

import pytest
from strategies import INTERPRETING

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fastft.kernels import rms_norm_triton as norm  # noqa: E402

SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # per block
KERNELS = {
    "forward": norm.forward_kernel,
    "backward": norm.backward_kernel,
    "backward_weight": norm.backward_weight_kernel,
}
CONFIGS = [
    pytest.param(kernel, config, id=f"{name}-{config.block_d}")
    for name, kernel in KERNELS.items()
    for config in norm.CONFIGS
]


def compiled(kernel: Any, config: norm.Config, capability: int, dtype: str, **constants: Any) -> Any:
    """The kernel for contiguous, aligned tensors, unless constants has no n1 and n2."""
    _, meta = norm.config_for(config.block_d)
    options = {name: meta.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    values = {"ROUND_FIRST": True, **meta, **constants}
    values = {name: value for name, value in values.items() if name in kernel.arg_names}

    def type_of(name: str) -> str:
        if name in values:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*fp32" if name in ("rstd_ptr", "partial_ptr") else f"*{dtype}"
        return "fp32" if name in ("eps", "offset") else "i32"

    signature = {name: type_of(name) for name in kernel.arg_names}
    aligned = [
        (index,)
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name == "D" or re.fullmatch(r"\w+_s\d", name)
    ]
    attributes = {index: [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check(binary: Any, capability: int) -> None:
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    assert not re.search(r"\.f64\b", binary.asm["ptx"]), "double precision"
    assert len(binary.asm["cubin"]) > 0


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(("kernel", "config"), CONFIGS)
def test_compiles(kernel: Any, config: norm.Config, capability: int) -> None:
    binary = compiled(kernel, config, capability, "bf16" if capability >= 80 else "fp16", n1=1, n2=1)
    check(binary, capability)
    assert re.search(r"ld\.global\.\S*v4", binary.asm["ptx"]), "loads are 16 bytes wide"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("round_first", [True, False])
@pytest.mark.parametrize(("kernel", "config"), [CONFIGS[1], CONFIGS[7], CONFIGS[13]])
def test_compiles_for_each_dtype_and_for_rows_on_three_axes(
    kernel: Any, config: norm.Config, round_first: bool, dtype: str
) -> None:
    check(compiled(kernel, config, 90, dtype, ROUND_FIRST=round_first), 90)


def test_every_kernel_is_listed() -> None:
    jitted = {value for name, value in vars(norm).items() if name.endswith("_kernel")}
    assert jitted == set(KERNELS.values())


def test_configurations_reach_the_longest_row() -> None:
    from fastft.kernels.dispatch import MAX_ROW

    lengths = [config.block_d for config in norm.CONFIGS]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == MAX_ROW
