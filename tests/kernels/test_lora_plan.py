"""Which way lora_linear takes, where the tests of every op cannot see it."""

from typing import Any

import pytest
import torch
from op_calls import examples
from strategies import INTERPRETING

from fastft.kernels import REGISTRY, lora_plan
from fastft.kernels.lora_linear import Group

ENTRY = REGISTRY["fastft::lora_linear"]


def four_bit(dtype: torch.dtype) -> list[Any]:
    """A call for each case of packed weights."""
    calls = examples("fastft::lora_linear", dtype, len(ENTRY.cases))
    return [one for one in calls if ENTRY.cases[one.case][1]["quant_type"]]


@pytest.mark.skipif(INTERPRETING, reason="no kernel of ours runs")
def test_few_rows_go_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters or without, whatever its bytes are stored as: no weight is written in 16 bits."""
    pytest.importorskip("bitsandbytes")
    aligned = lambda group, x: group.quant_type != "" and x.shape[-1] % group.blocksize == 0  # noqa: E731
    monkeypatch.setattr(lora_plan, "_fused", aligned)  # which is false on a CPU
    monkeypatch.setattr(lora_plan, "scratch", lambda *_, **__: pytest.fail("de-quantised"))
    seen = 0
    for call in four_bit(torch.float32):
        group = Group(*call.arguments(call.tensors("cpu")))
        if not aligned(group, group.x):
            continue
        apart = group._replace(weights=[torch.stack((one, one), 1)[:, 0] for one in group.weights])
        as_words = group._replace(weights=[one.view(torch.float32).view(-1, 1) for one in group.weights])
        expected = ENTRY.reference(*group)[0]
        for given in (group, apart, as_words):
            torch.testing.assert_close(
                ENTRY.op(*given)[0], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
            )
        seen += 1
    assert seen >= 4
