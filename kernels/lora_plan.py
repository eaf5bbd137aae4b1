"""Run lora_linear: choose the GEMMs, and whether the adapters join them as spare columns.

A 4-bit weight is dequantized to 16 bits into scratch for one GEMM and freed with the call; torch's caching allocator
gives the next group the same memory.  The adapters' part is either a few spare columns of that GEMM,
[x | S] [W | s B]^T forward and [dY | dS] [W ; A] backward, or it is what the GEMM's result is added to.  Spare columns
cost a copy of the GEMM's left operand, the other way a pass over its result, so the smaller of the two decides.

The small matrices that a call multiplies by are allocated first, and placed by one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastft.kernels.core.launch_recorder import is_aligned
from fastft.kernels.lora_group import Group
from fastft.kernels.lora_products import (
    Matrix,
    Piece,
    by_terms,
    operand,
    operands,
    place,
    project,
    terms_of,
    write_spare,
)

FEW_ROWS = 8  # below which bitsandbytes' GEMM reads the 4 bits themselves; from here on it too de-quantises, on sm_90
ALIGNED = 64  # spare columns come in such numbers: rows of 128 bytes, and a GEMM's steps along K


def rows(tensor: Tensor) -> Tensor:
    """Reshape [..., D] to [M, D]."""
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def spare_columns(group: Group, wider: int, narrower: int) -> int:
    """Return how many spare columns the GEMM gets: 0 if adapters are better added, or would overflow its dtype.

    wider: columns of the left operand, which is copied; narrower: of the result, which would be read and written again.
    An adapter whose own products overflow all the same makes its siblings NaN too, through the zeros beside it.  Its
    own results are infinite then, so the loss is not finite either way, and a scaler leaves that step out.
    """
    ranks = sum(a.shape[0] for a in group.lora_a)
    overflow = any(overflows(group, factor, group.x.dtype) for factor in (*group.lora_a, *group.lora_b))
    if not group.quant_type or ranks == 0 or overflow or group.widened or wider >= 2 * narrower:
        return 0
    return -(-ranks // ALIGNED) * ALIGNED


def overflows(group: Group, adapter: Tensor, dtype: torch.dtype) -> bool:
    """Return whether an adapter's products may overflow the activations' dtype: float16 has few exponents."""
    return dtype == torch.float16 and adapter.dtype != torch.float16 and not group.rounded


def scratch(group: Group, rows_below: int = 0, spare: int = 0) -> Tensor:
    """Dequantize all siblings' weights, one below the other, in x's dtype, into a new larger tensor."""
    n, columns = sum(group.features), group.x.shape[-1]
    weight = group.x.new_empty(n + rows_below, columns + spare)
    group.weights_into(weight[:n, :columns])
    return weight


def forward_scratch(group: Group) -> int:
    """Count the bytes that forward allocates beside its results, small ones left out."""
    M, K, N = prod(group.x.shape[:-1]), group.x.shape[-1], sum(group.features)
    spare = spare_columns(group, K, N)
    weight = N * (K + spare) if group.quant_type else 0
    return (weight + (M * (K + spare) if spare else 0)) * group.x.element_size()


def factors_a(group: Group) -> list[Piece]:
    """List all A, one below the other: [ranks, K]."""
    return [(a, ranks.start, 0, 1.0) for a, _, _, _, ranks in group.adapters]


def factors_b(group: Group) -> list[Piece]:
    """List all B, scaled, each in its sibling's rows and its own columns: [N, ranks]."""
    return [(b, part.start, ranks.start, scale) for _, b, scale, part, ranks in group.adapters]


def bias_of(group: Group) -> Tensor | None:
    """Concatenate the biases of all siblings, zero for those without; return None if there are none."""
    if not group.biases:
        return None
    bias = group.x.new_zeros(sum(group.features))
    for sibling, value in zip(group.biased, group.biases, strict=True):
        bias[group.columns[sibling]] = value
    return bias


def forward(targets: Sequence[Tensor], group: Group) -> None:
    """Fill y and the products with A."""
    y, s, x = rows(targets[0]), rows(targets[1]), rows(group.x)
    if y.shape[0] == 0:
        return
    columns, spare = x.shape[1], 0 if _fused(group, x) else spare_columns(group, x.shape[1], y.shape[1])
    matrices: list[Matrix] = []
    terms = _terms_of_a(group, matrices)
    if spare:
        weight, wider = scratch(group, spare=spare), x.new_empty(x.shape[0], columns + spare)
        place([*matrices, (weight[None, :, columns:], factors_b(group))])
        _products(group, x, s, terms, wider[:, :columns], wider[:, columns:])
        _multiply(y, wider, weight.T, bias_of(group))
        return
    second = _operands_of_b(group, y.dtype, matrices)
    place(matrices)
    lower = y.dtype == x.dtype != s.dtype and len(second) > 0 and all(right is not None for right in second)
    low = x.new_empty(s.shape) if lower else None
    _products(group, x, s, terms, None, low)
    _adapters(y, s, low, second, group)
    begun = len(group.lora_a) > 0 or len(group.biases) > 0
    if y.dtype == x.dtype:
        _base(y, x, group, begun)
        return
    product = x.new_empty(y.shape)
    _base(product, x, group, begun=False)
    if begun:
        y.add_(product)
    else:
        y.copy_(product)


