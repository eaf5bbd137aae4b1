"""Simplify lifted attention: masks to ranges and ids, repeated K/V heads to the originals, transposed output.

A mask is read once, however many layers take it, and its ranges and ids are computed once, where the mask was; then
nothing needs the mask itself.  A mask whose meaning is not proven stays as it is, and the report says why.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import dynamo, fake_tensors, operators, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.kernels import REGISTRY
from fastft.kernels.attention import HIGHEST, LOWEST
from fastft.reasons import Reason, with_prefix
from fastft.rewriter.attention.masks.recognize import recognize
from fastft.rewriter.context import Context
from fastft.rewriter.fx.bodies import bodies
from fastft.rewriter.fx.editing import annotate_like
from fastft.rewriter.fx.effects import all_mutated, is_pure, may_alias
from fastft.rewriter.fx.metadata import module_path, name_of, same_sizes, source_line, traced_in
from fastft.rewriter.fx.operands import Calls, pass_in, take_out
from fastft.rewriter.report.data import GraphReport, Lifted

RULE = "attention.mask"
PARAMETERS = REGISTRY["fastft::attention"].parameters
MEANING = ("start", "end", "query_ids", "key_ids")
Meaning = tuple[dict[str, Any] | None, str]  # what a mask means, as arguments, and its kind; or None and the reason


def simplify(gm: GraphModule, context: Context) -> None:
    """Simplify every attention of ``gm`` and its bodies; what each mask means goes into the report."""
    _divide_layers(gm, context.report)
    masks = _Masks(gm)
    for body in bodies(gm):
        targets = all_mutated(body)
        for node in body.graph.find_nodes(op="call_function", target=torch.ops.fastft.attention):
            call = dict(zip(PARAMETERS, node.args, strict=True))
            mask = call["mask"]
            _read_heads(call, targets)
            module = module_path(node)
            kind = masks.read(body, call, context.refusal(RULE, module))
            node.args = tuple(call.values())
            context.report.masks.append(Lifted(kind, module, source_line(node)))
            _transpose_late(node, call)
            if isinstance(mask, Node) and call["mask"] is not mask:
                _drop(masks.calls, body, mask)


def _divide_layers(gm: GraphModule, report: GraphReport) -> None:
    """Give layers that are called with different masks bodies of their own: sliding and full attention may share one.

    Otherwise neither mask would be known.  What was done to the body was done to its copies, as the report then says.
    """
    calls: dict[str, list[Node]] = {}
    for call in gm.graph.find_nodes(op="call_function", target=operators.LAYER_CALL):
        if not call.kwargs:
            calls.setdefault(str(call.args[0].target), []).append(call)
    for name, alike in calls.items():
        body = getattr(gm, name)
        places = [place for place, one in enumerate(body.graph.find_nodes(op="placeholder")) if _is_mask(one)]
        by_masks: dict[Any, list[Node]] = {}
        for call in alike:
            by_masks.setdefault(tuple(call.args[1 + place] for place in places), []).append(call)
        for number, others in enumerate(list(by_masks.values())[1:], 1):
            copied = f"{name}_with_mask_{number}"
            gm.add_module(copied, GraphModule(body, dynamo.copy_graph(body.graph)))
            _move(getattr(gm, copied), alike, others[0], report)
            for call in others:
                with gm.graph.inserting_before(call):
                    call.args = (gm.graph.get_attr(copied), *call.args[1:])


def _move(body: GraphModule, alike: Sequence[Node], call: Node, report: GraphReport) -> None:
    """Tell of a copied body that its nodes are in a call's layer, and not in the one that was traced."""
    calls = {module_path(one): one for one in reversed(alike)}
    before, now = traced_in(body.graph.nodes, map(module_path, alike)), module_path(call)
    if before is None:
        return
    inside = re.compile(rf"{re.escape(before)}(?=\.|$)")
    raw_before, raw_now = (list(one.meta["nn_module_stack"].values())[-1][0] for one in (calls[before], call))
    for node in body.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (path.replace(raw_before, raw_now, 1) if path.startswith(raw_before) else path, *rest)
            for key, (path, *rest) in stack.items()
        }
    lists: list[list[Any]] = [report.lifted, report.fused, report.near_misses]
    for found in lists:
        found += [replace(one, module=inside.sub(now, one.module)) for one in found if inside.match(one.module)]


