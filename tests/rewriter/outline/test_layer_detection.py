"""Where layers are thought to begin and end: by the numbers in module paths, and by what repeats itself."""

import functools
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastft.rewriter.fx.metadata import module_path
from fastft.rewriter.outline import layer_detection


def cut(paths: str, depth: int = 1) -> list[str]:
    """The stretches as words of ``paths``; a dash stands for the model itself."""
    words = paths.split()
    stretches = layer_detection.by_module(["" if word == "-" else word for word in words], depth)
    return [" ".join(words[stretch.start : stretch.stop]) for stretch in stretches]


@pytest.mark.parametrize(
    ("paths", "depth", "expected"),
    [
        ("embed h.0 h.1 norm", 1, ["h.0", "h.1"]),
        ("h.0.a h.0.b h.0 h.1.a h.1", 1, ["h.0.a h.0.b h.0", "h.1.a h.1"]),
        ("0 0.a 1.a 2", 1, ["0 0.a", "1.a", "2"]),  # nn.Sequential is the model
        ("h.9 h.10 h.11", 1, ["h.9", "h.10", "h.11"]),
        ("- h.0 - - h.1 - h.2 - -", 1, ["h.0 - -", "h.1 -", "h.2"]),  # between layers: the first of them
        ("h.0 rotary h.1 norm", 1, ["h.0 rotary", "h.1"]),
        ("e.h.0 e.h.1 e.norm d.h.0 - d.h.1", 1, ["e.h.0", "e.h.1", "d.h.0 -", "d.h.1"]),  # encoder and decoder
        ("h.0 - h.0 h.1", 1, ["h.0 -", "h.0", "h.1"]),  # one called twice
        ("layer2d h2.a conv1d norm", 1, []),  # digits within a name are no number
        ("layer2d h.0.conv1d h.1.conv1d", 1, ["h.0.conv1d", "h.1.conv1d"]),
        ("s.0.h.0 s.0.h.1.a s.0.norm s.1.h.0 s.1.h.1", 1, ["s.0.h.0 s.0.h.1.a s.0.norm", "s.1.h.0 s.1.h.1"]),
        ("s.0.h.0 s.0.h.1.a s.0.norm s.1.h.0 s.1.h.1", 2, ["s.0.h.0", "s.0.h.1.a", "s.1.h.0", "s.1.h.1"]),
        ("s.0.h.0 s.0 s.0.h.1 s.1.h.0", 2, ["s.0.h.0 s.0", "s.0.h.1", "s.1.h.0"]),
        ("0.0 0.1 1.0", 2, ["0.0", "0.1", "1.0"]),
        ("a.0.b.1.c.2.d a.0.b.1.c.3", 3, ["a.0.b.1.c.2.d", "a.0.b.1.c.3"]),
        ("h.0.a h.1.a", 2, []),
        ("embed norm head", 1, []),
        ("", 1, []),
    ],
)
def test_by_module(paths: str, depth: int, expected: list[str]) -> None:
    assert cut(paths, depth) == expected


class Block(nn.Module):
    """A layer of four nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Shared(nn.Module):
    """One block, called again and again, between an embedding and a head."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.embed, self.block, self.head, self.calls = nn.Embedding(9, 4), Block(), nn.Linear(4, 9), calls

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(self.calls):
            x = self.block(x)
        return self.head(x).relu()


class Nested(nn.Module):
    """Stages of layers; a stage ends with a norm."""

    def __init__(self, *depths: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*(Block() for _ in range(depth))) for depth in depths)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = torch.rms_norm(stage(x), (4,))
        return x