def _base(y: Tensor, x: Tensor, group: Group, begun: bool) -> None:
    """Write the weights' products into y, or add them if begun."""
    if _fused(group, x):
        _few_rows(y, x, group, begun)
    elif group.quant_type:
        accumulate(y, x, scratch(group).T, begun)
    else:
        for sibling, part in enumerate(group.columns):
            accumulate(y[:, part], x, group.weights[sibling].T, begun)


def _terms_of_a(group: Group, matrices: list[Matrix]) -> list[Tensor]:
    """Allocate what the adapters' inputs are multiplied by: A^T of all adapters together, or of each."""
    if len(group.inputs) > 1:
        every = [([(a, 0, 0, 1.0)], a.shape[0], source) for a, source in zip(group.lora_a, group.inputs, strict=True)]
    else:
        every = [(factors_a(group), sum(a.shape[0] for a in group.lora_a), group.read[0])] if group.lora_a else []
    terms = [
        terms_of(pieces, ranks, group.x.shape[-1], source.dtype, matrices, group.rounded_beside(source))
        for pieces, ranks, source in every
    ]
    return [one.transpose(1, 2) for one in terms]


def _operands_of_b(group: Group, dtype: torch.dtype, matrices: list[Matrix]) -> list[Tensor | None]:
    """Allocate s_j B_j^T of each adapter for a GEMM in y's dtype; None where that takes more than one product."""

    def of(b: Tensor, scale: float) -> Tensor | None:
        pieces, rank = [(b, 0, 0, scale)], b.shape[1]
        if overflows(group, b, dtype) or (by_terms(rank, pieces, dtype) and not group.rounded):
            return None
        return operand(pieces, rank, b.shape[0], dtype, matrices, transposed=True)

    return [of(b, scale) for b, scale in zip(group.lora_b, group.scales, strict=True)]


def _products(
    group: Group, x: Tensor, s: Tensor, terms: Sequence[Tensor], copy: Tensor | None, spare: Tensor | None
) -> None:  # fmt: skip
    """Write s = x A^T of all adapters, copy = x and spare = [s | 0]."""
    if len(group.inputs) > 1:
        for source, one, part in zip(map(rows, group.inputs), terms, group.ranks, strict=True):
            project(source, one, s[:, part])
        write_spare(spare, s)
    elif terms:
        project(rows(group.read[0]), terms[0], s, None if group.inputs else copy, spare)
    if group.inputs and copy is not None:
        copy.copy_(x)


def _adapters(y: Tensor, s: Tensor, low: Tensor | None, second: Sequence[Tensor | None], group: Group) -> None:
    """Write what the weights' products are added to, y = bias + s B^T; write nothing if there is neither.

    low: s in y's dtype, if that was written.  second: s_j B_j^T, as _operands_of_b gives them.
    """
    bias = bias_of(group)
    if bias is not None:
        y.copy_(bias.expand_as(y))
    elif group.lora_a and len(set(group.adapted)) < len(group.features):
        y.zero_()
    begun = set(range(len(group.features))) if bias is not None else set()
    for (_, b, scale, part, ranks), sibling, right in zip(group.adapters, group.adapted, second, strict=True):
        safe = s.dtype if overflows(group, b, y.dtype) else y.dtype
        if right is not None:
            product = (s if low is None else low)[:, ranks].to(safe), right
        else:
            product = operands(s[:, ranks], [(b, 0, 0, scale)], b.shape[0], safe, transposed=True)
        if safe == y.dtype:
            accumulate(y[:, part], *product, sibling in begun)
        elif sibling in begun:
            y[:, part] += torch.mm(*product)
        else:
            y[:, part] = torch.mm(*product)
        begun.add(sibling)


def _multiply(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def accumulate(out: Tensor, left: Tensor, right: Tensor, begun: bool) -> None:
    """Add left right to out if begun, otherwise write it."""
    if begun:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def _fused(group: Group, x: Tensor) -> bool:
    """Return whether bitsandbytes' own GEMM takes this call: for few rows on a GPU."""
    few = group.quant_type != "" and x.is_cuda and x.shape[0] < FEW_ROWS
    takes = few and x.dtype in (torch.float16, torch.bfloat16, torch.float32) and x.shape[1] % group.blocksize == 0
    return takes and hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def _few_rows(y: Tensor, x: Tensor, group: Group, begun: bool) -> None:
    x = _dense_at_16_bytes(x)
    for sibling, part in enumerate(group.columns):
        absmax, *nested = map(_dense_at_16_bytes, group.statistics_of(sibling))
        names = ("absmax_8bit", "absmax_code", "absmax_offset")
        packed = _dense_at_16_bytes(group.weights[sibling]).view(torch.uint8).view(-1, 1)  # whatever it is stored as
        product = torch.ops.bitsandbytes.gemm_4bit(
            x, packed, [group.features[sibling], x.shape[1]], absmax, group.blocksize, group.quant_type, None,
            **dict(zip(names, nested, strict=False)),
        )  # fmt: skip
        y[:, part] = y[:, part] + product if begun else product


def _dense_at_16_bytes(tensor: Tensor) -> Tensor:
    """Return the tensor or a dense copy aligned to 16 bytes, as many as bitsandbytes' GEMM reads at once anywhere."""
    dense = tensor.contiguous()
    return dense if is_aligned(dense) else dense.clone()
