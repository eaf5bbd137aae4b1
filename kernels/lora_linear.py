"""Projections of one input, side by side, with their adapters:  y_i = x W_i^T + bias_i + sum_j s_j (x_j A_j^T) B_j^T.

Sources: Hu et al., LoRA, 2021, arXiv:2106.09685; Dettmers et al., QLoRA, 2023, arXiv:2305.14314.

A group has n siblings, such as the queries', the keys' and the values' projections.  x [..., K]; y [..., N] has their
results beside each other, N the sum of features.  The arguments, which are the fields of Group:

x: [..., K], floating point.
weights: n of [features[i], K] in x's dtype; or, with a quant_type, packed as dequantize_4bit takes them.
absmax: of 4-bit weights, one for each; for nested quantisation also absmax_8bit, absmax_code and absmax_offset.
biases: [features[biased[i]]] in x's dtype, for the siblings that biased names.
lora_a, lora_b: A [r, K] and B [features[adapted[j]], r] of adapter j, of any floating-point dtype and any rank; it
    belongs to the sibling adapted[j] and is scaled by scales[j].
inputs: what the adapters read, if that is not x: one [..., K] for all of them (x before it was cast), or one for each
    (with dropout).
blocksize, quant_type: of 4-bit weights, "" for others.
widened: y is float32 (float64 beside float64), as adapters in float32 add to a float32 residual stream.
rounded: adapters count as rounded to x's dtype, as under autocast; their gradients keep their own.

Otherwise y has x's dtype; products are summed in float32 at least.  The second result, x_j A_j^T of all adapters beside
each other [..., sum of r], float32, is for backward.  No weight is kept in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastft.kernels import dequantize_4bit
from fastft.kernels.core.registry import Case, define, empty_gradients, parameter_of, require, wide
from fastft.kernels.lora_group import Group


def reference(
    x: Tensor, weights: Sequence[Tensor], absmax: Sequence[Tensor], absmax_8bit: Sequence[Tensor],
    absmax_code: Sequence[Tensor], absmax_offset: Sequence[Tensor], biases: Sequence[Tensor],
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], inputs: Sequence[Tensor], features: Sequence[int],
    biased: Sequence[int], adapted: Sequence[int], scales: Sequence[float], blocksize: int, quant_type: str,
    widened: bool, rounded: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute both results in plain PyTorch, as PEFT writes it: adapters compute in their own dtype."""
    group = Group(
        x, weights, absmax, absmax_8bit, absmax_code, absmax_offset, biases, lora_a, lora_b, inputs, features, biased,
        adapted, scales, blocksize, quant_type, widened, rounded,
    )  # fmt: skip
    results = [F.linear(x, group.weight(index), group.bias(index)) for index in range(len(features))]
    products = [x.new_empty(*x.shape[:-1], 0, dtype=wide(x.dtype))]
    for source, sibling, a, b, scale in zip(group.read, adapted, lora_a, lora_b, scales, strict=True):
        dtype = group.adapter_dtype(a, b)
        product = F.linear(source.to(dtype), a.to(dtype))
        results[sibling] = results[sibling] + F.linear(product, b.to(dtype)) * scale
        products.append(product.to(products[0].dtype))
    dtype = wide(x.dtype) if widened else x.dtype
    return torch.cat([result.to(dtype) for result in results], -1), torch.cat(products, -1)


