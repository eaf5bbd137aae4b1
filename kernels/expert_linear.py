"""The linear layers of a mixture of experts, each for the tokens that chose its expert:  y_i = x_i W_e^T + ...

    y_i = x_i W_e^T + scale (x_i A_e^T) B_e^T + bias_e    for each row i of expert e

Rows are sorted by expert, as expert_order says: order, place, ends and top_k, the K that each token chose.  Sources:
Gale et al., MegaBlocks, 2022, arXiv:2211.15841 (nothing is dropped); Hu et al., LoRA, 2021, arXiv:2106.09685;
Dettmers et al., QLoRA, 2023, arXiv:2305.14314.  W + scale B A is never built.

x: if gathers, tokens [T, K], and row i reads the token that slot order[i] is of; otherwise rows [S, K].
weight: [E, N, K], or [E, K, N] if transposed, in x's dtype, of any strides; or, with a quant_type, all experts' packed
    as one matrix as dequantize_4bit takes it, and absmax has its absmax, or, nested, absmax, absmax_8bit, absmax_code
    and absmax_offset.
bias: [E, N] in x's dtype.
lora_a, lora_b: [E, r, K] and [E, N, r], of any floating-point dtype and strides; they count as rounded to x's.
top_k_weights: [T, K], any floating-point dtype.  If given, y is [T, N], the sum of each token's rows, each times its
    weight; otherwise y has the rows [S, N].
features: N.  blocksize, quant_type: of 4-bit weights, "" for others.

y has x's dtype; products are summed in float32 at least.  Rows of no expert are 0.  The second result, x_i A_e^T
[S, r] in x's dtype, is for backward, which needs no row of y.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels import dequantize_4bit
from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import Case, define, empty_gradients, load, require
from fastft.kernels.expert_call import DIFFERENTIABLE, ExpertCall, differentiable, is_readable


def reference(
    x: Tensor, weight: Tensor, absmax: Sequence[Tensor], bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, top_k_weights: Tensor | None, order: Tensor, place: Tensor, ends: Tensor, features: int,
    scale: float, top_k: int, transposed: bool, gathers: bool, blocksize: int, quant_type: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute both results in plain PyTorch, expert by expert."""
    call = ExpertCall(
        x, weight, absmax, bias, lora_a, lora_b, top_k_weights, order, place, ends, features, scale, top_k, transposed,
        gathers, blocksize, quant_type,
    )  # fmt: skip
    rows, matrices = x[order // top_k] if gathers else x, call.matrices()
    results, products = [], []
    for expert, own in _experts(ends):
        y, s = rows[own] @ matrices[expert], rows.new_empty(own.stop - own.start, 0)
        if bias is not None:
            y = y + bias[expert]
        if lora_a is not None and lora_b is not None:
            s = F.linear(rows[own], lora_a[expert].to(x.dtype))
            y = y + F.linear(s, lora_b[expert].to(x.dtype)) * scale
        results.append(y)
        products.append(s)
    y, s = (_with_tail(parts, call.rows) for parts in (results, products))
    return (y if top_k_weights is None else _combined(y, top_k_weights, order, place)), s


def _experts(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert's number and rows."""
    first = 0
    for expert, end in enumerate(ends.tolist()):
        yield expert, slice(first, end)
        first = end


def _with_tail(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Put rows below each other, and zeros below them."""
    missing = rows - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(missing, parts[0].shape[1])])


def _combined(y: Tensor, top_k_weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Sum the rows of each token, each times its weight."""
    tokens, top_k = top_k_weights.shape
    weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[place].view(tokens, top_k, y.shape[1]).sum(1).to(y.dtype)


def reference_backward(
    grad_output: Tensor, s: Tensor, x: Tensor, weight: Tensor, absmax: Sequence[Tensor], bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, top_k_weights: Tensor | None, order: Tensor, place: Tensor,
    ends: Tensor, features: int, scale: float, top_k: int, transposed: bool, gathers: bool, blocksize: int,
    quant_type: str, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the needed gradients in plain PyTorch, in the order of differentiable(); s: the second result."""
    call = ExpertCall(
        x, weight, absmax, bias, lora_a, lora_b, top_k_weights, order, place, ends, features, scale, top_k, transposed,
        gathers, blocksize, quant_type,
    )  # fmt: skip
    rows, matrices = x[order // top_k] if gathers else x, call.matrices()
    weights = None if top_k_weights is None else top_k_weights.reshape(-1)[order].unsqueeze(-1)
    grads = grad_output if weights is None else grad_output[order // top_k]
    dx, dweights, dw, dbias, da, db = [], [], [], [], [], []
    for expert, own in _experts(ends):
        dy, factor = grads[own], 1.0 if weights is None else weights[own].to(x.dtype)
        unscaled = dy @ matrices[expert].T
        if lora_a is not None and lora_b is not None:
            ds = dy @ lora_b[expert].to(x.dtype) * scale
            unscaled = unscaled + ds @ lora_a[expert].to(x.dtype)
            da.append((ds * factor).T @ rows[own])
            db.append((dy * factor).T @ s[own] * scale)
        dots = (unscaled * rows[own]).sum(-1)
        if bias is not None:
            dots = dots + dy @ bias[expert]
            dbias.append((dy * factor).sum(0))
        dweights.append(dots.unsqueeze(-1))
        dx.append(unscaled * factor)
        dw.append(rows[own].T @ (dy * factor) if transposed else (dy * factor).T @ rows[own])
    dx_rows, dots = _with_tail(dx, call.rows), _with_tail(dweights, call.rows)[place]
    if gathers:
        dx_rows = dx_rows[place].view(x.shape[0], top_k, x.shape[1]).sum(1)
    gradients: list[Tensor | list[Tensor]] = [dx_rows, dw, dbias, da, db, dots]
    return [
        (gradient if isinstance(gradient, Tensor) else torch.stack(gradient)).reshape(like.shape).to(like.dtype)
        for gradient, like, need in zip(gradients, differentiable(call), needed, strict=True)
        if need and like is not None
    ]


def _check(call: ExpertCall) -> None:
    x, (experts,) = call.x, call.ends.shape
    columns, features = x.shape[-1], call.features
    require(x.dim() == 2 and x.is_floating_point(), lambda: f"x {x.dtype} of {x.dim()} dimensions")
    for name in ("order", "place", "ends"):
        tensor = getattr(call, name)
        require(tensor.dtype == torch.int32 and tensor.dim() == 1, lambda: f"{name} {tensor.dtype} {tensor.shape}")  # noqa: B023
    require(call.place.shape == call.order.shape, lambda: f"{call.place.shape} places of {call.order.shape} rows")
    require(call.top_k > 0, lambda: f"top_k {call.top_k}")
    read = x.shape[0] * call.top_k if call.gathers else x.shape[0]
    require(read == call.rows, lambda: f"{x.shape[0]} rows of x for {call.rows} rows of {call.top_k} a token")
    if call.top_k_weights is not None:
        given = tuple(call.top_k_weights.shape)
        require(given == (call.rows // call.top_k, call.top_k), lambda: f"top_k_weights {given} for {call.rows} rows")
    shape = (columns, features) if call.transposed else (features, columns)
    if call.quant_type:
        require(len(call.absmax) in (1, 4), lambda: f"{len(call.absmax)} statistics of a weight")
        sizes: Any = (experts * shape[0], shape[1], call.blocksize, call.quant_type)
        dequantize_4bit.check(call.weight, *dequantize_4bit.padded(call.absmax), *sizes)
    else:
        fits = call.weight.shape == (experts, *shape) and call.weight.dtype == x.dtype
        require(fits, lambda: f"a weight {call.weight.dtype} {tuple(call.weight.shape)} for {experts} of {shape}")
    if call.bias is not None:
        bias = call.bias
        fits = bias.shape == (experts, features) and bias.dtype == x.dtype
        require(fits, lambda: f"a bias {bias.dtype} {tuple(bias.shape)} for {experts} of {features}")
    require((call.lora_a is None) == (call.lora_b is None), lambda: "one factor of adapters without the other")
    if call.lora_a is not None and call.lora_b is not None:
        rank = call.lora_a.shape[1]
        fits = call.lora_a.shape == (experts, rank, columns) and call.lora_b.shape == (experts, features, rank)
        shapes = tuple(call.lora_a.shape), tuple(call.lora_b.shape)
        require(fits, lambda: f"A and B {shapes} for {experts} of {shape}")


def new_outputs(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Allocate empty y and products with A; raise where shapes or dtypes do not fit."""
    call = ExpertCall(*arguments)
    _check(call)
    return call.x.new_empty(call.shape), call.x.new_empty(call.rows, call.rank)


def new_gradients(grad_output: Tensor, s: Tensor, *arguments: Any) -> list[Tensor]:
    """Allocate the needed gradients, empty."""
    *fields, needed = arguments
    call = ExpertCall(*fields)
    _check(call)
    require(grad_output.shape == call.shape, lambda: f"gradient {tuple(grad_output.shape)} of y {call.shape}")
    return empty_gradients(differentiable(call), needed)


def flops(x: torch.Size, *arguments: Any) -> int:
    """Count 2 FLOPs for each row and each element of its expert's weight and adapters."""
    lora_a, order, features = arguments[3], arguments[6], arguments[9]
    rank = 0 if lora_a is None else lora_a[1]
    return 2 * order[0] * (x[-1] * features + rank * (x[-1] + features))


def flops_backward(grad_output: torch.Size, s: torch.Size, x: torch.Size, *arguments: Any) -> int:
    """Count the FLOPs of the gradient of x and, as needed, of the weights, and twice the adapters'."""
    *others, needed = arguments
    lora_a, order, features = others[3], others[6], others[9]
    rank = 0 if lora_a is None else lora_a[1]
    products = (int(needed[0] or needed[5]) + int(needed[1])) * x[-1] * features
    return 2 * order[0] * (products + 2 * rank * (x[-1] + features))


def scratch_bytes(*arguments: Any) -> int:
    """Bound the bytes of the weights in 16 bits, rows that are combined, and what kernels cannot read as it lies."""
    call = ExpertCall(*arguments)
    combined = call.rows * call.features if call.combines else 0
    return (_weight_elements(call) + combined) * call.x.element_size() + call.copied_bytes()


def scratch_bytes_backward(grad_output: Tensor, s: Tensor, *arguments: Any) -> int:
    """Bound the same of the gradients of s and of x's rows, with their dots in float32, or of rows that are summed."""
    *fields, needed = arguments
    call = ExpertCall(*fields)
    columns, size = call.x.shape[-1], call.x.element_size()
    in_place = needed[0] and not call.gathers  # the gradient of x is of rows
    dots = call.rows * (int(not needed[5]) + int(call.bias is not None)) if call.combines else 0
    products = (_weight_elements(call) + (0 if in_place else call.rows * columns)) * size + 4 * dots
    copied = 0 if is_readable(grad_output) else grad_output.numel() * size
    ones = size if needed[2] else 0
    most = max(products, call.sorted_bytes() if needed[1] else 0, ones)
    return most + call.rows * call.rank * size + copied + call.copied_bytes()


def _weight_elements(call: ExpertCall) -> int:
    return call.ends.shape[0] * call.features * call.x.shape[-1] if call.quant_type else 0


def _fill(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    _run("forward", reference, targets, arguments)


def _fill_backward(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    _run("backward", reference_backward, targets, arguments)


def _run(name: str, plain: Any, targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    """Write results by the kernels where they run, by the reference elsewhere.

    dispatch.fill takes no tensor without elements, as the products with A are where there is no adapter.
    """
    tensors = [value for value in (*targets, *arguments) if isinstance(value, Tensor)]
    device = tensors[0].device
    dtypes = dispatch.triton_dtypes(device) if dispatch.has_tensor_cores(device) else ()
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    runs = all(tensor.dtype in dtypes for tensor in floats) and targets[0].numel() > 0
    if runs and dispatch.launched(load(f"expert_plan.{name}"), tensors, targets, *arguments):
        return
    for target, result in zip(targets, plain(*arguments), strict=True):
        target.copy_(result)


def _case(
    features: int, top_k: int = 2, columns: str = "K", rank: str = "", bias: bool = False, transposed: bool = False,
    gathers: bool = False, combines: bool = False, quant_type: str = "", nested: bool = False, experts: str = "E",
) -> Case:  # fmt: skip
    """Build a case; sizes of 4-bit weights are numbers."""
    rows = f"T*{top_k}"
    shapes = {"x": f"{'T' if gathers else rows} {columns}"}
    shape = (columns, str(features)) if transposed else (str(features), columns)
    if quant_type:
        blocks = int(experts) * features * int(columns) // 64
        shapes |= {"weight": f"bytes {blocks * 32}", "absmax.0": str(-(-blocks // 256) if nested else blocks)}
        shapes |= {"absmax.1": f"bytes {blocks}", "absmax.2": "256", "absmax.3": ""} if nested else {}
    else:
        shapes["weight"] = " ".join([experts, *shape])
    shapes |= {"bias": f"{experts} {features}"} if bias else {}
    shapes |= {"lora_a": f"{experts} {rank} {columns}", "lora_b": f"{experts} {features} {rank}"} if rank else {}
    shapes |= {"top_k_weights": f"T {top_k}"} if combines else {}
    shapes |= {name: f"{name} {rows} {experts}" for name in ("order", "place", "ends")}
    return shapes, {
        "features": features, "scale": 0.5, "top_k": top_k, "transposed": transposed, "gathers": gathers,
        "blocksize": 64 if quant_type else 0, "quant_type": quant_type,
    }  # fmt: skip


_CASES = [
    _case(24, rank="R", gathers=True),
    _case(40, rank="R", combines=True),
    _case(7, bias=True, transposed=True, gathers=True, top_k=3),
    _case(33, rank="R", bias=True, transposed=True, combines=True, top_k=3),
    _case(16),
    _case(16, top_k=1, gathers=True, combines=True),
    _case(24, 2, "64", "4", gathers=True, quant_type="nf4", nested=True, experts="3"),
    _case(8, 3, "128", "17", combines=True, quant_type="nf4", experts="5"),
    _case(64, 2, "40", "3", transposed=True, gathers=True, quant_type="fp4", experts="3"),
    _case(64, 1, "64", "", quant_type="nf4", nested=True, experts="2"),
]


def _backward_case(case: Case) -> Case:
    """Add a gradient of y to a case; all tensors need a gradient, but what is in 4 bits."""
    shapes, choice = case
    rows = shapes["order"].split()[1]
    rank = shapes["lora_a"].split()[1] if "lora_a" in shapes else "0"
    lead = {"grad_output": f"{'T' if 'top_k_weights' in shapes else rows} {choice['features']}", "s": f"{rows} {rank}"}
    needed = [name in shapes and not (name == "weight" and choice["quant_type"]) for name in DIFFERENTIABLE]
    return {**lead, **shapes}, {**choice, "needed": needed}


expert_linear = define(
    "expert_linear", reference, new_outputs, _fill, cases=_CASES, flops=flops, scratch=scratch_bytes,
    gradients=DIFFERENTIABLE, statistics=("absmax",),
    alike=("x", "weight", "bias"),
)  # fmt: skip
expert_linear_backward = define(
    "expert_linear_backward", reference_backward, new_gradients, _fill_backward, flops=flops_backward,
    cases=[_backward_case(case) for case in _CASES], scratch=scratch_bytes_backward, statistics=("absmax",),
    alike=("grad_output", "s", "x", "weight", "bias"),
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    call = ExpertCall(*inputs)
    saved = call._replace(absmax=())
    ctx.tensors = [isinstance(value, Tensor) for value in saved]
    ctx.others = [None if isinstance(value, Tensor) else value for value in saved]
    ctx.save_for_backward(output[1], *call.absmax, *(value for value in saved if isinstance(value, Tensor)))
    ctx.statistics = len(call.absmax)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    s, *saved = ctx.saved_tensors
    tensors = iter(saved[ctx.statistics :])
    fields = [next(tensors) if is_tensor else value for is_tensor, value in zip(ctx.tensors, ctx.others, strict=True)]
    call = ExpertCall(*fields)._replace(absmax=saved[: ctx.statistics])
    marks = dict(zip(ExpertCall._fields, ctx.needs_input_grad, strict=True))
    needed = [bool(marks[name]) and grad_y is not None for name in DIFFERENTIABLE]
    computed = iter(expert_linear_backward(grad_y, s, *call, needed) if any(needed) else ())
    gradients = {name: next(computed) if need else None for name, need in zip(DIFFERENTIABLE, needed, strict=True)}
    statistics = [None] * ctx.statistics
    return tuple(statistics if name == "absmax" else gradients.get(name) for name in ExpertCall._fields)


expert_linear.register_autograd(_backward, setup_context=_setup_context)
