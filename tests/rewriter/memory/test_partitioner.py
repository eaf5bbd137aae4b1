"""The partitioner: what it keeps where torch tagged nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import CheckpointPolicy

from fastft.rewriter.memory.partitioner import Partitioner, tag_forward
from fastft.rewriter.passes import rewrite


def saved(partitioner: Callable, dropout: float = 0.0) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """The shapes that a small layer keeps beside its inputs, and its gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    shapes = []

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        inner = torch.nn.functional.dropout(torch.softmax(x @ weight, -1), dropout)
        return x + torch.tanh(inner @ weight) @ weight

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable:
        run = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
        return aot_module_simplified(gm, example_inputs, run, partition_fn=partitioner)

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in (x.data_ptr(), weight.data_ptr()):
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = torch.compile(layer, backend=backend)(x, weight)
    y.square().sum().backward()
    return shapes, [x.grad, weight.grad]


def test_nothing_but_the_inputs_is_kept() -> None:
    usual, expected = saved(min_cut_rematerialization_partition)
    kept, actual = saved(Partitioner(()))
    assert usual
    assert not kept
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_seeds_and_what_depends_on_a_gradient_are_not_tagged() -> None:
    graph = Graph()
    x, tangent = graph.placeholder("primals_1"), graph.placeholder("tangents_1")
    import torch._inductor.inductor_prims  # registers the operators

    seed = graph.call_function(torch.ops.prims.inductor_seeds.default, (1, torch.device("cpu")))
    inner = graph.call_function(torch.ops.aten.mul.Tensor, (x, seed))
    user = graph.call_function(torch.ops.aten.sin.default, (inner,))
    user.meta = {"recompute": CheckpointPolicy.MUST_SAVE, "ac_graph_id": 7}
    grad = graph.call_function(torch.ops.aten.mul.Tensor, (inner, tangent))
    last = graph.call_function(torch.ops.aten.sin.default, (grad,))
    tag_forward(graph, ())
    assert inner.meta == {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 7}
    assert user.meta["recompute"] is CheckpointPolicy.MUST_SAVE
    assert not any("recompute" in node.meta for node in (x, tangent, seed, grad, last))


def test_the_partitioner_names_itself_to_the_caches() -> None:
    full, usual = (Partitioner(kept).uuid() for kept in ((), None))
    assert full == Partitioner(()).uuid() != ""
    assert full != usual


@pytest.mark.parametrize("packed", [False, True])
def test_the_product_of_a_gated_activation_is_computed_again(packed: bool) -> None:
    """An MLP keeps its input and what gate and up are; torch by itself would keep their product too."""

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        if packed:
            a, b = (x @ torch.cat((gate, up), -1)).chunk(2, -1)
        else:
            a, b = x @ gate, x @ up
        return (torch.nn.functional.silu(a) * b) @ down

    sequences, hidden, inner = 5, 6, 14
    weights = [torch.randn(*size, requires_grad=True) for size in ((hidden, inner), (hidden, inner), (inner, hidden))]
    x = torch.randn(sequences, hidden, requires_grad=True)
    kept: dict[bool, list[tuple[int, ...]]] = {}
    for ours in (False, True):
        torch._dynamo.reset()

        def backend(gm: GraphModule, example_inputs: list[Any], ours: bool = ours) -> Callable:
            assert [one.rule for one in rewrite(gm).lifted] == ["glu.silu_packed" if packed else "glu.silu"]
            partitioner = Partitioner() if ours else min_cut_rematerialization_partition
            run = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
            partition = partial(partitioner, compiler="inductor")
            return aot_module_simplified(gm, example_inputs, run, partition_fn=partition)

        compiled, shapes = torch.compile(mlp, backend=backend), kept.setdefault(ours, [])
        compiled(x, *weights)  # compiles, which saves things of its own
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(tuple(t.shape)) or t, lambda t: t):
            y = compiled(x, *weights)
        actual = torch.autograd.grad(y.square().sum(), [x, *weights])
        expected = torch.autograd.grad(mlp(x, *weights).square().sum(), [x, *weights])
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    products = {
        ours: sum(sorted(shape) == [sequences, inner] for shape in kept[ours]) for ours in kept
    }  # or transposed
    assert products == ({False: 1, True: 0} if packed else {False: 3, True: 2})


@pytest.mark.slow
def test_through_inductor_with_dropout() -> None:
    """Seeds are kept: the mask of backward is that of forward, which the gradient along a direction shows."""
    torch._dynamo.reset()

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.nn.functional.dropout(torch.tanh(x @ self.weight), 0.5)

    torch.manual_seed(0)
    model = torch.nn.Sequential(*[Layer() for _ in range(3)])
    compiled = torch.compile(model, backend="fastft", options={"memory_budget": "min", "strict": True})
    x = torch.randn(2, 8, dtype=torch.float64)
    step = 1e-6

    def loss() -> Tensor:
        torch.manual_seed(1)
        return compiled(x).square().sum()

    loss().backward()
    weight = model[1].weight
    along = torch.randn_like(weight)
    values = []
    for sign in (1, -2):
        weight.data.add_(along, alpha=sign * step)
        values.append(loss().item())
    expected = (values[0] - values[1]) / (2 * step)
    assert (weight.grad * along).sum().item() == pytest.approx(expected, rel=1e-5)
