"""Masked statistics of tokens: rows under the mask need no logits, and nothing else about the graph changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lifting import Capture, compiled, ops
from torch import Tensor, nn

V, H = 131, 64
IDS, LABELS = (torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
LABELS[0, :3], LABELS[1, 6:] = -100, -100
OP = torch.ops.fastft.linear_token_statistics
NEVER = -(2**62)
FEW = 3 * 192 * 8  # bytes of three rows of logits


def statistics(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    return OP(hidden, weight, labels, bias, None, None, NEVER, 1.0, 0.0, 2**28, [False] * 5)


class Model(nn.Module):
    """An embedding, something to learn, a head, and what is asked of its predictions."""

    def __init__(self, asked: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False)
        self.asked = asked
        self.to(torch.float32 if asked in CAST else torch.float64)

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return self.asked(torch.tanh(self.inner(self.embedding(ids))), self.head.weight, labels)


def shifted(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """As TRL: positions whose next token has a label, two of the results."""
    hidden, labels = hidden[:, :-1], labels[:, 1:]
    mask = labels != -100
    found = statistics(hidden.reshape(-1, hidden.size(-1)), weight, labels.clamp(min=0).reshape(-1))
    return [found[at].view(mask.shape).masked_fill(~mask, 0) for at in (0, 1, 3, 5)]


def in_place(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Without a shift, by the mask of what does not count, of wider hidden states."""
    ignored = labels < 0
    found = statistics(hidden.double().flatten(0, 1), weight.double(), labels.masked_fill(ignored, 7).flatten())
    return [found[0].reshape(labels.shape).masked_fill(ignored, 0.0)]


def one_is_not_masked(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    mask = labels != -100
    found = statistics(hidden.reshape(-1, H), weight, labels.clamp(min=0).reshape(-1))
    return [found[0].view(mask.shape).masked_fill(~mask, 0), found[1].sum()]


def mask_of_numbers(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    mask = (labels != -100).long()
    found = statistics(hidden.reshape(-1, H), weight, labels.clamp(min=0).reshape(-1))
    return [found[0].view(mask.shape).masked_fill(torch.logical_not(mask), 0)]


def two_masks(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    masks = labels == -100, labels == 3
    found = statistics(hidden.reshape(-1, H), weight, labels.clamp(min=0).reshape(-1))
    return [found[at].view(labels.shape).masked_fill(mask, 0) for at, mask in enumerate(masks)]


def filled_by_one(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    ignored = labels == -100
    found = statistics(hidden.reshape(-1, H), weight, labels.clamp(min=0).reshape(-1))
    return [found[0].view(labels.shape).masked_fill(ignored, 1)]


def mask_of_the_results(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    found = statistics(hidden.reshape(-1, H), weight, labels.clamp(min=0).reshape(-1))
    entropy = found[1].view(labels.shape)
    return [entropy.masked_fill(found[0].detach().view(labels.shape) < -5.0, 0)]


def written_between(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """After what the op reads was made of it."""
    hidden = hidden.clone()
    flat = hidden.reshape(-1, H).double()
    hidden.exp_()
    mask = labels != -100
    found = statistics(flat, weight.double(), labels.clamp(min=0).reshape(-1))
    return [found[0].view(mask.shape).masked_fill(~mask, 0) + hidden.sum()]


def mask_written(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    mask = labels != -100
    found = statistics(hidden.reshape(-1, H), weight, labels.clamp(min=0).reshape(-1))
    mask[0] = False
    return [found[0].view(mask.shape).masked_fill(~mask, 0)]


def by_heads(hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Rows that are no rows of the batch: a reshape that merges other axes."""
    flat = hidden.transpose(0, 1).reshape(-1, H)
    mask = labels.t() != -100
    found = statistics(flat, weight, labels.t().clamp(min=0).reshape(-1))
    return [found[0].view(mask.shape).masked_fill(~mask, 0)]


CAST = (in_place, written_between)


def step(model: nn.Module, run: Callable) -> list[Tensor]:
    model.zero_grad()
    results = run(IDS, LABELS)
    weights = torch.linspace(0.5, 2.0, 18)
    sum((one * weights[: one.numel()].view(one.shape)).sum() for one in results if one.requires_grad).backward()
    return [*(one.detach() for one in results), *(one.grad for one in model.parameters() if one.requires_grad)]


def check(model: Model) -> Any:
    """The arguments of the op in the rewritten graph, whose results and gradients are eager's."""
    captures: list[Capture] = []
    expected = [one.clone() for one in step(model, model)]
    for mine, right in zip(step(model, compiled(model, captures, logits_memory=FEW)), expected, strict=True):
        torch.testing.assert_close(mine, right)
    ((gm, report),) = captures
    assert [one.rule for one in report.lifted] == ["linear_token_statistics"]
    assert ops(gm) == ["linear_token_statistics"]
    (node,) = gm.graph.find_nodes(op="call_function", target=OP)
    return node.args


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("asked", [shifted, in_place, by_heads])
def test_rows_under_the_mask_are_left_out(asked: Callable, trained: bool) -> None:
    """And what forward computes are gradients that backward can scale by row, if these are all."""
    model = Model(asked)
    model.head.requires_grad_(trained)
    hidden, _, labels, *_, ignored, scale, softcap, chunk_bytes, marks = check(model)
    assert ignored == -100
    shape = (9, 2) if asked is by_heads else (2, 9)
    assert hidden.meta["example_value"].shape == (*shape, H)
    assert labels.meta["example_value"].shape == shape
    assert (scale, softcap) == (1.0, 0.0)
    assert chunk_bytes == FEW
    assert marks == [not trained, *[False] * 4]


@pytest.mark.parametrize(
    "asked",
    [
        one_is_not_masked,
        mask_of_numbers,
        two_masks,
        filled_by_one,
        mask_of_the_results,
        written_between,
        mask_written,
    ],
)
def test_rows_that_may_count_stay(asked: Callable) -> None:
    hidden, *_, ignored, _, _, _, marks = check(Model(asked))
    assert ignored == NEVER
    assert hidden.meta["example_value"].dim() == 2
    assert marks == [False] * 5


def test_forward_computes_no_gradient_that_nobody_asks_for() -> None:
    model, captures = Model(shifted), []
    run = compiled(model, captures)
    with torch.no_grad():
        for mine, right in zip(run(IDS, LABELS), model(IDS, LABELS), strict=True):
            torch.testing.assert_close(mine, right)
    (node,) = captures[0][0].graph.find_nodes(op="call_function", target=OP)
    assert node.args[-1] == [False] * 5
