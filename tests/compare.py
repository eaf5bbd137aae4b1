"""The one tolerance: an op may err twice as much as PyTorch's own expression in that dtype, against float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

FORWARD, GRADIENT = 2.0, 3.0


def assert_same_metadata(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype, device and (but for axes of size 1, which have none) strides."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.device == expected.device, f"device {actual.device}, expected {expected.device}"
    if actual.numel() > 0:
        strides = [
            (axis, mine, other)
            for axis, (size, mine, other) in enumerate(
                zip(actual.shape, actual.stride(), expected.stride(), strict=True)
            )
            if size > 1 and mine != other
        ]
        assert not strides, f"(axis, stride, expected): {strides}"


Pair = tuple[Tensor, Tensor]  # eager's value and the truth


def assert_close_to_truth(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    factor: float,
    magnitude: float | None = None,
    *,
    others: Sequence[Pair] = (),
    cases: bool = False,
) -> None:
    """err(actual) <= factor * err(eager) + atol, in the largest and in the root mean square error.

    truth is float64; eager is the same mathematics by plain PyTorch in actual's dtype.  atol allows what any right
    implementation may differ by: one rounding of the result, and a few of float32's of the largest term inside.
    That term is as large as the result unless magnitude says more (terms that cancel: a sum, a projection).
    others: further values and truths to measure eager's error by: at inputs close by, as on a few numbers eager may err
    little by luck, and with every step rounded another way, as terms that cancel exactly need not do so elsewhere.
    cases: the first axis is one of cases, and the median of their errors counts: a deep model's errors in low precision
    differ tenfold from one batch to the next, for eager as for any other way.
    """
    assert truth.dtype == torch.float64, "the truth is computed in float64"
    assert actual.shape == truth.shape == eager.shape, f"{actual.shape}, eager {eager.shape}, truth {truth.shape}"
    assert actual.dtype == eager.dtype, f"dtype {actual.dtype}, eager {eager.dtype}"
    if truth.numel() == 0:
        return
    if not actual.is_floating_point():
        assert torch.equal(actual.double(), truth), "integers differ"
        return
    if not cases:
        actual, eager, truth = actual[None], eager[None], truth[None]
        others = [(one[None], right[None]) for one, right in others]
    assert torch.isfinite(truth).all(), "the case itself is not finite: draw smaller values"
    infinite = (~torch.isfinite(eager)).nonzero().tolist()
    assert not infinite, (
        f"eager itself overflows, and then bounds nothing: draw smaller values ({len(infinite)} of {eager.numel()}, "
        f"the first at {infinite[0]})"
    )
    assert torch.isfinite(actual).all(), f"{int((~torch.isfinite(actual)).sum())} values are not finite"
    error, eager_errors = actual.double() - truth, [one.double() - right for one, right in ((eager, truth), *others)]
    inside = 8 * torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    tiny = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps  # steps of subnormal numbers
    for name, size in (("largest", _largest), ("root mean square", _root_mean_square)):
        scale, eager_error = size(truth), max(map(size, eager_errors))
        terms = max(magnitude or 0.0, scale)
        atol = torch.finfo(actual.dtype).eps / 2 * scale + inside * terms + tiny
        allowed = factor * eager_error + atol
        assert size(error) <= allowed, (
            f"{name} error {size(error):.3e} > {allowed:.3e} = {factor} * {eager_error:.3e} (eager) + {atol:.1e}"
        )


def _largest(values: Tensor) -> float:
    return values.abs().reshape(len(values), -1).amax(1).median().item()


def _root_mean_square(values: Tensor) -> float:
    return values.square().reshape(len(values), -1).mean(1).median().sqrt().item()


def makes_new_tensors(func: Any) -> bool:
    """Whether an aten op returns neither views nor what it writes to."""
    return all(one.alias_info is None for one in func._schema.returns)


class RoundedOtherwise(TorchDispatchMode):
    """In float64, every step errs by up to eps, float32's, at random: what arithmetic in float32 may do to a result."""

    def __init__(self, seed: int, eps: float = torch.finfo(torch.float32).eps) -> None:
        super().__init__()
        self.eps = eps
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not makes_new_tensors(func):
            return result
        return tree_map_only(torch.Tensor, self._err, result)

    def _err(self, value: Tensor) -> Tensor:
        if value.dtype != torch.float64:
            return value
        noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
        return value * (1.0 + self.eps * (2.0 * noise - 1.0))


@contextmanager
def poison() -> Iterator[None]:
    """torch.empty is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
