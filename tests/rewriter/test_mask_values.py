"""What the reader says of an element against the element itself, for every node of random programs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from mask_terms_strategy import World
from recording import record
from tensor_programs import DATA, compute, steps
from torch import Tensor
from torch.fx import Node

from fastft.rewriter import mask_calls, mask_indexing  # noqa: F401  # what they tell the reader
from fastft.rewriter.compat import value_of
from fastft.rewriter.mask_terms import Sum, variable, whole
from fastft.rewriter.mask_values import Cases, Depends, NotReadError, Reader

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


def read(drawn: Any) -> list[bool]:
    """Every node held to its value; whether each is known by more than what it depends on."""
    gm, recording = record(compute(drawn), DATA)
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
        except NotReadError:
            continue
        known.append(not isinstance(value, Depends))
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
        known.extend(read(drawn))

    draw()
    assert sum(known) > 0.7 * len(known)
