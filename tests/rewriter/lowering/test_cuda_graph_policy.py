"""Which layers run as CUDA graphs unasked, decided on tensors of a device that need not be there."""

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from fastft.compat.fake_tensors import FakeTensorMode, set_value
from fastft.rewriter.lowering.cuda_graph_policy import SMALL, capturable
from fastft.rewriter.outline.partition import Piece

H, EXPERTS, TOP_K = 64, 4, 2


def traced(tokens: int, *, experts: bool) -> tuple[GraphModule, list[Piece]]:
    """A graph with one layer that reads a hidden state [1, tokens, H] on a CUDA device, as Dynamo would trace it."""
    graph = Graph()

    def valued(node: Node, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Node:
        set_value(node, torch.empty(shape, dtype=dtype, device="cuda"))
        return node

    ids = valued(graph.placeholder("input_ids"), 1, tokens, dtype=torch.int64)
    hidden = valued(graph.call_function(torch.ops.aten.embedding, (ids,)), 1, tokens, H)
    if not experts:
        result = valued(graph.call_function(torch.relu, (hidden,)), 1, tokens, H)
        return GraphModule({}, graph), [Piece([result], layer=True, inputs=[hidden], outputs=[result])]
    weight = valued(graph.placeholder("weight"), EXPERTS, H, H)
    chosen = valued(graph.placeholder("top_k_index"), tokens, TOP_K, dtype=torch.int64)
    rows = valued(graph.call_function(torch.reshape, (hidden, (tokens, H))), tokens, H)
    sort = graph.call_function(torch.ops.fastft.expert_order, (chosen, EXPERTS))
    sizes = (tokens * TOP_K, tokens * TOP_K, EXPERTS)
    routing = [
        valued(graph.call_function(operator.getitem, (sort, at)), size, dtype=torch.int32)
        for at, size in enumerate(sizes)
    ]
    arguments = (rows, weight, [], None, None, None, None, *routing, H, 1.0, TOP_K, False, True, 0, "")
    product = graph.call_function(torch.ops.fastft.expert_linear, arguments)
    result = valued(graph.call_function(operator.getitem, (product, 0)), tokens * TOP_K, H)
    inside = [rows, sort, *routing, product, result]
    layer = Piece(inside, layer=True, inputs=[hidden, weight, chosen], outputs=[result])
    return GraphModule({}, graph), [layer]


@pytest.mark.parametrize(
    ("tokens", "experts", "asked", "graphed"),
    [
        (SMALL // H, False, None, True),
        (SMALL // H + 1, False, None, False),
        (SMALL // H // TOP_K, True, None, True),
        (SMALL // H // TOP_K + 1, True, None, False),
        (SMALL // H + 1, True, True, True),
        (1, True, False, False),
    ],
)
def test_small_layers_run_as_cuda_graphs(tokens: int, experts: bool, asked: bool | None, graphed: bool) -> None:
    with FakeTensorMode():
        assert (capturable(*traced(tokens, experts=experts), asked) is not None) == graphed