def reference_backward(
    grad_output: Tensor, s: Tensor, x: Tensor, weights: Sequence[Tensor], absmax: Sequence[Tensor],
    absmax_8bit: Sequence[Tensor], absmax_code: Sequence[Tensor], absmax_offset: Sequence[Tensor],
    biases: Sequence[Tensor], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], inputs: Sequence[Tensor],
    features: Sequence[int], biased: Sequence[int], adapted: Sequence[int], scales: Sequence[float], blocksize: int,
    quant_type: str, widened: bool, rounded: bool, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Compute the needed gradients in plain PyTorch, in the order of differentiable(); s: the second result."""
    group = Group(
        x, weights, absmax, absmax_8bit, absmax_code, absmax_offset, biases, lora_a, lora_b, inputs, features, biased,
        adapted, scales, blocksize, quant_type, widened, rounded,
    )  # fmt: skip
    rows = lambda tensor: tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])  # noqa: E731
    grads = [rows(grad_output[..., columns]) for columns in group.columns]
    dx = sum(grad.to(x.dtype) @ group.weight(index) for index, grad in enumerate(grads))
    das, dbs, dinputs = [], [], []
    for source, (a, b, scale, columns, ranks) in zip(group.read, group.adapters, strict=True):
        dtype = group.adapter_dtype(a, b)
        grad, source_rows = rows(grad_output[..., columns]).to(dtype) * scale, rows(source)
        ds = grad @ b.to(dtype)
        das.append((ds.T @ source_rows.to(dtype)).to(a.dtype))
        dbs.append((grad.T @ rows(s[..., ranks]).to(dtype)).to(b.dtype))
        dinput = ds @ a.to(dtype)
        dinputs += [dinput.to(source_rows.dtype)] if inputs else []
        dx = dx if inputs else dx + dinput.to(x.dtype)
    dinputs = dinputs if len(dinputs) == len(inputs) else [sum(dinputs)]
    dweights = [grad.to(x.dtype).T @ rows(x) for grad in grads] if not quant_type else [x.new_empty(0)] * len(weights)
    dbiases = [grads[index].sum(0, dtype=bias.dtype) for index, bias in zip(biased, biases, strict=True)]
    gradients = [dx, *dweights, *dbiases, *das, *dbs, *dinputs]
    tensors = differentiable(group)
    return [
        gradient.reshape(like.shape) for gradient, like, need in zip(gradients, tensors, needed, strict=True) if need
    ]


def differentiable(group: Group) -> list[Tensor]:
    """List the tensors that may need a gradient."""
    return [group.x, *group.weights, *group.biases, *group.lora_a, *group.lora_b, *group.inputs]


def _check(group: Group) -> None:
    x, n, K = group.x, len(group.features), group.x.shape[-1]
    require(x.dim() > 0 and x.is_floating_point(), lambda: f"x {x.dtype} of {x.dim()} dimensions")
    require(len(group.weights) == n > 0, lambda: f"{len(group.weights)} weights for {n} siblings")
    if group.quant_type:
        nested = (group.absmax_8bit, group.absmax_code, group.absmax_offset)
        complete = len(group.absmax) == n and {len(statistics) for statistics in nested} in ({0}, {n})
        require(
            complete,
            lambda: f"{len(group.absmax)} and {[len(statistics) for statistics in nested]} statistics of {n} weights",
        )
        for sibling in range(n):
            sizes: Any = (group.features[sibling], K, group.blocksize, group.quant_type)
            dequantize_4bit.check(group.weights[sibling], *dequantize_4bit.padded(group.statistics_of(sibling)), *sizes)
    require(len(group.biases) == len(group.biased), lambda: f"{len(group.biases)} biases of {group.biased}")
    for sibling in range(n):
        _check_sibling(group, sibling)
    for a, b, _, columns, _ in group.adapters:
        _check_factors(a, b, K, columns.stop - columns.start)
    require(not (group.rounded and group.widened), lambda: "adapters that are rounded to x's dtype widen nothing")
    counts = (0, min(1, len(group.lora_a)), len(group.lora_a))
    require(len(group.inputs) in counts, lambda: f"{len(group.inputs)} inputs of adapters")
    require(all(tensor.shape == x.shape for tensor in group.inputs), lambda: "an adapter's input has another shape")


def _check_sibling(group: Group, sibling: int) -> None:
    """Raise where a weight that is not packed, or a bias, does not fit."""
    dtype, shape, bias = group.x.dtype, (group.features[sibling], group.x.shape[-1]), group.bias(sibling)
    weight = group.weights[sibling]
    fits = bool(group.quant_type) or (weight.shape == shape and weight.dtype == dtype)
    require(fits, lambda: f"a weight {weight.dtype} {tuple(weight.shape)} for {shape}, {dtype}")
    if bias is not None:
        fits = bias.shape == shape[:1] and bias.dtype == dtype
        require(fits, lambda: f"a bias {bias.dtype} {tuple(bias.shape)} for {shape[0]} {dtype}")


def _check_factors(a: Tensor, b: Tensor, columns: int, rows: int) -> None:
    fits = a.shape == (a.shape[0], columns) and b.shape == (rows, a.shape[0])
    require(fits, lambda: f"A {tuple(a.shape)} and B {tuple(b.shape)} between {columns} and {rows} features")


def new_outputs(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Allocate empty y and products with A; raise where shapes or dtypes do not fit."""
    group = Group(*arguments)
    _check(group)
    rank = sum(a.shape[0] for a in group.lora_a)
    dtype = wide(group.x.dtype)
    y = group.x.new_empty(group.shape, dtype=dtype if group.widened else group.x.dtype)
    return y, group.x.new_empty(*group.x.shape[:-1], rank, dtype=dtype)


def new_gradients(grad_output: Tensor, s: Tensor, *arguments: Any) -> list[Tensor]:
    """Allocate the needed gradients, empty."""
    *fields, needed = arguments
    group = Group(*fields)
    _check(group)
    require(grad_output.shape == group.shape, lambda: f"gradient {tuple(grad_output.shape)} of y {group.shape}")
    return empty_gradients(differentiable(group), needed)


