"""The passes, in order, over a captured graph and the graphs nested in it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule

from fastft import patterns
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.attention import simplify
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.bodies import bodies
from fastft.rewriter.fx.effects import transformed
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.loss import losses
from fastft.rewriter.loss.losses import Deferred
from fastft.rewriter.matching.apply import fuse, lift
from fastft.rewriter.matching.rule import Rule
from fastft.rewriter.options import Options
from fastft.rewriter.projections import bnb4bit, merge
from fastft.rewriter.report.data import GraphReport

log = logging.getLogger("fastft")


def rewrite(
    gm: GraphModule, rules: Sequence[Rule] = patterns.LIFT, merging: Sequence[Rule] = patterns.FUSE,
    *, across_layers: bool = False, logits_bytes: int = Options().logits_bytes, deferred: list[Deferred] | None = None,
) -> GraphReport:  # fmt: skip
    """Rewrite ``gm`` and its bodies in place.  Raises what a pass raises.

    rules: what is lifted; merging: what is made of it.  across_layers: whether a layer's last addition may be merged
    with the next one's norm.  Two tensors instead of one go from layer to layer then, and the first and the last layer
    are of kinds of their own.  logits_bytes: see Options.  deferred: outputs that the graph does not compute any more
    are added here; without it they all stay.
    """
    report = GraphReport()
    report.nodes_before = _size(gm)
    done: set[int] = set()
    while body := next((one for one in bodies(gm) if id(one) not in done), None):  # what was lifted has no body left
        done.add(id(body))
        with autocast.around(gm, body):
            plain = not transformed(body.graph)
            if plain:
                bnb4bit.lift(body, report)
            lift(body, rules, report)
            if plain:
                merge.group(body, report)
            fuse(body, merging, report, across_layers=across_layers)
    simplify.simplify(gm, report)
    losses.lift(gm, report, logits_bytes, deferred)
    for body in bodies(gm):
        body.graph.lint()
        body.recompile()
        report.left.update(_computed(body))
    report.nodes_after = _size(gm)
    log.debug("%d nodes, then %d", report.nodes_before, report.nodes_after)
    return report


def _size(gm: GraphModule) -> int:
    return sum(len(body.graph.nodes) for body in bodies(gm))


def _computed(gm: GraphModule) -> Counter[str]:
    """How often each function that computes a tensor occurs."""
    return Counter(
        name_of(node.target)
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method") and isinstance(value_of(node), Tensor)
    )