def _is_mask(node: Node) -> bool:
    position = PARAMETERS.index("mask")
    return any(user.target == torch.ops.fastft.attention and user.args[position] is node for user in node.users)


class _Masks:
    """The meanings of the masks of a graph and its bodies, each mask read once."""

    def __init__(self, gm: GraphModule) -> None:
        self.calls = Calls(gm)
        self.meanings: dict[tuple[Node, bool], Meaning] = {}
        self.rows: dict[Node, dict[str, Any]] = {}
        self.alike: dict[Node, Node] = {}

    def read(self, body: GraphModule, call: dict[str, Any], refusal: str | None) -> str:
        """Replace a call's mask by what it means, and return the kind of mask.

        refusal: why it is to stay as it is.
        """
        mask, sinks = call["mask"], call["sinks"] is not None
        if mask is None:
            return "causal" if call["causal"] else "full"
        outer, levels = self.calls.outside(body, mask)
        if (outer, sinks) not in self.meanings:
            rows, columns = (value_of(call[name]).shape[-2] for name in ("query", "key"))
            self.meanings[outer, sinks] = _meaning(outer, rows, columns, sinks)
        meaning, kind = self.meanings[outer, sinks] if refusal is None else (None, refusal)
        if meaning is None:
            if not sinks and _by_head(mask):
                call["mask"] = pass_in(levels, self._alike(outer))
            elif not sinks:
                call |= self._rows(mask)
            return with_prefix("dense: ", kind)
        meaning = dict(meaning)
        for name in MEANING:
            meaning[name] = pass_in(levels, meaning[name])
        call |= meaning | {"mask": None, "causal": meaning["causal"] or call["causal"]}
        return kind

    def _rows(self, mask: Node) -> dict[str, Any]:
        if mask not in self.rows:
            self.rows[mask] = _rows_without_keys(mask)
        return self.rows[mask]

    def _alike(self, mask: Node) -> Node:
        if mask not in self.alike:
            self.alike[mask] = _with_rows_alike(mask)
        return self.alike[mask]


def _by_head(mask: Node) -> bool:
    """Return whether rows without keys may be other ones for each head, or a mask's gradient is wanted in them."""
    tensor = value_of(mask)
    return tensor.requires_grad or (tensor.dim() > 2 and not same_sizes(tensor.shape[-3:-2], (1,)))


def _meaning(mask: Node, rows: Any, columns: Any, sinks: bool) -> Meaning:
    """Compute what a mask means before its node, or say why that is not known."""
    if value_of(mask).requires_grad:
        return None, Reason("it is trained", "mask.trained")
    recognized = recognize(mask, rows, columns)
    if isinstance(recognized, str):
        return None, recognized
    try:
        return recognized.arguments(mask, sinks=sinks), recognized.kind
    except Exception as error:  # a size that no node computes
        return None, str(error)


def _rows_without_keys(mask: Node) -> dict[str, Any]:
    """Return ``start`` for a mask that is added: -1 in rows that finite numbers mask throughout.

    These numbers are so low that scores vanish in them.
    """
    tensor = value_of(mask)
    if not tensor.is_floating_point():
        return {}
    add = _calls_after(mask)
    numbers = add("detach", mask)
    vanishing = add("all", add("lt", numbers, LOWEST), -1)
    finite = add("gt", add("amin", numbers, -1), -torch.inf)
    rows = add("neg", add("to", add("logical_and", vanishing, finite), torch.int32))
    for _ in range(tensor.dim(), 4):
        rows = add("unsqueeze", rows, 0)
    return {"start": add("select", rows, 1, 0)}


