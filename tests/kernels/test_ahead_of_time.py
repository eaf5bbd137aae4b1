"""Every kernel compiles for every generation of GPUs, and fits; none is needed here.

Any two constants of a kernel meet in a variant that is compiled, on one generation; the least and the largest variant
are compiled for others.  FASTFT_EVERY_VARIANT=1 compiles all of them for all: for a new Triton, or a changed kernel.
"""

import importlib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from choices import pairwise
from strategies import INTERPRETING

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")]

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import fastft.kernels  # noqa: E402
from fastft.capability import BFLOAT16_FROM  # noqa: E402
from fastft.kernels.core import tiles  # noqa: E402

Variant = tuple[Any, dict[str, Any]]  # a kernel and its constants
EVERY = os.environ.get("FASTFT_EVERY_VARIANT") == "1"
SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # per block
FLOAT32 = re.compile(r"(\w*_)?(rstd|mean|partial\w*)_ptr")  # the other pointers have the dtype of the rows
# Sizes and strides that are multiples of 16 in a model.
ALIGNED = re.compile(r"D|K|R|padded_S|columns|rows|half|M|N|\w+_s[bhij\d]|\w*stride\w*")
FEW_BYTES = 16  # of a thread, which the assembler stores before a loop of products so that one more program fits
ELEMENTS_A_THREAD = 8  # of a tile, from which on loads of 16 bits can be 16 bytes wide
MODULES = sorted(path.stem for path in Path(str(fastft.kernels.__file__)).parent.glob("*_triton.py"))
SPILLS_IN_3_8 = pytest.mark.xfail(
    triton.__version__.startswith("3.8."),
    reason="the assembler of Triton 3.8 (torch 2.14) stores one number before the loop and loads it after",
    strict=True,
)
LARGE_IN_3_8 = pytest.mark.xfail(
    triton.__version__.startswith("3.8."),
    reason="on sm_100 Triton 3.8 takes more shared and local memory for these; dispatch falls back where it must",
    strict=True,
)
LARGE = [("lora_linear_triton", 100)]
SPILLING = {"rms_norm_triton-backward_weight_kernel-False-True-8-256-4": SPILLS_IN_3_8}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def variants() -> Iterator[Any]:
    for name in MODULES:
        for kernel, constants in importlib.import_module(f"fastft.kernels.{name}").variants():
            values = [str(value) for value in constants.values() if not isinstance(value, tuple)]
            variant = "-".join([name, kernel.__name__, *values])
            yield pytest.param(kernel, constants, id=variant, marks=SPILLING.get(variant, ()))


def is_for(constants: dict[str, Any], capability: int) -> bool:
    return capability // 10 in constants.get("majors", (capability // 10,))


def constants_of(variant: Variant) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in sorted(variant[1].items())]


def in_pairs(found: Sequence[Variant], kept: Sequence[Variant] = ()) -> list[Variant]:
    """Of a kernel's variants so many that any two constants meet; the first and the last are among them."""
    return list(found) if EVERY else pairwise(found, constants_of, [*found[:1], *found[-1:], *kept])


def chosen(found: Sequence[Any]) -> Iterator[Any]:
    """The same of each kernel's, as parameters of a test; those that are marked are among them."""
    by_kernel: dict[Any, list[Any]] = {}
    for one in found:
        by_kernel.setdefault(one.values[0], []).append(one)
    for each in by_kernel.values():
        left = in_pairs([one.values for one in each], [one.values for one in each if one.marks])
        yield from (one for one in each if any(one.values is values for values in left))


ALL = [one for one in variants() if is_for(one.values[1], 90)]
VARIANTS = list(chosen(ALL))

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def is_type(value: Any) -> bool:
    """Whether a constant of a variant is a type instead: "*fp32", "i32" or a tuple of them."""
    return isinstance(value, tuple) or (
        isinstance(value, str) and re.fullmatch(r"\*?(row|u8|i32|i64|fp16|fp32|bf16)", value) is not None
    )


def compiled(kernel: Any, constants: dict[str, Any], capability: int, row: str) -> Any:
    """The kernel for rows of a dtype that lie side by side, aligned, in one merged axis.

    A tuple among the constants is the signature of a tuple argument, a word that of another argument.
    """
    values = {name: value for name, value in constants.items() if name in kernel.arg_names and not is_type(value)}
    values |= {name: 1 for name in ("n1", "n2") if name in kernel.arg_names}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def typed(given: Any, path: tuple[int, ...]) -> Any:
        if isinstance(given, tuple):
            return tuple(typed(one, (*path, at)) for at, one in enumerate(given))
        if given.startswith("*") or len(path) == 3:  # pointers, and strides in a tuple of their own
            attributes[path] = [["tt.divisibility", 16]]
        return f"*{row}" if given == "*row" else given

    def type_of(at: int, name: str) -> Any:
        if name in values:
            return "constexpr"
        if is_type(constants.get(name)):
            return typed(constants[name], (at,))
        if name.endswith("_ptr"):
            return typed("*fp32" if FLOAT32.fullmatch(name) else "*row", (at,))
        if ALIGNED.fullmatch(name) and name not in kernel.do_not_specialize:
            attributes[(at,)] = [["tt.divisibility", 16]]
        return "fp32" if name in ("eps", "inner_eps", "offset") else "i32"

    signature = {name: type_of(at, name) for at, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, signature, values, attributes)
    options = {name: constants[name] for name in OPTIONS if name in constants}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check(binary: Any, capability: int, folder: Path, few_bytes: int = 0) -> None:
    assert binary.metadata.shared <= SHARED_MEMORY[capability]
    assert not re.search(r"\.f64\b", binary.asm["ptx"]), "double precision"
    file = folder / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    spilled_bytes = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
    assert spilled_bytes <= few_bytes, f"registers spill on sm_{capability}: {usage}"


