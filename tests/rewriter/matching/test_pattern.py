"""How references are traced."""

import operator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fastft.rewriter.matching.pattern import capture
from fastft.rewriter.matching.rule import Rule


def test_another_thread_may_use_modules_meanwhile() -> None:
    """torch.fx.Tracer takes every module's call and every parameter for its own while it traces, whoever asks."""
    linear, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    expected, met = linear(x), []

    def reference(hidden_states: Tensor) -> Tensor:
        with ThreadPoolExecutor() as others:
            met.append(others.submit(linear, x).result())
        return hidden_states * 2

    graph = capture(reference, x).graph
    torch.testing.assert_close(met, [expected])
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [operator.mul]


def test_a_tensor_without_dimensions_is_an_error() -> None:
    """And not a number, as which it would never match."""

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return weight * torch.rsqrt(x)

    with pytest.raises(ValueError, match=r"scaled: weight is a Tensor, so its dimensions belong into shapes"):
        Rule(scaled, None, torch.rsqrt, {"x": "... D"})
