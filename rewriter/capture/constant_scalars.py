"""Inline the model's float constants, such as eps and LoRA's scale, under ``torch.compile(dynamic=True)``.

Dynamo then lifts them to graph inputs, like sizes, and no rule matches a norm whose eps may be any number.  Here they
become constants guarded by Dynamo, as without dynamic=True, until one of them is seen to change.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import SymFloat
from torch.fx import GraphModule, Node

from fastft.compat import dynamo
from fastft.compat.dynamo import SizeEntry
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx.bodies import body_of
from fastft.rewriter.fx.editing import replace_by_value

log = logging.getLogger("fastft")


def inline_constant_scalars(gm: GraphModule) -> None:
    """Replace numbers that had a single value so far by constants, in nested graphs too."""
    try:
        remembered = dynamo.remembered_sizes()
    except Exception as error:  # called without Dynamo, or by another torch: then numbers stay as they are
        log.debug("numbers are left to torch: %s", error)
        return
    _inline(gm, [node for node in gm.graph.find_nodes(op="placeholder") if _has_one_value(node, remembered)], {})


def _has_one_value(placeholder: Node, remembered: Mapping[str, SizeEntry]) -> bool:
    entry = remembered.get(dynamo.source_name(placeholder))
    return entry is not None and isinstance(entry.scalar, float)


def _inline(gm: GraphModule, holders: Collection[Node], constants: dict[Node, float]) -> None:
    """Replace scalars by constants in one graph and its bodies.

    holders: inputs that are tensors of one number, which ``item`` takes out; constants: inputs that are numbers.
    """
    items = [node for node in gm.graph.find_nodes(op="call_method", target="item") if node.args[0] in holders]
    items = [node for node in items if isinstance(value_of(node), SymFloat)]
    constants = constants | {node: float(value_of(node)) for node in items}  # this is what makes Dynamo guard them
    if not holders and not constants:
        return
    for node in gm.graph.nodes:
        if (body := body_of(gm, node)) is not None:
            placeholders = body.graph.find_nodes(op="placeholder")
            pairs = list(zip(placeholders, node.args[len(node.args) - len(placeholders) :], strict=True))
            inner = [placeholder for placeholder, argument in pairs if argument in holders]
            _inline(
                body,
                inner,
                {placeholder: constants[argument] for placeholder, argument in pairs if argument in constants},
            )
    for node, value in constants.items():
        replace_by_value(node, value)
    for node in items:
        gm.graph.erase_node(node)
    gm.recompile()