def few_bytes(constants: dict[str, Any]) -> int:
    """What a thread of this variant may store to memory of its own."""
    return constants.get("spilled_bytes", FEW_BYTES if "majors" in constants else 0)


def row_dtype(capability: int) -> str:
    return "bf16" if divmod(capability, 10) >= BFLOAT16_FROM else "fp16"


@pytest.mark.parametrize(("kernel", "constants"), VARIANTS)
def test_variants_on_one_generation(kernel: Any, constants: dict[str, Any], tmp_path: Path) -> None:
    binary = compiled(kernel, constants, 90, "bf16")
    check(binary, 90, tmp_path, few_bytes(constants))
    sizes = [value for name, value in constants.items() if name.startswith("BLOCK") and value > 0]
    if (
        "spilled_bytes" not in constants
        and min(sizes, default=0) * constants.get("ROWS", 1) >= ELEMENTS_A_THREAD * 32 * constants["num_warps"]
    ):
        assert re.search(r"ld\.global\.\S*v4", binary.asm["ptx"]), "loads are not 16 bytes wide"


def _variants_of(module: str) -> list[Variant]:
    return list(importlib.import_module(f"fastft.kernels.{module}").variants())


def generations(module: str) -> Sequence[int]:
    """One of each kind for which the compiler goes another way; of a kind with little in common, each module another.

    Modules with products of tiles, whose variants say which generations they are for: that with the least shared
    memory of its kind, and both of the newest.
    """
    if EVERY:
        return [one for one in SHARED_MEMORY if one != 90]
    if any("majors" in constants for _, constants in _variants_of(module)):
        return [75, 86, 100, 120]
    at = MODULES.index(module)
    return [75, (80, 86, 89)[at % 3], (100, 120)[at % 2]]


def others() -> Iterator[Any]:
    for module in MODULES:
        for capability in generations(module):
            yield pytest.param(module, capability, marks=LARGE_IN_3_8 if (module, capability) in LARGE else ())


@pytest.mark.parametrize(("module", "capability"), others())
def test_every_kernel_on_the_others(module: str, capability: int, tmp_path: Path) -> None:
    """The first and the last variant of each kernel: the least and the most of one program.

    All of those that say which generations they are for: what products of tiles hold in registers differs by that, but
    between sm_80, sm_86 and sm_89, of which sm_86 has the least shared memory, and sm_120, which has the same variants
    and as much.
    """
    by_kernel: dict[str, list[Any]] = {}
    for kernel, constants in _variants_of(module):
        by_kernel.setdefault(kernel.__name__, []).append((kernel, constants))
    for found in by_kernel.values():
        each = (EVERY or capability not in (80, 89, 120)) and any("majors" in constants for _, constants in found)
        there = [(kernel, constants) for kernel, constants in found if is_for(constants, capability)]
        for kernel, constants in in_pairs(there) if each else (*there[:1], *there[1:][-1:]):
            binary = compiled(kernel, constants, capability, row_dtype(capability))
            check(binary, capability, tmp_path, few_bytes(constants))


@pytest.mark.parametrize("row", ["fp32", "fp16"])
@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_for_each_dtype(module: str, row: str, tmp_path: Path) -> None:
    middle = [(kernel, values) for kernel, values in _variants_of(module) if is_middle(values) and is_for(values, 90)]
    by_kernel = {kernel.__name__: (kernel, values) for kernel, values in middle}
    for kernel, constants in by_kernel.values():
        check(compiled(kernel, constants, 90, row), 90, tmp_path, constants.get("spilled_bytes", 0))


def is_middle(constants: dict[str, Any]) -> bool:
    """Not among the longest rows, which in float32 take twice the registers and are rare."""
    return all(value <= 4096 for name, value in constants.items() if name.startswith("BLOCK"))


@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_is_listed(module: str) -> None:
    imported = importlib.import_module(f"fastft.kernels.{module}")
    jitted = {
        name
        for name, value in vars(imported).items()
        if name.endswith("_kernel") and value.__module__ == imported.__name__
    }
    assert jitted == {kernel.__name__ for kernel, _ in _variants_of(module)} != set()


def test_every_generation_is_compiled_for() -> None:
    assert {capability for module in MODULES for capability in (90, *generations(module))} == SHARED_MEMORY.keys()
    assert {kernel for kernel, _ in (one.values for one in VARIANTS)} == {one.values[0] for one in ALL}


def test_configurations_reach_the_longest_row() -> None:
    from fastft.kernels.core.dispatch import MAX_ROW

    lengths = [config.block_d for config in tiles.CONFIGS]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == MAX_ROW
