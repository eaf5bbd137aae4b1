"""The choices worth considering for a layer: which results it keeps, which go to the host, and the seconds this costs.

Of all combinations only those on the lower convex hull of (bytes, seconds) remain, since a mixture of two of them over
many layers is as good as any other (the relaxed knapsack problem); they are ordered from the fastest to the leanest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate, combinations, pairwise

from fastft.compat.symbolic import evaluate
from fastft.rewriter.memory.device_rates import Rates
from fastft.rewriter.memory.joint_graph import EXACT, Joint

COPY_SLOWDOWN = 0.1  # compute slows by this share of an overlapping copy's time; H100, docs/performance.md
LEAST_OFFLOAD = 2**20  # bytes from which offloading a tensor is worth a separate copy


@dataclass(frozen=True)
class Choice:
    """What a layer does with its activations.

    kept: names of the forward ops whose results may be kept.  offloaded: names of storages kept in host memory.
    saved_bytes: of its own results and of inputs that nothing else needs, in device memory until backward;
    offloaded_bytes: in host memory.  seconds: by how much backward takes longer, at the example's sizes.
    """

    kept: tuple[str, ...]
    offloaded: tuple[str, ...] = ()
    saved_bytes: int = 0
    offloaded_bytes: int = 0
    seconds: float = 0.0
    ops: tuple[int, ...] = field(default=(), repr=False)  # the kept ops, by number


def choices(joint: Joint, rate: Rates, private: Set[int], *, offload: bool) -> list[Choice]:
    """List a layer's choices, from the fastest to the leanest.

    private: indices of inputs that are live for this layer alone.  offload: whether storages may go to the host.
    """
    keeping = _pareto(_with_ops(joint, kept, private) for kept in _combinations(joint))
    candidates = list(keeping)
    if offload:
        candidates += [offloading for choice in keeping for offloading in _offloading(joint, choice, rate, private)]
    return _hull(candidates)


def _combinations(joint: Joint) -> Iterator[tuple[int, ...]]:
    """Iterate over sets of ops to keep: all subsets, or for many ops a chain that drops one op at a time."""
    _, recomputed = joint.closure(())
    ops = [
        number
        for number in sorted(recomputed)
        if joint.ops[number].materialized and any(_size(joint, storage) for storage in joint.ops[number].makes)
    ]
    if len(ops) <= EXACT:
        for count in range(len(ops), -1, -1):
            yield from combinations(ops, count)
        return
    kept = tuple(ops)
    yield kept
    while kept:
        fewer = [tuple(storage for storage in kept if storage != dropped) for dropped in kept]
        kept = min(fewer, key=lambda ops: _price(joint, ops))
        yield kept


def _price(joint: Joint, kept: tuple[int, ...]) -> float:
    """Return the seconds of what is recomputed, plus the saved bytes at the time of a copy; lower is better."""
    saved, recomputed = joint.closure(kept)
    return (
        sum(joint.ops[number].seconds for number in recomputed) + sum(_size(joint, storage) for storage in saved) / 1e12
    )


def _with_ops(joint: Joint, kept: tuple[int, ...], private: Set[int]) -> Choice:
    saved, recomputed = joint.closure(kept)
    size = sum(_size(joint, storage) for storage in saved if _own(joint, storage, private))
    seconds = sum(joint.ops[number].seconds for number in recomputed)
    return Choice(tuple(joint.ops[number].node for number in kept), (), size, 0, seconds, kept)


def _own(joint: Joint, storage: int, private: Set[int]) -> bool:
    """Tell whether a storage is live for this layer alone."""
    return storage in joint.maker or joint.storages[storage].input in private


def _offloading(joint: Joint, choice: Choice, rate: Rates, private: Set[int]) -> Iterator[Choice]:
    """Keep the same ops and offload ever more of their results: once largest first, once smallest first."""
    saved, _ = joint.closure(choice.ops)
    large = [storage for storage in saved if _own(joint, storage, private) and _size(joint, storage) >= LEAST_OFFLOAD]
    forward = sum(op.seconds for op in joint.ops if op.forward)
    backward = sum(op.seconds for op in joint.ops if not op.forward) + choice.seconds
    for sign in (-1, 1):
        order = sorted(large, key=lambda item, sign=sign: (sign * _size(joint, item), item))  # type: ignore[misc]
        for going in accumulate(([storage] for storage in order), lambda chosen, more: chosen + more):
            size = sum(_size(joint, storage) for storage in going)
            away, back = size / rate.to_host, size / rate.from_host
            waits = max(0.0, away - forward) + max(0.0, back - backward) + COPY_SLOWDOWN * (away + back)
            yield Choice(
                choice.kept, tuple(joint.storages[storage].name for storage in sorted(going)),
                choice.saved_bytes - size, size,
                choice.seconds + waits, choice.ops,
            )  # fmt: skip


def _size(joint: Joint, storage: int) -> int:
    return evaluate(joint.storages[storage].bytes, joint.hints)


def _pareto(candidates: Iterable[Choice]) -> list[Choice]:
    """Drop the choices that another beats in bytes and seconds; among equals, keep the one with the fewest kept ops."""
    best: list[Choice] = []
    for choice in sorted(
        candidates,
        key=lambda candidate: (candidate.seconds, candidate.saved_bytes, len(candidate.kept), candidate.kept),
    ):
        if not best or choice.saved_bytes < best[-1].saved_bytes:
            best.append(choice)
    return best


def _hull(candidates: Sequence[Choice]) -> list[Choice]:
    """Return the lower convex hull, by falling bytes."""
    hull: list[Choice] = []
    for choice in _pareto(candidates):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    assert all(faster.saved_bytes > leaner.saved_bytes for faster, leaner in pairwise(hull))
    return hull


def slope(faster: Choice, leaner: Choice) -> float:
    """Return the seconds lost for each byte that the leaner choice frees."""
    return (leaner.seconds - faster.seconds) / (faster.saved_bytes - leaner.saved_bytes)
