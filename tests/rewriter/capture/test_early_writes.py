"""Writes to inputs that nothing read before come first; layers that take parts of one tensor by number are alike."""

import copy
from collections.abc import Callable

import pytest
import torch
from lifting import calls
from torch import Tensor, nn
from torch.fx import GraphModule

from fastft.rewriter.lowering import lower
from fastft.rewriter.options import Options
from fastft.rewriter.passes import rewrite
from fastft.rewriter.report.data import GraphReport

WIDTH, DEPTH = 4, 5


class Layer(nn.Module):
    def __init__(self, body: Callable) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.register_buffer("scale", torch.full((WIDTH,), 3.0))

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return self.body(self, x, more)


class Model(nn.Module):
    """Layers that each may get a part of what is made for all of them."""

    def __init__(self, body: Callable, part: Callable | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = part
        self.first = nn.Linear(WIDTH, DEPTH * WIDTH)
        self.layers = nn.ModuleList(Layer(body) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.tanh(self.first(x)).view(*x.shape[:-1], DEPTH, WIDTH)
        for number, layer in enumerate(self.layers):
            x = layer(x, self.part(made, number) if self.part else None)
        return x


def trained(model: nn.Module, run: Callable) -> dict[str, Tensor | None]:
    """Output, gradients, parameters and buffers after a step."""
    x = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(2)
    output = run(x)
    output.square().sum().backward()
    gradients = {f"gradient of {name}": one.grad for name, one in model.named_parameters()}
    return {
        "output": output.detach(),
        "x": x.grad,
        **gradients,
        **dict(model.named_parameters()),
        **dict(model.named_buffers()),
    }


def eagerly(reports: list[GraphReport], order: list[str] | None = None) -> Callable:
    """A backend that rewrites, cuts, and compiles nothing."""

    def backend(gm: GraphModule, example_inputs: list[Tensor]) -> Callable:
        reports.append(rewrite(gm))
        if order is not None:
            order.extend(calls(gm))
        return lower.lower(gm, example_inputs, Options(lower="eager"), reports[-1], plan=False)

    torch._dynamo.reset()
    return backend


def check(model: nn.Module, order: list[str] | None = None) -> GraphReport:
    reports: list[GraphReport] = []
    other = copy.deepcopy(model)
    expected = trained(other, other)
    actual = trained(model, torch.compile(model, backend=eagerly(reports, order), dynamic=False))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)
    (report,) = reports
    return report


def clipped(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    layer.weight.data.clamp_(-0.5, 0.5)
    return x + torch.tanh(x @ layer.weight)


def counted(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    layer.scale.mul_(0.5)
    return x + torch.tanh(x @ layer.weight) + layer.scale


def counted_afterwards(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    y = x + torch.tanh(x @ layer.weight) + layer.scale
    layer.scale.mul_(0.5)
    return y


def of_a_batch(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    layer.scale.copy_(x.detach().mean((0, 1)))
    return x + torch.tanh(x @ layer.weight) + layer.scale


def clipped_twice(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    """Through a view of a view."""
    rows = layer.weight.data
    flat = rows.view(-1)
    rows.clamp_(-0.5, 0.5)
    flat.clamp_(-0.4, 0.6)
    return x + torch.tanh(x @ layer.weight)


def clipped_without_gradient(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    with torch.no_grad():
        layer.weight.clamp_(-0.5, 0.5)
    return x + torch.tanh(x @ layer.weight)


def copied_without_gradient(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    with torch.no_grad():
        layer.scale.copy_(layer.weight[0])
    return x + torch.tanh(x @ layer.weight) + layer.scale


def random(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    """Two draws, whose order is kept."""
    x = nn.functional.dropout(x)
    layer.scale.uniform_()
    return x + torch.tanh(x @ layer.weight) + layer.scale


@pytest.mark.parametrize("body", [clipped, clipped_twice, counted], ids=lambda body: body.__name__)
def test_layers_that_write_before_they_read_are_alike(body: Callable) -> None:
    order: list[str] = []
    report = check(Model(body), order)
    assert [region.calls for region in report.regions if region.calls > 1] == [DEPTH]
    written = [place for place, name in enumerate(order) if name in ("clamp_", "mul_")]
    assert len(written) in (DEPTH, 2 * DEPTH)
    assert max(written) < order.index("linear")


@pytest.mark.parametrize(
    "body", [counted_afterwards, of_a_batch, clipped_without_gradient, copied_without_gradient, random],
    ids=lambda body: body.__name__,
)  # fmt: skip
def test_other_writes_keep_the_graph_whole(body: Callable) -> None:
    assert "writes in place" in check(Model(body)).whole


def test_a_write_behind_a_read_by_another_layer_stays() -> None:
    model = Model(counted)
    for layer in model.layers[1:]:
        layer.scale = model.layers[0].scale
    assert "writes in place" in check(model).whole


def gated(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    return x + torch.tanh(x @ layer.weight) * more


def added(layer: Layer, x: Tensor, more: Tensor | None) -> Tensor:
    return x + torch.tanh(x @ layer.weight) + more


PARTS: dict[str, Callable] = {
    "all but one axis": lambda made, number: made[:, :, number, :],
    "from the end": lambda made, number: made[..., number, :],
    "the last first": lambda made, number: made[:, :, DEPTH - 1 - number],
}


@pytest.mark.parametrize("name", PARTS)
def test_layers_that_take_parts_by_number_are_alike(name: str) -> None:
    report = check(Model(gated, PARTS[name]))
    assert [region.calls for region in report.regions if region.calls > 1] == [DEPTH]


def test_parts_taken_without_a_gradient_keep_it_so() -> None:
    def part(made: Tensor, number: int) -> Tensor:
        with torch.no_grad():
            return made[:, :, number]

    check(Model(gated, part))


def test_parts_of_what_is_written_stay() -> None:
    def part(made: Tensor, number: int) -> Tensor:
        made[:, :, 0].data.mul_(0.5)
        return made[:, :, number] + 1

    check(Model(added, part))


class Returning(Model):
    """Parts that the model returns, of a parameter of its own or of what it made."""

    def __init__(self, own: bool) -> None:
        super().__init__(gated)
        self.table = nn.Parameter(torch.randn(DEPTH, WIDTH)) if own else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made = torch.tanh(self.first(x)).view(*x.shape[:-1], DEPTH, WIDTH)
        parts = [(made if self.table is None else self.table)[..., number, :] for number in range(DEPTH)]
        for layer, part in zip(self.layers, parts, strict=True):
            x = layer(x, part)
        return x, parts[1], parts[2][1:]


@pytest.mark.parametrize("own", [False, True], ids=["made", "parameter"])
def test_parts_that_are_returned_are_views(own: bool) -> None:
    model, other = Returning(own), Returning(own)
    x = torch.randn(2, 3, WIDTH)
    actual, expected = torch.compile(model, backend=eagerly([]), dynamic=False)(x), other(x)
    for mine, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, truth)
        assert mine.stride() == truth.stride()
    places = [one.untyped_storage().data_ptr() for one in (*actual, *([model.table] if own else []))]
    assert len(set(places[1:])) == 1


class Written(Model):
    """A buffer is written to through .data, which no version counts, before its parts are taken."""

    def __init__(self) -> None:
        super().__init__(gated)
        self.register_buffer("table", torch.randn(DEPTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        self.table.data.add_(x.detach().mean())
        for number, layer in enumerate(self.layers):
            x = layer(x, self.table[number])
        return x


def test_parts_of_a_buffer_that_is_written_stay() -> None:
    check(Written())
