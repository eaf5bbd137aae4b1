"""Random attention masks, as nested tuples that print, and how they are computed; what the property tests draw."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

ENDS = torch.tensor([0, 2, 5, 20])
Program = tuple

_small = st.integers(-3, 6)
_number = st.tuples(st.just("number"), _small)
_q, _j = st.just(("q",)), st.just(("j",))
_side = st.sampled_from(("q", "j"))
_data = st.tuples(st.sampled_from(("position", "document", "id", "bucket")), _side)
_leaves = st.one_of(_q, _j, _number, _data, st.sampled_from([("b",), ("length",), ("before", 1), ("before", 2)]))
_flags = st.one_of(
    st.sampled_from([("padding",), ("counted padding",), ("float padding",), ("row",), ("true",)]),
    st.tuples(st.sampled_from(("tril", "triu")), st.integers(-2, 2)),
)
_comparisons = st.sampled_from(("lt", "le", "gt", "ge", "eq", "ne"))


def _same(name: str) -> Program:
    return ("eq", (name, "q"), (name, "j"))


def _clauses() -> st.SearchStrategy[Program]:
    """What masks are made of in practice, with other numbers."""
    some = st.integers(1, 4)
    return st.one_of(
        _flags,
        st.sampled_from([
            ("le", ("j",), ("q",)), ("ge", ("q",), ("j",)), ("eq", ("j",), ("q",)),
            _same("document"), _same("id"), _same("bucket"),
            ("lt", ("j",), ("length",)), ("ge", ("j",), ("length",)), ("lt", ("q",), ("length",)),
            ("or", ("le", ("j",), ("q",)), ("lt", ("j",), ("length",))), ("or", ("le", ("j",), ("q",)), ("row",)),
            ("and", _same("document"), ("le", ("position", "j"), ("position", "q"))),
        ]),
        _small.map(lambda n: ("gt", ("j",), ("sub", ("q",), ("number", n)))),
        _small.map(lambda n: ("le", ("j",), ("add", ("q",), ("number", n)))),
        _small.map(lambda n: ("le", ("abs", ("sub", ("q",), ("j",))), ("number", n))),
        _small.map(lambda n: ("gt", ("position", "j"), ("sub", ("position", "q"), ("number", n)))).map(
            lambda near: ("and", _same("document"), near)
        ),
        some.map(lambda n: ("eq", ("floor_divide", ("j",), n), ("floor_divide", ("q",), n))),
        some.map(lambda n: ("eq", *(("floor_divide", ("sub", (side,), ("length",)), n) for side in "jq"))),
        some.map(lambda n: ("ge", ("floor_divide", ("q",), n), ("floor_divide", ("j",), n))),
        some.map(lambda n: ("or", ("ge", ("j",), ("sub", ("q",), ("number", n))), ("ge", ("j",), ("length",)))),
        _small.map(lambda n: ("ne", ("id", "j"), ("number", n))),
        _small.map(lambda n: ("le", ("mul", ("j",), 2), ("add", ("q",), ("number", n)))),
    )  # fmt: skip


def _integers(conditions: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
    def grow(inner: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
        return st.one_of(
            st.tuples(st.sampled_from(("add", "sub", "minimum", "maximum")), inner, inner),
            st.tuples(st.just("mul"), inner, st.integers(-2, 3)),
            st.tuples(st.sampled_from(("floor_divide", "remainder")), inner, st.integers(1, 4)),
            st.tuples(st.sampled_from(("abs", "neg")), inner),
            st.tuples(st.just("long"), conditions),
            st.tuples(st.just("where"), conditions, inner, inner),
        )

    return st.recursive(_leaves, grow, max_leaves=4)


def _conditions() -> st.SearchStrategy[Program]:
    def grow(inner: st.SearchStrategy[Program]) -> st.SearchStrategy[Program]:
        return st.one_of(
            st.tuples(_comparisons, _integers(inner), _integers(inner)),
            st.tuples(st.sampled_from(("and", "or", "xor")), inner, inner),
            st.tuples(st.just("not"), inner),
            st.tuples(st.just("choose"), inner, inner, inner),
        )

    return st.recursive(_clauses(), grow, max_leaves=5)


clauses, conditions = _clauses(), _conditions()
conjunctions = st.lists(clauses, min_size=1, max_size=3).map(lambda parts: ("and", *parts))
FORMS = ("bool", "lowest", "infinite", "one minus", "filled", "inverted", "sum")
SPELLINGS = ("gathered", "viewed", "sliced")


@dataclass(frozen=True)
class Draw:
    """Masks of one batch: sizes, what the data is drawn from, and (form, spelling, condition) of each mask."""

    B: int
    S: int
    T: int
    seed: int
    programs: tuple[tuple[str, str, Program], ...]

    def data(self) -> dict[str, Tensor]:
        """What masks are computed from; positions start anew at random places, a sixth of the paddings are all zero."""
        generator = torch.Generator().manual_seed(self.seed)
        length = max(self.S, self.T, 3) + self.seed % 2
        draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
        positions = torch.arange(length).repeat(self.B, 1)
        for row in positions:
            for cut in draw(length, 2).tolist():
                row[cut:] = torch.arange(length - cut) + 3 * (cut % 2)
        padding = draw(10, self.B, length) < (0 if self.seed % 6 == 0 else 7)
        return {
            "padding": padding, "counts": draw(3, self.B, length), "row": draw(10, self.B, length) < 7,
            "positions": positions, "ids": draw(3, self.B, length), "lengths": draw(self.T + 1, self.B),
        }  # fmt: skip


def draws(programs: st.SearchStrategy[Program], count: int) -> st.SearchStrategy[Draw]:
    one = st.tuples(st.sampled_from(FORMS), st.sampled_from(SPELLINGS), programs)
    queries = st.sampled_from((1, 2, 5, 7))
    sizes = queries.flatmap(lambda S: st.tuples(st.just(S), st.sampled_from((S, S, S, 1, 6, 9))))
    return st.builds(
        lambda B, sizes, seed, programs: Draw(B, *sizes, seed, tuple(programs)),
        st.integers(1, 3), sizes, st.integers(0, 2**16), st.lists(one, min_size=count, max_size=count),
    )  # fmt: skip


class Masks:
    """Computes masks of a draw from its data."""

    def __init__(self, drawn: Draw, data: dict[str, Tensor], spelling: str) -> None:
        self.data, self.spelling = data, spelling
        self.B, self.S, self.T = B, S, T = drawn.B, drawn.S, drawn.T
        b, q, j = torch.arange(B), torch.arange(S), torch.arange(T)
        if spelling == "gathered":
            self.b, self.q, self.j = b[:, None, None, None], q[None, None, :, None], j[None, None, None, :]
        elif spelling == "viewed":
            self.b, self.q, self.j = b.view(B, 1, 1, 1), q.view(-1, 1), j.unsqueeze(0)
        else:
            self.b, self.j = b.unsqueeze(-1)[:, :, None, None].contiguous(), j.expand(B, 1, 1, T)
            self.q = (torch.arange(2, S + 2) - 2).reshape(1, 1, S, 1)

    def at(self, data: Tensor, side: str) -> Tensor:
        """Data of each token, of the query or of the key."""
        if self.spelling == "gathered":
            return data[self.b, self.q if side == "q" else self.j]
        if self.spelling == "viewed":
            return data[:, None, : self.S, None] if side == "q" else data[:, None, None, : self.T]
        if side == "q":
            return data[:, : self.S].unsqueeze(1).unsqueeze(-1)
        return data[:, : self.T].view(self.B, 1, 1, self.T)

    def integer(self, program: Program) -> Tensor:
        name, *rest = program
        data = self.data
        if name in ("q", "j", "b"):
            return getattr(self, name)
        if name == "number":
            return torch.tensor(rest[0])
        if name == "length":
            return data["lengths"][self.b] if self.spelling == "gathered" else data["lengths"][:, None, None, None]
        if name == "before":
            return data["ids"][self.b, self.q - rest[0]]
        if name in ("position", "document", "id", "bucket"):
            return self.at(self._per_token(name), rest[0])
        if name in ("long", "where"):
            condition = self.condition(rest[0])
            return condition.long() if name == "long" else torch.where(condition, *map(self.integer, rest[1:]))
        operands = [self.integer(one) if isinstance(one, tuple) else one for one in rest]
        return getattr(torch, name)(*operands)

    def _per_token(self, name: str) -> Tensor:
        positions, ids = self.data["positions"], self.data["ids"]
        if name == "document":
            return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        if name == "bucket":
            return torch.searchsorted(ENDS, torch.arange(ids.shape[1]), right=True)[None].expand(self.B, -1)
        return positions if name == "position" else ids

    def condition(self, program: Program) -> Tensor:
        name, *rest = program
        if name in ("padding", "row"):
            return self.at(self.data[name], "j" if name == "padding" else "q")
        if name == "counted padding":
            counts = self.data["counts"]
            return self.at(counts.bool(), "j") if self.spelling == "gathered" else self.at(counts, "j") != 0
        if name == "float padding":
            return self.at(self.data["counts"].float(), "j") > 0.5
        if name == "true":
            return torch.ones((), dtype=torch.bool)
        if name in ("tril", "triu"):
            dtype = {"gathered": torch.bool, "viewed": torch.int64, "sliced": torch.float32}[self.spelling]
            return getattr(torch, name)(torch.ones(self.S, self.T, dtype=dtype), rest[0]) == 1
        if name in ("and", "or", "xor", "not", "choose"):
            first, *others = map(self.condition, rest)
            return self._joined(name, first, others)
        return getattr(torch, name)(*map(self.integer, rest))

    @staticmethod
    def _joined(name: str, first: Tensor, others: list[Tensor]) -> Tensor:
        if name in ("not", "choose"):
            return ~first if name == "not" else torch.where(first, *others)
        for other in others:
            first = first & other if name == "and" else first | other if name == "or" else first ^ other
        return first

    def mask(self, form: str, program: Program) -> Tensor:
        counts = self.condition(program).expand(self.B, 1, self.S, self.T)
        zeros, least = torch.zeros(self.B, 1, self.S, self.T), torch.finfo(torch.float32).min
        if form == "bool":
            return counts.clone()
        if form == "infinite":
            return zeros.masked_fill(~counts, float("-inf"))
        if form == "one minus":
            return (1.0 - counts.to(torch.float32)) * least
        if form == "filled":
            return torch.full((self.B, 1, self.S, self.T), least).masked_fill(counts, 0.0)
        if form == "inverted":
            inverted = 1.0 - counts.to(torch.float32)
            return inverted.masked_fill(inverted.to(torch.bool), least)
        lowest = torch.where(counts, 0.0, least)
        return lowest + torch.where(self.at(self.data["padding"], "j"), 0.0, least) if form == "sum" else lowest


def compute(drawn: Draw) -> Any:
    """The function of the data that gives all masks of a draw."""

    def function(data: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(Masks(drawn, data, spelling).mask(form, program) for form, spelling, program in drawn.programs)

    return function
