"""A layer's forward and backward as storages and ops: what may be saved for backward, and what recomputing it costs.

Read from the joint graph that AOTAutograd traces.  Views share the storage of what they are views of; every other node
is an op.  A choice is a set of forward ops that are *kept*: their results stay in memory if backward or a recomputed op
reads them.  All other ops are recomputed where their results are needed, from what is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.fx import Graph, Node

from fastft.compat import fake_tensors, operators, symbolic
from fastft.compat.symbolic import Sizes, evaluate, expression
from fastft.rewriter.fx.metadata import module_path
from fastft.rewriter.memory import cost_model, op_traits
from fastft.rewriter.memory.device_rates import Rates

EXACT = 10  # up to so many ops, every combination is tried


@dataclass(frozen=True)
class Storage:
    """Memory of a tensor and its views.

    bytes: an int, or an expression of the graph's symbols.  input: its index among the inputs, if it is one.
    """

    name: str
    bytes: Any
    dtype: str
    shape: str
    input: int | None = None
    tangent: bool = False


@dataclass(frozen=True)
class Op:
    """A node that computes.

    reads, makes: storages.  seconds: at the example's sizes.  scratch: bytes besides the results.  materialized: its
    results are in memory; those of others are fused into their users.  recomputable: may be run a second time.
    """

    node: str
    label: str
    module: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    seconds: float
    scratch: Any
    materialized: bool
    forward: bool
    recomputable: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of a layer at given sizes, beyond what is allocated before it runs.

    saved: results of its own that it keeps for backward.  forward, backward: the peak while it runs; forward includes
    what it keeps and its results, backward its results and the incoming gradients, but not what it kept.
    """

    saved: int
    forward: int
    backward: int


@dataclass
class Joint:
    """The storages and ops of a joint graph, in its order, and the storages that forward and backward return.

    hints: the symbols of its sizes, with their values in the example.
    nodes: the names of storages in the graph.
    """

    storages: list[Storage] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    forward_outputs: list[int] = field(default_factory=list)
    backward_outputs: list[int] = field(default_factory=list)
    hints: Sizes = field(default_factory=dict)
    nodes: dict[int, str] = field(default_factory=dict)

    @cached_property
    def maker(self) -> dict[int, int]:
        """The op that makes each storage, both by number."""
        return {storage: number for number, op in enumerate(self.ops) for storage in op.makes}

    @cached_property
    def needed(self) -> list[int]:
        """The storages of forward and of the inputs that backward reads."""
        made = {storage for op in self.ops if not op.forward for storage in op.makes}
        reads = dict.fromkeys(storage for op in self.ops if not op.forward for storage in op.reads)
        reads |= dict.fromkeys(self.backward_outputs)
        return [storage for storage in reads if storage not in made and not self.storages[storage].tangent]

    def closure(self, kept: Iterable[int]) -> tuple[list[int], list[int]]:
        """Return the storages that stay in memory, inputs included, and the ops that are recomputed."""
        kept, saved, recomputed = set(kept), [], []
        waiting, seen = list(self.needed), set(self.needed)
        while waiting:
            storage = waiting.pop()
            made_by = self.maker.get(storage)
            if made_by is None or made_by in kept or not self.ops[made_by].recomputable:
                saved.append(storage)
            elif made_by not in recomputed:
                recomputed.append(made_by)
                new = [read for read in self.ops[made_by].reads if read not in seen]
                waiting += new
                seen.update(new)
        return saved, recomputed

    def saved_inputs(self, kept: Iterable[int]) -> list[int]:
        """List the indices of the inputs that are saved for backward."""
        places = [self.storages[storage].input for storage in self.closure(kept)[0]]
        return [place for place in places if place is not None]

    def memory(self, kept: Iterable[int], sizes: Sizes | None = None) -> Memory:
        """Replay forward and backward and count the live bytes.

        What was kept is freed as soon as backward no longer reads it, and so are the incoming gradients.
        """
        saved, _ = self.closure(kept)
        sizes = self.hints | (sizes or {})
        sizes_of = [evaluate(storage.bytes, sizes) for storage in self.storages]
        made = [storage for storage in saved if storage in self.maker]
        forward = self._peak([op for op in self.ops if op.forward], [*made, *self.forward_outputs], [], sizes_of, sizes)
        order = list(self._backward_order(set(saved)))
        tangents = [number for number, storage in enumerate(self.storages) if storage.tangent]
        backward = self._peak(order, self.backward_outputs, [*made, *tangents], sizes_of, sizes)
        return Memory(
            sum(sizes_of[storage] for storage in made), forward, backward - sum(sizes_of[storage] for storage in made)
        )

    def _backward_order(self, saved: set[int]) -> Iterator[Op]:
        """Iterate over backward's ops, each after the ops that are recomputed for it."""
        done: set[int] = set()

        def needs(op: Op) -> Iterator[Op]:
            for read in op.reads:
                made_by = self.maker.get(read)
                if made_by is not None and self.ops[made_by].forward and read not in saved and made_by not in done:
                    done.add(made_by)
                    yield from needs(self.ops[made_by])
                    yield self.ops[made_by]

        for op in self.ops:
            if not op.forward:
                yield from needs(op)
                yield op

    def _peak(
        self, order: Sequence[Op], stays: Sequence[int], before: Sequence[int], sizes_of: Sequence[int], sizes: Any
    ) -> int:
        """Return the peak of live bytes while these ops run; before: the storages that are live at the start."""
        last = {storage: step for step, op in enumerate(order) for storage in (*op.reads, *op.makes)}
        last |= dict.fromkeys(stays, len(order))
        live = sum(sizes_of[storage] for storage in before)
        peak = live
        counted = set(before)
        for step, op in enumerate(order):
            made = [
                storage
                for storage in op.makes
                if storage not in counted and (op.materialized or last[storage] == len(order))
            ]
            live += sum(sizes_of[storage] for storage in made)
            counted.update(made)
            peak = max(peak, live + evaluate(op.scratch, sizes))
            dead = [storage for storage in {*op.reads, *op.makes} if storage in counted and last[storage] == step]
            live -= sum(sizes_of[storage] for storage in dead)
            counted.difference_update(dead)
        return peak


