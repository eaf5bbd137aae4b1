"""Strings that tell sizes: no graph is compiled for them, and they are right where they are read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastft.rewriter.report.history import recorded


def graphs(function: Callable, backend: Any = "fastft") -> int:
    """Compare with eager for several sizes; count the graphs."""
    torch._dynamo.reset()
    options = {"options": {"lower": "eager", "strict": True}} if backend == "fastft" else {}
    run = torch.compile(function, backend=backend, dynamic=True, **options)
    with recorded() as reports:
        for rows in (3, 5, 8):
            x = torch.arange(6.0 * rows).view(rows, 6)
            expected, actual = function(x), run(x)
            assert torch.equal(actual[0], expected[0])
            assert actual[1:] == expected[1:]
    return len(reports)


def unread(x: Tensor) -> tuple:
    message = f"{x.shape[0]} rows of {x.shape[1]:>4}, {x}"
    return (x * 2 if x.dim() == 2 else _wrong(message),)


def _wrong(message: str) -> Tensor:
    raise ValueError(message)


def test_a_message_that_nobody_reads() -> None:
    assert graphs(unread) == 1


def returned(x: Tensor) -> tuple:
    return x * 2, f"{x.shape[0]} rows of {x.shape[1]:>4}"


def looked_up(x: Tensor) -> tuple:
    times = {"3 rows": 7}.get(f"{x.shape[0]} rows", 2)
    return (x * times,)


def joined(x: Tensor) -> tuple:
    first = f"<{x.shape[0]}>"
    return x * 2, len(first), f"{first} and {x.shape[0] + 1}"


def behind_a_break(x: Tensor) -> tuple:
    message = f"{x.shape[0]} rows"
    torch._dynamo.graph_break()
    return x * 2, message


@pytest.mark.parametrize("function", [returned, looked_up, joined, behind_a_break])
def test_a_string_that_is_read(function: Callable) -> None:
    graphs(function)


def test_other_backends_trace_as_ever() -> None:
    counted: list[Any] = []
    graphs(unread, lambda gm, _: counted.append(gm) or gm)
    assert len(counted) > 1
