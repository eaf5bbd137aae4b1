"""Tell whether layers compute the same of rows that are the same, and what they read of rows (prefixes.py)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors, operators, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.reasons import Reason
from fastft.rewriter.fx.effects import may_use_rng
from fastft.rewriter.fx.metadata import name_of, source_line
from fastft.rewriter.loss.logits import CASTS
from fastft.rewriter.report.data import RowsReport
from fastft.rewriter.rows.proof import RowSizes

EXAMPLE = 3  # keys, in the example: what is compiled is for any number
_ELEMENTWISE = frozenset((*CASTS, "clone", "contiguous", "alias", "add", "sub", "mul", "div", "truediv"))


def may_share(
    report: RowsReport | None, calls: Iterable[Mapping[str, Any]], inner: Iterable[GraphModule],
    after: Collection[Node], sizes: RowSizes,
) -> bool:  # fmt: skip
    """Return whether rows that are the same may be computed once; the report says why not.

    calls: the arguments of all attentions.  inner: bodies.  after: the calls of the layers and behind them.
    """
    nodes = [*after, *(node for body in inner for node in body.graph.nodes)]
    reason = _refusal(calls, nodes, after, sizes)
    if report is not None:
        report.unshared = reason
    return not reason


def _refusal(
    calls: Iterable[Mapping[str, Any]], nodes: Sequence[Node], after: Collection[Node], sizes: RowSizes
) -> str:
    if any(not call["causal"] or call["seed"] is not None for call in calls):
        return Reason("attention is not causal, or drops weights at random", "rows.unshared")
    for node in nodes:
        if may_use_rng(node) and not operators.is_higher_order(node.target):
            return Reason(f"{name_of(node.target)} draws for each row ({source_line(node)})", "rows.unshared")
    for node in read(after, sizes):
        if _looked_up(node, sizes) is None:
            return Reason(f"the gradient of {node.name} is one for each sequence", "rows.unshared")
    return ""


def compared(after: Collection[Node], sizes: RowSizes, besides: Collection[Node | None]) -> list[Node]:
    """List the rows that have to be equal where they are shared: what calls read, and numbers of what is trained."""
    found = read(after, sizes, besides)
    numbers = [number for node in found for number in _looked_up(node, sizes) or ()]
    return list(dict.fromkeys((*found, *numbers)))


def read(after: Collection[Node], sizes: RowSizes, besides: Collection[Node | None] = ()) -> list[Node]:
    """List the rows that calls read of others; besides: those that are known anyway."""
    operands = dict.fromkeys(operand for node in after for operand in node.all_input_nodes)
    return [
        node for node in operands
        if node not in after and node not in besides and isinstance(value_of(node), Tensor) and _by_rows(node, sizes)
    ]  # fmt: skip


def _by_rows(node: Node, sizes: RowSizes) -> bool:
    """Return whether a value has rows for each sequence, and not the same for all."""
    axes = sizes.axes(value_of(node))
    return "bs" in axes or ("b" in axes and "s" in axes)


def _looked_up(node: Node, sizes: RowSizes) -> list[Node] | None:
    """Return by which numbers rows that are trained were looked up, or None where their gradients end elsewhere too.

    Of equal numbers gradients are summed in the table anyway.  Rows of what is looked up may be copied, and scaled and
    added to by what is the same for all sequences.
    """
    if not value_of(node).requires_grad:
        return []
    if node.target is F.embedding and isinstance(number := node.args[0], Node):
        return [number]
    if name_of(node.target) not in _ELEMENTWISE:
        return None
    tensors = [one for one in node.all_input_nodes if isinstance(value_of(one), Tensor)]
    own = [one for one in tensors if {"b", "bs"}.intersection(sizes.axes(value_of(one)))]  # of each sequence
    if not any(value_of(one).requires_grad for one in tensors):
        return []  # made a leaf here, as trainers of checkpointed layers do: nobody reads its gradient
    found: list[Node] = []
    for one in own:
        numbers = _looked_up(one, sizes) if value_of(one).requires_grad else None
        if numbers is None:
            return None
        found += numbers
    return found


def copies_like(hidden: Tensor) -> Tensor:
    """Return an example of the numbers of rows that keys are copies of, int32, of a size that may be any."""
    length: Any = hidden.shape[1]
    count = symbolic.new_size(length, "copies", EXAMPLE)
    with fake_tensors.fake_mode_of([hidden]):
        return torch.empty(count, dtype=torch.int32, device=hidden.device)
