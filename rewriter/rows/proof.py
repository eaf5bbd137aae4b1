"""Prove that calls keep the rows of a batch apart: each row of a result depends on the same row of what they read.

A row is one place of one sequence.  The sizes of a batch are symbols, so that the axes that hold its rows are known by
their sizes, as nothing else has these.  Each call is made again on fake tensors, and the ATen calls that it consists
of are looked at: what is not known to keep rows apart is declined, with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import aot, eager, fake_tensors, operators, symbolic
from fastft.compat.fake_tensors import value_of
from fastft.errors import describe
from fastft.kernels import REGISTRY
from fastft.reasons import Declined
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.effects import mutated_args
from fastft.rewriter.fx.metadata import name_of, source_line
from fastft.rewriter.rows import by_expert

LOSS = "fastft::linear_cross_entropy"  # rows whose label does not count add nothing to what it sums up
ROW_WISE = frozenset(
    f"fastft::{name}"
    for name in (
        "rms_norm", "add_rms_norm", "rms_norm_add", "rms_norm_add_rms_norm", "layer_norm", "rotary", "rotary_qk",
        "norm_rotary", "glu", "glu_packed", "lora_linear", "linear_token_statistics",
    )
)  # fmt: skip
_ELEMENTWISE = frozenset(  # and what moves whole axes
    f"aten::{name}"
    for name in (
        "clone", "copy_", "fill_", "_to_copy", "detach", "alias", "lift_fresh", "native_dropout", "bernoulli_",
        "bernoulli", "rand_like", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full",
        "full_like", "new_full", "empty_like", "stack", "permute", "transpose", "t", "unsqueeze", "squeeze",
        "view_as_real",
    )
)  # fmt: skip
_RANDOM = frozenset(("aten::native_dropout", "aten::bernoulli_", "aten::bernoulli", "aten::rand_like"))
_BY_SIZES = frozenset(("aten::slice", "aten::select", "aten::split", "aten::split_with_sizes"))
_RESHAPES = frozenset(("aten::view", "aten::_unsafe_view", "aten::reshape"))
_ALONG = {  # the place of the axes along which these mix elements, by name
    "sum": 1, "mean": 1, "amax": 1, "amin": 1, "var": 1, "std": 1, "any": 1, "all": 1, "prod": 1, "_softmax": 1,
    "_log_softmax": 1, "logsumexp": 1, "cumsum": 1, "argmax": 1, "argmin": 1, "sort": 1, "linalg_vector_norm": 2,
    "topk": 2, "gather": 1, "scatter": 1, "scatter_": 1, "select": 1, "split": 2, "split_with_sizes": 2, "unbind": 1,
    "cat": 1,
}  # fmt: skip
_LAST_BY_DEFAULT = frozenset(("sort", "topk"))
_FIRST_BY_DEFAULT = frozenset(("split", "split_with_sizes", "unbind", "cat"))


class RowSizes(NamedTuple):
    """The sizes of a batch of rows: expressions of symbols.  batch: 1 where a batch is one sequence."""

    batch: Any
    length: Any

    def axis(self, size: Any) -> str:
        """Return which axis has this size: "b", "s", "bs" for both as one, "" for another.  Raises Declined."""
        expression = symbolic.expression(size)
        if isinstance(expression, int):
            return ""
        if expression == self.length:
            return "s"
        if expression == self.batch:
            return "b"
        if expression == self.batch * self.length:
            return "bs"
        if self.depends(expression):
            raise Declined(f"something has the size {size}")
        return ""

    def depends(self, expression: Any) -> bool:
        """Return whether a size depends on those of the batch."""
        symbols = {symbol for size in self if not isinstance(size, int) for symbol in size.free_symbols}
        return not isinstance(expression, int) and not symbols.isdisjoint(expression.free_symbols)

    def axes(self, tensor: Tensor) -> list[str]:
        """Return the axes of a tensor.  Raises Declined."""
        return [self.axis(size) for size in tensor.shape]

    def holds(self, value: Any) -> bool:
        """Return whether one of the tensors of a node's value holds rows.  Raises Declined."""
        return any(any(self.axes(tensor)) for tensor in fake_tensors.tensors_in(value))


