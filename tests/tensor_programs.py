"""Random programs of small tensors, made of all calls that the reader of masks knows, and what they are given."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZE = 4  # of every axis that is not 1: what goes along a wrong axis has the right shape
DATA = {
    "ids": torch.tensor([[2, 0, 1, 2], [3, 3, 0, 1], [0, 0, 0, 0], [1, 2, 3, 0]]),
    "small": torch.tensor([0, 1, -1, 2], dtype=torch.int32),
    "flags": torch.tensor([True, False, True, True]),
    "weights": torch.tensor([[0.0, 1.0, -2.5, 0.0]] * 4),
}
Step = tuple[str, Any]
_axis, _number = st.integers(-3, 2), st.integers(-3, 5)
_floats = st.sampled_from((0.0, 1.0, -1.0, 0.5, 2.0, float("inf"), float("-inf"), float("nan"), 2.0**24))
_dtypes = st.sampled_from((torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.uint8))
_tensors = st.sampled_from(("arange", "column", "scalar", "data", "reversed"))
_slices = st.builds(slice, st.one_of(st.none(), st.integers(-5, 3)), st.none(), st.sampled_from((None, 1, 2)))
_index = st.lists(
    st.one_of(st.integers(-2, 1), st.just(None), st.just(Ellipsis), _slices, _slices, _tensors), min_size=1, max_size=4
).filter(lambda one: one.count(Ellipsis) < 2)
_ranges = st.sampled_from([
    ((SIZE,), {}), ((1, 1 + SIZE), {}), ((1,), {"end": 1 + SIZE}), ((), {"start": 2, "end": 2 + SIZE}),
    ((0, 2 * SIZE), {"step": 2}), ((0, 2 * SIZE, 2), {}), ((3, 3 - SIZE, -1), {}), ((), {"end": SIZE}),
    ((SIZE,), {"dtype": torch.int32}), ((SIZE,), {"dtype": torch.float32}), ((0.5, SIZE + 0.5), {"dtype": torch.int64}),
])  # fmt: skip
_NEW = st.one_of(
    st.tuples(st.just("arange"), _ranges),
    st.tuples(st.just("data"), st.sampled_from(sorted(DATA))),
    st.tuples(
        st.just("full"), st.tuples(st.sampled_from(((4,), (4, 1), (4, 4))), st.one_of(_number, _floats), _dtypes)
    ),
)
_MOVED = st.one_of(
    st.tuples(st.sampled_from(("unsqueeze", "squeeze", "cumsum", "diff", "prepended")), _axis),
    st.tuples(st.sampled_from(("transpose",)), st.tuples(_axis, _axis)),
    st.tuples(st.sampled_from(("t", "T", "mT", "contiguous", "stacked", "flattened")), st.none()),
    st.tuples(st.just("permute"), st.permutations((0, 1, 2))),
    st.tuples(st.just("expand"), st.sampled_from(((4, -1), (4, 4), (1, 4, -1), (4, 4, 4), (4, 1, -1, -1)))),
    st.tuples(st.just("repeat"), st.sampled_from(((1,), (4, 1), (1, 4), (4, 4), (1, 1, 1)))),
    st.tuples(st.just("index"), _index),
    st.tuples(st.sampled_from(("tril", "triu")), _number),
)
_COMPUTED = st.one_of(
    st.tuples(st.sampled_from(("neg", "abs", "bitwise_not", "logical_not")), st.none()),
    st.tuples(st.just("to"), _dtypes),
    st.tuples(
        st.sampled_from(("add", "sub", "mul", "rsub", "lt", "le", "gt", "ge", "eq", "ne", "div", "remainder")),
        st.one_of(_number, _floats),
    ),
    st.tuples(st.just("floor_divide"), _number),
    st.tuples(st.sampled_from(("lt_", "ge_", "eq_", "ne_", "mul_", "add_", "remainder_")), _number),
    st.tuples(st.just("clamp"), st.tuples(st.one_of(st.none(), _number), st.one_of(st.none(), _number))),
    st.tuples(st.just("filled"), st.one_of(_number, _floats)),
)
_JOINED = st.tuples(
    st.sampled_from((
        "add", "sub", "mul", "minimum", "maximum", "lt", "le", "gt", "ge", "eq", "ne", "bitwise_and", "bitwise_or",
        "bitwise_xor", "logical_and", "logical_xor", "where", "masked_fill", "floor_divide", "remainder", "lt_", "div",
    )),
    st.just("other"),
)  # fmt: skip
steps = st.lists(
    st.tuples(st.one_of(_NEW, _NEW, _MOVED, _MOVED, _COMPUTED, _JOINED, _JOINED), st.integers(0, 9), st.integers(0, 9)),
    min_size=3,
    max_size=12,
)


def compute(drawn: list[tuple[Step, int, int]]) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """The function of the data that gives all tensors of a program; steps that torch declines are left out."""

    def function(data: dict[str, Tensor]) -> list[Tensor]:
        made = [data["ids"], torch.arange(SIZE)]
        for (name, given), one, other in drawn:
            try:
                result = step(name, given, made[-1 - one % len(made)], made[-1 - other % len(made)], data)
            except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
                continue
            if isinstance(result, Tensor) and result.dim() <= 4 and max((1, *result.shape)) <= SIZE:
                made.append(result)
        return made

    return function


def step(name: str, given: Any, x: Tensor, y: Tensor, data: dict[str, Tensor]) -> Any:
    """One call, of tensors that there are."""
    if name == "arange":
        return torch.arange(*given[0], **given[1])
    if name == "data":
        return data[given]
    if name == "full":
        return torch.full(given[0], given[1], dtype=given[2])
    if name == "prepended":
        return torch.diff(x, dim=given, prepend=torch.zeros_like(x.narrow(given, 0, 1)))
    if name in ("T", "mT"):
        return getattr(x, name) if x.dim() == 2 else x.mT if x.dim() > 2 else None
    if name == "stacked":
        return x.reshape(*x.shape[:-1], 1, x.shape[-1])
    if name == "flattened":
        return x.flatten()
    if name == "index":
        return x[tuple(index_of(one, data) for one in given)]
    if name == "filled":
        return x.masked_fill(x != 0, given)
    if given == "other":
        return joined(name, x, y)
    if name.endswith("_"):
        return getattr(x.clone(), name)(given)
    if name == "rsub":
        return given - x
    arguments = () if given is None else given if isinstance(given, tuple) and name != "permute" else (given,)
    return getattr(torch.Tensor, name)(x, *arguments)


def joined(name: str, x: Tensor, y: Tensor) -> Tensor:
    """A call of two."""
    if name == "where":
        return torch.where(x != 0, x, y)
    if name == "masked_fill":
        return x.masked_fill(y.bool(), 1)
    return getattr(x.clone(), name)(y) if name.endswith("_") else getattr(torch, name)(x, y)


def index_of(one: Any, data: dict[str, Tensor]) -> Any:
    """A part of an index, as it is or a tensor of places."""
    if not isinstance(one, str):
        return one
    return {
        "arange": lambda: torch.arange(SIZE),
        "column": lambda: torch.arange(SIZE)[:, None],
        "scalar": lambda: torch.tensor(1),
        "data": lambda: data["small"].long(),
        "reversed": lambda: SIZE - 1 - torch.arange(SIZE),
    }[one]()
