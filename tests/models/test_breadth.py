"""What people fine-tune: loss and gradients as in eager, how many graphs, which layers share a region, what is lifted.

What is told of a case is what is so today, exceptions with their reasons: a test fails too when one goes away.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from fastft.rewriter.check import Check
from fastft.rewriter.report import by_layer
from fastft.rewriter.report.data import GraphReport
from models.breadth import Case, run
from models.breadth_adapters import ADAPTERS, BASES
from models.breadth_decoders import DECODERS
from models.breadth_heads import HEADS
from models.breadth_pictures import PICTURES

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
    assert told(found) == {
        "graphs": case.graphs, "again": case.again, "shared": case.shared, "ops": set(case.ops.split()),
    }, f"{found}"  # fmt: skip
    assert bool(found.breaks) == bool(case.breaks)
    assert any(case.breaks in reason for reason, _ in found.breaks) or not case.breaks, found.breaks
    assert any(case.whole in graph.whole for graph in found.graphs if graph.whole) or not case.whole


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
