"""The choices worth having for a layer: what it keeps, what goes to the host, and the seconds that this costs.

Of all combinations only those on the lower convex hull of (bytes, seconds) stay, as a mixture of two of them over many
layers is as good as any other (the relaxed knapsack problem); they are walked from the fastest to the leanest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise

from fastft.compat.symbolic import evaluate
from fastft.rewriter.memory.device_rates import Rates
from fastft.rewriter.memory.joint_graph import EXACT, Joint

COPY_SLOWDOWN = 0.1  # compute slows by this share of an overlapping copy's time; H100, docs/performance.md
LEAST_OFFLOAD = 2**20  # bytes of a tensor that is worth a copy of its own


@dataclass(frozen=True)
class Choice:
    """What a layer does with its activations.

    kept: names of the forward ops whose results may stay.  offloaded: names of storages that are kept in host memory.
    saved_bytes: of its own making and of inputs that nothing else needs, in device memory until backward;
    offloaded_bytes: in host memory.  seconds: what backward takes longer, at the sizes of the example.
    """

    kept: tuple[str, ...]
    offloaded: tuple[str, ...] = ()
    saved_bytes: int = 0
    offloaded_bytes: int = 0
    seconds: float = 0.0
    ops: tuple[int, ...] = field(default=(), repr=False)  # kept, by number


def choices(joint: Joint, rate: Rates, private: Set[int], *, offload: bool) -> list[Choice]:
    """From the fastest to the leanest.

    private: places of inputs that live for this layer alone.  offload: whether there is a host to offload to.
    """
    keeping = _pareto(_with_ops(joint, kept, private) for kept in _combinations(joint))
    found = list(keeping)
    if offload:
        found += [one for choice in keeping for one in _offloading(joint, choice, rate, private)]
    return _hull(found)


def _combinations(joint: Joint) -> Iterator[tuple[int, ...]]:
    """Sets of ops that may be kept: all of them, or where they are many, each smaller than the one before."""
    _, again = joint.closure(())
    ops = [
        at
        for at in sorted(again)
        if joint.ops[at].materialized and any(_size(joint, one) for one in joint.ops[at].makes)
    ]
    if len(ops) <= EXACT:
        for count in range(len(ops), -1, -1):
            yield from combinations(ops, count)
        return
    kept = tuple(ops)
    yield kept
    while kept:
        fewer = [tuple(one for one in kept if one != dropped) for dropped in kept]
        kept = min(fewer, key=lambda ops: _price(joint, ops))
        yield kept


def _price(joint: Joint, kept: tuple[int, ...]) -> float:
    """To be small: seconds, and bytes as if each took the time of a copy."""
    saved, again = joint.closure(kept)
    return sum(joint.ops[at].seconds for at in again) + sum(_size(joint, one) for one in saved) / 1e12


def _with_ops(joint: Joint, kept: tuple[int, ...], private: Set[int]) -> Choice:
    saved, again = joint.closure(kept)
    size = sum(_size(joint, one) for one in saved if _own(joint, one, private))
    seconds = sum(joint.ops[at].seconds for at in again)
    return Choice(tuple(joint.ops[at].node for at in kept), (), size, 0, seconds, kept)


def _own(joint: Joint, storage: int, private: Set[int]) -> bool:
    """Whether a storage lives for this layer."""
    return storage in joint.maker or joint.storages[storage].input in private


def _offloading(joint: Joint, choice: Choice, rate: Rates, private: Set[int]) -> Iterator[Choice]:
    """The same ops kept, with ever more of their results in host memory: the largest first, and the smallest first."""
    saved, _ = joint.closure(choice.ops)
    large = [one for one in saved if _own(joint, one, private) and _size(joint, one) >= LEAST_OFFLOAD]
    forward = sum(op.seconds for op in joint.ops if op.forward)
    backward = sum(op.seconds for op in joint.ops if not op.forward) + choice.seconds
    for sign in (-1, 1):
        order = sorted(large, key=lambda one, sign=sign: (sign * _size(joint, one), one))  # type: ignore[misc]
        for going in accumulate(([one] for one in order), lambda some, more: some + more):
            size = sum(_size(joint, one) for one in going)
            away, back = size / rate.to_host, size / rate.from_host
            waits = max(0.0, away - forward) + max(0.0, back - backward) + COPY_SLOWDOWN * (away + back)
            yield Choice(
                choice.kept, tuple(joint.storages[one].name for one in sorted(going)), choice.saved_bytes - size, size,
                choice.seconds + waits, choice.ops,
            )  # fmt: skip


def _size(joint: Joint, storage: int) -> int:
    return evaluate(joint.storages[storage].bytes, joint.hints)


def _pareto(found: Iterable[Choice]) -> list[Choice]:
    """Those that no other beats in both; the fewest ops kept where several are equal."""
    best: list[Choice] = []
    for choice in sorted(found, key=lambda one: (one.seconds, one.saved_bytes, len(one.kept), one.kept)):
        if not best or choice.saved_bytes < best[-1].saved_bytes:
            best.append(choice)
    return best


def _hull(found: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull, by falling bytes."""
    hull: list[Choice] = []
    for choice in _pareto(found):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    assert all(one.saved_bytes > other.saved_bytes for one, other in pairwise(hull))
    return hull


def slope(one: Choice, leaner: Choice) -> float:
    """Seconds for each byte that the leaner choice frees."""
    return (leaner.seconds - one.seconds) / (one.saved_bytes - leaner.saved_bytes)
