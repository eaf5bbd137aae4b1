"""Heads and their losses without Dynamo: what needs no logits any more, with the values and gradients that it had."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lifting import calls, compiled, frozen, normal, ops
from recording import record
from torch import Tensor
from torch.fx import GraphModule

from fastft.rewriter.context import Context
from fastft.rewriter.loss.head import Head, Logits, run
from fastft.rewriter.loss.logits import follow
from fastft.rewriter.loss.losses import Deferred, lift
from fastft.rewriter.options import Options

V, H = 13, 6
HIDDEN, WEIGHT, BIAS = normal(2, 5, H), normal(V, H, seed=1), normal(V, seed=2)
LABELS = torch.tensor([[3, 0, 7, -100, 12], [1, 1, -100, 4, 0]])
CLASSES = LABELS.clamp_min(0)
TEACHER = frozen(2, 5, V, seed=3).log_softmax(-1)
FEW = Options(logits_memory=3 * 64 * 4)  # bytes of a few rows of logits


def lifted(function: Callable[..., Any], hidden: Tensor = HIDDEN, weight: Tensor = WEIGHT) -> GraphModule:
    """A function of hidden states and a weight, its losses lifted."""
    gm, recording = record(function, hidden, weight)
    lift(gm, Context(FEW))
    gm.graph.lint()
    gm.recompile()
    given = [hidden, weight, *recording.inputs[2:]]
    found, expected = gm(*given)[0], function(hidden, weight)
    torch.testing.assert_close(found, expected)
    upstream = torch.linspace(0.5, 2, expected.numel()).view_as(expected)
    mine, other = (torch.autograd.grad(one, (hidden, weight), upstream) for one in (found, expected))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    return gm


def flat(logits: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, V), LABELS.view(-1), **more)


def shifted(logits: Tensor, **more: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, V).float(), LABELS[:, 1:].reshape(-1), **more)


def gathered(logits: Tensor) -> Tensor:
    return torch.gather(logits[:, :-1].log_softmax(-1), 2, CLASSES[:, 1:].unsqueeze(2)).squeeze(-1)


def divergence(logits: Tensor, reduction: str) -> Tensor:
    return F.kl_div(F.log_softmax(logits.float(), -1), TEACHER, log_target=True, reduction=reduction)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": flat,
    "sum": lambda y: flat(y, reduction="sum"),
    "each": lambda y: flat(y, reduction="none").view(2, 5).sum(0),
    "shifted": shifted,
    "shifted by the last tokens": lambda y: F.cross_entropy(y[:, 1:].reshape(-1, V), LABELS[:, :-1].reshape(-1)),
    "another ignored label": lambda y: F.cross_entropy(y.view(-1, V), CLASSES.view(-1), ignore_index=1),
    "smoothed": lambda y: flat(y, label_smoothing=0.2),
    "classes second": lambda y: F.cross_entropy(y.transpose(1, 2), LABELS),
    "nll_loss": lambda y: F.nll_loss(y.view(-1, V).log_softmax(-1), LABELS.view(-1)),
    "scaled": lambda y: flat(y * 0.25),
    "divided": lambda y: flat(y / 4.0),
    "scaled by a number ahead": lambda y: flat(3.0 * y),
    "capped": lambda y: flat(torch.tanh(y / 2.0) * 2.0),
    "scaled and capped": lambda y: flat(torch.tanh(y * 3.0) * 1.5),
    "capped and divided": lambda y: flat(torch.tanh(y) / 0.5),
    "gathered": gathered,
    "a token": lambda y: F.cross_entropy(y[:, 2], CLASSES[:, 2]),
    "the last tokens": lambda y: F.cross_entropy(y[:, -2:].reshape(-1, V), LABELS[:, -2:].reshape(-1)),
    "tokens by number": lambda y: F.cross_entropy(
        y[:, torch.tensor([4, 0])].flatten(0, 1), CLASSES[:, [4, 0]].flatten()
    ),
    "narrowed": lambda y: F.cross_entropy(y.narrow(1, 1, 3).flatten(0, 1), LABELS[:, 1:4].flatten()),
    "divergence": lambda y: divergence(y, "sum"),
    "divergence of a batch": lambda y: divergence(y, "batchmean"),
    "mean divergence": lambda y: divergence(y, "mean"),
    "divergence of each": lambda y: divergence(y, "none").sum(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_logits(name: str) -> None:
    gm = lifted(lambda hidden, weight: LOSSES[name](F.linear(hidden, weight)))
    assert len(ops(gm)) == 1
    assert not {"linear", "cross_entropy", "log_softmax", "kl_div"}.intersection(calls(gm))


HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bias": lambda hidden, weight: F.linear(hidden, weight, BIAS),
    "bias added": lambda hidden, weight: F.linear(hidden, weight) + BIAS,
    "bias of a row added": lambda hidden, weight: F.linear(hidden, weight) + BIAS.view(1, V),
    "bias ahead": lambda hidden, weight: torch.add(BIAS.view(1, 1, V), hidden @ weight.T),
    "bias added, then scaled": lambda hidden, weight: (F.linear(hidden, weight) + BIAS) * 0.5,
    "by matmul": lambda hidden, weight: hidden @ weight.T,
    "by a transpose": lambda hidden, weight: hidden @ weight.transpose(0, 1),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    assert ops(lifted(lambda *given: flat(HEADS[name](*given)))) == ["linear_cross_entropy"]


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "classes weighted": lambda y: flat(y, weight=torch.ones(V)),
    "tokens as classes": lambda y: F.cross_entropy(y, F.one_hot(CLASSES[:, :1], V).float().expand(2, 5, V)),
    "over the tokens": lambda y: y.log_softmax(1).sum(),
    "over the tokens, gathered": lambda y: torch.gather(y.log_softmax(1), 2, CLASSES.unsqueeze(2)).sum(),
    "some classes": lambda y: F.cross_entropy(y[..., :5].reshape(-1, 5), CLASSES.view(-1) % 5),
    "classes the other way round": lambda y: F.cross_entropy(y.flip(-1).view(-1, V), LABELS.view(-1)),
    "rows and classes mixed": lambda y: F.cross_entropy(y.view(V, -1).T, CLASSES.view(-1)),
    "capped twice": lambda y: flat(torch.tanh(torch.tanh(y))),
    "added to": lambda y: flat(y + 1.0),
    "two biases": lambda y: flat(y + BIAS + BIAS),
    "scaled, then a bias": lambda y: flat(y * 0.5 + BIAS),
    "a multiple of a bias": lambda y: flat(torch.add(y, BIAS, alpha=2)),
    "a bias for all classes": lambda y: flat(y + BIAS[:1]),
    "a bias for each row": lambda y: flat(y + TEACHER),
    "a bias for each sequence": lambda y: flat(y + TEACHER[:, :1]),
    "a wider bias": lambda y: flat(y.half() + BIAS),
    "itself": lambda y: flat(y + y),
    "used otherwise too": lambda y: flat(y) + y.square().sum(),
    "other target": lambda y: F.kl_div(y.log_softmax(-1), TEACHER.exp(), reduction="sum"),
    "log-probabilities as logits": lambda y: flat(y.log_softmax(-1) * 2.0),
    "each gathered twice": lambda y: torch.gather(y.log_softmax(-1), 2, CLASSES.unsqueeze(2).expand(2, 5, 2)).sum(),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_needs_its_logits_keeps_them(name: str) -> None:
    assert ops(lifted(lambda hidden, weight: KEPT[name](F.linear(hidden, weight)))) == []


def test_a_write_to_what_logits_are_made_of() -> None:
    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden * 1
        logits = F.linear(rows, weight)
        rows.data.add_(1)
        return flat(logits)

    gm, recording = record(function, HIDDEN.detach(), WEIGHT.detach())
    lift(gm, Context(FEW))
    assert ops(gm) == []
    gm, recording = record(lambda *given: flat(F.linear(*given)), HIDDEN, WEIGHT)
    loss = next(node for node in gm.graph.nodes if "cross_entropy" in str(node.target))
    with gm.graph.inserting_before(loss):
        gm.graph.call_function(torch._C._set_grad_enabled, (True,))
    lift(gm, Context(FEW))
    assert ops(gm) == []
    assert len(recording.inputs) == 3


def test_nothing_is_lifted_of_logits_that_are_returned() -> None:
    gm, _ = record(lambda hidden, weight: (flat(F.linear(hidden, weight)), F.linear(hidden, weight)), HIDDEN, WEIGHT)
    lift(gm, Context(FEW))
    assert ops(gm) == ["linear_cross_entropy"]  # the second product is another head, whose logits nothing reads
    gm, _ = record(lambda hidden, weight: (lambda y: (flat(y), y))(F.linear(hidden, weight)), HIDDEN, WEIGHT)
    lift(gm, Context(FEW))
    assert ops(gm) == []


def test_logits_are_not_computed_later_where_nothing_says_that_they_are_logits() -> None:
    """Neither a loss nor an embedding of as many tokens."""
    deferred: list[Deferred] = []
    gm, _ = record(F.linear, HIDDEN, WEIGHT)
    lift(gm, Context(FEW, deferred=deferred))
    assert (calls(gm), deferred) == (["linear"], [])
    gm, _ = record(lambda hidden, weight: (lambda y: (flat(y), y))(F.linear(hidden, weight)), HIDDEN, WEIGHT)
    lift(gm, Context(FEW, deferred=deferred))
    assert (ops(gm), len(deferred)) == (["linear_cross_entropy"], 1)


def test_which_gradients_forward_computes() -> None:
    """Sums over rows cannot be scaled by row afterwards."""
    for hidden, weight, reduction, expected in (
        (HIDDEN, WEIGHT, "mean", [True, True]), (HIDDEN.detach(), WEIGHT, "sum", [False, True]),
        (HIDDEN, WEIGHT, "none", [False, False]), (HIDDEN, WEIGHT.detach(), "none", [True, False]),
    ):  # fmt: skip
        gm, _ = record(lambda *given: flat(F.linear(*given), reduction=reduction), hidden, weight)  # noqa: B023
        lift(gm, Context(FEW))
        (op,) = gm.graph.find_nodes(op="call_function", target=torch.ops.fastft.linear_cross_entropy)
        assert op.args[-1] == [*expected, False, False, False]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(V,), (1, V)], ids=str)
def test_a_bias_that_is_added_to_the_product(trained: bool, shape: tuple[int, ...]) -> None:
    """BART's, a buffer: what is returned and read later has it too."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(V, H)
            self.bias = torch.nn.Parameter(frozen(*shape, seed=3), requires_grad=trained)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            logits = F.linear(self.embedding(ids), self.embedding.weight) + self.bias
            return flat(logits), logits

    module, captures = Module(), []
    run = compiled(module, captures, lazy=True)
    found = []
    for one in (run, module):
        loss, logits = one(CLASSES)
        gradients = torch.autograd.grad(
            loss + logits.square().mean(), [p for p in module.parameters() if p.requires_grad]
        )
        found.append([loss, logits + 0.0, *gradients])
    assert ops(captures[0][0]) == ["linear_cross_entropy"]
    assert len(captures[0][1].deferred) == 1
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_bias_that_is_written_to_afterwards() -> None:
    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        bias = BIAS.detach() * 1
        logits = F.linear(hidden, weight) + bias.view(1, V)
        bias.data.add_(1)
        return flat(logits)

    gm, _ = record(function, HIDDEN, WEIGHT)
    lift(gm, Context(FEW))
    assert ops(gm) == []


