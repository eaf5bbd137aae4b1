"""Decide where the calls end that are run for live rows alone; what is behind them is run for all rows again.

It then reads zeros for rows that were left out.  That is what results of token statistics are for rows whose label does
not count, so that nothing changes where it reads nothing else of rows.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import torch
from torch.fx import GraphModule, Node

from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.fx.effects import mutated_args
from fastft.rewriter.rows import proof
from fastft.rewriter.rows.proof import RowSizes

_STATISTICS = torch.ops.fastft.linear_token_statistics
_LOSSES = (torch.ops.fastft.linear_cross_entropy, _STATISTICS)


def losses(nodes: Sequence[Node]) -> list[Node]:
    """List the calls that are given labels, of which some may not count."""
    return [node for node in nodes if node.target in _LOSSES]


def results(nodes: Sequence[Node]) -> dict[Node, None]:
    """List what is zero for rows whose label does not count."""
    selected = [node for node in nodes if node.target is operator.getitem and isinstance(node.args[0], Node)]
    return dict.fromkeys(node for node in selected if node.args[0].target == _STATISTICS)  # type: ignore[union-attr]


def behind_results(
    gm: GraphModule, after: Sequence[Node], zeros: Collection[Node], sizes: RowSizes
) -> tuple[list[Node], list[Node]]:
    """Divide calls behind the last of these results.

    Raises Declined where what is behind it reads anything else of rows, or may write.
    """
    last = max((number for number, node in enumerate(after) if node in zeros), default=len(after) - 1)
    before, rest = list(after[: last + 1]), list(after[last + 1 :])
    if any(mutated_args(gm, node) for node in rest):
        raise Declined("something is written to behind the layers", "rows.returned")
    behind = set(rest)
    for node in before:
        if node not in zeros and not behind.isdisjoint(node.users) and sizes.holds(value_of(node)):
            raise Declined(f"{node.name} is read behind the layers", "rows.returned")
    return before, rest


def at_the_first_unknown(
    gm: GraphModule, after: Sequence[Node], last: Node, sizes: RowSizes
) -> tuple[list[Node], list[Node]]:
    """Divide calls at the first behind the last layer that is not known to keep rows apart."""
    for position in range(after.index(last) + 1, len(after)):
        try:
            proof.check(gm, [after[position]], sizes)
        except Declined:
            return list(after[:position]), list(after[position:])
    return list(after), []
