"""What the reader says of an element against the element itself, for every node of random programs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from mask_terms_strategy import World
from recording import record
from tensor_programs import DATA, SIZE, compute, steps
from torch import Tensor
from torch.fx import Node

from fastft.compat.fake_tensors import value_of
from fastft.reasons import Declined
from fastft.rewriter.attention.masks import indexing, pointwise  # noqa: F401  # what they tell the reader
from fastft.rewriter.attention.masks.reader import Cases, Depends, Reader
from fastft.rewriter.attention.masks.terms import Leaf, Sum, atoms, variable, whole

NAMES = "bhqj"


class Elements(World):
    """All indices of a tensor, by the names of its axes; leaves are elements of what nodes computed."""

    def __init__(self, values: dict[Node, Tensor], shape: Sequence[int]) -> None:
        self.values = values
        self.names = NAMES[4 - len(shape) :]
        grids = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
        self.at = dict(zip(self.names, grids, strict=True))
        self.shape = tuple(shape)

    def everywhere(self, value: Any) -> Any:
        return np.broadcast_to(value, self.shape)

    def element(self, node: Node, index: list[Any]) -> Any:
        assert all(
            (one >= 0).all() and (one < size).all() for one, size in zip(index, self.values[node].shape, strict=True)
        )
        return self.values[node].numpy()[tuple(index)]


def assert_read(value: Any, world: Elements, actual: Tensor) -> None:
    """The value is the element, whatever kind of value it is."""
    numbers = (actual.double() if actual.is_floating_point() else actual).numpy()
    if isinstance(value, Depends):
        for axis, name in enumerate(world.names):
            if name not in value.names and numbers.size:
                np.testing.assert_array_equal(numbers, np.broadcast_to(numbers.take([0], axis), numbers.shape))
    elif isinstance(value, Cases):
        held = [world.term(condition) for _, condition in value.numbers]
        assert (np.sum(held, axis=0) == 1).all()
        for (number, _), one in zip(value.numbers, held, strict=True):
            np.testing.assert_array_equal(numbers[one], np.full(one.sum(), number))
    else:
        assert isinstance(value, Sum) != (actual.dtype == torch.bool)
        np.testing.assert_array_equal(world.term(value), numbers)


def leaves(value: Any) -> list[Leaf]:
    """The elements that a value is made of."""
    inside = [condition for _, condition in value.numbers] if isinstance(value, Cases) else [value]
    return [one for one in atoms(*inside) if isinstance(one, Leaf)]


def read(function: Callable[[dict[str, Tensor]], Any]) -> list[bool]:
    """Every node held to its value; whether each is known by more than what it depends on."""
    gm, recording = record(function, DATA)
    values, known = recording.values, []
    for node, actual in values.items():
        if actual.dim() > len(NAMES):
            continue
        index = [
            variable(name, whole(size)) for name, size in zip(NAMES[4 - actual.dim() :], actual.shape, strict=True)
        ]
        assert value_of(node).dtype == actual.dtype
        try:
            value = Reader().value(node, index)
        except Declined:
            continue
        known.append(not isinstance(value, Depends) and all(one.node is not node for one in leaves(value)))
        try:
            assert_read(value, Elements(values, actual.shape), actual)
        except AssertionError as error:
            raise AssertionError(f"{node.format_node()} is read as {value}, in\n{gm.graph}") from error
    return known


def test_what_is_read_is_the_element() -> None:
    """And most of it is more than what it depends on."""
    known: list[bool] = []

    @settings(max_examples=100)
    @given(steps)
    def draw(drawn: Any) -> None:
        known.extend(read(compute(drawn)))

    draw()
    assert sum(known) > 0.4 * len(known)


def cube() -> Tensor:
    places = torch.arange(SIZE)
    return places[:, None, None] * 16 + places[:, None] * 4 + places


CALLS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "steps": lambda data: torch.arange(1, 2 * SIZE, 2),
    "steps by name": lambda data: torch.arange(1, 2 * SIZE, step=2),
    "falling": lambda data: torch.arange(SIZE, 0, -1),
    "the lower triangle": lambda data: torch.ones(SIZE, SIZE).tril(1),
    "the upper triangle": lambda data: torch.ones(SIZE, SIZE, dtype=torch.bool).triu(1),
    "a choice": lambda data: torch.where(data["flags"], data["small"], 7),
    "a choice of numbers": lambda data: torch.where(data["flags"], 0.5, -torch.inf),
    "a choice of what is not 0": lambda data: torch.where(data["weights"] != 0, 5.0, data["weights"]),
    "either": lambda data: data["flags"] ^ (torch.arange(SIZE) > 1),
    "remainders": lambda data: (torch.arange(SIZE) - 2) % 3,
    "quotients": lambda data: torch.div(torch.arange(SIZE) - 2, 3, rounding_mode="floor"),
    "bits": lambda data: ~torch.arange(SIZE),
    "between": lambda data: torch.arange(SIZE).clamp(1, 2),
    "from a number": lambda data: 3 - torch.arange(SIZE),
    "sizes": lambda data: (torch.arange(SIZE) - 2).abs(),
    "flags as numbers": lambda data: 1.0 - data["flags"].float(),
    "flags that are added": lambda data: data["flags"].long() + 1,
    "axes exchanged": lambda data: cube().transpose(0, 2),
    "axes in another order": lambda data: cube().permute(1, 2, 0),
    "a matrix turned": lambda data: cube()[0].T + cube()[1].t() + cube()[2].mT,
    "slices": lambda data: cube()[1:, :, ::2],
    "slices from the end": lambda data: cube()[-3:, ..., -1:],
    "a number, an axis more": lambda data: cube()[-1, None, 2:],
    "places ahead": lambda data: cube()[torch.arange(2)[:, None], torch.arange(3)],
    "places behind": lambda data: cube()[:, torch.arange(SIZE), torch.arange(SIZE)],
    "places apart": lambda data: cube()[torch.arange(SIZE), :, torch.arange(SIZE)],
    "a place and a number": lambda data: cube()[torch.tensor(3), :, torch.arange(SIZE)],
    "places of data": lambda data: data["ids"][torch.arange(SIZE)[:, None], torch.arange(SIZE)],
    "counts": lambda data: torch.full((2, SIZE), 3).cumsum(-1),
    "differences": lambda data: torch.diff(torch.arange(1, 9, 2)),
    "differences with the first": lambda data: torch.diff(torch.arange(1, 9, 2), prepend=torch.full((1,), -1)),
    "an axis of one": lambda data: torch.arange(SIZE).view(1, SIZE, 1).expand(2, SIZE, 3).contiguous()[:, 1:],
    "repeated": lambda data: torch.arange(SIZE).unsqueeze(1).repeat(2, 1, 3),
    "compared in place": lambda data: torch.arange(SIZE).lt_(2),
}  # fmt: skip
UNKNOWN: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "counts of other numbers": lambda data: torch.arange(SIZE).cumsum(0),
    "differences without the first": lambda data: torch.diff(torch.arange(1, 9, 2), prepend=torch.full((1,), 5)),
    "counts along both axes": lambda data: torch.diff(
        (torch.arange(8)[:, None] - torch.arange(8) == 5).long().cumsum(0), dim=1
    ),
}


@pytest.mark.parametrize("name", [*CALLS, *UNKNOWN])
def test_calls(name: str) -> None:
    known = read((CALLS | UNKNOWN)[name])
    assert known[-1] == (name in CALLS)
