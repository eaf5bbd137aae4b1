"""Calls of an op, drawn from what its entry in the registry says of its arguments.

A drawn Call prints as the code that builds it, so a failure can be pasted.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from strategies import INTERPRETING, LAYOUTS, UPSTREAM, Spec, dtypes, lengths, seeds
from torch import Tensor

from fastft.kernels import REGISTRY
from fastft.kernels.core.registry import Entry, Shapes, parameter_of

LARGEST = 4 if INTERPRETING else 6  # of batches, heads, positions: of the interpreter's programs one follows another
# Sizes that rows are made of, and the longest drawn.
ROW_NAMES = {"D": 300, "I": 300, "R": 40, "P": 40, "K": 300, "N": 40}
ROUTING = (
    "order",
    "place",
    "ends",
    "rows",
)  # rows sorted by expert: "order S E" of S slots and E experts, and the experts
Sizes = dict[str, Any]  # by name; "..." has a tuple


@dataclass(frozen=True)
class Call:
    """Arguments of REGISTRY[op]: the case, a Spec for each tensor; upstream gradients and which inputs need one."""

    op: str
    case: int
    specs: tuple[tuple[str, Spec], ...]
    upstream: str = "random"
    needs: tuple[str, ...] = ()
    sizes: tuple[tuple[str, Any], ...] = ()  # what the names in the case's other arguments stand for

    @property
    def entry(self) -> Entry:
        return REGISTRY[self.op]

    def tensors(self, device: str) -> dict[str, Tensor]:
        """What the specs say, on a device."""
        return {name: spec.build(device) for name, spec in self.specs}

    def arguments(self, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
        """All arguments, with these tensors in their places."""
        choice = self.entry.cases[self.case][1]
        named = {
            name: [eval(one, {}, dict(self.sizes)) for one in value]
            for name, value in choice.items()
            if is_named(value)
        }
        return self.entry.arguments(tensors, {**choice, **named})


def is_named(value: Any) -> bool:
    """Whether an argument is a list of sizes that are named as those of tensors are."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def fixed_dtype(entry: Entry, name: str, spec: str) -> torch.dtype | None:
    """The dtype of this tensor, where it is not that of the others."""
    if spec.startswith(ROUTING):
        return torch.int32
    if spec.startswith(("bytes", "index")):
        return torch.uint8 if spec.startswith("bytes") else torch.int64
    return torch.float32 if parameter_of(name) in entry.statistics else None


def shape_of(spec: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that "B S 2*R+P" or "... D" stands for; "index ... N" has that of "..."."""
    tokens = spec.removeprefix("bytes").split()
    if spec.startswith(("index", *ROUTING)):
        tokens = tokens[1:-1]
    axes = [sizes["..."] if token == "..." else (eval(token, {}, sizes),) for token in tokens]
    return tuple(itertools.chain.from_iterable(axes))


def below(spec: str, sizes: Sizes) -> int:
    """What the numbers of "index ... N" are less than, a name or a number; of "order S E" the number of experts."""
    return eval(spec.split()[-1], {}, sizes) if spec.startswith(("index", *ROUTING)) else 0


def routing_of(spec: str) -> str:
    """Which result of expert_order "order S E" stands for, if any."""
    return spec.split()[0] if spec.startswith(ROUTING) else ""


def trainable(entry: Entry, shapes: Shapes) -> list[str]:
    """The tensors that may get a gradient."""
    return [name for name, spec in shapes.items() if parameter_of(name) in entry.gradients and "bytes" not in spec]


def names_in(shapes: Shapes) -> list[str]:
    return sorted(
        {name for spec in shapes.values() for name in re.findall(r"[A-Za-z]\w*", spec)} - {"bytes", "index", *ROUTING}
    )


@st.composite
def sizes(draw: st.DrawFn, shapes: Shapes) -> Sizes:
    """A size for each name, and leading ones."""
    found: Sizes = {"...": tuple(draw(st.lists(st.integers(1, 5), max_size=3)))}
    for name in names_in(shapes):
        found[name] = draw(lengths(ROW_NAMES[name]) if name in ROW_NAMES else st.integers(1, 5))
    return found


@st.composite
def calls(draw: st.DrawFn, op: str) -> Call:
    """Any call that the op is defined for, of bounded size."""
    entry = REGISTRY[op]
    case = draw(st.integers(0, len(entry.cases) - 1))
    shapes = entry.cases[case][0]
    drawn = draw(sizes(shapes))
    common = draw(dtypes)
    mixed, scale = draw(st.booleans()), draw(st.sampled_from((1.0, 0.03, 20.0)))
    routing = draw(seeds) if any(map(routing_of, shapes.values())) else 0
    specs = []
    for at, (name, spec) in enumerate(shapes.items()):
        dtype = fixed_dtype(entry, name, spec) or (
            draw(dtypes) if mixed and parameter_of(name) not in entry.alike else common
        )
        alone = scale if at == 0 and entry.gradients else 1.0  # products of several large factors overflow float16
        layout, seed = draw(st.sampled_from(LAYOUTS)), draw(seeds)
        if routing_of(spec):  # of one routing
            layout, seed = "contiguous", routing
        shape = shape_of(spec, drawn)
        specs.append((name, Spec(shape, dtype, layout, seed, alone, below(spec, drawn), routing_of(spec))))
    given = trainable(entry, shapes)
    needs = tuple(name for name in given if draw(st.booleans())) or tuple(given)
    return Call(op, case, tuple(specs), draw(st.sampled_from(UPSTREAM)), needs, tuple(drawn.items()))


def examples(
    op: str, dtype: torch.dtype, count: int = 5, rows: Sequence[int] = (16, 24, 32, 40, 48), largest: int = LARGEST,
    leading: tuple[int, ...] = (),
) -> Iterator[Call]:  # fmt: skip
    """Some calls, always the same, the first five each larger than the one before; cases from all over the list.

    rows: the sizes that rows are made of, in turn; the other sizes are at most largest.  leading: the sizes before
    them, and the lengths of queries and keys, if these are not to be drawn.
    """
    entry = REGISTRY[op]
    for number in range(count):
        case = number * len(entry.cases) // count
        shapes = entry.cases[case][0]
        chosen = random.Random(number)
        size = min(2 + number % 5, largest) if max(rows) < 100 else 2  # long rows are few
        drawn: Sizes = {"...": leading or (size, 3)}
        for name in names_in(shapes):
            drawn[name] = rows[number % len(rows)] if name in ROW_NAMES else size
        if leading:
            drawn |= dict(zip(("B", "S"), leading, strict=True)) | {"T": leading[1]}
        specs = [
            (
                name,
                Spec(
                    shape_of(spec, drawn),
                    fixed_dtype(entry, name, spec) or dtype,
                    chosen.choice(("contiguous", "transposed", "sliced")),
                    seed=number if routing_of(spec) else number + at,
                    below=below(spec, drawn),
                    routing=routing_of(spec),
                ),
            )
            for at, (name, spec) in enumerate(shapes.items())
        ]
        yield Call(op, case, tuple(specs), needs=tuple(trainable(entry, shapes)), sizes=tuple(drawn.items()))


def nearby(tensor: Tensor, seed: int) -> Tensor:
    """The tensor with every element a little larger or smaller, in the same dtype and layout."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    moved = tensor.double() * (0.99 + 0.02 * noise)
    return torch.empty_like(tensor).copy_(moved)
