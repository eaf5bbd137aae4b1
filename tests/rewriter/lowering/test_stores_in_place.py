"""What Inductor's reductions store over their input, other warps have read: a gradient would lack terms otherwise."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch._inductor.codegen.triton import TritonKernel

from fastft.compat import inductor


@pytest.mark.parametrize("inside_reduction", [True, False])
@pytest.mark.parametrize("name", ["in_place", "elsewhere"])
def test_a_barrier_is_written_before_a_store_in_place(
    name: str, inside_reduction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(TritonKernel, "store", lambda self, name, index, value: written.append(f"{name} = {value}"))
    inductor.guard_stores_in_place.__wrapped__()
    kernel: Any = SimpleNamespace(
        inside_reduction=inside_reduction, args=SimpleNamespace(inplace_buffers={"in_place": 1}),
        stores=SimpleNamespace(writeline=lambda line: written.append(line.line)),
    )  # fmt: skip
    TritonKernel.store(kernel, name, 0, "x")  # type: ignore[arg-type]
    waits = ["tl.debug_barrier()"] if inside_reduction and name == "in_place" else []
    assert written == [*waits, f"{name} = x"]
