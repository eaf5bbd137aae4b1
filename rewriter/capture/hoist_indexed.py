"""Give every layer its own part of a tensor where the tensor was made, and not where the layer is called.

A model that makes one tensor for all layers takes ``x[:, :, 7]`` for the eighth.  The number differs from layer to
layer, and so do the parts' places in memory: no two layers would be equal.  Each part becomes a tensor of its own
before the layers; all of them together take as much memory as the one that they are cut from.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx.editing import annotate_like, between, infer_requires_grad
from fastft.rewriter.fx.effects import all_mutated, check_mutation, may_alias, switches_mode, transformed
from fastft.rewriter.fx.metadata import layer_of, module_path


def hoist(gm: GraphModule) -> None:
    """Move parts of a tensor that different layers take by different numbers to where the tensor was made."""
    under_transforms, mutated = transformed(gm.graph), functools.cache(all_mutated)
    for node in list(gm.graph.nodes):
        parts = {user: number for user in node.users if (number := _place(user, node)) is not None}
        layers = {layer_of(module_path(user)) for part in parts for user in part.users}.difference([""])
        apart = len(set(parts.values())) > 1 and len(layers) > 1 and not layer_of(module_path(node))
        if not apart or not under_transforms.isdisjoint((node, *parts)) or _is_shared(gm, node, mutated(gm)):
            continue
        if any(map(switches_mode, between(node, max(parts)))):
            continue
        after = node if node.op != "placeholder" else list(gm.graph.find_nodes(op="placeholder"))[-1]
        for part in sorted(parts, key=parts.__getitem__, reverse=True):
            after.append(part)
            with gm.graph.inserting_after(part):
                own = gm.graph.call_method("clone", (part,))
            annotate_like(own, part)
            infer_requires_grad(own)
            part.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)


def _place(part: Node, of: Node) -> int | None:
    """Return the number by which a node takes a part of another along one axis, or None."""
    if part.target is not operator.getitem or part.args[0] is not of or not isinstance(value_of(of), Tensor):
        return None
    index: Any = part.args[1] if isinstance(part.args[1], tuple) else (part.args[1],)
    numbers = [item for item in index if type(item) is int]
    plain = all(type(item) is int or item is Ellipsis or item == slice(None) for item in index)
    return numbers[0] if plain and len(numbers) == 1 else None


def _is_shared(gm: GraphModule, node: Node, targets: Sequence[Any]) -> bool:
    """Tell whether a tensor's memory is written to, or a part of it is returned: a copy would be seen to be one.

    targets: what the graph may write to.
    """
    returned = [output for output in gm.graph.output_node().all_input_nodes if output is not node]
    return check_mutation([node]) is not None or any(may_alias(node, other) for other in (*returned, *targets))
