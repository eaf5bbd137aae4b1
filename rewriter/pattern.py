"""A rule's reference as a graph: traced, given values, and normalised like the user's own graph."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node, Tracer

from fastft.rewriter import compat
from fastft.rewriter.compat import value_of
from fastft.rewriter.normalize import normalize
from fastft.rewriter.rule import Rule, dims

ANY_SIZE = object()  # in a template: a number that depends on the shapes, known only once they are


@dataclass(frozen=True, eq=False)
class Pattern:
    """A normalised trace of ``rule.reference`` at given dtypes and shapes."""

    rule: Rule
    graph: Graph
    root: Node
    anchor: Node
    parameters: Mapping[str, Node]

    @property
    def calls(self) -> list[Node]:
        """The nodes that compute something."""
        return [node for node in self.graph.nodes if node.op in ("call_function", "call_method")]

    @functools.cached_property
    def height(self) -> int:
        """How many calls lie above the anchor on the longest way to the root."""
        heights = {self.anchor: 0}
        for node in self.graph.nodes:
            below = [heights[argument] for argument in node.all_input_nodes if argument in heights]
            if below:
                heights[node] = max(below) + 1
        return heights[self.root]


def trace(rule: Rule, values: Mapping[str, Any]) -> Pattern:
    """Trace ``rule.reference`` at these values: fake tensors and numbers."""
    graph = capture(rule.reference, *(values[name] for name in inspect.signature(rule.reference).parameters)).graph
    normalize(graph)
    for node in graph.nodes:
        node.args, node.kwargs = compat.tree_map_only(torch.SymInt, _or_any_size, (node.args, dict(node.kwargs)))
    root = graph.output_node().args[0]
    assert isinstance(root, Node), f"{rule.name}: a reference returns one tensor"
    anchors = list(graph.find_nodes(op="call_function", target=rule.anchor))
    assert anchors, f"{rule.name}: the anchor does not occur in the reference"
    parameters = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    return Pattern(rule, graph, root, anchors[-1], parameters)


@functools.cache
def template(rule: Rule, dtypes: tuple[torch.dtype, ...]) -> Pattern:
    """The pattern that finds candidates: symbolic sizes, one dtype for each tensor parameter of ``rule.shapes``."""
    names = [dims(spec) for spec in rule.shapes.values()]
    tensors = compat.symbolic_tensors([("leading",) * leading + tuple(named) for leading, named in names], dtypes)
    scalars = [name for name in inspect.signature(rule.reference).parameters if name not in rule.shapes]
    return trace(rule, dict(zip(rule.shapes, tensors, strict=True)) | dict.fromkeys(scalars, 0.5))


def templates(rule: Rule, present: frozenset[torch.dtype]) -> list[Pattern]:
    """One template for each assignment of the dtypes that occur in a graph."""
    ordered = sorted(present, key=str)
    return [template(rule, dtypes) for dtypes in itertools.product(ordered, repeat=len(rule.shapes))]


def capture(function: Callable, *values: Any) -> GraphModule:
    """A straight-line function at these values, as Dynamo would give it: every node knows what it computes."""
    graph = Tracer().trace(function)
    gm = GraphModule(torch.nn.Module(), graph)
    with compat.fake_mode_of(values):
        _Propagate(gm).run(*values)
    _fold(graph)
    gm.recompile()
    return gm


class _Propagate(Interpreter):
    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        compat.set_value(n, result)
        return result


def _fold(graph: Graph) -> None:
    """Write dtypes, sizes and other values that are not tensors into the calls that use them, as Dynamo does."""
    for node in list(graph.nodes):
        if node.op not in ("placeholder", "output") and not isinstance(value_of(node), Tensor):
            for user in list(node.users):
                user.args, user.kwargs = torch.fx.map_arg((user.args, user.kwargs), functools.partial(_write, node))
            graph.erase_node(node)


def _write(folded: Node, argument: Node) -> Any:
    return value_of(folded) if argument is folded else argument


def _or_any_size(size: torch.SymInt) -> Any:
    return ANY_SIZE if compat.is_template_size(size) else size
