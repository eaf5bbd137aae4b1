"""Report the experts that an op computes, and those that are computed in another way.

The ops are in the graph from the start: what is traced in place of the experts calls them, and says why where it does
not (fastft/compat/expert_substitutes.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fastft.compat import operators
from fastft.compat.expert_substitutes import RULE
from fastft.reasons import Reason
from fastft.rewriter.context import Context
from fastft.rewriter.fx.metadata import place_of
from fastft.rewriter.report.data import Lifted, NearMiss

OPS = ("expert_order", "expert_linear")
_GROUPED = tuple(one for one in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if one)
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
    grouped = operators.is_operator(node.target) and str(node.target).startswith("transformers.grouped_mm")
    if grouped or node.target in _GROUPED:
        return LEFT
    return ADDED if node.target is torch.baddbmm else None