def decorated(forward: Callable) -> Callable:
    """As transformers' decorators wrap a model's forward."""

    @functools.wraps(forward)
    def wrapper(*args: object, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    return wrapper


class Decorated(Nested):
    forward = decorated(Nested.forward)


def gated(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    return x + torch.tanh(x @ weights[0]) * torch.sigmoid(x @ weights[1])


def plain(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    return torch.relu(x @ weights[0]) - x


def functional(*kinds: Callable) -> Callable[[Tensor], Tensor]:
    """A loop over tuples of parameters, without any module."""
    parameters = [(torch.randn(4, 4), torch.randn(4, 4)) for _ in kinds]

    def model(x: Tensor) -> Tensor:
        x = torch.layer_norm(x, (4,))
        for kind, weights in zip(kinds, parameters, strict=True):
            x = kind(x, weights)
        return x.mean().exp()

    return model


WEIGHTS = [torch.randn(4, 4) for _ in range(5)]


def carrying(x: Tensor) -> Tensor:
    """Two values go from turn to turn, but in the middle of a turn there is one."""
    y = x.sin()
    for weight in WEIGHTS:
        both = torch.atan2(x @ weight, y)
        x, y = both.tanh(), both.cos()
    return x * y


def nodes_of(model: Callable, *inputs: Tensor) -> list[Node]:
    """The nodes that compute something, as Dynamo captures them."""
    captured: list[Node] = []

    def backend(gm: GraphModule, _: object) -> Callable:
        captured.extend(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr", "output"))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return captured


@pytest.mark.parametrize("kind", [Nested, Decorated])
def test_paths_are_named_as_the_model_names_them(kind: type[Nested]) -> None:
    model = kind(1, 2)
    found = {module_path(node) for node in nodes_of(model, X)}
    assert {"", "stages.0.0.up", "stages.1.1.down"} <= found <= {name for name, _ in model.named_modules()}


def crossing(nodes: list[Node], at: int) -> int:
    """How many values are made before ``at`` and read from there on."""
    return sum(any(user not in nodes[:at] for user in node.users) for node in nodes[:at])


def names(nodes: list[Node], stretch: range) -> list[str]:
    return [getattr(nodes[at].target, "__name__", str(nodes[at].target)) for at in stretch]


X, IDS = torch.randn(2, 3, 4), torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("model", "given", "turns", "length"),
    [
        (functional(*[gated] * 5), X, 5, 6),
        (functional(gated, gated), X, 2, 6),
        (functional(*[gated, gated, plain] * 3), X, 3, 15),
        (functional(*[gated, plain] * 4, gated), X, 4, 9),
        (functional(plain, *[gated] * 4, plain), X, 4, 6),
        (Shared(6), IDS, 6, 4),
        (carrying, X, 4, 4),
    ],
    ids=["loop", "twice", "A_A_B", "A_B_and_A", "ends_differ", "one_module_six_times", "two_values"],
)
def test_by_period(model: Callable, given: Tensor, turns: int, length: int) -> None:
    """As many turns as there are, one after another, each of the same nodes, cut where one value crosses."""
    nodes = nodes_of(model, given)
    stretches = layer_detection.by_period(nodes)
    assert [len(stretch) for stretch in stretches] == [length] * turns
    assert all(left.stop == right.start for left, right in pairwise(stretches))
    assert all(names(nodes, stretch) == names(nodes, stretches[0]) for stretch in stretches)
    inner = [stretch.start for stretch in stretches[1:]]
    assert [crossing(nodes, at) for at in inner] == [1] * len(inner)


def test_a_turn_begins_where_the_layer_does() -> None:
    """The cut costs one value at any place between two layers: the first of them is taken."""
    nodes = nodes_of(functional(*[gated] * 3), X)
    first = layer_detection.by_period(nodes)[0]
    assert names(nodes, first) == ["matmul", "tanh", "matmul", "sigmoid", "mul", "add"]
    assert first.start == 1  # after the norm


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_nodes_that_do_not_repeat(count: int) -> None:
    steps = (torch.sin, torch.tanh, torch.exp)[:count]

    def model(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    nodes = nodes_of(model, X) if count else []
    assert len(nodes) == count
    assert layer_detection.by_period(nodes) == []
    assert list(layer_detection.proposals(nodes)) == [[]]


def test_shapes_and_literals_tell_turns_apart() -> None:
    def model(x: Tensor) -> Tensor:
        return ((x * 2 + 1) * 2 + 1).repeat(2, 1, 1) * 3 + 1

    nodes = nodes_of(model, X)
    assert layer_detection.by_period(nodes) == [range(2), range(2, 4)]


def test_proposals_come_outermost_first_and_by_period_last() -> None:
    nodes = nodes_of(Nested(2, 3), X)
    outer, inner, *_, last = layer_detection.proposals(nodes)
    assert [len(stretch) for stretch in outer] == [9, 12]  # the norm after the first stage belongs to it
    assert [len(stretch) for stretch in inner] == [4] * 5
    assert last == layer_detection.by_period(nodes)


def test_proposals_are_not_repeated() -> None:
    found = list(layer_detection.proposals(nodes_of(nn.Sequential(Block(), Block(), Block()), X)))
    assert found == [[range(4), range(4, 8), range(8, 12)]] * 2  # by module, and by period