MOVED = (("getitem", (..., slice(None))), ("getitem", (0,)), ("view", -1, V), ("flatten", 0, 1), ("unsqueeze", 0))
CHANGED = (
    ("getitem", (..., slice(0, 5))), ("getitem", (0, 0, 3)), ("getitem", (..., None)), ("view", V, -1), ("flatten",),
    ("unsqueeze", -1), ("squeeze", -1), ("select", -1, 0), ("narrow", 2, 0, V), ("transpose", 0, 2), ("div", 0),
    ("to", torch.int64), ("log_softmax", 1), ("add", 1.0),
)  # fmt: skip


@pytest.mark.parametrize(("name", "given"), [(name, given) for name, *given in (*MOVED, *CHANGED)])
def test_logits_are_followed_or_not(name: str, given: list[Any]) -> None:
    """A call on logits is the same call on the hidden states, or none that is known."""
    head = Head(WEIGHT, None, V, H, torch.float32, torch.float32)
    logits = Logits(HIDDEN, head, torch.float32, (True,) * 5)
    found = follow(name, logits, given, {}, run)
    if (name, *given) in CHANGED:
        assert found is None
        return
    y = F.linear(HIDDEN, WEIGHT)
    expected = y[given[0]] if name == "getitem" else getattr(torch.Tensor, name)(y, *given)
    assert found is not None
    assert tuple(found.shape) == expected.shape
    torch.testing.assert_close(found.compute(), expected)
