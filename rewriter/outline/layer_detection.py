"""Propose where a model's layers begin and end in its graph; partition.py chooses among the proposals.

A proposal is a list of stretches of nodes, in graph order.  None has to be right: stretches that turn out to differ are
compiled separately, so that a wrong cut costs time and never correctness.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx.metadata import module_path

Stretch = range  # of positions in the list of a graph's nodes
_DEPTH = 3  # levels of nested module lists that are considered


def proposals(nodes: Sequence[Node]) -> Iterator[list[Stretch]]:
    """Propose ways to cut ``nodes`` into layers, the likeliest first; nodes between stretches belong to no layer."""
    paths = [module_path(node) for node in nodes]
    seen: list[list[Stretch]] = []
    for depth in range(1, _DEPTH + 1):
        stretches = by_module(paths, depth)
        if len(stretches) > 1 and stretches not in seen:
            seen.append(stretches)
            yield stretches
    yield by_period(nodes)


def by_module(paths: Sequence[str], depth: int) -> list[Stretch]:
    """Return one stretch for each numbered module: ``layers.7`` at depth 1, ``stages.0.layers.7`` at depth 2.

    What a model does between two layers belongs to the first of them.
    """
    numbered = re.compile(rf"(?:(?:^|.*?\.)\d+(?=\.|$)){{{depth}}}")
    labels = [prefix.group() if (prefix := numbered.match(path)) else "" for path in paths]
    runs = [(label, [index for index, _ in run]) for label, run in groupby(enumerate(labels), key=lambda pair: pair[1])]
    layers = [(re.sub(r"\d+$", "", label), run[0], run[-1] + 1) for label, run in runs if label]
    if not layers:
        return []
    ends = [start if stack == following else end for (stack, _, end), (following, start, _) in pairwise(layers)]
    return [range(start, end) for (_, start, _), end in zip(layers, [*ends, layers[-1][2]], strict=True)]


def by_period(nodes: Sequence[Node]) -> list[Stretch]:
    """Cut the longest repeating part of the graph where the fewest values cross from one repetition to the next."""
    kinds: dict[Any, int] = {}
    tokens = torch.tensor([kinds.setdefault(_token(node), len(kinds)) for node in nodes])
    runs = [(*_run(tokens, period), period) for period in range(1, len(nodes) // 2 + 1)]
    repeated = lambda run: (run[1] // run[2] * run[2], -run[2])  # noqa: E731  (most nodes, then the shortest period)
    start, length, period = max(runs, key=repeated, default=(0, 0, 1))
    if length < period:
        return []
    end = start + length + period
    first = min(
        range(start, start + period), key=lambda position: (_crossing(nodes, start, position + period), position)
    )
    return [range(position, position + period) for position in range(first, end - period + 1, period)]


def _run(tokens: Tensor, period: int) -> tuple[int, int]:
    """Return the start and length of the longest run of tokens that equal those one period later."""
    different = (tokens[:-period] != tokens[period:]).nonzero().flatten().tolist()
    edges = [-1, *different, len(tokens) - period]
    length, begin = max((right - left - 1, -(left + 1)) for left, right in pairwise(edges))
    return -begin, length


def _token(node: Node) -> Any:
    """Describe what a node computes, regardless of which nodes it reads."""
    value = value_of(node)
    metadata = (value.dtype, tuple(map(str, value.shape))) if isinstance(value, Tensor) else type(value)
    return node.op, node.target, metadata, repr(map_arg((node.args, node.kwargs), lambda _: None))


def _crossing(nodes: Sequence[Node], start: int, cut: int) -> int:
    """Count the values made from ``start`` on that are still needed at ``cut``."""
    after = set(nodes[cut:])
    return sum(any(user in after or user.op == "output" for user in node.users) for node in nodes[start:cut])