def flops(x: torch.Size, *arguments: Any) -> int:
    """Count 2 FLOPs a row for each element of a weight or an adapter."""
    lora_a, lora_b, features = arguments[6], arguments[7], arguments[9]
    return 2 * prod(x[:-1]) * (x[-1] * sum(features) + sum(prod(factor) for factor in (*lora_a, *lora_b)))


def flops_backward(grad_output: torch.Size, s: torch.Size, x: torch.Size, *arguments: Any) -> int:
    """Count the FLOPs of the gradient of x and of those of the weights, as needed, and twice the adapters'."""
    weights, lora_a, lora_b, features = arguments[0], arguments[6], arguments[7], arguments[9]
    products = int(arguments[-1][0]) + int(any(arguments[-1][1 : 1 + len(weights)]))
    adapters = sum(prod(factor) for factor in (*lora_a, *lora_b))
    return 2 * prod(x[:-1]) * (products * x[-1] * sum(features) + 2 * adapters)


def scratch_bytes(*arguments: Any) -> int:
    """Count the bytes of the weight in 16 bits, and of what lies beside x (lora_plan.forward)."""
    from fastft.kernels import lora_plan

    return lora_plan.forward_scratch(Group(*arguments))


def scratch_bytes_backward(grad_output: Tensor, s: Tensor, *arguments: Any) -> int:
    """Count the bytes of the weight in 16 bits, of what lies beside grad_output, and of parts of sums over it.

    See lora_backward_plan.backward.
    """
    from fastft.kernels import lora_backward_plan

    return lora_backward_plan.backward_scratch(Group(*arguments[:-1]))


