"""A graph as lines, to be shown beside what it became."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule

from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx.bodies import bodies
from fastft.rewriter.fx.metadata import module_path, name_of

MOST = 20_000  # lines: who would read more


@dataclass(frozen=True)
class Line:
    """A call: the module that makes it, what it calls, and what comes out."""

    module: str
    call: str
    result: str

    @property
    def ours(self) -> bool:
        return self.call.startswith("fastft.")


def lines(gm: GraphModule) -> list[Line]:
    """List every call of a graph and of its nested bodies, in order."""
    found = [
        Line(module_path(node), name_of(node.target), _result(value_of(node)))
        for body in bodies(gm)
        for node in body.graph.nodes
        if node.op in ("call_function", "call_method")
    ]
    return found[:MOST]


def _result(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(map(str, value.shape))}".replace("'", "")
    return "" if value is None else type(value).__name__
