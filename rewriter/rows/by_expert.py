"""Follow rows that are sorted by expert, between the products of a mixture of experts, and show that they stay apart.

A token has a row for each expert that it chose, so that such rows lie along no axis of the batch.  They come from an
expert_linear that gathers, go through calls that take each row by itself, and end in one that sums those of each token;
all in the order of one expert_order.  What that returns are numbers of rows, which only expert_linear may read.  Which
values are sorted is followed from call to call, as with one expert a token they are no more rows than tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors, operators, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.kernels import REGISTRY
from fastft.reasons import Declined
from fastft.rewriter.fx.bodies import bodies

if TYPE_CHECKING:
    from fastft.rewriter.rows.proof import RowSizes

OPS = frozenset(("fastft::expert_order", "fastft::expert_linear"))
_OPS = _ORDER, _LINEAR = torch.ops.fastft.expert_order, torch.ops.fastft.expert_linear
_ROUTING = ("order", "place", "ends")  # the results of expert_order, as expert_linear takes them
Orders = Mapping[Node, Node]  # what is sorted by expert, to the expert_order that tells how


def orders(gm: GraphModule) -> dict[Node, Node]:
    """Find all that is sorted by expert, the results of expert_order included."""
    found: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node.target == _ORDER:
            found[node] = node
        elif node.target == _LINEAR:
            continue  # its results are looked at one by one
        elif _takes_result(node, _LINEAR):
            call = _arguments(node.args[0])
            order = found.get(call["order"])
            if order is not None and (node.args[1] != 0 or call["top_k_weights"] is None):
                found[node] = order
        elif order := next((found[one] for one in node.all_input_nodes if one in found), None):
            found[node] = order
    return found


def elements(gm: GraphModule) -> Iterator[int]:
    """Count the elements, in the example, of the rows that products read: a token has one for each of its experts."""
    for node in (node for body in bodies(gm) for node in body.graph.nodes):
        if node.target == _LINEAR:
            call = _arguments(node)
            yield symbolic.hint(value_of(call["order"]).numel() * value_of(call["x"]).shape[-1])


def check_place(node: Node, found: Orders, inside: Set[Node]) -> None:
    """Check that what is sorted is made and read by the calls inside, not by bodies.  Raises Declined."""
    for one in (node, *node.all_input_nodes):
        is_sorted = one in found or one.target == _LINEAR
        if is_sorted and not all(user in inside and _is_plain_call(user) for user in (one, *one.users)):
            raise Declined("rows sorted by expert are read elsewhere", "rows.mixed")


def is_known(node: Node) -> bool:
    """Return whether this is a call of one of OPS, or takes one of its results."""
    return node.target in _OPS or _takes_result(node, *_OPS)


def _is_plain_call(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and not operators.is_higher_order(node.target)


def _takes_result(node: Any, *ops: Any) -> bool:
    """Return whether this takes a result out of what one of these ops returns."""
    return isinstance(node, Node) and node.target is getitem and getattr(node.args[0], "target", None) in ops


def check_known(node: Node, found: Orders, sizes: RowSizes) -> None:
    """Check a call that is_known: that it sorts the batch's rows, or reads these or sorted ones.  Raises Declined."""
    if node.target is getitem:
        return
    call, tokens = _arguments(node), ["s" if sizes.batch == 1 else "bs", ""]

    def by_tokens(operand: Any) -> bool:
        return operand not in found and sizes.axes(value_of(operand)) == tokens

    if node.target == _ORDER:
        known = by_tokens(call["top_k_index"])
    else:
        order, routing = found.get(call["order"]), [call[name] for name in _ROUTING]
        routed = [_takes_result(one, _ORDER) and one.args == (order, at) for at, one in enumerate(routing)]
        x, top_k_weights = call["x"], call["top_k_weights"]
        others = [one for name, one in call.items() if name not in (*_ROUTING, "x", "top_k_weights")]
        known = (
            order is not None and all(routed)
            and (by_tokens(x) if call["gathers"] else found.get(x) == order)
            and (top_k_weights is None or by_tokens(top_k_weights))
            and not any(_has_rows(one, found, sizes) for one in _nodes(others))
        )  # fmt: skip
    if not known:
        raise Declined(f"{node.target} may mix rows", "rows.mixed")


def sizes_of(node: Node, found: Orders, sizes: RowSizes) -> RowSizes:
    """Return the sizes of the rows that a call computes: of sorted ones as of one sequence, where it reads any.

    Raises Declined where it reads others too.
    """
    if node not in found:
        return sizes
    for one in node.all_input_nodes:
        if found.get(one) != found[node] if one in found else _has_rows(one, found, sizes):
            raise Declined("rows in one order are computed with rows in another", "rows.mixed")
        if one.target == _ORDER or _takes_result(one, _ORDER):
            raise Declined("it computes with the order of rows", "rows.mixed")
    rows = value_of(found[node])[0].shape[0]
    return sizes._replace(batch=1, length=symbolic.expression(rows))


def _has_rows(node: Node, found: Orders, sizes: RowSizes) -> bool:
    value = value_of(node)
    by_size = symbolic.is_symbolic(value) and sizes.depends(symbolic.expression(value))
    return node in found or by_size or sizes.holds(value)


def _arguments(node: Node) -> dict[str, Any]:
    entry = REGISTRY[f"fastft::{node.target.__name__}"]  # type: ignore[union-attr]
    return dict(zip(entry.parameters, entry.complete(node.args, node.kwargs), strict=True))


def _nodes(arguments: Any) -> list[Node]:
    return [one for one in fake_tensors.leaves(arguments) if isinstance(one, Node)]
