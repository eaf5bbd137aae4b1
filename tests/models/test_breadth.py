"""What people fine-tune: loss and gradients as in eager, how many graphs, which layers share a region, what is lifted.

A case says what is expected of it, breadth_today.py where that is not so yet: a test fails too when that changes.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fastft.rewriter.check import Check
from fastft.rewriter.report import by_layer
from fastft.rewriter.report.data import GraphReport
from models.breadth import LAYERS, Case, run
from models.breadth_adapters import ADAPTERS, BASES
from models.breadth_decoders import DECODERS
from models.breadth_heads import HEADS
from models.breadth_pictures import PICTURES
from models.breadth_today import TODAY

CASES = (*DECODERS, *ADAPTERS, *BASES, *PICTURES, *HEADS)


def cases() -> Iterator[Any]:
    for case in CASES:
        missing = case.missing()
        marks = [pytest.mark.skip(reason=f"{missing} is not installed")] if missing else []
        yield pytest.param(case, id=case.name, marks=[*marks, *([pytest.mark.slow] if case.slow else [])])


@pytest.mark.parametrize("case", cases())
@pytest.mark.filterwarnings("ignore")
def test_it_trains_as_in_eager_and_is_one_graph_of_regions(case: Case) -> None:
    found = run(case)
    assert found.right, f"{found}"
    assert_told(found, case)


@pytest.mark.filterwarnings("ignore")
def test_layers_that_one_trace_serves_with_two_masks_are_all_told_of() -> None:
    found = run(next(case for case in CASES if case.name == "Gemma 3"))
    assert [name for name, _ in found.layers if name != by_layer.ELSEWHERE] == [f"model.layers.* ×{LAYERS}"]


def test_what_is_not_so_is_said_of_what_there_is() -> None:
    assert TODAY.keys() <= {case.name for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


def assert_told(found: Check, case: Case) -> None:
    """What became of it is what its entry expects, but for today's exceptions."""
    exception = TODAY.get(case.name, {})
    today = replace(case, **exception)
    now, wanted = told(found), expected(case)
    line = {name: value for name, value in now.items() if value != wanted[name]}
    reasons = [*(graph.whole for graph in found.graphs if graph.whole), *(reason for reason, _ in found.breaks)]
    told_now = f"{case.name!r} in breadth_today.py, as it is now: {line}, because of {sorted(set(reasons))}\n{found}"
    if today.breaks:
        assert found.breaks, told_now
    else:
        assert now == expected(today), told_now
        assert all(getattr(today, name) != getattr(case, name) for name in exception), told_now
    assert all(any(part in reason for reason in reasons) for part in (today.whole, today.breaks) if part), told_now


def expected(case: Case) -> dict[str, Any]:
    """What a case tells, in the form of ``told``."""
    return {"graphs": case.graphs, "again": case.again, "shared": case.shared, "ops": set(case.ops.split())}


def told(found: Check) -> dict[str, Any]:
    """What a case tells of itself."""
    return {
        "graphs": len(found.graphs), "again": len(found.again), "shared": shared(found.graphs),
        "ops": set(ops_in_layers(found.graphs)),
    }  # fmt: skip


def shared(graphs: list[GraphReport]) -> int:
    """How many layers share a region."""
    return sum(region.calls for graph in graphs for region in graph.regions if by_layer.repeats(region))


def ops_in_layers(graphs: list[GraphReport]) -> Iterator[str]:
    for graph in graphs:
        for one in graph.lifted:
            if by_layer.layer_of(one.module):
                yield by_layer.op_of(one)
