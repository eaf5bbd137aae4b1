"""Numbers of the model under dynamic=True: constants, until one was seen to change."""

from collections import Counter, deque
from collections.abc import Callable

import pytest
import torch
from models.families import FAMILIES, batch, build, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.rewriter import backend
from fastft.rewriter.capture import constant_scalars
from fastft.rewriter.report import history

OPTIONS = {"lower": "eager", "strict": True}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(history, "_graphs", deque(maxlen=history.LIMIT))


class Scaled(nn.Module):
    """A norm of its own eps, times a number; in a checkpoint or not."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.scale = nn.Parameter(torch.randn(16)), 1e-3, 2.0
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.scale

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        inside = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return inside * factor


def check(model: nn.Module, compiled: Callable, *more: float) -> None:
    """Results and gradients as the model itself has them."""
    x = torch.randn(3, 5, 16, requires_grad=True)
    results = [function(x, *more) for function in (compiled, model)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(one.square().sum(), [x, *model.parameters()]) for one in results]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_number_is_a_constant_until_it_changes(checkpointed: bool) -> None:
    model = Scaled(checkpointed)
    compiled = torch.compile(model, backend="fastft", options=OPTIONS, dynamic=True)
    for scale in (2.0, 2.0, 3.0, 4.0, 5.0, 2.0):
        model.scale = scale
        check(model, compiled)
    graphs = fastft.compilations().graphs
    assert [len(graph.lifted) for graph in graphs] == [1, 1], "eps has not changed"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_argument_that_changes_is_an_input(checkpointed: bool) -> None:
    model = Scaled(checkpointed)
    compiled = torch.compile(model, backend="fastft", options=OPTIONS, dynamic=True)
    for factor in (0.5, 0.25, 3.0, 4.0, 0.5):
        check(model, compiled, factor)
    assert len(fastft.compilations().graphs) == 2


def test_eps_that_changes_is_computed_with() -> None:
    model = Scaled()
    compiled = torch.compile(model, backend="fastft", options=OPTIONS, dynamic=True)
    for eps in (1e-3, 1.0, 2.0, 1e-3):
        model.eps = eps
        check(model, compiled)
    first, second = fastft.compilations().graphs
    assert (len(first.lifted), len(second.lifted)) == (1, 0)
    assert [miss.rule.split(".")[0] for miss in second.near_misses] == ["rms_norm"]


def test_a_failure_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a graph like no other")

    monkeypatch.setattr(constant_scalars, "_inline", fail)
    monkeypatch.setattr(backend, "_warned", set())
    compiled = torch.compile(Scaled(), backend="fastft", options={"lower": "eager"}, dynamic=True)
    with pytest.warns(RuntimeWarning, match="left a graph as it was"):
        compiled(torch.randn(3, 5, 16))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_as_much_is_lifted_and_fused_as_without(checkpointed: bool) -> None:
    model = build(FAMILIES[0], nf4=True, checkpoint=checkpointed, train_norms=True)
    losses, found = [], []
    for dynamic in (None, True):
        torch._dynamo.reset()
        before = len(fastft.compilations().graphs)
        compiled = torch.compile(model, backend="fastft", options=OPTIONS, dynamic=dynamic)
        losses.append(step(compiled, batch(padded=False), model).loss)
        graphs = fastft.compilations().graphs[before:]
        found.append(Counter(one.rule for graph in graphs for one in (*graph.lifted, *graph.fused)))
    torch.testing.assert_close(*losses)
    assert found[0] == found[1]
    assert found[0]["lora_linear.group"] == 8