def read(graph: Graph, forward_outputs: int, rate: Rates) -> Joint:
    """Read a layer's joint graph, whose first ``forward_outputs`` outputs are those of forward.

    Storages are named after nodes, whose names are the same whenever the layer is traced.
    """
    joint, storage_of, places = Joint(), dict[Node, list[int]](), 0
    gradient: set[Node] = set()

    def new(name: str, value: Any, **known: Any) -> int:
        dtype, shape = str(getattr(value, "dtype", "")).removeprefix("torch."), "x".join(map(str, value.shape))
        joint.storages.append(Storage(name, expression(cost_model.tensor_bytes(value)), dtype, shape, **known))
        joint.hints |= symbolic.hints_of(value)
        return len(joint.storages) - 1

    for node in graph.nodes:
        value = node.meta.get("val")
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or not gradient.isdisjoint(node.all_input_nodes):
            gradient.add(node)
        if node.op == "placeholder":
            if fake_tensors.tensors_in(value):
                storage_of[node] = [new(node.name, value, tangent=tangent, input=None if tangent else places)]
                joint.nodes[storage_of[node][0]] = node.name
            places += not tangent
        elif node.op == "call_function":
            reads = dict.fromkeys(
                storage for argument in node.all_input_nodes for storage in storage_of.get(argument, ())
            )
            if node.target is operator.getitem:
                parent, place = node.args
                whole = storage_of.get(parent, [])
                storage_of[node] = [whole[place]] if isinstance(place, int) and place < len(whole) else whole
                joint.nodes[storage_of[node][0]] = node.name
            elif operators.is_view(node.target) and reads:
                storage_of[node] = list(storage_of.get(node.all_input_nodes[0], reads))
            else:
                values = fake_tensors.tensors_in(value)
                made = [
                    new(f"{node.name}.{index}" if len(values) > 1 else node.name, tensor)
                    for index, tensor in enumerate(values)
                ]
                storage_of[node] = made
                joint.nodes |= dict.fromkeys(made, node.name)
                joint.ops.append(_op(node, tuple(reads), tuple(made), node not in gradient, rate))
    results: Any = graph.output_node().args[0]
    outputs = [storage_of.get(node, []) if isinstance(node, Node) else [] for node in results]
    joint.forward_outputs = [storage for storages in outputs[:forward_outputs] for storage in storages]
    joint.backward_outputs = [storage for storages in outputs[forward_outputs:] for storage in storages]
    return joint


def _op(node: Node, reads: tuple[int, ...], makes: tuple[int, ...], forward: bool, rate: Rates) -> Op:
    name = str(node.target).removesuffix(".default")
    return Op(
        node.name, name, module_path(node), reads, makes, cost_model.seconds(node, rate),
        expression(cost_model.scratch_bytes(node)),
        materialized=not op_traits.is_fused(node) or not all(map(op_traits.is_fused, node.users)),
        forward=forward, recomputable=not op_traits.is_random(node.target),
    )  # fmt: skip
