"""What is merged of queries and keys: rotations by the same angles, and norms of each head before them."""

from collections.abc import Callable

import pytest
import torch
from choices import in_pairs
from lifting import assert_right, frozen, lifted, normal, ops, reasons, rules
from torch import Tensor

from fastft.patterns import rms_norm, rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, H, G, S, D = 2, 4, 2, 5, 16
NORM, TURN = rms_norm.llama, rotary.half
PAIR, NORMED = "rotary.queries_and_keys", "norm_rotary.normed"
Values = list[Tensor]


def heads(dtype: torch.dtype = torch.float32, angle_dtype: torch.dtype | None = None, width: int = D) -> Values:
    """q and k [B, S, heads, D] seen as [B, heads, S, D], slices of one projection; their weights; cos and sin."""
    qkv = frozen(B, S, H + 2 * G, D, dtype=dtype)
    q, k, _ = (part.transpose(1, 2).requires_grad_() for part in qkv.split([H, G, G], 2))
    angle = frozen(B, 1, S, width, seed=2)
    weights = [normal(D, dtype=dtype, seed=seed) for seed in (3, 4)]
    return [q, k, *weights, *(one.to(angle_dtype or dtype) for one in (angle.cos(), angle.sin()))]


@in_pairs(
    name=("half", "half_of_a_part", "half_by_parts", "interleaved", "interleaved_part"),
    dtype=DTYPES,
    angle_dtype=DTYPES,
)
def test_queries_and_keys_become_one_op(name: str, dtype: torch.dtype, angle_dtype: torch.dtype) -> None:
    turn = getattr(rotary, name)
    function = lambda q, k, w, v, cos, sin: (turn(q, cos, sin), turn(k, cos, sin))  # noqa: E731
    values = heads(dtype, angle_dtype, 8 if name in ("half_of_a_part", "interleaved_part", "half_by_parts") else D)
    gm, report = lifted(function, *values)
    assert (ops(gm), rules(report)[1]) == (["rotary_qk"], [PAIR]), reasons(report)
    assert_right(gm, function, values)


