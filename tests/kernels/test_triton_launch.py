"""Kernels that are compiled for what is known of their arguments: found again in Triton's cache, by any process."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strategies import INTERPRETING

from fastft.compat import triton_launch
from fastft.compat.triton_launch import Pointer
from fastft.kernels import REGISTRY
from fastft.kernels.core import dispatch
from fastft.kernels.core.launch_plan import Described, Plan

triton = pytest.importorskip("triton")
lora_linear_triton = pytest.importorskip("fastft.kernels.lora_linear_triton")
pytestmark = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
BF16, F32 = Pointer(torch.bfloat16, True), Pointer(torch.float32, True)


def rms_norm(n_rows: int, x: Pointer = BF16) -> tuple[str, str, list[Any], dict[str, Any]]:
    """A launch of rms_norm's forward kernel for rows of 256."""
    arguments = [BF16, F32, x, BF16, n_rows, 256, 1, 1, 256, 0, 0, 1, 0, 0, 1e-6, 0.0]
    meta = {"HAS_WEIGHT": True, "ROUND_FIRST": True, "ROWS": 8, "BLOCK_D": 256, "num_warps": 4}
    return "fastft.kernels.rms_norm_triton", "forward_kernel", arguments, meta


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Triton's cache, which one of its functions remembers kernels beside."""
    from fastft.kernels import rms_norm_triton

    rms_norm_triton.forward_kernel.device_caches.clear()
    yield tmp_path
    rms_norm_triton.forward_kernel.device_caches.clear()


def compile_as_a_worker(cache: Path, module: str, name: str, arguments: list[Any], meta: dict[str, Any]) -> set[str]:
    """Compile without a device; return what is in the cache now."""
    from triton.backends.compiler import GPUTarget

    environment = {"TRITON_CACHE_DIR": str(cache)}
    triton_launch._compile_in_worker(module, name, arguments, meta, GPUTarget("cuda", 90, 32), environment)
    return {path.parent.name for path in cache.rglob("*.cubin")}


def test_sizes_that_are_known_alike_are_one_kernel(cache: Path) -> None:
    from fastft.kernels import rms_norm_triton

    first = compile_as_a_worker(cache, *rms_norm(triton_launch.integer(divisible=False)))
    assert len(first) == 1
    rms_norm_triton.forward_kernel.device_caches.clear()  # as in another process
    assert compile_as_a_worker(cache, *rms_norm(35)) == first
    assert len(compile_as_a_worker(cache, *rms_norm(triton_launch.integer(divisible=True)))) == 2
    assert len(compile_as_a_worker(cache, *rms_norm(35, Pointer(torch.bfloat16, aligned=False)))) == 3


def test_a_workers_variables_are_its_own_for_the_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/of/the/worker")
    seen = []
    kernel = SimpleNamespace(warmup=lambda *_, **__: seen.append(dict(os.environ)), fn=rms_norm, cache_key="")
    monkeypatch.setattr(triton_launch.importlib, "import_module", lambda name: SimpleNamespace(kernel=kernel))
    triton_launch._compile_in_worker("any", "kernel", [], {}, None, {"TRITON_CACHE_DIR": str(cache)})
    assert "TRITON_PTXAS_PATH" not in seen[0]
    assert seen[0]["TRITON_CACHE_DIR"] == str(cache)
    assert os.environ["TRITON_PTXAS_PATH"] == "/of/the/worker"
    assert os.environ.get("TRITON_CACHE_DIR") != str(cache)


def test_inductors_own_ptxas_is_not_taken_for_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("TRITON_PTXAS_PATH", os.path.join(os.path.dirname(torch.__file__), "bin", "ptxas"))
    assert "TRITON_PTXAS_PATH" not in triton_launch._as_the_user_set_it()
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/usr/bin/ptxas")
    assert triton_launch._as_the_user_set_it()["TRITON_PTXAS_PATH"] == "/usr/bin/ptxas"


@triton.jit
def inner(x):  # type: ignore[no-untyped-def]
    return x + 1


@triton.jit
def outer(x_ptr):  # type: ignore[no-untyped-def]
    inner(1)


