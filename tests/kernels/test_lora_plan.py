"""Which way lora_linear takes, where the tests of every op cannot see it."""

import itertools
import logging
from typing import Any

import pytest
import torch
from op_calls import examples
from strategies import INTERPRETING
from torch.utils._pytree import tree_leaves, tree_map_only

from fastft.kernels import REGISTRY, lora_backward_plan, lora_plan
from fastft.kernels.core import dispatch
from fastft.kernels.lora_group import Group

ENTRY = REGISTRY["fastft::lora_linear"]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same, one element after where an allocation begins."""
    return torch.cat((tensor.new_zeros(1), tensor.reshape(-1)))[1:].view(tensor.shape)


def four_bit(dtype: torch.dtype) -> list[Any]:
    """A call for each case of packed weights."""
    calls = examples("fastft::lora_linear", dtype, len(ENTRY.cases))
    return [one for one in calls if ENTRY.cases[one.case][1]["quant_type"]]


without_interpreter = pytest.mark.skipif(INTERPRETING, reason="no kernel of ours runs")


@without_interpreter
def test_few_rows_go_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters or without, whatever its bytes are stored as, wherever: no weight is written in 16 bits."""
    pytest.importorskip("bitsandbytes")
    aligned = lambda group, x: group.quant_type != "" and x.shape[-1] % group.blocksize == 0  # noqa: E731
    monkeypatch.setattr(lora_plan, "_fused", aligned)  # which is false on a CPU
    monkeypatch.setattr(lora_plan, "scratch", lambda *_, **__: pytest.fail("de-quantised"))
    gemm, seen = torch.ops.bitsandbytes.gemm_4bit, 0

    def watched(*given: Any, **more: Any) -> torch.Tensor:
        tensors = [one for one in (*given, *more.values()) if isinstance(one, torch.Tensor)]
        assert all(one.data_ptr() % 16 == 0 and one.is_contiguous() for one in tensors)
        return gemm(*given, **more)

    monkeypatch.setattr(torch.ops.bitsandbytes, "gemm_4bit", watched)
    for call in four_bit(torch.float32):
        group = Group(*call.arguments(call.tensors("cpu")))
        if not aligned(group, group.x):
            continue
        apart = group._replace(weights=[torch.stack((one, one), 1)[:, 0] for one in group.weights])
        as_words = group._replace(weights=[one.view(torch.float32).view(-1, 1) for one in group.weights])
        expected = ENTRY.reference(*group)[0]
        moved = Group(*tree_map_only(torch.Tensor, shifted, tuple(group)))
        for given in (group, apart, as_words, moved):
            torch.testing.assert_close(
                ENTRY.op(*given)[0], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
            )
        seen += 1
    assert seen >= 4


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_in_parts_is_that_of_the_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its copy only some rows exist at a time; a last part may be shorter."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tolerance = 2**-6 if device == "cuda" else 1e-5
    name = "fastft::lora_linear_backward"
    calls = examples(name, dtype, 4 * len(REGISTRY[name].cases))
    seen, part = [], lora_backward_plan._adapter_gradients

    def watched(grad: torch.Tensor, *given: Any, **more: Any) -> None:
        seen.append(grad.shape[0])
        part(grad, *given, **more)

    monkeypatch.setattr(lora_backward_plan, "_adapter_gradients", watched)
    monkeypatch.setattr(lora_backward_plan, "ROWS_TOGETHER", 2)
    for call in calls:
        given = call.arguments(call.tensors(device))
        expected = REGISTRY[name].op(*given)
        with monkeypatch.context() as small:
            small.setattr(lora_backward_plan, "PART_BYTES", 2**10)
            seen.append(0)
            found = REGISTRY[name].op(*given)
        for one, other in zip(found, expected, strict=True):
            atol = tolerance * (other.abs().max().item() if other.numel() else 0)
            torch.testing.assert_close(one, other, rtol=tolerance, atol=atol)
    parts = [list(group) for zero, group in itertools.groupby(seen, bool) if zero]
    assert any(len(set(sizes)) > 1 and len(sizes) > 2 for sizes in parts)


@without_interpreter
def test_kernels_that_do_not_compile_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton = pytest.importorskip("triton")
    from fastft.kernels import dequantize_4bit_triton, lora_linear_triton

    calls = [
        one for name in ("lora_linear", "lora_linear_backward") for one in examples(f"fastft::{name}", torch.float32)
    ]
    arguments = [(one.entry.op, one.arguments(one.tensors("cpu"))) for one in calls]
    expected = [op(*given) for op, given in arguments]

    def refuse(name: str) -> Any:
        def launch(*arguments: object) -> None:
            raise triton.OutOfResources(300_000, 232_448, f"shared memory of {name}")

        return launch

    names = ((lora_linear_triton, "place"), (lora_linear_triton, "project"), (lora_linear_triton, "outer"))
    for module, name in (*names, (dequantize_4bit_triton, "together")):
        monkeypatch.setattr(module, name, refuse(name))
    monkeypatch.setattr(dispatch, "triton_dtypes", lambda device: frozenset({torch.float32}))
    monkeypatch.setattr(dispatch, "has_tensor_cores", lambda device: True)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    with caplog.at_level(logging.WARNING, logger="fastft"):
        found = [op(*given) for _ in range(2) for op, given in arguments][: len(arguments)]
    for mine, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    said = [record.getMessage().split("shared memory of ")[1].split(",")[0] for record in caplog.records]
    assert sorted(said) == ["outer", "place", "project", "together"]