@in_pairs(
    dtype=DTYPES,
    angle_dtype=DTYPES,
    style=("llama", "gemma", "gpt_oss", "torch_rms_norm"),
    transposed=(False, True),
)
def test_norms_and_rotations_become_one_op(
    dtype: torch.dtype, angle_dtype: torch.dtype, style: str, transposed: bool
) -> None:
    norm = getattr(rms_norm, style)

    def function(q: Tensor, k: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if transposed:
            q, k = norm(q.transpose(1, 2), w, 1e-5).transpose(1, 2), norm(k.transpose(1, 2), v, 1e-5).transpose(2, 1)
        else:
            q, k = norm(q, w, 1e-5), norm(k, v, 1e-5)
        return TURN(q, cos, sin), TURN(k, cos, sin)

    values = heads(dtype, angle_dtype)
    gm, report = lifted(function, *values)
    rule = "norm_rotary.normed_then_transposed" if transposed else NORMED
    if style == "torch_rms_norm" and not transposed:  # contiguous whatever x is, which the op is not
        assert ops(gm) == ["rotary_qk"]
        assert all("the replacement is laid out as" in reason for reason in reasons(report))
    else:
        assert (ops(gm), rules(report)[1]) == (["norm_rotary"], [rule]), reasons(report)
    assert_right(gm, function, values)


def _both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return TURN(q, cos, sin), TURN(k, cos, sin)


def _k_of_turned_q(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q = TURN(q, cos, sin)
    k = k * q.mean()
    return q, TURN(k if w is None else NORM(k, w, 1e-5), cos, sin)


def _used_before_k_is_known(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    shown = TURN(q, cos, sin).exp()
    return shown, TURN(k.exp(), cos, sin)


def _norm_used_elsewhere(q: Tensor, k: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    q = NORM(q, w, 1e-5)
    return *_both(q, NORM(k, v, 1e-5), cos, sin), q.exp()


def _normed_once(q: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _both(*[NORM(q, w, 1e-5)] * 2, cos, sin)


def _one_transposed(q: Tensor, k: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _both(NORM(q.transpose(1, 2), w, 1e-5).transpose(1, 2), NORM(k, v, 1e-5), cos, sin)


TWO, ONE, APART = ["rotary", "rotary"], ["rotary_qk"], ["rms_norm", "rms_norm", "rotary_qk"]
CASES: dict[str, tuple[Callable, list[str]]] = {  # a function of q, k, their weights, cos and sin; the ops left
    "k first": (lambda q, k, w, v, c, s: (TURN(k, c, s), TURN(q, c, s)), ONE),
    "three": (lambda q, k, w, v, c, s: (*_both(q, k, c, s), TURN(q * 2, c, s)), ["rotary_qk", "rotary"]),
    "two pairs": (lambda q, k, w, v, c, s: (*_both(q, k, c, s), *_both(q * 2, k * 2, c, s)), ONE * 2),
    "one tensor twice": (lambda q, k, w, v, c, s: _both(q, q, c, s), ONE),
    "other angles": (lambda q, k, w, v, c, s: (TURN(q, c, s), TURN(k, c * 1, s)), TWO),
    "sin and cos swapped for k": (lambda q, k, w, v, c, s: (TURN(q, c, s), TURN(k, s, c)), TWO),
    "other pairs for k": (lambda q, k, w, v, c, s: (TURN(q, c, s), rotary.interleaved(k, c, s)), TWO),
    "k depends on the turned q": (lambda q, k, w, v, c, s: _k_of_turned_q(q, k, c, s), TWO),
    "q is used before k is known": (lambda q, k, w, v, c, s: _used_before_k_is_known(q, k, c, s), TWO),
    "one weight": (lambda q, k, w, v, c, s: _both(NORM(q, w, 1e-5), NORM(k, w, 1e-5), c, s), ["norm_rotary"]),
    "normed once": (lambda q, k, w, v, c, s: _normed_once(q, w, c, s), ["norm_rotary"]),
    "other eps": (lambda q, k, w, v, c, s: _both(NORM(q, w, 1e-5), NORM(k, v, 1e-6), c, s), APART),
    "other norms": (lambda q, k, w, v, c, s: _both(NORM(q, w, 1e-5), rms_norm.gemma(k, v, 1e-5), c, s), APART),
    "one norm": (lambda q, k, w, v, c, s: _both(NORM(q, w, 1e-5), k, c, s), ["rms_norm", "rotary_qk"]),
    "scaled between": (lambda q, k, w, v, c, s: _both(NORM(q, w, 1e-5) * 2, NORM(k, v, 1e-5), c, s), APART),
    "a norm used elsewhere": (_norm_used_elsewhere, APART),
    "one of them transposed": (_one_transposed, APART),
    "a normed k depends on the turned q": (
        lambda q, k, w, v, c, s: _k_of_turned_q(NORM(q, w, 1e-5), k, c, s, v),
        ["rms_norm", "rotary", "rms_norm", "rotary"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_merged_and_what_is_not(name: str) -> None:
    function, expected = CASES[name]
    values = heads()
    gm, report = lifted(function, *values)
    assert ops(gm) == expected
    assert reasons(report) == []
    assert_right(gm, function, values)


def test_what_is_turned_twice_is_no_pair() -> None:
    """k would be the turned q, which the op replaces."""
    function = lambda q, k, w, v, cos, sin: TURN(TURN(q, cos, sin), cos, sin)  # noqa: E731
    values = heads()
    gm, _ = lifted(function, *values)
    assert ops(gm) == TWO
    assert_right(gm, function, values)


def test_trained_angles_are_shared_by_what_is_not_lifted() -> None:
    """cos needs a gradient from both, which the op does not give: all stays as it is written."""
    function = lambda q, k, w, v, cos, sin: _both(q, k, cos, sin)  # noqa: E731
    values = [*heads()[:4], *(angle.requires_grad_() for angle in heads()[4:])]
    gm, report = lifted(function, *values)
    assert ops(gm) == []
    assert all("gives cos no gradient" in reason for reason in reasons(report))
    assert_right(gm, function, values)