def check(gm: GraphModule, nodes: Iterable[Node], sizes: RowSizes) -> None:
    """Check that calls of a graph keep rows apart, but for attention and losses.  Raises Declined.

    What runs bodies is to be checked by its bodies.  What is written to has to be made by a call of the same layer, as
    the outline of a graph sees to.
    """
    nodes = dict.fromkeys(nodes)
    orders = by_expert.orders(gm)
    for node in nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        try:
            by_expert.check_place(node, orders, nodes.keys())
            if _runs_body(node) or node.target == torch.ops.fastft.attention:
                continue
            if not fake_tensors.tensors_in(value_of(node)):
                continue
            if by_expert.is_known(node):
                by_expert.check_known(node, orders, sizes)
                continue
            with autocast.at(node), _Watch(by_expert.sizes_of(node, orders, sizes)):
                _repeat(node, writes=bool(mutated_args(gm, node)))
        except Declined as declined:
            raise Declined(f"{declined.reason} ({source_line(node)})") from None
        except Exception as error:
            raise Declined(f"{name_of(node.target)} could not be read: {describe(error)}") from error


def _runs_body(node: Node) -> bool:
    if not operators.is_higher_order(node.target):
        return False
    if node.target not in (operators.CHECKPOINT, operators.LAYER_CALL):
        raise Declined(f"{name_of(node.target)} is not looked into")
    return True