def test_called_functions_have_their_keys_first() -> None:
    assert inner.hash is None
    triton_launch._settle_key(outer)
    assert inner.hash is not None
    assert outer.hash is not None


class Made:
    """As Triton's CompiledKernel, as far as launches read it."""

    run, function, packed_metadata = object(), 77, (1,)

    def __init__(self, signature: dict[Any, Any], names: list[str], **metadata: Any) -> None:
        self.src = SimpleNamespace(signature=signature, fn=SimpleNamespace(arg_names=names))
        self.metadata = SimpleNamespace(num_warps=4, shared=64, num_ctas=1, **metadata)


def test_constants_are_left_out_of_a_launch_and_tuples_are_laid_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(triton_launch, "_static_launcher", lambda: lambda *given: launched.append(given))
    signature = {0: ("*bf16", ("i32", "constexpr")), 1: "*fp32", 2: "constexpr", 3: "fp32", 4: "i64", 5: "constexpr"}
    made = Made(signature, ["pieces", "x", "one", "scale", "n", "BLOCK"], global_scratch_size=0, profile_scratch_size=0)
    texts = [("a.data_ptr()", ("n0", "1")), "b", "1", "0.5", "n0 * 4"]
    text, scope = triton_launch.launch(made, "k1", ["n0", "2"], texts, {"BLOCK": 16, "num_warps": 4})
    exec(text, {**scope, "a": SimpleNamespace(data_ptr=lambda: 11), "b": 12, "n0": 3, "stream": 9})
    assert launched == [(77, 3, 2, 1, 4, 64, "OiOflOO", (11, 3, 12, 0.5, 12, None, None), 9)]


def test_a_kernel_gets_the_memory_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(triton_launch, "_static_launcher", lambda: lambda *given: launched.append(given))
    monkeypatch.setattr(triton_launch, "_scratch", lambda size_bytes: size_bytes)
    made = Made({0: "*fp32"}, ["x"], global_scratch_size=128, profile_scratch_size=0)
    text, scope = triton_launch.launch(made, "k1", ["n0 + 1", "2"], ["5"], {"num_warps": 4})
    exec(text, {**scope, "n0": 2, "stream": 9})
    assert launched == [(77, 3, 2, 1, 4, 64, "OOO", (5, 128 * 6, None), 9)]


@pytest.mark.parametrize("metadata", [{"profile_scratch_size": 8}, {"launch_cooperative_grid": True}])
def test_kernels_that_need_more_are_launched_by_triton(
    metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_launch, "_static_launcher", lambda: lambda *_: pytest.fail("not by torch"))
    made, launched = Made({0: "*fp32", 1: "constexpr"}, ["x", "BLOCK"], **metadata), []
    made.run = lambda *given: launched.append(given)
    text, scope = triton_launch.launch(made, "k1", ["4"], ["5"], {"BLOCK": 16, "num_warps": 4})
    exec(text, {**scope, "stream": 9})
    assert launched == [(4, 1, 1, 9, 77, (1,), None, None, None, 5, 16)]


CAPABILITIES = (80, 90, 120)
EVERY = os.environ.get("FASTFT_EVERY_VARIANT") == "1"
LEAD = ("n0", "n1")
BFLOAT16 = torch.bfloat16


def described(dtype: torch.dtype, *shape: int | str) -> Described:
    """A dense tensor on the CPU; names are sizes that change."""
    strides: list[int | str] = [1]
    for size in reversed(shape[1:]):
        known = strides[0]
        whole = isinstance(known, int) and isinstance(size, int)
        strides.insert(0, known * size if whole else f"{known}*{size}")  # type: ignore[operator]
    return Described(dtype, "cpu", shape, tuple(strides[: len(shape)]), True)


