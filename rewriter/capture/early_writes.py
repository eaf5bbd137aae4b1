"""Move writes to the graph's inputs that nothing reads before them to the graph's beginning.

A layer that changes a parameter or a buffer of its own before it reads it can then be cut out like any other: what it
reads is as it was changed.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fastft.compat.fake_tensors import storage_key, tensors_in, value_of
from fastft.rewriter.fx.effects import is_pure, may_use_rng, mutated_args, switched, transformed


def move(gm: GraphModule) -> None:
    """Move the writes of one graph, in their order, as far as nothing before them can tell.

    Those that draw random numbers, or run under another grad or autocast mode than the graph begins in, stay.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    given = {storage_key(tensor) for node in inputs for tensor in tensors_in(value_of(node))}
    elsewhere = transformed(gm.graph) | switched(gm.graph.nodes)
    ahead = next((node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr")), None)
    read: set[int] = set()  # the storages that calls have read or written so far
    waiting: dict[Node, list[Node]] = {}  # views of inputs, and what they are made by
    moved: set[Node] = set()
    for node in list(gm.graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        keys = {storage_key(tensor) for one in node.all_input_nodes for tensor in tensors_in(value_of(one))}
        made_by = [*(step for one in node.all_input_nodes for step in waiting.get(one, ())), node]
        early = all(one in inputs or one in waiting for one in node.all_input_nodes)
        early = early and not may_use_rng(node) and node not in elsewhere
        early = early and node.op in ("call_function", "call_method")
        own = {storage_key(tensor) for tensor in tensors_in(value_of(node))}
        if early and is_pure(node) and own and own <= given & keys:  # a view, which reads nothing
            waiting[node] = made_by
            continue
        targets = {storage_key(one) for target in mutated_args(gm, node) for one in tensors_in(value_of(target))}
        if early and targets and targets <= given and read.isdisjoint(keys) and ahead is not None:
            for step in [one for one in dict.fromkeys(made_by) if one not in moved]:
                step.meta.pop("nn_module_stack", None)  # it is part of no layer any more
                if step is not ahead:
                    ahead.prepend(step)
                else:
                    ahead = ahead.next
                moved.add(step)
            read |= keys - targets
            continue
        read |= keys