def _repeat(node: Node, *, writes: bool) -> None:
    """Make a call again.  writes: on copies, as what Dynamo saw counts how often it was written to."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
    tensors = fake_tensors.tensors_in((args, kwargs, value_of(node)))  # its own, as it may be made of sizes alone
    with fake_tensors.fake_mode_of(tensors), torch.no_grad():
        if writes:
            args, kwargs = fake_tensors.tree_map_only(Tensor, torch.clone, (args, kwargs))
        function: Any = getattr(Tensor, str(node.target)) if node.op == "call_method" else node.target
        function(*args, **kwargs)


class _Watch(eager.TorchDispatchMode):
    """Looks at each ATen call on fake tensors; raises Declined for one that may mix rows."""

    def __init__(self, sizes: RowSizes) -> None:
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = fake_tensors.tensors_in((args, kwargs))
        name = operators.schema_name(func)
        if name.startswith(("prim::", "aten::sym_")):  # what a tensor is, not what it holds
            return results
        if not (any(map(self.sizes.holds, given)) or self.sizes.holds(results)):
            self._no_numbers(fake_tensors.leaves((args, kwargs)))  # what holds no rows may hold their number
            return results
        try:
            self._check(func, name, args, kwargs or {}, results)
        except Declined:
            raise
        except Exception as error:
            raise Declined(f"{name} could not be read: {describe(error)}") from error
        return results

    def _check(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any], results: Any) -> None:
        short = name.removeprefix("aten::")
        known = True
        if name in _RANDOM and aot.draws_as_eager():
            raise Declined("what dropout draws has to be what eager code draws (fallback_random)")
        if name not in _BY_SIZES:
            self._no_numbers((*args, *kwargs.values()))
        if name in _RANDOM and not self._for_each_row(results):
            raise Declined("what is drawn is not for each row by itself")
        if torch.Tag.pointwise in func.tags or name in _ELEMENTWISE:
            pass
        elif name in _RESHAPES:
            known = self._rows_in_order(args[0]) == self._rows_in_order(results)
        elif name == "aten::expand":
            known = self._only_at_the_end(args[0], results)
        elif name == "aten::slice":
            dim = args[1] if len(args) > 1 else 0
            known = not self.sizes.axis(args[0].shape[dim]) or self._same(args[0].shape[dim], results.shape[dim])
        elif name == "aten::index":
            places = zip(self.sizes.axes(args[0]), args[1], strict=False)
            known = not any(index is not None and (axis or self.sizes.holds(index)) for axis, index in places)
        elif short in ("gather", "scatter", "scatter_"):
            known = self._apart(short, args, kwargs) and self._at_places(*args[:3])
            sources = [self.sizes.axes(one) for one in args[3:] if isinstance(one, Tensor)]  # a number, gather has none
            known &= all(axes == self.sizes.axes(args[2]) for axes in sources)
        elif short in _ALONG:
            known = self._apart(short, args, kwargs)
        elif name in ("aten::mm", "aten::addmm", "aten::linear", "aten::embedding", "aten::bmm"):
            known = self._product(short, args)
        elif name in ROW_WISE or name == LOSS:
            known = self._of_ours(name, args, kwargs)
        else:
            known = False
        if not known:
            raise Declined(f"{short} may mix rows", "rows.mixed")

    def _for_each_row(self, results: Any) -> bool:
        """Return whether what is drawn has both axes of rows."""
        wanted = {"s"} if self.sizes.batch == 1 else {"b", "s"}
        return all(
            set(axes) - {""} in (wanted, {"bs"}) for axes in map(self.sizes.axes, fake_tensors.tensors_in(results))
        )

    def _no_numbers(self, args: Sequence[Any]) -> None:
        """Check that no number that is computed with depends on the batch's sizes."""
        for argument in args:
            if symbolic.is_symbolic(argument) and self.sizes.depends(symbolic.expression(argument)):
                raise Declined(f"it computes with the size {argument}")

    def _same(self, left: Any, right: Any) -> bool:
        return symbolic.expression(left) == symbolic.expression(right)

    def _rows_in_order(self, tensor: Tensor) -> list[tuple[str, Any]]:
        """List the axes of rows, each with the number of elements before it."""
        found, before = [], 1
        for size, axis in zip(tensor.shape, self.sizes.axes(tensor), strict=True):
            for one, length in (("b", self.sizes.batch), ("s", self.sizes.length)) if axis == "bs" else ((axis, None),):
                if one:
                    found.append((one, before))
                before = before * (symbolic.expression(size) if length is None else length)
        return found

    def _only_at_the_end(self, source: Tensor, result: Tensor) -> bool:
        """Return whether an expansion repeats what is the same for all rows, or for one axis of them."""
        offset = result.dim() - source.dim()
        pairs = zip(self.sizes.axes(source), self.sizes.axes(result)[offset:], source.shape, strict=True)
        return all(before == after or not isinstance(size, torch.SymInt) for before, after, size in pairs)

    def _apart(self, short: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Return whether none of the axes along which a call goes holds rows."""
        tensor = args[0]
        if isinstance(tensor, (list, tuple)):  # of which torch skips empty ones of one axis, as caches begin with
            full = [one for one in tensor if tuple(one.shape) != (0,)]
            if len(full) == 1:
                return True
            tensor = full[0]
        place = _ALONG[short]
        default = -1 if short in _LAST_BY_DEFAULT else 0 if short in _FIRST_BY_DEFAULT else None
        dims = args[place] if len(args) > place else kwargs.get("dim", default)
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            return False
        axes = self.sizes.axes(tensor)
        along = dims if isinstance(dims, (list, tuple)) else [dims]
        return not any(axes[dim] for dim in along)

    def _at_places(self, tensor: Tensor, dim: int, index: Tensor) -> bool:
        """Return whether rows of an index are rows of the tensor that it tells places of, along another axis."""
        pairs = zip(self.sizes.axes(tensor), self.sizes.axes(index), strict=True)
        return all(one == other for place, (one, other) in enumerate(pairs) if place != dim % tensor.dim())

    def _product(self, short: str, args: Sequence[Any]) -> bool:
        """Return whether rows are multiplied by what is the same for all of them."""
        axes = [self.sizes.axes(tensor) for tensor in args if isinstance(tensor, Tensor)]
        if short == "bmm":
            (one, _, inner), (other, *rest) = axes
            return one == other and not inner and not any(rest)
        if short == "embedding":
            return not any(axes[0])
        if short == "addmm":
            return not any(axes[0]) and not axes[1][-1] and not any(axes[2])
        return not axes[0][-1] and not any(axis for others in axes[1:] for axis in others)

    def _of_ours(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Return whether rows are where an op of ours has rows, in all axes but the last; losses must be sums."""
        entry = REGISTRY[name]
        by_rows = {
            parameter.partition(".")[0]
            for shapes, _ in entry.cases
            for parameter, shape in shapes.items()
            if "..." in shape or "S" in shape.split()
        }
        for parameter, value in zip(entry.parameters, entry.complete(args, kwargs), strict=True):
            for tensor in fake_tensors.tensors_in(value):
                axes = self.sizes.axes(tensor)
                last = [] if parameter == "labels" else axes[-1:]
                if any(last) or (any(axes) and parameter not in by_rows):
                    return False
        return name != LOSS or bool(entry.complete(args, kwargs)[entry.parameters.index("reduce")])
