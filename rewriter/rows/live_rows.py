"""Prepare a graph to be run without the rows of its batch that nobody reads: padding, what follows the last label.

A row is live if its label counts, or if the attention of a live row may read it.  From the first layer on everything is
proven to keep rows apart (proof.py) but for attention, whose masks are ranges and ids, and the loss, to which rows
whose label does not count add nothing.  So the same code, which takes any batch and length, may be called with the live
rows alone, as one long sequence: attention is given the ranges of that sequence.  runtime/live_rows.py does so.

The graph is changed in two ways.  Labels are made ready before the layers, so that they tell which rows count.  And
every attention is given ranges and max_seqlen, whose value tells which of the ranges and ids have to be read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.kernels import REGISTRY
from fastft.kernels.core.launch_recorder import LARGEST_INT32
from fastft.reasons import Declined
from fastft.rewriter.attention import simplify
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.bodies import bodies, body_of
from fastft.rewriter.fx.editing import annotate_like
from fastft.rewriter.fx.effects import is_pure, switches_mode
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.fx.operands import Calls, Level, pass_in, take_out
from fastft.rewriter.outline import partition
from fastft.rewriter.report.data import GraphReport
from fastft.rewriter.rows import division, moves, proof, shared_rows
from fastft.rewriter.rows.proof import RowSizes

RULE = "live_rows"
PARAMETERS = REGISTRY["fastft::attention"].parameters
LOSS_PARAMETERS = REGISTRY[proof.LOSS].parameters
ANY_LENGTH = 3  # of the longest sequence, in the example: what is compiled is for any


@dataclass(frozen=True)
class Mask:
    """What restricts some attentions beside causal and window, as nodes of the graph [B or 1, S]; None is nothing.

    start: is given to each of them, and what the model's own was, None for none.  end: likewise.
    """

    start: Node
    own_start: Node | None
    end: Node | None
    own_end: Node | None
    query_ids: Node | None
    key_ids: Node | None
    causal: bool
    window: int


@dataclass
class LiveRows:
    """What it takes to run a graph's layers without some rows.

    sizes: of the batch.  hidden: what comes into the first layer.  first: the first node that is run so; rest: the
    first behind it that is run for all rows again, if there is one.  max_seqlen: the input that attention takes it
    from.  copies: likewise, the input that tells which keys stand in several places, and read: what the layers read of
    rows; None and nothing where rows are not shared.  masks: of all attentions.  labels: of each loss, [B * S] or
    [B, S], with the number that does not count.  by_labels: whether a row is live only if there is a way to a label;
    not where logits leave the graph too, as those of tokens that are no padding may be read.  guards: what compiled
    code assumes of sizes.
    """

    sizes: RowSizes
    hidden: Node
    first: Node
    rest: Node | None
    max_seqlen: Node
    copies: Node | None
    read: list[Node]
    masks: list[Mask]
    labels: dict[Node, int]
    by_labels: bool
    guards: symbolic.LaterGuards

    def no_copies(self) -> list[Tensor]:
        """Return what the layers are given as copies where each key stands in one place."""
        device = value_of(self.hidden).device
        return [] if self.copies is None else [torch.empty(0, dtype=torch.int32, device=device)]


def prepare(
    gm: GraphModule, report: GraphReport, deferred: Sequence[int], *, asked: bool, share: bool = False
) -> LiveRows:
    """Prepare a graph; changes nothing where it raises Declined.

    deferred: positions of hidden states among the outputs of which logits are computed when they are read.  asked: the
    user says that nothing outside the graph counts padding.  share: whether rows that are the same in several sequences
    are to be computed once; where they cannot be, the report says why.
    """
    pieces = partition.outline(gm, report)
    layers = [piece for piece in pieces if piece.layer]
    if not layers:
        raise Declined("it has no layers that are compiled by themselves")
    first = layers[0].nodes[0]
    hidden, calls = _hidden(layers[0]), Calls(gm)
    after = _after(gm, first)
    losses = division.losses(after)
    if not losses and not asked:
        raise Declined("its loss is not taken from labels in it", "rows.labels")
    sizes = _sizes(value_of(hidden), losses)
    zeros = division.results(after)
    rest: list[Node] = []
    if asked and not zeros:  # what follows the layers and is not known to keep rows apart is run for all rows
        after, rest = division.at_the_first_unknown(gm, after, layers[-1].nodes[-1], sizes)
        losses = division.losses(after)
    if any(switches_mode(node) and "autocast" not in name_of(node.target) for node in (*after, *rest)):
        raise Declined("gradients are switched on or off behind the first layer", "mode.switched")
    hoisted = _hoisted(after, losses)
    after = [node for node in after if node not in hoisted]
    if zeros:
        after, rest = division.behind_results(gm, after, zeros, sizes)
    region = [gm, *(body for body in bodies(gm) if body is not gm)]
    for body in region:
        with autocast.around(gm, body):
            proof.check(body, after if body is gm else body.graph.nodes, sizes)
    attentions = [
        _attention(calls, body, node, sizes, first)
        for body in region for node in body.graph.find_nodes(op="call_function", target=_ATTENTION)
    ]  # fmt: skip
    labels = _labels(losses, sizes)
    returned = _check_outputs(gm, {*after} - {*zeros}, sizes, deferred, [one.node for one in attentions], asked)
    by_labels = (bool(zeros) or not rest) if asked else not deferred and not returned
    guards = symbolic.LaterGuards(value_of(hidden).shape[1])
    live = LiveRows(sizes, hidden, first, rest[0] if rest else None, first, None, [], [], labels, by_labels, guards)
    if share:
        calls_of = [dict(zip(PARAMETERS, one.node.args, strict=True)) for one in attentions]
        share = shared_rows.may_share(report.rows, calls_of, region[1:], dict.fromkeys(after), sizes)
    if (
        not share
        and not (by_labels and losses)
        and not any(one.outer[name] is not None for one in attentions for name in _VECTORS)
    ):
        raise Declined("no mask tells what is padding, and logits of any token may be read", "rows.unmasked")
    _check_moves(after, sizes, labels)
    # Nothing is declined from here on.
    for node in hoisted:
        first.prepend(node)
    live.max_seqlen = _add_input(
        gm, "max_seqlen", symbolic.new_size(value_of(hidden).shape[1], "max_seqlen", ANY_LENGTH)
    )
    if share:
        live.copies = _add_input(gm, "copies", shared_rows.copies_like(value_of(hidden)))
    masks: dict[Any, Mask] = {}
    for one in attentions:
        _restrict(one, live, masks)
    live.masks = list(masks.values())
    if share:
        ranges = [node for mask in live.masks for node in (mask.start, mask.end)]
        live.read = shared_rows.compared(dict.fromkeys(after), sizes, {*ranges, *labels, live.copies})
    return live


class _Attention(NamedTuple):
    """A call of attention.  outer: what restricts it, as nodes of the whole graph.  levels: the bodies around it."""

    node: Node
    outer: dict[str, Any]
    levels: list[Level]


_ATTENTION = torch.ops.fastft.attention
_VECTORS = ("start", "end", "query_ids", "key_ids")


def _after(gm: GraphModule, first: Node) -> list[Node]:
    nodes = list(gm.graph.nodes)
    return [node for node in nodes[nodes.index(first) :] if node.op not in ("placeholder", "get_attr", "output")]


def _hidden(layer: Any) -> Node:
    """Return the hidden states [B, S, H] that come into a layer.  Raises Declined."""
    states = [node for node in layer.inputs if _may_be_hidden(value_of(node))]
    if not states:
        raise Declined("no hidden states come into its layers")
    fitting = [node for node in states if isinstance(value_of(node).shape[1], torch.SymInt)]
    several = [node for node in fitting if isinstance(value_of(node).shape[0], torch.SymInt)]  # angles are for all
    if not fitting:
        raise Declined("it is compiled for batches of one size", "rows.sizes")
    return (several or fitting)[0]


def _may_be_hidden(value: Any) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
        return False
    return value.is_floating_point() and value.dim() == 3


def _sizes(hidden: Tensor, losses: Sequence[Node]) -> RowSizes:
    """Return the sizes of a batch of such hidden states.  Raises Declined."""
    for loss in losses:
        _make_equal(hidden, value_of(loss.args[LOSS_PARAMETERS.index("labels")]), loss)
    sizes = RowSizes(*map(symbolic.expression, hidden.shape[:2]))
    if sizes.batch == sizes.length or not all(one == 1 or symbolic.is_one(one) for one in sizes):
        raise Declined("it is compiled for batches of one size", "rows.sizes")
    return sizes


def _make_equal(hidden: Tensor, labels: Any, loss: Node) -> None:
    """Let the sizes of labels be known to be those of the batch, as they are in the example."""
    sources = [value_of(node) for node in loss.graph.find_nodes(op="placeholder")]
    symbols = set(symbolic.symbols_of(labels))
    for value in sources:
        if isinstance(value, Tensor) and value.dim() == 2 and symbols & {*symbolic.symbols_of(value)}:
            for size, of_batch in zip(value.shape, hidden.shape, strict=False):
                if isinstance(size, torch.SymInt):
                    symbolic.made_equal(size, of_batch)


def _hoisted(after: Sequence[Node], losses: Sequence[Node]) -> dict[Node, None]:
    """List the calls that make labels, and what is made of these alone, in graph order.  Raises Declined."""
    inside = set(after)
    wanted: set[Node] = set()
    pending = [node.args[LOSS_PARAMETERS.index("labels")] for node in losses]
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node not in inside or node in wanted:
            continue
        if not is_pure(node) or node.target == _ATTENTION or node in losses:
            raise Declined(f"its labels depend on {node.name}")
        wanted.add(node)
        pending += node.all_input_nodes
    for node in after:
        reads = [one for one in node.all_input_nodes if one in inside]
        values = fake_tensors.tensors_in(value_of(node))
        whole = not any(value.is_floating_point() for value in values)  # which autocast leaves alone
        if reads and wanted.issuperset(reads) and whole and is_pure(node):
            wanted.add(node)
    return {node: None for node in after if node in wanted}


def _labels(losses: Sequence[Node], sizes: RowSizes) -> dict[Node, int]:
    """Return the labels of each loss, with the number that does not count.  Raises Declined."""
    pairs = [_label(loss, sizes) for loss in losses]
    found = dict(pairs)
    if any(found[labels] != ignored for labels, ignored in pairs):
        raise Declined("two losses count different labels")
    return found


def _label(loss: Node, sizes: RowSizes) -> tuple[Node, int]:
    """Return a loss' labels, one for each row in the batch's order, and the number that does not count."""
    call: dict[str, Any] = dict(zip(LOSS_PARAMETERS, loss.args, strict=False))
    labels = call["labels"]
    axes = sizes.axes(value_of(labels))
    expected = (["bs"], ["b", "s"]) if sizes.batch != 1 else (["s"], ["", "s"])
    if axes not in expected or not isinstance(call["ignore_index"], int):
        raise Declined("its labels are not one for each row")
    return labels, call["ignore_index"]


def _attention(calls: Calls, body: GraphModule, node: Node, sizes: RowSizes, first: Node) -> _Attention:
    """Return an attention with what is around it.  Raises Declined."""
    outer, levels = _restricted(calls, body, node, sizes, first), calls.levels(body)
    if any(call < first for call in (levels[-1][1] if levels else [node])):
        raise Declined("there is attention before the layers")
    return _Attention(node, outer, levels)


def _restricted(calls: Calls, body: GraphModule, node: Node, sizes: RowSizes, first: Node) -> dict[str, Any]:
    """Return what restricts an attention, ranges and ids as nodes of the whole graph.  Raises Declined."""
    call: dict[str, Any] = dict(zip(PARAMETERS, node.args, strict=True))
    if call["mask"] is not None:
        raise Declined("a mask is not understood", "rows.mask")
    query, key = value_of(call["query"]), value_of(call["key"])
    expected = ["b" if sizes.batch != 1 else "", "", "s", ""]
    if sizes.axes(query) != expected or sizes.axes(key) != expected:
        raise Declined("its queries and keys are not the rows of the batch")
    if any(symbolic.is_symbolic(value_of(one)) for one in call.values()):
        raise Declined("attention computes with a size")
    outer = {name: call[name] and calls.outside(body, call[name])[0] for name in _VECTORS}
    for name, vector in outer.items():
        if vector is not None and not (vector.graph is calls.gm.graph and vector < first):
            raise Declined(f"{name} is not made before the layers")
    return outer | {name: call[name] for name in ("causal", "window")}


def _check_outputs(
    gm: GraphModule, after: set[Node], sizes: RowSizes, deferred: Sequence[int], attentions: Sequence[Node],
    asked: bool,
) -> bool:  # fmt: skip
    """Check that no hidden states leave the graph but for their logits, unless the user says so.  Raises Declined.

    Returns whether keys and values leave it.
    """
    returned = False
    caches = {node.args[PARAMETERS.index(name)] for node in attentions for name in ("key", "value")}
    for position, node in enumerate(gm.graph.output_node().args[0]):  # type: ignore[arg-type]
        if not isinstance(node, Node) or node not in after:
            continue
        value = value_of(node)
        if not isinstance(value, Tensor):
            raise Declined(f"{node.name}, a size, leaves the graph")
        if asked or position in deferred or not any(sizes.axes(value)):
            continue
        if not caches.intersection(_sources(gm, node)):
            raise Declined(f"{node.name} leaves the graph", "rows.returned")
        returned = True
    return returned


def _check_moves(after: Sequence[Node], sizes: RowSizes, labels: dict[Node, int]) -> None:
    """Check that what these calls read of others can be taken by rows, and put back what others read of them."""
    inside = set(after)
    for node in dict.fromkeys(operand for user in after for operand in user.all_input_nodes):
        if node not in inside and node.op != "get_attr":
            moves.taker(node, sizes, labels)
    for node in after:
        if not inside.issuperset(node.users):
            moves.restorer(value_of(node), sizes)


def _sources(gm: GraphModule, node: Node) -> list[Node]:
    """List the call that computes an output, and what it only copies."""
    found = [_made_by(gm, node)]
    while (source := simplify.copied(found[-1])) is not None:
        found.append(source)
    return found


def _made_by(gm: GraphModule, node: Node) -> Node:
    """Return the call inside a body that computes what a call of the body returns."""
    while node.target is operator.getitem and isinstance(call := node.args[0], Node):
        body = body_of(gm, call)
        if body is None:
            break
        results: Any = body.graph.output_node().args[0]
        gm, node = body, results[node.args[1]]
    return node


def _add_input(gm: GraphModule, name: str, value: Any) -> Node:
    """Add an input of this value to a graph, as the last."""
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    fake_tensors.set_value(node, value)
    return node


def _restrict(attention: _Attention, live: LiveRows, masks: dict[Any, Mask]) -> None:
    """Give an attention ranges that can be replaced, and max_seqlen."""
    node, outer, levels = attention
    key = tuple(outer.values())
    if key not in masks:
        start, end = outer["start"], outer["end"]
        needed = end is not None or not outer["causal"] or outer["query_ids"] is not None  # some rows may not be read
        needed = needed or live.copies is not None
        new_end = _range(live, LARGEST_INT32, end) if needed else None
        masks[key] = Mask(_range(live, 0, start), start, new_end, end, *key[2:])
    mask = masks[key]
    call = dict(zip(PARAMETERS, node.args, strict=True))
    call["start"], call["end"] = pass_in(levels, mask.start), pass_in(levels, mask.end)
    call["max_seqlen"], call["copies"] = pass_in(levels, live.max_seqlen), pass_in(levels, live.copies)
    own = {one for one in node.all_input_nodes if one.op == "placeholder"}
    node.args = tuple(call.values())
    for one in own.difference(node.all_input_nodes):
        take_out(levels, one)


def _range(live: LiveRows, fill: int, like: Node | None = None) -> Node:
    """Return a new range before the layers, for attention alone: of this number, or a copy of one that there is."""
    graph, first, hidden = live.first.graph, live.first, value_of(live.hidden)
    with graph.inserting_before(first):
        if like is not None:
            node = graph.call_method("clone", (like,))
        else:
            settings = {"dtype": torch.int32, "device": hidden.device}
            node = graph.call_function(torch.full, ((1, _length(live)), fill), settings)
    with fake_tensors.fake_mode_of([hidden]):
        annotate_like(node, first)
    node.meta.pop("nn_module_stack", None)  # it belongs to no layer
    return node


def _length(live: LiveRows) -> Node:
    """Return a node that computes the length of the batch's sequences."""
    for node in live.first.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.SymInt) and symbolic.expression(value) == live.sizes.length:
            return node
    raise AssertionError("Dynamo makes an input of each symbol")
