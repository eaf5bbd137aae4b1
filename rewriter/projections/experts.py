"""Report the experts that an op computes, and those that are computed in another way.

The ops are in the graph from the start: what is traced in place of the experts calls them, and says why where it does
not (fastft/compat/expert_substitutes.py).
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fastft.compat import expert_substitutes, operators
from fastft.compat.expert_substitutes import RULE
from fastft.reasons import Reason
from fastft.rewriter.context import Context
from fastft.rewriter.fx.metadata import place_of
from fastft.rewriter.report.data import Lifted, NearMiss

OPS = ("expert_order", "expert_linear")
LEFT = Reason("its experts are not transformers' own, or are sharded, or hold their weights otherwise", "experts.left")
ADDED = Reason("an adapter is added to a weight of experts before the product", "experts.added")


def note(gm: GraphModule, context: Context) -> None:
    """Add to the report which experts of one graph are computed by the op, and which are not."""
    for node in gm.graph.nodes:
        place = place_of(node)
        if node.target is torch.ops.fastft.expert_linear:
            context.report.lifted.append(Lifted(RULE, *place))
        elif (reason := _reason(node)) is not None:
            refusal = context.refusal(RULE, place[0], *OPS)
            context.report.near_misses.append(NearMiss(RULE, *place, refusal or reason))


def _reason(node: Node) -> Reason | None:
    """Return why the op does not compute experts where this node does; None for any other node."""
    if node.op != "call_function":
        return None
    if operators.is_grouped_product(node.target):
        return LEFT
    is_delta = node.target is torch.baddbmm and expert_substitutes.__file__ in (node.meta.get("stack_trace") or "")
    return ADDED if is_delta else None