def _with_rows_alike(mask: Node) -> Node:
    """Return a mask that is above HIGHEST where it is finite, but so low that scores vanish, in all of a head's row.

    Such a row weighs these keys alike.  A trained mask has the gradients there that it had.
    """
    tensor = value_of(mask)
    if not tensor.is_floating_point() or tensor.dtype == torch.float16:  # which has no such numbers
        return mask
    add = _calls_after(mask)
    numbers = add("detach", mask)
    vanishing = add("all", add("lt", numbers, LOWEST), -1, True)
    alike = add("logical_and", vanishing, add("gt", numbers, -torch.inf))
    if not tensor.requires_grad:
        return add("masked_fill", mask, alike, 2 * HIGHEST)
    return add("where", add("add", add("sub", mask, numbers), 2 * HIGHEST), alike, mask)


def _calls_after(node: Node) -> Callable[..., Node]:
    """Return a function that adds calls of methods behind a node, one after the other."""
    last = node if node.op != "placeholder" else list(node.graph.find_nodes(op="placeholder"))[-1]

    def add(name: str, *arguments: Any, **named: Any) -> Node:
        nonlocal last
        with node.graph.inserting_after(last):
            last = node.graph.call_method(name, arguments, named)
        annotate_like(last, node)
        return last

    return add


def _drop(calls: Calls, body: GraphModule, mask: Node) -> None:
    """Remove a mask of which nothing but sizes is used any more, and what only it was computed from."""
    outer, levels = calls.outside(body, mask)
    _read_sizes_elsewhere(mask)
    if mask.users or not take_out(levels, mask):
        return
    _read_sizes_elsewhere(outer)
    pending = [outer]
    while pending:
        node = pending.pop()
        stays = node.users or node.op not in ("call_function", "call_method")
        if stays or not is_pure(node):
            continue
        pending += node.all_input_nodes
        node.graph.erase_node(node)
        pending = [other for other in dict.fromkeys(pending) if other is not node]


def _read_sizes_elsewhere(mask: Node) -> None:
    """Read the sizes that code reads of a mask of other tensors, so that they are not what keeps it."""
    for user in list(mask.users):
        axis = user.args[1] if len(user.args) == 2 and name_of(user.target) in ("size", "aten.sym_size.int") else None
        place = symbolic.place_of_size(mask.graph, value_of(user), besides=mask) if type(axis) is int else None
        if place is not None:
            user.args = place


def _read_heads(call: dict[str, Any], targets: Iterable[Any]) -> None:
    """Make the call read key and value heads from before they were repeated or copied into a cache."""
    key, value = _source(call["key"], targets), _source(call["value"], targets)
    heads = [value_of(tensor).shape[:3] for tensor in (key, value)]
    if same_sizes(*heads):
        call["key"], call["value"] = key, value


def _source(node: Node, targets: Iterable[Any]) -> Node:
    """Return what repeats, copies and empty caches were made of, as far as nothing of it is mutated or detached."""
    current = node
    while (before := copied(current)) is not None:
        trained = [value_of(candidate).requires_grad for candidate in (current, before)]
        if trained[0] != trained[1] or any(
            may_alias(target, candidate) for target in targets for candidate in (current, before)
        ):
            break
        current = before
    return current


def copied(node: Node) -> Node | None:
    """Return what this call only copies, or repeats along the heads as the op itself would read them, or None."""
    name = name_of(node.target)
    if node.op not in ("call_function", "call_method") or value_of(node).dim() != 4:
        return None
    if name in ("contiguous", "clone") and not node.args[1:] and not node.kwargs:
        return _like(node, node.args[0])
    if name in ("cat", "concat", "concatenate"):
        return _with_nothing(node)
    if name in ("reshape", "view"):
        return _repeated(node)
    return _interleaved(node) if name == "repeat_interleave" else None


