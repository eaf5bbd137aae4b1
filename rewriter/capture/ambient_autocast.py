"""Take autocast out of a graph that is all inside of it, and have the compiled graph called in it instead.

Trainers put autocast around a model's forward, where Dynamo traces it: the graph begins with it and ends with it.
Layers that are compiled by themselves have to begin and end in one mode, which is then that of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.fx import GraphModule, Node

from fastft.compat import aot, operators
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.metadata import name_of

_IN_ANY_MODE = frozenset(("to", "float", "half", "bfloat16", "double", "type_as", "getitem", "view", "detach"))


def take_out(gm: GraphModule) -> list[tuple[Any, ...]]:
    """Take the autocasts that are around all of a graph out of it; return their arguments, the outermost first."""
    modes: list[tuple[Any, ...]] = []
    while (pair := _around(gm)) is not None:
        begin, end = pair
        modes.append(begin.args)
        gm.graph.erase_node(end)
        gm.graph.erase_node(begin)
    if modes:
        gm.recompile()
    return modes


@contextmanager
def entered(modes: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    """Enter these autocasts, for forwards alone: a backward runs in the mode in which it is called."""
    with ExitStack() as stack:
        if modes:
            stack.enter_context(aot.backward_without_autocast())
        for mode in modes:
            stack.enter_context(autocast.context(*mode))
        yield


def called_within(modes: Sequence[tuple[Any, ...]], compiled: Callable) -> Callable:
    """Return a function that calls another one in these autocasts."""
    if not modes:
        return compiled

    def call(*inputs: Any) -> Any:
        with entered(modes):
            return compiled(*inputs)

    return call


def _around(gm: GraphModule) -> tuple[Node, Node] | None:
    """Return where an autocast begins and ends, if nothing outside of it depends on the mode; else None."""
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    if not nodes or nodes[0].target != operators.ENTER_AUTOCAST or len(nodes[0].args) != 4:
        return None
    begin, ends = nodes[0], list(nodes[0].users)
    if len(ends) != 1 or ends[0] not in nodes:
        return None
    behind = nodes[nodes.index(ends[0]) + 1 :]
    return (begin, ends[0]) if all(name_of(node.target) in _IN_ANY_MODE for node in behind) else None
