"""Trace a rule's reference to a graph, propagate example values, and normalise it like the user's own graph."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fastft.compat import fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.capture.normalize import normalize
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.editing import replace_by_value
from fastft.rewriter.matching.rule import Rule, dims

ANY_SIZE = object()  # in a template: a number that depends on the shapes, known only once they are
_EXAMPLES = {"bool": False, "str": "silu"}  # of parameters that are neither tensors nor numbers
_SIZES = ((64, 2), (96, 3))  # two choices of the first named size, halved for each further one, and of leading ones


@dataclass(frozen=True, eq=False)
class Pattern:
    """A normalised trace of ``rule.reference`` at given dtypes and shapes.

    roots: the nodes that it returns; the anchor is below the first.
    """

    rule: Rule
    graph: Graph
    roots: tuple[Node, ...]
    anchor: Node
    parameters: Mapping[str, Node]

    @property
    def calls(self) -> list[Node]:
        """The nodes that compute something."""
        return [node for node in self.graph.nodes if node.op in ("call_function", "call_method")]

    @functools.cached_property
    def height(self) -> int:
        """How many calls are above the anchor on the longest path to the first root."""
        heights = {self.anchor: 0}
        for node in self.graph.nodes:
            below = [heights[argument] for argument in node.all_input_nodes if argument in heights]
            if below:
                heights[node] = max(below) + 1
        return heights[self.roots[0]]


def trace(rule: Rule, values: Mapping[str, Any]) -> Pattern:
    """Trace ``rule.reference`` with these values: fake tensors and numbers."""
    graph = capture(rule.reference, *(values[name] for name in inspect.signature(rule.reference).parameters)).graph
    normalize(graph)
    graph.eliminate_dead_code()  # chunks whose parts became slices
    returned = graph.output_node().args[0]
    roots = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    assert all(isinstance(root, Node) for root in roots), f"{rule.name}: a reference returns tensors"
    anchors = list(graph.find_nodes(op="call_function", target=rule.anchor))
    assert anchors, f"{rule.name}: the anchor does not occur in the reference"
    parameters = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    return Pattern(rule, graph, roots, anchors[0], parameters)


@functools.cache
def template(rule: Rule, dtypes: tuple[torch.dtype, ...], state: autocast.State) -> Pattern | None:
    """Return the pattern that finds candidates: sizes left open, one dtype for each tensor that the reference casts.

    It is traced at two choices of sizes: a number that differs between them depends on the sizes.  None for dtypes that
    the reference does not take together.
    """
    try:
        with autocast.reproduced_on_cpu(state), fake_tensors.expecting_failures():
            first, second = (trace(rule, _values(rule, dtypes, *sizes)) for sizes in _SIZES)
    except RuntimeError:
        return None
    for node, other in zip(first.graph.nodes, second.graph.nodes, strict=True):
        node.args, node.kwargs = _opened(node.args, other.args), _opened(dict(node.kwargs), dict(other.kwargs))
    return first


def _opened(first: Any, second: Any) -> Any:
    """Return the first value, with ANY_SIZE wherever the second differs."""
    if isinstance(first, slice):
        return slice(*(_opened(getattr(first, name), getattr(second, name)) for name in ("start", "stop", "step")))
    if isinstance(first, dict):
        return {key: _opened(value, second[key]) for key, value in first.items()}
    if isinstance(first, (tuple, list)):
        return type(first)(map(_opened, first, second))
    return ANY_SIZE if type(first) is int and first != second else first


def _values(rule: Rule, dtypes: tuple[torch.dtype, ...], largest: int, leading: int) -> dict[str, Any]:
    """Make fake tensors of the rule's shapes, and a number for each other parameter."""
    sizes: dict[str, int] = {}
    for spec in rule.shapes.values():
        for name in dims(spec)[1]:
            sizes.setdefault(name, int(name) if name.isdigit() else largest >> len(sizes))
    of_dtype = dict(zip(rule.dtype_from, dtypes, strict=True))
    of_dtype |= {name: of_dtype[other] for name, other in rule.same_dtype_as.items()}
    of_dtype |= dict.fromkeys(rule.booleans, torch.bool)
    values: dict[str, Any] = {}
    for parameter, declared in inspect.signature(rule.reference).parameters.items():
        if parameter in rule.shapes:
            spec = rule.shapes[parameter]
            has_leading, names = dims(spec)
            shape = (1 if spec.startswith("*") else leading,) * has_leading + tuple(sizes[name] for name in names)
            values[parameter] = fake_tensors.fake_tensor(shape, of_dtype.get(parameter, torch.float32))
        else:
            values[parameter] = _EXAMPLES.get(str(getattr(declared.annotation, "__name__", declared.annotation)), 0.5)
    return values


def templates(rule: Rule, present: frozenset[torch.dtype]) -> Iterator[Pattern]:
    """Iterate over the templates for every choice of dtypes that occur in a graph, under autocast as it is now."""
    if not rule.between_casts:
        present = present - {torch.float32} or present
    for dtypes in itertools.product(sorted(present, key=str), repeat=len(rule.dtype_from)):
        if (pattern := template(rule, dtypes, autocast.state())) is not None:
            yield pattern


def capture(function: Callable, *values: Any) -> GraphModule:
    """Trace a straight-line function with these values, as Dynamo would: every node has its example value."""
    graph = Graph()
    # Not torch.fx.Tracer: while it traces, it patches module calls and attributes in all threads.
    tracer = GraphAppendingTracer(graph)
    names = itertools.islice(inspect.signature(function).parameters, len(values))
    returned = function(*(Proxy(graph.placeholder(name), tracer) for name in names))
    graph.output(tracer.create_arg(returned))
    gm = GraphModule(torch.nn.Module(), graph)
    with fake_tensors.fake_mode_of(values):
        _Propagate(gm).run(*values)
    fold(graph, list(graph.nodes))
    gm.recompile()
    return gm


class _Propagate(Interpreter):
    def run_node(self, n: Node) -> Any:
        """Run one node and record its example value."""
        result = super().run_node(n)
        fake_tensors.set_value(n, result)
        return result


def fold(graph: Graph, nodes: Sequence[Node]) -> None:
    """Replace dtypes, sizes and other values that are not tensors by constants in the calls that use them, as Dynamo
    does.
    """
    for node in nodes:
        if node.op not in ("placeholder", "output") and not fake_tensors.tensors_in(value_of(node)):
            replace_by_value(node, value_of(node))
            graph.erase_node(node)
