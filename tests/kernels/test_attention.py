"""fastft::attention against scores in float64 by its definition, and what is true of this op alone."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compare import FORWARD, GRADIENT, RoundedOtherwise, assert_close_to_truth, assert_same_metadata
from hypothesis import example, given
from hypothesis import strategies as st
from op_calls import nearby
from strategies import DEVICES, DTYPES, INTERPRETING, LAYOUTS, LOW, UPSTREAM, Spec, dtypes, seeds, upstream
from torch import Tensor

from fastft.kernels import REGISTRY
from fastft.kernels.attention import HIGHEST, LOWEST, kept

ENTRY = REGISTRY["fastft::attention"]
ROWS = ("query", "key", "value")
NAMES = (*ROWS, "sinks")  # of what has a gradient
on_devices = pytest.mark.parametrize("device", DEVICES)
# In the interpreter one that rounds, for whose larger tiles it takes half of the time: others have float32.
in_dtypes = pytest.mark.parametrize("dtype", LOW if INTERPRETING else DTYPES, ids=str)
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Tensors, Names = dict[str, Tensor], Sequence[str]
RANGES, DENSE = ("starts", "ends", "ranges", "stretches", "documents"), ("bool", "added")
IDS = ("left", "right", "keys", "runs", "holes", "kinds")  # keys: padding of keys alone


@dataclass(frozen=True)
class Problem:
    """Tensors and numbers of a call: prints as the code that builds it."""

    B: int = 2
    G: int = 2
    E: int = 2  # query heads of a key head
    S: int = 20
    T: int = 20
    D: int = 16
    DV: int = 0  # of a value; 0: as a query
    dtype: torch.dtype = torch.float32
    layout: str = "transposed"
    seed: int = 0
    causal: bool = False
    window: int = 0
    ranges: str = ""
    ids: str = ""
    dense: str = ""
    sinks: bool = False
    softcap: float = 0.0
    scale: float = 0.25
    dropout: float | None = None
    contiguous: bool = False

    def build(self, device: str) -> Tensors:
        """All tensors of the call, by parameter."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors = self.heads(device)
        if self.sinks:
            dtype = torch.float32 if coin(generator) else self.dtype
            tensors["sinks"] = Spec((self.G * self.E,), dtype, seed=self.seed + 3).build(device)
        masks = {**self.range_masks(generator), **self.id_masks(generator), **self.dense_masks(generator)}
        if self.dropout is not None:
            masks["seed"] = torch.randint(-(2**40), 2**40, (1,), generator=generator)
        return tensors | {name: mask.to(device) for name, mask in masks.items()}

    def heads(self, device: str) -> Tensors:
        counts, lengths = (self.G * self.E, self.G, self.G), (self.S, self.T, self.T)
        sizes = (self.D, self.D, self.DV or self.D)
        if self.layout == "fused":  # one projection, whose columns are all heads
            rows = Spec((self.B, max(lengths), sum(counts), max(sizes)), self.dtype, seed=self.seed).build(device)
            parts = zip(ROWS, rows.transpose(1, 2).split(counts, 1), lengths, sizes, strict=True)
            return {name: one[:, :, :length, :size] for name, one, length, size in parts}
        specs = [
            Spec((self.B, count, length, size), self.dtype, self.layout, self.seed + at)
            for at, (count, length, size) in enumerate(zip(counts, lengths, sizes, strict=True))
        ]
        return {name: spec.build(device) for name, spec in zip(ROWS, specs, strict=True)}

    def range_masks(self, generator: torch.Generator) -> Tensors:
        if not self.ranges:
            return {}
        shape, dtype = (self.B if coin(generator) else 1, self.S), torch.int32 if coin(generator) else torch.int64
        if self.ranges == "documents":
            first = torch.rand(shape, generator=generator) < 0.1
            return {"start": (first * torch.arange(self.S)).cummax(1).values.to(dtype)}
        if self.ranges == "stretches":  # of rows that attend to the same keys, more than a tile of them
            stretch = ((torch.arange(self.S) + 9) // 64).expand(shape)
            starts = (stretch % 3 - 1) * (self.T // 5)  # the first weighs its keys alike
            ends = torch.randint(self.T // 2, self.T + 1, stretch.shape, generator=generator).gather(-1, stretch)
            return {"start": starts.to(dtype), "end": ends.to(dtype)}
        alike = torch.rand(shape, generator=generator) < 0.1
        start = torch.randint(self.T, shape, generator=generator).masked_fill(alike, -1 if coin(generator) else -100)
        end = torch.randint(self.T + 2, (1, self.S) if coin(generator) else shape, generator=generator)
        given = {"starts": {"start": start}, "ends": {"end": end}, "ranges": {"start": start, "end": end}}
        return {name: one.to(dtype) for name, one in given[self.ranges].items()}

    def id_masks(self, generator: torch.Generator) -> Tensors:
        if not self.ids:
            return {}
        rows, dtype = self.B if coin(generator) else 1, torch.int32 if coin(generator) else torch.int64
        blank = torch.randint(1 + min(self.S, self.T) // 2, (rows, 1), generator=generator)

        def made(length: int) -> Tensor:
            at = torch.arange(length)
            if self.ids in ("left", "right", "keys"):
                return at >= blank if self.ids == "left" else at < length - blank
            numbers = torch.randint(4, (rows, length), generator=generator)
            if self.ids == "runs":  # of as many elements as a tile has, and more
                return numbers[:, at // (20 + 10 * int(blank[0]) % 90)] > 1
            return numbers > 0 if self.ids == "holes" else numbers - 2

        of_queries = torch.ones(rows, self.S) if self.ids == "keys" else made(self.S)
        return {"query_ids": of_queries.to(dtype), "key_ids": made(self.T).to(dtype)}

    def dense_masks(self, generator: torch.Generator) -> Tensors:
        if not self.dense:
            return {}
        heads = self.G * self.E if coin(generator) else 1
        shape, room = (self.B if coin(generator) else 1, heads, self.S), 3 if coin(generator) else 0
        drawn = torch.rand((*shape, self.T + room), generator=generator)[..., : self.T]  # may be a part of a larger one
        drawn = drawn * (torch.rand(shape, generator=generator) > 0.05)[..., None]  # some rows are masked throughout
        if self.dense == "bool":
            return {"mask": drawn > 0.3}
        dtype = torch.float32 if coin(generator) else self.dtype
        lowest = torch.finfo(dtype).min if coin(generator) else -torch.inf
        added = drawn.masked_fill(drawn < 0.15, -torch.inf).masked_fill((drawn >= 0.15) & (drawn < 0.3), lowest)
        alike = torch.rand(shape, generator=generator)[..., None] < 0.1
        added = added if dtype == torch.float16 else added.masked_fill(alike, 2 * HIGHEST)
        return {"mask": added.to(dtype)}

    def choice(self) -> dict[str, Any]:
        numbers = {"scale": self.scale, "softcap": self.softcap, "dropout": self.dropout or 0.0}
        return {"causal": self.causal, "window": self.window, "max_seqlen": 0, **numbers, "contiguous": self.contiguous}

    def fused(self, given: Tensors) -> tuple[Tensor, Tensor]:
        return ENTRY.op(*ENTRY.arguments(given, self.choice()))

    def seen(self, given: Tensors) -> tuple[Tensor, Tensor | bool]:
        """Which scores count [B, H, S, T], and which rows weigh all of them alike [B, 1, S, 1]."""
        query, key = given["query"], given["key"]
        i, j = (torch.arange(one.shape[2], device=one.device) for one in (query, key))
        ahead = j[None, :] - i[:, None]  # how far a key is after a query
        result = (ahead < 1) if self.causal else torch.full_like(ahead, True, dtype=torch.bool)
        if self.window:
            result = result & (ahead > -self.window)
        before_end = j < given["end"][:, None, :, None] if "end" in given else j < len(j)
        result = result & before_end
        if "query_ids" in given:
            result = result & ~(given["query_ids"][:, None, :, None] - given["key_ids"][:, None, None, :]).bool()
        mask = given.get("mask")
        if mask is not None:
            result = result & (mask if mask.dtype == torch.bool else mask.double() >= LOWEST)
        if "start" not in given:
            return result.expand(*query.shape[:3], len(j)), False
        start = given["start"][:, None, :, None]
        result = torch.where(start < 0, before_end, result & (start <= j))
        return result.expand(*query.shape[:3], len(j)), start < 0

    def eager(self, given: Tensors) -> tuple[Tensor, Tensor]:
        """By the definition, as a model computes it: products in the dtype of the rows, all else wide."""
        query, key, value = (given[name] for name in ROWS)
        wide, group = torch.promote_types(query.dtype, torch.float32), query.shape[1] // key.shape[1]
        head = torch.arange(query.shape[1], device=query.device) // group
        scores = torch.einsum("bhid,bhjd->bhij", query, key[:, head]).to(wide) * self.scale
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        seen, alike = self.seen(given)
        nothing = scores - scores.detach()  # but its gradient
        if "mask" in given and given["mask"].dtype != torch.bool:
            added = given["mask"].to(wide)
            alone = nothing + (added - added.detach())
            scores = scores + added.masked_fill(given["mask"].double() < LOWEST, -torch.inf)
            scores = torch.where(added > HIGHEST, alone, scores)
        scores = torch.where(torch.as_tensor(alike, device=query.device), nothing, scores)
        scores = scores.masked_fill(~seen, -torch.inf)
        empty = ~seen.any(-1, keepdim=True) if "sinks" not in given else torch.zeros_like(seen[..., :1])
        if "sinks" in given:
            scores = torch.cat((given["sinks"].to(wide)[:, None, None].expand(*scores.shape[:3], 1), scores), -1)
        scores = scores.masked_fill(empty, 0.0)
        weights = scores.softmax(-1).masked_fill(empty, 0.0)[..., -key.shape[2] :]
        if "seed" in given:
            share = self.dropout or 0.0
            weights = weights * kept(given["seed"], weights.shape, share) / (1.0 - share)
        out = torch.einsum("bhij,bhjd->bhid", weights.to(query.dtype), value[:, head])
        return out, scores.logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)

    def from_saved(self, given: Tensors, dtype: torch.dtype, grad: Tensor, needs: Names) -> list[Tensor]:
        """The gradients of a backward whose forward kept out in a dtype: out's error counts as one of the scores'."""
        leaves = requiring(given, needs)
        out, lse = self.eager(leaves)
        error = (grad * (out - out.to(dtype).to(out.dtype))).sum(-1).detach()
        total = (grad * out).sum() + (error * lse.masked_fill(lse.isneginf(), 0.0)).sum()
        return gradients_of(total, leaves, needs)


def coin(generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < 0.5)


def converted(given: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: one.to(dtype) if one.is_floating_point() else one for name, one in given.items()}


def requiring(given: Tensors, needs: Names) -> Tensors:
    return {name: one.detach().requires_grad_() if name in needs else one for name, one in given.items()}


def gradients_of(result: Tensor, leaves: Tensors, needs: Names, grad: Tensor | None = None) -> list[Tensor]:
    """Zeros for what has no part in the result: a query of which all weights are alike."""
    if not result.requires_grad:
        return [torch.zeros_like(leaves[name]) for name in needs]
    wanted = [leaves[name] for name in needs]
    return list(torch.autograd.grad(result, wanted, grad, allow_unused=True, materialize_grads=True))


def evaluate(function: Callable, given: Tensors, grad: Tensor, needs: Names = ROWS) -> list[Tensor]:
    """out, lse, and the gradients of what needs one."""
    leaves = requiring(given, needs)
    out, lse = function(leaves)
    return [out.detach(), lse.detach(), *gradients_of(out, leaves, needs, grad.to(out.dtype))]


def assert_lse(actual: Tensor, given: Tensors, problem: Problem) -> None:
    """float32 whatever the rows are; -inf of what is empty, and near the lowest number where all scores are."""
    eager, truth = (problem.eager(converted(given, dtype))[1] for dtype in (torch.float32, torch.float64))
    assert torch.equal(actual.isneginf(), truth.isneginf())
    usual = truth.abs() < 1e4
    low = ~usual & ~truth.isneginf()
    torch.testing.assert_close(actual[low].double(), truth[low], rtol=1e-6, atol=0)
    assert_close_to_truth(actual[usual], eager[usual], truth[usual], FORWARD, terms_of_scores(problem, given))


def terms_of_scores(problem: Problem, given: Tensors) -> float:
    """The largest sum that a score can be: float32 rounds that of its terms."""
    sizes = [given[name].double().norm(dim=-1).max().item() for name in ("query", "key")]
    return abs(problem.scale) * sizes[0] * sizes[1]


def terms_of_gradients(problem: Problem, given: Tensors, grad: Tensor) -> dict[str, float]:
    """And of those gradients for which differences of two products with grad are summed, which may be 0."""
    sizes = [one.double().norm(dim=-1).max().item() for one in (grad, given["value"])]
    product = sizes[0] * sizes[1] / (1.0 - (problem.dropout or 0.0))
    factors = {name: abs(problem.scale) * given[name].abs().max().item() for name in ("query", "key")}
    several = {"query": product * factors["key"], "key": product * factors["query"]}
    return several | dict.fromkeys(("sinks", "mask"), product)


def check(problem: Problem, device: str, needs: Names = ROWS, kind: str = "random") -> None:
    """Against eager's own error, here and at inputs close by, and that of arithmetic in another order."""
    given = problem.build(device)
    out, _ = problem.fused(given)
    assert (out if problem.contiguous else out.transpose(1, 2)).is_contiguous()
    assert_same_metadata(out, ENTRY.outputs(*ENTRY.arguments(given, problem.choice()))[0])
    grad = upstream(out, kind, problem.seed)
    exact, wide_grad = converted(given, torch.float64), grad.double()

    def measured(seed: int) -> list[tuple[Tensor, Tensor]]:
        values = {name: nearby(one, seed) if seed and name in (*NAMES, *needs) else one for name, one in given.items()}
        pair = (evaluate(problem.eager, one, grad, needs) for one in (values, converted(values, torch.float64)))
        return list(zip(*pair, strict=True))

    def disturbed(seed: int) -> list[Tensor]:
        on_cpu = {name: one.cpu() for name, one in exact.items()}  # whose backward runs in this thread
        with RoundedOtherwise(seed):
            return evaluate(problem.eager, on_cpu, wide_grad.cpu(), needs)[2:]

    few = min(one.numel() for one in (out, *(given[name] for name in needs))) <= 256
    here, *around = (measured(seed) for seed in range(12 if few else 2))
    truth = [right for _, right in here]
    moved = [disturbed(seed) for seed in range(4 if few else 1)]
    moved.append(problem.from_saved(exact, problem.dtype, wide_grad, needs))
    actual, terms = evaluate(problem.fused, given, grad, needs), terms_of_gradients(problem, given, grad)
    assert actual[1].dtype == torch.float32
    assert_close_to_truth(actual[0], *here[0], FORWARD, others=[one[0] for one in around])
    assert_lse(actual[1], given, problem)
    for at, name in enumerate(needs, 2):
        assert actual[at].dtype == given[name].dtype, name
        others = [*(one[at] for one in around), *((one[at - 2].to(device), truth[at]) for one in moved)]
        assert_close_to_truth(actual[at], *here[at], GRADIENT, terms.get(name), others=others)


BORDERS = [size + step for size in (16, 32, 64, 128) for step in (-1, 0, 1)]
LENGTHS = st.integers(1, 8) | st.sampled_from(BORDERS) | st.integers(1, 200)
SCORES = 2**14 if INTERPRETING else 2**16  # of all heads


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    S, room = draw(LENGTHS), SCORES
    T = S if draw(st.booleans()) else draw(LENGTHS)
    room = max(1, SCORES // (S * T))
    B = min(draw(st.integers(1, 3)), room)
    G = min(draw(st.integers(1, 3)), room // B)
    E = min(draw(st.integers(1, 4)), room // (B * G))
    D = draw(st.sampled_from((16, 32, 40, 64, 80, 96, 128, 256)))
    DV = draw(st.sampled_from((0, 0, 16, 24, 64, 128, 192)))
    causal = draw(st.booleans())
    return Problem(
        B, G, E, S, T, D, DV, draw(dtypes), draw(st.sampled_from((*LAYOUTS, "fused"))), draw(seeds), causal,
        draw(st.sampled_from((0, 0, 1, 7, 64))), draw(st.sampled_from(("", "", *RANGES))),
        draw(st.sampled_from(("", "", *IDS))), draw(st.sampled_from(("", "", "", *DENSE))), draw(st.booleans()),
        draw(st.sampled_from((0.0, 0.0, 2.0, 30.0))), draw(st.sampled_from((D**-0.5, 0.03, 0.5, -0.1))),
        draw(st.sampled_from((None, None, 0.0, 0.1, 0.8))), draw(st.booleans()),
    )  # fmt: skip


SUBSETS = st.sets(st.sampled_from((*NAMES, "mask")), min_size=1).map(sorted)
RICH = Problem(
    1, 2, 2, 70, 90, 32, causal=True, window=40, ranges="ranges", ids="holes", sinks=True, softcap=2.0, dropout=0.1
)
LONE = Problem(1, 1, 1, 1, 1, 16, dtype=LOW[0], dropout=0.25)


@on_devices
@given(problems(), SUBSETS, st.sampled_from(UPSTREAM))
@example(RICH, list(NAMES), "random")
@example(replace(RICH, dtype=LOW[-1], ranges="documents", dense="bool", window=0), list(NAMES), "expanded")
@example(replace(RICH, D=48, DV=32, dtype=LOW[-1], layout="fused", window=0), list(NAMES), "random")
@example(replace(RICH, D=24, DV=72, E=1, ids="runs", softcap=0.0), list(NAMES), "strided")
@example(replace(RICH, B=2, dense="added", DV=24, seed=3), [*NAMES, "mask"], "random")
@example(LONE, list(ROWS), "random")
@example(replace(LONE, dtype=torch.float32, sinks=True), list(NAMES), "random")
def test_agrees_with_the_definition(device: str, problem: Problem, needs: Names, kind: str) -> None:
    there = {"sinks": problem.sinks, "mask": problem.dense == "added"}
    names = [name for name in needs if there.get(name, True)] or ROWS
    check(problem, device, names, kind)


MASKS = [
    {}, {"causal": True}, {"causal": True, "window": 33}, {"window": 5}, *({"ranges": one} for one in RANGES),
    *({"ids": one, "causal": True} for one in IDS), *({"dense": one} for one in DENSE),
    {"ranges": "ranges", "ids": "kinds", "dense": "added", "window": 50}, {"ranges": "stretches", "ids": "runs"},
]  # fmt: skip


@on_devices
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "-".join(f"{name}={one}" for name, one in mask.items()))
def test_every_mask(device: str, mask: dict[str, Any]) -> None:
    """Over several tiles; that with sinks, a softcap and dropout in turn."""
    at = MASKS.index(mask)
    more = ({"softcap": 1.0}, {"sinks": True}, {"dropout": 0.3})[at % 3]
    base = Problem(1, 1, 2, 150, 140, 16, dtype=DTYPES[at % len(DTYPES)], seed=at)
    check(replace(base, **mask), device)
    check(replace(base, **mask, **more, S=33, D=80, DV=40), device, NAMES if "sinks" in more else ROWS)


def assert_near(found: Tensor, expected: Tensor, beside: Tensor | None = None) -> None:
    """Up to a few of the dtype's steps of the largest element, or of the largest beside it."""
    largest = (expected if beside is None else beside).abs().max().item()
    allowed = 8.0 * torch.finfo(found.dtype).eps * largest
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


@on_devices
@in_dtypes
@pytest.mark.parametrize("way", ["start", "ids", "start and end", "bool"])
def test_documents_in_a_row_are_as_each_alone(device: str, dtype: torch.dtype, way: str) -> None:
    lengths, problem = (5, 33, 1, 30, 16), Problem(B=1, S=85, T=85, D=32, dtype=dtype, causal=True, sinks=True)
    ends = torch.tensor(lengths, device=device).cumsum(0)
    number = torch.repeat_interleave(torch.arange(5, device=device), torch.tensor(lengths, device=device))[None]
    start, end = ends[number] - torch.tensor(lengths, device=device)[number], ends[number]
    masks = {
        "start": {"start": start}, "ids": {"query_ids": number, "key_ids": number},
        "start and end": {"start": start, "end": end}, "bool": {"mask": (number.mT == number)[None]},
    }  # fmt: skip
    given = problem.build(device)
    grad = Spec((1, 4, 85, 32), dtype, seed=9).build(device)
    packed = evaluate(problem.fused, given | masks[way], grad)
    for first, last in itertools.pairwise([0, *ends.tolist()]):
        part = {name: one[:, :, first:last] if name in ROWS else one for name, one in given.items()}
        alone = evaluate(problem.fused, part, grad[:, :, first:last])
        for mine, right in zip(packed, alone, strict=True):
            assert_near(mine[:, :, first:last], right, mine)


def blanks(side: str) -> Tensor:
    """Where two sequences of 70 are padding."""
    at, count = torch.arange(70), torch.tensor([[20], [0]])
    if side == "holes":
        return torch.rand(2, 70, generator=torch.Generator().manual_seed(0)) < 0.4
    return at < count if side == "left" else at >= 70 - count


def without(blank: Tensor, way: str, side: str) -> Tensors:
    """Masks by which what is not blank does not attend to what is."""
    if way == "ids":
        return {"query_ids": (~blank).long(), "key_ids": (~blank).long()}
    if way == "own ids":  # blank rows attend to nothing
        return {"query_ids": torch.where(blank, 2, 1), "key_ids": torch.where(blank, 3, 1)}
    if way == "bool":
        return {"mask": ~blank[:, None, None, :].expand(2, 1, 70, 70)}
    if way == "added":
        rows = torch.zeros(2, 1, 1, 70).masked_fill(blank[:, None, None], torch.finfo(torch.float32).min)
        return {"mask": rows.expand(2, 1, 70, 70)}
    count = blank.sum(1, keepdim=True).expand(2, 70)
    if side == "right":
        return {"end": 70 - count}
    return {"start": torch.where(blank, -1, count)}  # as an eager mask leaves it: the same weight for all


WAYS = [*itertools.product(("left", "right", "holes"), ("ids", "own ids", "bool", "added"))]


@on_devices
@in_dtypes
@pytest.mark.parametrize(("side", "way"), [*WAYS, ("left", "range"), ("right", "range")])
def test_what_padding_holds_does_not_matter(device: str, dtype: torch.dtype, side: str, way: str) -> None:
    """To the last bit, in outputs and gradients, whose upstream is 0 there."""
    problem = Problem(G=1, S=70, T=70, D=32, dtype=dtype, causal=True, softcap=5.0, layout="fused")
    blank = blanks(side)
    masks = {name: one.to(device) for name, one in without(blank, way, side).items()}
    blank, given = blank.to(device), problem.build(device)
    largest = min(2.0**40, torch.finfo(dtype).max / 2)  # and products of such, too, are finite
    spoilt = {
        name: torch.where(blank[:, None, :, None], torch.where(one < 0, -largest, largest).to(dtype), one)
        for name, one in given.items()
    }
    grad = Spec((2, 2, 70, 32), dtype, seed=9).build(device).masked_fill(blank[:, None, :, None], 0.0)
    before, after = (evaluate(problem.fused, one | masks, grad) for one in (given, spoilt))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.transpose(1, 2)[~blank], other.transpose(1, 2)[~blank])


EMPTY = torch.tensor([0, 3, 17, 18, 19])


def masked_throughout(way: str) -> Tensors:
    """Of 20 rows, those in EMPTY attend to nothing."""
    rows = torch.zeros(1, 20, dtype=torch.bool).index_fill(1, EMPTY, True)
    if way == "range":
        return {"start": torch.where(rows, 7, 0), "end": torch.where(rows, 7, 20)}
    if way == "ids":
        return {"query_ids": torch.where(rows, 5, 1), "key_ids": torch.ones(1, 20, dtype=torch.int64)}
    dense = rows[:, None, :, None].expand(1, 1, 20, 20)
    return {"mask": ~dense if way == "bool" else torch.zeros(1, 1, 20, 20).masked_fill(dense, -torch.inf)}


@on_devices
@in_dtypes
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("way", ["range", "ids", "bool", "added"])
def test_a_row_that_may_attend_to_nothing(device: str, dtype: torch.dtype, way: str, sinks: bool) -> None:
    problem = Problem(dtype=dtype, sinks=sinks, contiguous=sinks)
    given = problem.build(device)
    masks, empty = {name: one.to(device) for name, one in masked_throughout(way).items()}, EMPTY.to(device)
    grad = Spec((2, 4, 20, 16), dtype, seed=9).build(device)
    needs = NAMES if sinks else ROWS
    out, lse, dquery, *others = evaluate(problem.fused, given | masks, grad, needs)
    assert (out[:, :, empty] == 0.0).all()
    assert (dquery[:, :, empty] == 0.0).all()
    expected = given["sinks"].float()[:, None].expand(2, 4, 5) if sinks else torch.full_like(lse[..., :5], -torch.inf)
    torch.testing.assert_close(lse[:, :, empty], expected, rtol=1e-6, atol=1e-6)
    rest = [at for at in range(20) if at not in EMPTY]
    part = {name: one[:, :, rest] if name == "query" else one for name, one in given.items()}
    for one, right in zip(others, evaluate(problem.fused, part, grad[:, :, rest], needs)[3:], strict=True):
        assert_near(one, right)
    assert not any(one.isnan().any() for one in (out, lse, dquery, *others))


@on_devices
@pytest.mark.parametrize("way", ["range", "ids", "bool", "added"])
def test_nothing_but_such_rows(device: str, way: str) -> None:
    given = Problem(T=5).build(device)
    masks = {name: one.to(device) for name, one in masked_throughout(way).items()}
    masks = {name: one[:, EMPTY[:1]].expand(-1, 20) if name in ("start", "end") else one for name, one in masks.items()}
    masks |= {"query_ids": masks["query_ids"] + 5, "key_ids": masks["key_ids"][:, :5]} if way == "ids" else {}
    masks |= {"mask": masks["mask"][:, :, :1, :5].expand(1, 1, 20, 5)} if "mask" in masks else {}
    out, lse, *gradients = evaluate(Problem(T=5).fused, given | masks, torch.ones(2, 4, 20, 16, device=device))
    assert lse.isneginf().all()
    assert all((one == 0.0).all() for one in (out, *gradients))


@on_devices
@pytest.mark.parametrize("change", ["window", "start", "end", "-end"])
def test_numbers_beyond_32_bits(device: str, change: str) -> None:
    """A window or an end that is far away is none, and before a far start or after an end below 0 there are no keys."""
    largest, problem = 2**31 - 5, Problem(S=70, T=70, dtype=torch.float32, causal=True)
    given = problem.build(device)
    grad = Spec((2, 4, 70, 16), torch.float32, seed=9).build(device)
    expected = evaluate(problem.fused, given, grad)
    if change == "window":
        found = evaluate(replace(problem, window=largest).fused, given, grad)
    else:
        far = torch.full((1, 70), 2**63 - 1 if change != "-end" else 5 - 2**32, device=device)
        found = evaluate(problem.fused, given | {change.removeprefix("-"): far}, grad)
    if change in ("start", "-end"):
        assert not any(one.any() for one in (found[0], *found[2:]))
    else:
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right)


@on_devices
@in_dtypes
@pytest.mark.parametrize("T", [20, 150])
def test_a_row_that_starts_before_all_keys_weighs_them_alike(device: str, dtype: torch.dtype, T: int) -> None:
    """Whatever else holds; with the gradients of a softmax of such weights."""
    problem = Problem(T=T, dtype=dtype, causal=True, window=2, ids="kinds", dense="bool")
    given, end = problem.build(device), torch.arange(T - 19, T + 1, device=device).flip(0)[None]
    start = torch.full_like(end, -1)
    if T > 20:  # there are whole tiles of other ids than those of the rows
        given |= {"query_ids": start, "key_ids": -(torch.arange(T, device=device) < 20).long()[None]}
    grad = Spec((2, 4, 20, 16), dtype, seed=9).build(device)
    out, lse, dquery, dkey, dvalue = evaluate(problem.fused, given | {"start": start, "end": end}, grad)
    share = (torch.arange(T, device=device) < end[0][:, None]) / end[0][:, None].double()  # [S, T]
    key, value = (given[name].double().repeat_interleave(2, 1) for name in ("key", "value"))
    pull = grad.double() @ value.mT
    dscores = share * (pull - (share * pull).sum(-1, keepdim=True)) * problem.scale
    assert_near(out, (share @ value).to(dtype))
    torch.testing.assert_close(lse, end.float().log()[:, None].expand(2, 4, 20))
    assert_near(dquery, (dscores @ key).to(dtype))
    assert_near(dkey, (dscores.mT @ given["query"].double()).unflatten(1, (2, 2)).sum(2).to(dtype))
    assert_near(dvalue, (share.mT @ grad.double()).unflatten(1, (2, 2)).sum(2).to(dtype))


@on_devices
@in_dtypes
def test_a_row_with_the_lowest_number_added_attends_to_nothing(device: str, dtype: torch.dtype) -> None:
    """Scores vanish in it, so that it counts as -inf."""
    problem = Problem(dtype=dtype)
    given = problem.build(device)
    rows = (torch.arange(20, device=device) % 3 == 0)[None, None, :, None].expand(2, 1, 20, 20)
    given["mask"] = torch.zeros(2, 1, 20, 20, device=device).masked_fill(rows, torch.finfo(torch.float32).min)
    out, lse = problem.fused(given)
    assert not out[:, :, ::3].any()
    assert lse[:, :, ::3].isneginf().all()


@on_devices
@pytest.mark.parametrize(("D", "DV"), [(300, 16), (16, 300)])
def test_heads_that_are_too_long_for_a_tile(device: str, D: int, DV: int) -> None:
    check(Problem(S=9, T=9, D=D, DV=DV, causal=True, scale=0.05), device)


@on_devices
@in_dtypes
def test_grouped_heads_are_as_repeated_ones(device: str, dtype: torch.dtype) -> None:
    """Whose gradients are summed."""
    problem = Problem(G=3, E=4, S=40, T=70, D=32, dtype=dtype, sinks=True)
    given = problem.build(device)
    repeated = {name: one.repeat_interleave(4, 1) if name in ("key", "value") else one for name, one in given.items()}
    grad = Spec((2, 12, 40, 32), dtype, seed=9).build(device)
    mine, other = (evaluate(problem.fused, one, grad, NAMES) for one in (given, repeated))
    for at, name in enumerate(("out", "lse", *NAMES)):
        expected = other[at].double().unflatten(1, (3, 4)).sum(2) if name in ("key", "value") else other[at]
        assert_near(mine[at], expected.to(mine[at].dtype))


@pytest.mark.skipif(INTERPRETING, reason="it runs one program after another")
@on_devices
@in_dtypes
@pytest.mark.parametrize("change", [{}, {"dense": "added", "ids": ""}, {"E": 1, "D": 128}], ids=str)
def test_two_calls_give_the_same_bits(device: str, dtype: torch.dtype, change: dict[str, Any]) -> None:
    problem = replace(RICH, dtype=dtype, **change)
    given, heads = problem.build(device), problem.G * problem.E
    grad = Spec((1, heads, 70, problem.D), dtype, seed=9).build(device)
    first, second = (evaluate(problem.fused, given, grad, NAMES) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def dropped(problem: Problem, given: Tensors, seed: int) -> Tensor:
    return problem.fused(given | {"seed": torch.tensor([seed], device=given["query"].device)})[0]


@on_devices
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_leaves_a_share_of_the_weights(device: str, share: float) -> None:
    """Which ones a seed says; the others are larger."""
    problem = Problem(B=2, S=64, T=64, D=64, dropout=share, scale=0.125)
    given = problem.build(device)
    given["value"] = torch.eye(64, device=device).expand(2, 2, 64, 64)
    plain, first, again, other = (dropped(one, given, seed) for one, seed in zip(
        (replace(problem, dropout=0.0), *[problem] * 3), (1, 1, 1, 2), strict=True
    ))  # fmt: skip
    assert torch.equal(first, again)
    count = plain.numel()
    for found in (first, other):
        assert abs((found == 0.0).sum().item() / count - share) < 5 * (share * (1 - share) / count) ** 0.5
    both = ((first == 0.0) & (other == 0.0)).sum().item() / count
    assert abs(both - share**2) < 5 * (share**2 * (1 - share**2) / count) ** 0.5
    left = first != 0.0
    torch.testing.assert_close(first[left], plain[left] / (1.0 - share))
    assert torch.equal(left, kept(torch.tensor([1], device=device), first.shape, share))
    assert len(left.flatten(0, 2).unique(dim=0)) > 2 * 4 * 64 - 9  # every row of every head draws anew
    for axis in range(4):  # no head, row or column is left out or spared
        by_index = left.float().mean([other for other in range(4) if other != axis])
        allowed = 6 * (share * (1 - share) * left.shape[axis] / count) ** 0.5
        assert (by_index - (1.0 - share)).abs().max().item() < allowed


@pytest.mark.skipif(INTERPRETING, reason="hundreds of calls")
@on_devices
def test_dropout_changes_no_mean(device: str) -> None:
    problem = Problem(B=1, dropout=0.3, causal=True)
    given = problem.build(device)
    samples = torch.stack([dropped(problem, given, seed) for seed in range(400)]).double()
    plain = dropped(replace(problem, dropout=0.0), given, 0)
    off = (samples.mean(0) - plain) / (samples.std(0) / 400**0.5)
    assert 0.7 < off.square().mean().item() < 1.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 20, 16)}, r"query \(2, 3, 20, 16\), key \(2, 2, 20, 16\)"),
        ({"query": torch.zeros(1, 4, 20, 16)}, r"query \(1, 4, 20, 16\)"),
        ({"query": torch.zeros(2, 4, 20, 8)}, r"query \(2, 4, 20, 8\)"),
        ({"query": torch.zeros(4, 20, 16)}, r"query \(4, 20, 16\)"),
        ({"value": torch.zeros(2, 2, 21, 16)}, r"value \(2, 2, 21, 16\)"),
        ({"value": torch.zeros(2, 1, 20, 24)}, r"value \(2, 1, 20, 24\)"),
        ({"key": torch.zeros(2, 2, 20, 16, dtype=torch.float16)}, "key torch.float16"),
        ({name: torch.zeros(2, 2, 20, 16, dtype=torch.int64) for name in ROWS}, "query torch.int64"),
        ({"start": torch.zeros(2, 19, dtype=torch.int64)}, r"start \(2, 19\)"),
        ({"end": torch.zeros(20, dtype=torch.int64)}, "has not 2 axes"),
        ({"start": torch.zeros(3, 20, dtype=torch.int64)}, "size"),
        ({"query_ids": torch.zeros(1, 20, dtype=torch.int64)}, "query_ids and key_ids belong together"),
        ({"mask": torch.zeros(2, 3, 20, 20)}, "size"),
        ({"dropout": 1.0}, "a share of 1.0 cannot be dropped"),
        ({"dropout": -0.5}, "a share of -0.5 cannot be dropped"),
    ],
)
def test_what_is_not_defined_raises(change: dict[str, Any], message: str) -> None:
    given = Problem(layout="contiguous").build("cpu") | {k: v for k, v in change.items() if isinstance(v, Tensor)}
    choice = Problem().choice() | {k: v for k, v in change.items() if not isinstance(v, Tensor)}
    with pytest.raises(RuntimeError, match=message):
        ENTRY.op(*ENTRY.arguments(given, choice))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize(("S", "T", "causal"), [
    (256, 256, True), (200, 200, True), (129, 129, True), (1, 1, True), (256, 256, False), (100, 300, False),
    (300, 64, False), (1, 257, False), (200, 130, True), (130, 200, True),
])  # fmt: skip
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_a_gpu)])
def test_plain_calls_whoever_computes_them(
    device: str, S: int, T: int, causal: bool, D: int, dtype: torch.dtype
) -> None:
    """A kernel of torch's own may be chosen for these."""
    for layout, contiguous, E in (("transposed", False, 1), ("contiguous", True, 4), ("sliced", False, 4)):
        base = Problem(2, 2, E, S, T, D, 0, dtype, layout, causal=causal, scale=D**-0.5, contiguous=contiguous)
        check(base, device)


LARGE = Problem(1, 1, 2, 8192, 8192, 64, dtype=torch.bfloat16, causal=True)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize(
    "change",
    [
        {}, {"causal": False}, {"window": 512}, *({"ranges": one} for one in RANGES), *({"ids": one} for one in IDS),
        {"sinks": True, "softcap": 5.0}, {"dropout": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_no_tensor_is_as_large_as_the_scores(device: str, change: dict[str, Any]) -> None:
    problem = replace(LARGE, **change)
    given = problem.build(device)
    grad = torch.ones(1, 2, 8192, 64, dtype=problem.dtype, device=device)
    evaluate(problem.fused, given, grad)  # compiles
    torch.cuda.synchronize()
    before_bytes = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    evaluate(problem.fused, given, grad)
    taken_bytes = torch.cuda.max_memory_allocated() - before_bytes
    assert taken_bytes < 8 * sum(one.numel() * one.element_size() for one in given.values())
    assert taken_bytes < 8192 * 8192
