"""Replace writes to tensors that the graph itself made by calls that make new ones, where nobody can tell.

Rules match values, and layers are cut apart by what they read; a tensor that changes halfway fits neither.  Inductor
writes in place again where that saves memory.  Known are arithmetic in place (``x += y``), and copies to one slice or
one place along an axis (``x[..., :n] = y``); an empty tensor that such copies fill is their concatenation.  What shares
memory with a tensor that is written is followed as far as it is a part of it by such an index.

Anything else, and any write to the graph's inputs, stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import set_value, storage_key, tensors_in, value_of
from fastft.reasons import Declined
from fastft.rewriter.fx.bodies import runs_bodies
from fastft.rewriter.fx.editing import annotate_like, between, infer_requires_grad
from fastft.rewriter.fx.effects import mutated_args, switches_mode, transformed
from fastft.rewriter.fx.metadata import name_of, same_sizes, same_strides

# What these compute in place is what the function computes, under autocast too.
_ARITHMETIC: dict[str, Callable] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "truediv": torch.div, "neg": torch.neg,
    "clamp": torch.clamp, "and": torch.bitwise_and, "or": torch.bitwise_or, "masked_fill": torch.masked_fill,
}  # fmt: skip
_OPERATORS = {getattr(operator, f"i{name}"): name for name in ("add", "sub", "mul", "truediv", "and", "or")}
_EMPTY = ("empty", "new_empty", "empty_like")
_SCATTERS = (torch.slice_scatter, torch.select_scatter)


def functionalize(gm: GraphModule) -> None:
    """Rewrite the writes of one graph, tensor by tensor, as far as they are known."""
    under_transforms = transformed(gm.graph)
    made: dict[int, Node] = {}  # by storage: the node that it came with
    written: dict[Node, list[Node]] = {}
    for node in gm.graph.nodes:
        for tensor in tensors_in(value_of(node)):
            made.setdefault(storage_key(tensor), node)
        for tensor in tensors_in([value_of(target) for target in mutated_args(gm, node)]):
            writes = written.setdefault(made[storage_key(tensor)], [])
            writes += [node] if node not in writes else []
    for root, writes in written.items():
        if root.op in ("placeholder", "get_attr") or not under_transforms.isdisjoint((root, *writes)):
            continue
        storage = _Storage(gm, root, writes)
        try:
            storage.follow()
        except Declined:
            storage.undo()
            continue
        storage.rewrite()


class _Storage:
    """The memory that ``root`` came with, followed from write to write.

    aliases: all nodes that are in it.  tensor: of those that are the very same tensor, the first.
    index: of parts of the whole, theirs.  now: what has a tensor's present elements, since which write.
    """

    def __init__(self, gm: GraphModule, root: Node, writes: Sequence[Node]) -> None:
        self.graph, self.root, self.writes = gm.graph, root, set(writes)
        key = storage_key(tensors_in(value_of(root))[0])
        nodes = list(gm.graph.nodes)
        self.nodes = nodes[nodes.index(root) :]
        self.aliases = {node for node in self.nodes if key in map(storage_key, tensors_in(value_of(node)))}
        self.tensor: dict[Node, Node] = {}
        self.index: dict[Node, Any] = {}
        self.now: dict[Node, tuple[Node, int]] = {}
        self.count = 0  # of writes so far
        self.last: Node = root  # of them
        self.made: list[Node] = []
        self.reads: list[tuple[Node, Node, Node]] = []  # who reads what, and what it is to read instead

    def follow(self) -> None:
        """Compute what every reader is to read.  Raises Declined; the graph then has more nodes, which nobody reads."""
        if not isinstance(value_of(self.root), Tensor) or not fake_tensors.is_plain(value_of(self.root)):
            raise Declined("it is one of several results")
        of = tensors_in([value_of(argument) for argument in self.root.all_input_nodes])
        if not all(map(fake_tensors.is_plain, of)):  # whose memory it may be in
            raise Declined("it is made of a tensor of another class")
        switches = [name_of(node.target) for node in between(self.root, max(self.writes)) if switches_mode(node)]
        if (switches and value_of(self.root).requires_grad) or any("inference" in name for name in switches):
            raise Declined("gradients or autocast are switched halfway")
        for node in self.nodes:
            if node in self.writes:
                self._write(node)
                continue
            for read in node.all_input_nodes:
                if read in self.aliases and (fresh := self._present(read)) is not read:
                    self.reads.append((node, read, fresh))
            if node in self.aliases:
                self._enter(node)

    def _enter(self, node: Node) -> None:
        """Take note of a tensor that is made of the memory as it is now."""
        if runs_bodies(node):
            raise Declined("a nested graph returns it")
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and source in self.tensor and value_of(node) is value_of(source):
            self.tensor[node] = self.tensor[source]  # a cast to its own dtype, say
            return
        self.tensor[node], self.now[node] = node, (node, self.count)
        if (
            node.target is operator.getitem
            and isinstance(source, Node)
            and self.tensor.get(source) is self.root
            and _one_axis(node.args[1], source)
        ):
            self.index[node] = node.args[1]

    def _present(self, alias: Node) -> Node:
        """Return a node with the present elements of a tensor.

        It is made, if need be, where they were written: who reads it first may do so without gradients, say.
        """
        tensor = self.tensor[alias]
        node, since = self.now[tensor]
        if since == self.count:
            return node
        if tensor not in self.index or self.now[self.root][1] != self.count:
            raise Declined("what shares memory with what is written is read afterwards")
        fresh = self._call(self.last, operator.getitem, (self.now[self.root][0], self.index[tensor]))
        self.now[tensor] = (fresh, self.count)
        return fresh

    def _write(self, write: Node) -> None:
        target = write.args[0] if write.args else None
        if not isinstance(target, Node) or target not in self.aliases:
            raise Declined("its first argument is not what it writes to")
        tensor, name = self.tensor[target], name_of(write.target)
        if name == "setitem" and tensor is self.root:
            self._set(self.root, write, self._scattered(write, write.args[1], write.args[2]))
            return
        part = self.index.get(tensor)
        if name == "copy_" and len(write.args) == 2 and not write.kwargs and part is not None:
            self._set(self.root, write, self._scattered(write, part, write.args[1]))
        elif part is not None:  # read afterwards, it is taken from the whole again
            self._set(self.root, write, self._scattered(write, part, self._computed(write, target)))
        else:
            self._set(tensor, write, self._like(write, self._computed(write, target), value_of(target)))
        if write in self.aliases:
            self.tensor[write] = tensor

    def _set(self, tensor: Node, write: Node, value: Node) -> None:
        self.count += 1
        self.last, self.now[tensor] = write, (value, self.count)

    def _computed(self, write: Node, target: Node) -> Node:
        """Compute what arithmetic in place leaves in a tensor."""
        named = _OPERATORS.get(write.target) if callable(write.target) else None
        function = _ARITHMETIC.get(named or name_of(write.target).strip("_"))
        if function is None or "out" in write.kwargs or (named is None and not name_of(write.target).endswith("_")):
            raise Declined("it is not known to write what a function returns")
        first, *rest = (self._argument(one) for one in write.args)
        kwargs = {key: self._argument(one) for key, one in write.kwargs.items()}
        return self._call(write, function, (first, *rest), kwargs)

    def _argument(self, argument: Any) -> Any:
        """Return an argument of a write as it is before the write.  Raises Declined for one that holds several."""
        if isinstance(argument, (list, tuple, dict)):
            raise Declined("it reads a list")
        return self._present(argument) if argument in self.aliases else argument

    def _scattered(self, write: Node, index: Any, value: Any) -> Node:
        """Return the whole with a part replaced."""
        base = self._present(self.root)
        dim, item = _one_axis(index, self.root) or _decline("it writes to more than a slice along one axis")
        part = self._fitting(write, index, value)
        where = (item.start, item.stop, item.step or 1) if isinstance(item, slice) else (item,)
        if base.target in _SCATTERS and base in self.made and base.args[2:] == (dim, *where):
            (base, *_) = base.args  # type: ignore[assignment]  # what is replaced a second time
        scatter = torch.slice_scatter if isinstance(item, slice) else torch.select_scatter
        return self._like(write, self._call(write, scatter, (base, part, dim, *where)), value_of(self.root))

    def _fitting(self, write: Node, index: Any, value: Any) -> Node:
        """Return a value in the dtype and shape of the part that it is written to."""
        part = self._call(write, operator.getitem, (self._present(self.root), index))
        wanted, given = value_of(part), value_of(value)
        if isinstance(given, (bool, int, float)):
            return self._call(write, torch.full_like, (part, value))
        if not isinstance(value, Node) or not isinstance(given, Tensor) or given.device != wanted.device:
            raise Declined("what it writes is no tensor of this device")
        value = self._argument(value)
        if given.dtype != wanted.dtype:
            value = self._call(write, "to", (value, wanted.dtype))
        if same_sizes(given.shape, wanted.shape):
            return value
        ahead = wanted.dim() - given.dim()
        sizes = [-1 if at >= ahead and same_sizes(given.shape[at - ahead :][:1], [size]) else size
                 for at, size in enumerate(wanted.shape)]  # fmt: skip
        if not all(type(size) is int for size in sizes):
            raise Declined("it is broadcast to a size that is not fixed")
        return self._call(write, "expand", (value, *sizes))

    def _like(self, write: Node, node: Node, wanted: Tensor) -> Node:
        """Return a result in the dtype of what was written to.  Raises Declined where it lies otherwise in memory."""
        if value_of(node).dtype != wanted.dtype:
            node = self._call(write, "to", (node, wanted.dtype))
        value = value_of(node)
        if not same_sizes(value.shape, wanted.shape) or not same_strides(value, wanted):
            raise Declined("the result would lie otherwise in memory")
        return node

    def _call(self, before: Node, target: Any, args: tuple, kwargs: dict[str, Any] | None = None) -> Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(before):
            node = self.graph.create_node(kind, target, args, kwargs or {})
        self.made.append(node)
        annotate_like(node, before)
        if any(map(fake_tensors.written_to, tensors_in(value_of(node)))):  # to make it, as a new tensor
            set_value(node, fake_tensors.empty_like_fake(value_of(node), value_of(node).fake_mode))
        infer_requires_grad(node)
        return node

    def undo(self) -> None:
        """Remove the nodes that were added."""
        for node in reversed(self.made):
            self.graph.erase_node(node)

    def rewrite(self) -> None:
        """Let every reader read what was computed, and remove the writes."""
        for node, old, fresh in self.reads:
            node.replace_input_with(old, fresh)
        for node in reversed(self.nodes):
            if node in self.writes:
                self.graph.erase_node(node)
        self._join()
        spare = {*self.aliases.difference(self.writes), *self.made}
        for node in reversed(list(self.graph.nodes)):
            pure = node.target is operator.getitem or name_of(node.target) in _EMPTY or node in self.made
            if node in spare and pure and not node.users:
                self.graph.erase_node(node)
                self.aliases.discard(node)
        self._refresh()

    def _refresh(self) -> None:
        """Record anew what the nodes in this memory compute: their values count the writes."""
        for node in self.nodes:
            if node not in self.aliases or node in self.writes:
                continue
            value = value_of(node)
            needed = [one.requires_grad for one in tensors_in(value)]
            inputs = tensors_in([value_of(argument) for argument in node.all_input_nodes])
            trained = iter(needed if any(one.requires_grad for one in inputs) else [False] * len(needed))
            if node is self.root:
                set_value(node, fake_tensors.empty_like_fake(value, value.fake_mode))
            else:
                fake_tensors.infer_example_value(node)
            mark = lambda one, trained=trained: one.detach().requires_grad_(next(trained))  # noqa: E731
            set_value(node, fake_tensors.tree_map_only(Tensor, mark, value_of(node)))

    def _join(self) -> None:
        """Make a concatenation of slices that replace all of an empty tensor."""
        scatters = {node for node in self.made if node.target is torch.slice_scatter}
        for node in [node for node in self.made if node in scatters]:
            chain = [node]
            while chain[-1].args[0] in scatters:
                chain.append(chain[-1].args[0])  # type: ignore[arg-type]
            dim: Any = node.args[2]
            of_empty = chain[-1].args[0] is self.root and name_of(self.root.target) in _EMPTY
            if not of_empty or any(one.args[2] != dim for one in chain) or not _cover(chain, value_of(node).shape[dim]):
                continue
            start: Callable[[Node], Any] = lambda one: one.args[3] or 0  # noqa: E731
            parts = [one.args[1] for one in sorted(chain, key=start)]
            joined = self._call(node, torch.cat, (parts, dim - value_of(node).dim()))
            if same_strides(value_of(joined), value_of(node)):
                node.replace_all_uses_with(joined)


def _cover(scatters: Sequence[Node], size: Any) -> bool:
    """Tell whether slices along an axis of this size take every place once."""
    if type(size) is not int:
        return False
    ranges = sorted(slice(*node.args[3:]).indices(size) for node in scatters)
    edges = [0, *(stop for _, stop, _ in ranges)]
    return all(step == 1 for *_, step in ranges) and [start for start, *_ in ranges] == edges[:-1] and edges[-1] == size


def _one_axis(index: Any, of: Node) -> tuple[int, Any] | None:
    """Return the one axis along which an index takes less than everything, and the slice or place; or None."""
    items, rank = list(index) if isinstance(index, tuple) else [index], value_of(of).dim()
    if any(item is Ellipsis for item in items):
        at = next(place for place, item in enumerate(items) if item is Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    partial = [(dim, item) for dim, item in enumerate(items) if not (isinstance(item, slice) and item == slice(None))]
    if len(items) > rank or len(partial) != 1:
        return None
    _, item = partial[0]
    limits = (item.start, item.stop, item.step) if isinstance(item, slice) else (item,)
    plain = all(type(limit) is int or (limit is None and isinstance(item, slice)) for limit in limits)
    return partial[0] if plain else None


def _decline(reason: str) -> Any:
    raise Declined(reason)
