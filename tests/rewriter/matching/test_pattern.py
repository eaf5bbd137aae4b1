"""How references are traced."""

import operator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastft.rewriter.matching.pattern import capture


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
