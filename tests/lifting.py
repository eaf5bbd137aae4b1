"""What the tests of the patterns share: a function rewritten, the calls left in it, its values held to the truth."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from compare import FORWARD, GRADIENT, assert_close_to_truth, assert_same_metadata
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

import fastft.rewriter.backend  # noqa: F401  (what compilations are to trace otherwise)
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.loss.losses import Deferred
from fastft.rewriter.matching.pattern import capture
from fastft.rewriter.options import Options
from fastft.rewriter.passes import rewrite
from fastft.rewriter.report.data import GraphReport
from fastft.rewriter.runtime.lazy_logits import restore

_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type_as}
Capture = tuple[GraphModule, GraphReport]


def lifted(function: Callable, *values: Any) -> Capture:
    """A straight-line function, captured and rewritten."""
    gm = capture(function, *values)
    return gm, rewrite(gm)


def rewritten(gm: GraphModule, *, lazy: bool = False, **chosen: Any) -> tuple[Callable, GraphReport]:
    """What runs a captured graph once it is rewritten, without a compiler; lazy: its logits may be deferred."""
    deferred: list[Deferred] = []
    count = len(gm.graph.output_node().args[0])
    options = Options(**chosen)
    report = rewrite(gm, options=options, deferred=deferred if lazy else None)
    return restore(gm.forward, deferred, count, options.logits_bytes, report.reads), report


def compiled(
    function: Callable, captures: list[Capture], substituted: bool = False, **options: Any
) -> Callable:  # fmt: skip
    """A function or module, captured by torch.compile: with its modules, its modes and what symbolic tracing runs.

    substituted: substitutes of libraries' functions are traced, as by fastft.
    """

    def backend(gm: GraphModule, _: object) -> Callable:
        run, report = rewritten(gm, **options)
        captures.append((gm, report))
        return run

    backend.traces_layers_once = substituted  # type: ignore[attr-defined]
    torch._dynamo.reset()
    return torch.compile(function, backend=backend)


def calls(gm: GraphModule) -> list[str]:
    return [name_of(node.target) for node in gm.graph.nodes if node.op in ("call_function", "call_method")]


def ops(gm: GraphModule) -> list[str]:
    """The calls of fastft's ops."""
    return [name.removeprefix("fastft.") for name in calls(gm) if name.startswith("fastft.")]


def rules(report: GraphReport) -> tuple[list[str], list[str]]:
    """The names of what was lifted and of what was fused."""
    return [one.rule for one in report.lifted], [one.rule for one in report.fused]


def reasons(report: GraphReport) -> list[str]:
    return [miss.reason for miss in report.near_misses]


def told(report: GraphReport) -> list[str]:
    """The reasons without the numbers by which torch.fx tells nodes of one name apart."""
    return [re.sub(r"\b([a-z]+)_\d+\b", r"\1", reason) for reason in reasons(report)]


def gradient_like(value: Tensor) -> Tensor:
    """The same numbers for every shape, in the memory order and dtype of value."""
    numbers = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return torch.empty_like(value).copy_(numbers)


def run(function: Callable, values: Sequence[Tensor], like: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and, of all values that need one, gradients; like: outputs whose dtypes the upstream gradients have."""
    given = function(*values)
    outputs = [given] if isinstance(given, Tensor) else list(given)
    upstream = [gradient_like(one).to(output.dtype) for one, output in zip(like or outputs, outputs, strict=True)]
    trained = [value for value in values if value.requires_grad]
    pairs = [pair for pair in zip(outputs, upstream, strict=True) if pair[0].requires_grad]
    found = _gradients(pairs, trained) if pairs and trained else ()
    return [output.detach() for output in outputs], list(found)


def _gradients(pairs: list[tuple[Tensor, Tensor]], trained: list[Tensor]) -> tuple[Tensor, ...]:
    outputs, upstream = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, trained, upstream, materialize_grads=True)


class _Exact(TorchFunctionMode):
    """Every cast returns its input, so that a function of float64 computes in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in _CASTS else func(*args, **(kwargs or {}))


def truth(function: Callable, values: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in float64, without the roundings of the function."""
    wide = (torch.promote_types(value.dtype, torch.float64) for value in values)  # complex128 of what is complex
    exact = [one.detach().to(dtype).requires_grad_(one.requires_grad) for one, dtype in zip(values, wide, strict=True)]
    with _Exact():
        return run(function, exact, like)


def assert_right(actual: Callable, function: Callable, values: Sequence[Tensor], exact: Callable | None = None) -> None:
    """Outputs and gradients as near to the truth as eager's, with eager's dtypes, and outputs with its strides."""
    eager, eager_gradients = run(function, values)
    mine, gradients = run(actual, values)
    right, right_gradients = truth(exact or function, values, eager)
    magnitude = max(value.detach().abs().max().item() for value in values)
    for got, other, one in zip(mine, eager, right, strict=True):
        assert_same_metadata(got, other)
        assert_close_to_truth(got, other, one, FORWARD, magnitude)
    for got, other, one in zip(gradients, eager_gradients, right_gradients, strict=True):
        assert_close_to_truth(got, other, one, GRADIENT, magnitude)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers that need a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def frozen(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random numbers that need none."""
    return normal(*shape, dtype=dtype, seed=seed).detach()