def lora_linear(columns: int, features: tuple[int, ...], backward: bool = False) -> list[Any]:
    """Arguments of projections of nested NF4 weights with adapters in float32, as under autocast."""
    many, rank = len(features), 16
    blocks = [size * columns // 64 for size in features]
    group = [
        described(BFLOAT16, *LEAD, columns), [described(torch.uint8, size * columns // 2, 1) for size in features],
        [described(torch.float32, count // 256) for count in blocks], [described(torch.uint8, n) for n in blocks],
        [described(torch.float32, 256)] * many, [described(torch.float32)] * many, [],
        [described(torch.float32, rank, columns)] * many, [described(torch.float32, size, rank) for size in features],
        [], list(features), [], list(range(many)), [2.0] * many, 64, "nf4", False, True,
    ]  # fmt: skip
    if not backward:
        return group
    gradient, s = described(BFLOAT16, *LEAD, sum(features)), described(torch.float32, *LEAD, rank * many)
    return [gradient, s, *group, [True, *[False] * many, *[True] * 2 * many]]


QKV = [described(BFLOAT16, "n0", heads, "n1", 128) for heads in (32, 8, 8)]
LATENT = [described(BFLOAT16, "n0", 32, "n1", size) for size in (192, 192, 128)]
RANGES = [described(torch.int64, 1, "n1"), described(torch.int64, *LEAD)]
ROWS, LSE = described(BFLOAT16, *LEAD, 4096), described(torch.float32, "n0", 32, "n1")
LAYER = {  # what a layer of an 8B model calls
    "rms_norm": [ROWS, described(BFLOAT16, 4096), 1e-5, 0.0, True],
    "lora_linear": lora_linear(4096, (4096, 1024, 1024)),
    "lora_linear, down": lora_linear(14336, (4096,)),
    "lora_linear_backward": lora_linear(4096, (4096, 1024, 1024), backward=True),
    "lora_linear_backward, up": lora_linear(4096, (14336, 14336), backward=True),
    "attention": [*QKV, *RANGES, None, None, None, None, None, False, 0, 0, 0.088, 0.0, 0.0, False],
    "attention, values of another size": [*LATENT, *[None] * 7, True, 0, 0, 0.072, 0.0, 0.0, False],
    "attention_backward, values of another size": [
        LATENT[2],
        *LATENT,
        LATENT[2],
        LSE,
        *[None] * 6,
        True,
        0,
        0,
        0.072,
        0.0,
        0.0,
    ],
    "attention_backward": [QKV[0], *QKV, QKV[0], LSE, *RANGES, None, None, None, None, False, 0, 0, 0.088, 0.0, 0.0],
    "glu_packed": [described(BFLOAT16, *LEAD, 28672), "silu"],
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_plans_ask_for_is_compiled_for_every_generation(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sizes that are not known to be multiples of 16, as no test of a kernel by itself has them.

    Each launch is compiled for one of them; FASTFT_EVERY_VARIANT=1 compiles all for all.
    """
    from triton.backends.compiler import GPUTarget

    everything = frozenset({torch.float32, torch.float16, torch.bfloat16})
    monkeypatch.setattr(dispatch, "triton_dtypes", lambda device: everything)
    monkeypatch.setattr(dispatch, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(dispatch, "has_shared_operands", lambda device: capability == 90)
    monkeypatch.setattr(lora_linear_triton, "has_shared_operands", lambda device: capability == 90)
    count, asked = 0, set()
    for name, arguments in LAYER.items():
        op = REGISTRY[f"fastft::{name.partition(',')[0]}"]
        plan = Plan(op.compute, arguments, name)
        recorded = plan._recorded({"n0": 2, "n1": 300})
        assert not recorded.reason, (name, recorded.reason)
        for launch in recorded.launches:
            count += 1
            if not EVERY and CAPABILITIES[count % len(CAPABILITIES)] != capability:
                continue
            function, target = launch.kernel.fn, GPUTarget("cuda", capability, 32)
            launch.kernel.device_caches.clear()
            work = (function.__module__, function.__name__, launch.described, launch.meta, target)
            asked.add(function.__name__)
            triton_launch._compile_in_worker(*work, {"TRITON_CACHE_DIR": str(tmp_path)})
            launch.kernel.device_caches.clear()
    assert count > 2 * len(LAYER)
    assert {path.stem for path in tmp_path.rglob("*.cubin")} == asked
