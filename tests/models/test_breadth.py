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
from models.breadth import Case, run
from models.breadth_adapters import ADAPTERS, BASES
from models.breadth_decoders import DECODERS
from models.breadth_heads import HEADS
from models.breadth_pictures import PICTURES
from models.breadth_today import TODAY

ORDER = ("rms_norm", "layer_norm", "rotary", "attention", "glu", "lora", "lora_linear")
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


def test_what_is_not_so_is_said_of_what_there_is() -> None:
    assert TODAY.keys() <= {case.name for case in CASES}
    assert len({case.name for case in CASES}) == len(CASES)


def assert_told(found: Check, case: Case) -> None:
    """What became of it is what its entry expects, but for today's exceptions."""
    exception = TODAY.get(case.name, {})
    today = replace(case, **exception)
    now = told(found)
    ops = " ".join(op for op in ORDER if op in now["ops"])
    wanted = {"graphs": case.graphs, "again": case.again, "shared": case.shared}
    line = {name: value for name, value in now.items() if name in wanted and value != wanted[name]}
    line |= {"ops": ops} if now["ops"] != set(case.ops.split()) else {}
    reasons = [*(graph.whole for graph in found.graphs if graph.whole), *(reason for reason, _ in found.breaks)]
    assert now == {
        "graphs": today.graphs, "again": today.again, "shared": today.shared, "ops": set(today.ops.split()),
    }, f"in breadth_today.py now: {case.name!r}: {line}, and {reasons}\n{found}"  # fmt: skip
    assert all(getattr(today, name) != getattr(case, name) for name in exception), "no exception at all"
    assert bool(found.breaks) == bool(today.breaks), reasons
    for part in filter(None, (today.whole, today.breaks)):
        assert any(part in reason for reason in reasons), reasons


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