def _fill(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    from fastft.kernels import lora_plan

    lora_plan.forward(targets, Group(*arguments))


def _fill_backward(targets: Sequence[Tensor], arguments: Sequence[Any]) -> None:
    from fastft.kernels import lora_backward_plan

    grad_output, s, *fields, needed = arguments
    lora_backward_plan.backward(targets, grad_output, s, Group(*fields), needed)


def _plain(
    features: str, biased: Sequence[int], adapters: Sequence[tuple[int, str]], inputs: int = 0, widened: bool = False,
    rounded: bool = False,
) -> Case:  # fmt: skip
    """Build a case of weights that are not quantised.

    features: names; adapters: their siblings, and names of their ranks; inputs: how many there are.
    """
    names = features.split()
    shapes = {"x": "... K"}
    shapes |= {f"weights.{index}": f"{name} K" for index, name in enumerate(names)}
    shapes |= {f"biases.{index}": names[sibling] for index, sibling in enumerate(biased)}
    shapes |= {f"lora_a.{index}": f"{rank} K" for index, (_, rank) in enumerate(adapters)}
    shapes |= {f"lora_b.{index}": f"{names[sibling]} {rank}" for index, (sibling, rank) in enumerate(adapters)}
    shapes |= {f"inputs.{index}": "... K" for index in range(inputs)}
    return shapes, {
        "features": names, "biased": list(biased), "adapted": [sibling for sibling, _ in adapters],
        "scales": [0.5, 2.0, 1.0, 0.25][: len(adapters)], "blocksize": 0, "quant_type": "", "widened": widened,
        "rounded": rounded,
    }  # fmt: skip


def _four_bit(
    features: Sequence[int], columns: int, adapters: Sequence[tuple[int, int]], blocksize: int, quant_type: str,
    nested: bool = False, inputs: int = 0, widened: bool = False, rounded: bool = False,
) -> Case:  # fmt: skip
    """Build a case of 4-bit weights, whose sizes are numbers.  adapters: their siblings and ranks."""
    ranks = [(sibling, str(rank)) for sibling, rank in adapters]
    shapes, choice = _plain(" ".join(map(str, features)), (), ranks, inputs, widened, rounded)
    shapes = {name: spec.replace("K", str(columns)) for name, spec in shapes.items() if "weights" not in name}
    for index, size in enumerate(features):
        blocks = -(-size * columns // blocksize)
        shapes[f"weights.{index}"] = f"bytes {-(-size * columns // 2)}"
        shapes[f"absmax.{index}"] = str(-(-blocks // 256) if nested else blocks)
        more = {"absmax_8bit": f"bytes {blocks}", "absmax_code": "256", "absmax_offset": ""} if nested else {}
        shapes |= {f"{name}.{index}": spec for name, spec in more.items()}
    return shapes, {**choice, "features": list(features), "blocksize": blocksize, "quant_type": quant_type}


_CASES = [
    _plain("N", (), [(0, "R")]),
    _plain("N P 2", (0, 2), [(0, "R"), (1, "Q"), (2, "R")]),
    _plain("N P", (1,), [(0, "R"), (0, "Q")]),
    _plain("N P", (), [(0, "R"), (1, "Q")], inputs=2),
    _plain("N P", (1,), [(0, "R"), (1, "Q")], inputs=1, widened=True),
    _plain("N P", (0,), []),
    _plain("N P", (1,), [(0, "R"), (1, "Q")], rounded=True),
    _plain("N P", (), [(0, "R"), (1, "Q")], inputs=2, rounded=True),
    _four_bit((24, 8, 8), 64, [(0, 4), (1, 4), (2, 4)], 64, "nf4", nested=True),
    _four_bit((64, 7), 52, [(1, 9)], 64, "nf4"),
    _four_bit((8,), 128, [], 64, "fp4"),
    _four_bit((16,), 64, [(0, 3)], 128, "nf4", nested=True),
    _four_bit((8, 72), 64, [(0, 3), (1, 17)], 64, "fp4", nested=True),
    _four_bit((24, 8, 8), 64, [(0, 4), (2, 4)], 64, "nf4", inputs=1, widened=True),
    _four_bit((24, 8, 8), 64, [(0, 4), (1, 4), (2, 4)], 64, "nf4", nested=True, rounded=True),
    _four_bit((8, 72), 64, [(0, 3), (1, 17)], 64, "fp4", inputs=1, rounded=True),
]


def _backward_case(case: Case, plain: bool) -> Case:
    """Add a gradient of y to a case; all tensors need a gradient if plain, otherwise x and the adapters alone."""
    shapes, choice = case
    ranks = [spec.split()[0] for name, spec in shapes.items() if name.startswith("lora_a")]
    lead = {"grad_output": "... " + "+".join(map(str, choice["features"])), "s": "... " + ("+".join(ranks) or "0")}
    lists = ("x", "weights", "biases", "lora_a", "lora_b", "inputs")
    names = [name for parameter in lists for name in shapes if parameter_of(name) == parameter]
    needed = [plain or parameter_of(name) not in ("weights", "biases") for name in names]
    return {**lead, **shapes}, {**choice, "needed": needed}


_STATISTICS: dict[str, Any] = {
    "statistics": ("s", "absmax", "absmax_code", "absmax_offset"),
    "alike": ("grad_output", "x", "weights", "biases"),
}  # fmt: skip
lora_linear = define(
    "lora_linear", reference, new_outputs, _fill, cases=_CASES, flops=flops, scratch=scratch_bytes,
    gradients=("x", "weights", "biases", "lora_a", "lora_b", "inputs"), **_STATISTICS,
)  # fmt: skip
lora_linear_backward = define(
    "lora_linear_backward", reference_backward, new_gradients, _fill_backward, flops=flops_backward,
    cases=[_backward_case(case, not case[1]["quant_type"]) for case in _CASES], scratch=scratch_bytes_backward,
    **_STATISTICS,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    group = Group(*inputs)
    ctx.lengths = [
        len(value) if isinstance(value, (list, tuple)) else None for value in group[: group._fields.index("features")]
    ]
    ctx.others = inputs[len(ctx.lengths) :]
    ctx.save_for_backward(
        output[1],
        *(t for value in inputs[: len(ctx.lengths)] for t in ([value] if isinstance(value, Tensor) else value)),
    )
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    s, *saved = ctx.saved_tensors
    fields, first = [], 0
    for length in ctx.lengths:
        fields.append(saved[first] if length is None else saved[first : first + length])
        first += 1 if length is None else length
    group = Group(*fields, *ctx.others)
    marks = dict(zip(Group._fields, ctx.needs_input_grad, strict=True))
    lists = ("x", "weights", "biases", "lora_a", "lora_b", "inputs")
    by_list = {name: [marks[name]] if name == "x" else list(marks[name] or []) for name in lists}
    needed = [bool(need) and grad_y is not None for name in lists for need in by_list[name]]
    computed = iter(lora_linear_backward(grad_y, s, *group, needed) if any(needed) else ())
    flags = iter(needed)
    gradients = {name: [next(computed) if next(flags) else None for _ in by_list[name]] for name in lists}
    return tuple(
        gradients["x"][0] if name == "x" else gradients.get(name, _no_gradient(value, number < len(ctx.lengths)))
        for number, (name, value) in enumerate(zip(Group._fields, group, strict=True))
    )


def _no_gradient(value: Any, tensors: bool) -> Any:
    """Return a None for each tensor of a list, as torch expects, which takes an empty list of numbers for one too."""
    is_list = isinstance(value, (list, tuple)) and (tensors or not value)
    return [None] * len(value) if is_list else None


lora_linear.register_autograd(_backward, setup_context=_setup_context)
