"""Write a vmap over pointwise code as the same code on tensors that broadcast.

Masks are made so, and are then read like any other: a function of one query and one key, mapped over all.  Inside the
vmap every value is one element; outside, the batch of each nested vmap becomes an axis of its own, of size 1 where a
value does not depend on it.  A vmap over anything else stays as it is, and so does all that lies in it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.fx.bodies import bodies
from fastft.rewriter.fx.editing import annotate_like, infer_requires_grad
from fastft.rewriter.fx.effects import maybe_mutated_args, transform_spans
from fastft.rewriter.fx.metadata import name_of, same_strides

_POINTWISE = frozenset(
    [
        "abs", "add", "and", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "clone", "detach", "div", "eq",
        "floor_divide", "ge", "gt", "invert", "le", "logical_and", "logical_not", "logical_or", "logical_xor", "lt",
        "maximum", "minimum", "mod", "mul", "ne", "neg", "new_full", "new_ones", "new_zeros", "not", "or", "remainder",
        "sub", "tensor", "to", "truediv", "where", "xor",
    ]
)  # fmt: skip
_COUNTED = re.compile("_(add|remove)_batch_dim|_vmap_(in|de)crement_nesting|lazy_load_decompositions")


def broadcast(gm: GraphModule) -> None:
    """Rewrite each vmap of a graph and its bodies that is made of pointwise code alone."""
    for body in bodies(gm):
        for span in transform_spans(body.graph):
            try:
                _Span(span).rewrite()
            except Declined:
                continue


class _Span:
    """The nodes from the beginning of a vmap to its end.

    levels: of the vmaps, the outermost first; values: what stands for each node, of one axis a level or of none.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes, self.graph = list(nodes), nodes[0].graph
        self.levels: list[Any] = [node.args[2] for node in nodes if name_of(node.target) == "_add_batch_dim"]
        self.values: dict[Node, Node] = {}
        self._sizes: dict[Node, list[Any]] = {}  # of values that have got some of their axes again
        self.made: list[Node] = []

    def rewrite(self) -> None:
        """Rewrite the span.  Raises Declined, and then leaves the graph as it was."""
        try:
            results = self._results()
        except Exception:
            for node in reversed(self.made):
                self.graph.erase_node(node)
            raise
        inside = set(self.nodes)
        for old, new in results.items():
            for user in [user for user in old.users if user not in inside]:
                user.replace_input_with(old, new)
        for node in reversed(self.nodes):
            self.graph.erase_node(node)

    def _results(self) -> dict[Node, Node]:
        """Return what stands for each result of the outermost vmap."""
        if len(set(self.levels)) != len(self.levels) or self.levels != sorted(self.levels):
            raise Declined("its levels are not nested one in another")
        results: dict[Node, Node] = {}
        for node in self.nodes:
            name = name_of(node.target)
            if name == "_add_batch_dim":
                self.values[node] = self._spread(node)
            elif name == "_remove_batch_dim":
                outer = self._collected(node)
                if outer is not None:
                    results[node] = outer
            elif not _COUNTED.fullmatch(name):
                self.values[node] = self._computed(node, name)
        inside = set(self.nodes)
        if any(user not in inside and node not in results for node in self.nodes for user in node.users):
            raise Declined("a value inside of it is used outside")
        return results

    def _add(
        self, op: str, target: Any, args: tuple, kwargs: dict[str, Any], like: Node, *, known: bool = False
    ) -> Node:  # fmt: skip
        """Add a call before the span.  known: it computes what ``like`` does."""
        with self.graph.inserting_before(self.nodes[0]):
            made = self.graph.create_node(op, target, args, kwargs)
        self.made.append(made)
        if not known:
            annotate_like(made, like)
            infer_requires_grad(made)
        else:
            made.meta = dict(like.meta)
        return made

    def _spread(self, node: Node) -> Node:
        """Put the batch of one level along that level's axis."""
        source, axis, level = node.args
        if not isinstance(source, Node) or source in self.values or value_of(source).dim() != 1 or axis != 0:
            raise Declined("it is mapped over more than single numbers")
        place = self.levels.index(level)
        index = (None,) * place + (slice(None),) + (None,) * (len(self.levels) - place - 1)
        return self._add("call_function", operator.getitem, (source, index), {}, node)

    def _computed(self, node: Node, name: str) -> Node:
        """Compute what a call does for one element for all of them.  Raises Declined for one that is not known."""
        if name == "aten.index":
            return self._indexed(node)
        if name.strip("_") not in _POINTWISE or maybe_mutated_args(node):
            raise Declined(f"{name} is not pointwise, or writes in place")
        if value_of(node).dim() != 0:
            raise Declined("it is more than one number, and so reads a tensor as a whole")
        args, kwargs = map_arg((node.args, node.kwargs), lambda argument: self.values.get(argument, argument))
        if self.values.keys().isdisjoint(node.all_input_nodes):  # it is the same outside
            return self._add(node.op, node.target, args, kwargs, node, known=True)
        return self._like(self._add(node.op, node.target, args, kwargs, node), node)

    def _indexed(self, node: Node) -> Node:
        """Look up one element of a tensor from outside."""
        source: Any = node.args[0]
        index: Any = node.args[1]
        whole = isinstance(source, Node) and source not in self.values and isinstance(index, (list, tuple))
        if not whole or not all(item in self.values for item in index) or len(index) != value_of(source).dim():
            raise Declined("it indexes otherwise than by one number an axis")
        places = tuple(self.values[item] for item in index)
        return self._like(self._add("call_function", operator.getitem, (source, places), {}, node), node)

    def _like(self, made: Node, node: Node) -> Node:
        """Check that types are promoted as for single numbers, which weigh less than axes."""
        if value_of(made).dtype != value_of(node).dtype:
            raise Declined("types would be promoted otherwise")
        return made

    def _collected(self, node: Node) -> Node | None:
        """Take note that a level has become an axis again; return the result where it is the outermost one."""
        source, level, size, axis = node.args
        place = self.levels.index(level)
        if not isinstance(source, Node) or source not in self.values:
            raise Declined("it returns what was made outside of it")
        sizes = [] if place == len(self.levels) - 1 else self._sizes.get(source)
        if axis != 0 or sizes is None:
            raise Declined("its results are put together otherwise")
        self._sizes[node] = [size, *sizes]
        self.values[node] = self.values[source]
        if place:
            return None
        # Of one axis a level, or of none, if it depends on no level.
        return self._placed(
            self._add("call_method", "expand", (self.values[source], *self._sizes[node]), {}, node), node
        )

    def _placed(self, made: Node, node: Node) -> Node:
        """Return a result that lies in memory as vmap's own."""
        if not same_strides(value_of(made), value_of(node)):
            made = self._add("call_method", "contiguous", (made,), {}, node)
        if not same_strides(value_of(made), value_of(node)):
            raise Declined("its result lies otherwise in memory")
        return made