def _like(node: Node, source: Any) -> Node | None:
    """Return ``source`` if it has the dtype and shape of ``node``, or None."""
    alike = isinstance(source, Node) and value_of(source).dtype == value_of(node).dtype
    return source if alike and same_sizes(value_of(source).shape, value_of(node).shape) else None


def _with_nothing(node: Node) -> Node | None:
    """Return k of cat((empty cache, k)), or None: torch skips empty tensors of one axis."""
    tensors = node.args[0] if node.args else None
    if not isinstance(tensors, (tuple, list)):
        return None
    full = [tensor for tensor in tensors if not isinstance(tensor, Node) or tuple(value_of(tensor).shape) != (0,)]
    return _like(node, full[0]) if len(full) == 1 else None


def _repeated(node: Node) -> Node | None:
    """Return x of x[:, :, None].expand(B, G, n, T, D).reshape(B, G * n, T, D), or None."""
    expanded = node.args[0]
    if not isinstance(expanded, Node) or name_of(expanded.target) != "expand" or value_of(expanded).dim() != 5:
        return None
    widened: Any = expanded.args[0]
    source = widened.args[0] if isinstance(widened, Node) and widened.args else None
    if not isinstance(source, Node) or not isinstance(value_of(source), Tensor) or value_of(source).dim() != 4:
        return None
    index = (slice(None), slice(None), None)
    by_index = widened.target is operator.getitem and _trimmed(widened.args[1]) == index
    by_name = name_of(widened.target) == "unsqueeze" and widened.args[1:] in ((2,), (-3,)) and not widened.kwargs
    B, G, T, D = value_of(source).shape
    five, four = value_of(expanded).shape, value_of(node).shape
    repeats = same_sizes((*five[:2], *five[3:]), (B, G, T, D))
    joins = same_sizes((four[0], *four[2:]), (B, T, D))
    return source if (by_index or by_name) and repeats and joins else None


def _trimmed(index: Any) -> Any:
    """Return an index without the full slices at its end."""
    items = list(index) if isinstance(index, tuple) else [index]
    while items and (items[-1] == slice(None) or items[-1] is Ellipsis):
        items.pop()
    return tuple(items)


def _interleaved(node: Node) -> Node | None:
    """Return x of x.repeat_interleave(n, dim=1), or None."""
    source, *rest = node.args
    times = rest[0] if rest else node.kwargs.get("repeats")
    dim = rest[1] if len(rest) > 1 else node.kwargs.get("dim")
    plain = isinstance(times, int) and dim in (1, -3) and "output_size" not in node.kwargs
    return source if plain and isinstance(source, Node) and value_of(source).dim() == 4 else None


def _transpose_late(node: Node, call: dict[str, Any]) -> None:
    """Let attention write its output transposed where heads are then put next to each other: this saves a copy."""
    out = _only_user(node)
    turned = _only_user(out)
    copied = _only_user(turned)
    if not call["contiguous"] or copied is None or turned is None or out is None:
        return
    by_axes = name_of(turned.target) == "transpose" and {*turned.args[1:]} in ({1, 2}, {-3, -2}) and not turned.kwargs
    copies = name_of(copied.target) == "contiguous" and not copied.args[1:] and not copied.kwargs
    if not by_axes or not copies or len({value_of(output).requires_grad for output in (out, turned, copied)}) > 1:
        return
    call["contiguous"] = False
    node.args = tuple(call.values())
    for output in (node, out, turned):
        trained = any(tensor.requires_grad for tensor in fake_tensors.tensors_in(value_of(output)))
        fake_tensors.infer_example_value(output)
        if trained and output is not node:
            fake_tensors.set_value(output, value_of(output).detach().requires_grad_())
    copied.replace_all_uses_with(turned)
    copied.graph.erase_node(copied)


def _only_user(node: Node | None) -> Node | None:
    users = list(node.users) if node is not None else []
    return users[0] if len(users) == 1 else None
