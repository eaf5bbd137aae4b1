"""Run lora_linear: choose the GEMMs, and whether the adapters join them as spare columns.

A 4-bit weight is dequantized to 16 bits into scratch for one GEMM and freed with the call; torch's caching allocator
gives the next group the same memory.  The adapters' part is either a few spare columns of that GEMM,
[x | S] [W | s B]^T forward and [dY | dS] [W ; A] backward, or it is what the GEMM's result is added to.  Spare columns
cost a copy of the GEMM's left operand, the other way a pass over its result, so the smaller of the two decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.launch_recorder import is_aligned
from fastft.kernels.core.registry import wide
from fastft.kernels.lora_group import Group
from fastft.kernels.lora_products import (
    MAX_RANK,
    ONE_PASS_RANK,
    Piece,
    operands,
    outer,
    place,
    project,
    project_and_outer,
    terms_of,
    write_spare,
)

FEW_ROWS = 8  # below which bitsandbytes' GEMM reads the 4 bits themselves; from here on it too de-quantises, on sm_90
PASS_COLUMNS = 256  # of which a pass over the gradient keeps a sum each (TILE of lora_linear_backward_triton.py)
PART_BYTES = 2**27  # of a copy of the gradient of y; products of fewer rows than that are slower
ROWS_TOGETHER = 128  # a part has a multiple of them
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


def backward_scratch(group: Group) -> int:
    """Count the bytes that backward allocates beside its results, small ones left out."""
    M, K, N = prod(group.x.shape[:-1]), group.x.shape[-1], sum(group.features)
    spare = 0 if group.inputs else spare_columns(group, N, K)
    weight = (N + spare) * K if group.quant_type else 0
    rows = torch.sym_min(M, PART_BYTES // ((N + spare) * group.x.element_size()) + ROWS_TOGETHER) if spare else M
    sums = rows * ONE_PASS_RANK * 4 * (N // PASS_COLUMNS) if group.lora_a else 0
    return (weight + (rows * (N + spare) if spare else 0)) * group.x.element_size() + sums


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
    wider = x.new_empty(x.shape[0], columns + spare) if spare else None
    _products(group, x, s, wider)
    if wider is not None:
        weight = scratch(group, spare=spare)
        place(weight[None, :, columns:], factors_b(group))
        _multiply(y, wider, weight.T, bias_of(group))
        return
    _adapters(y, s, group)
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
        _accumulate(y, x, scratch(group).T, begun)
    else:
        for sibling, part in enumerate(group.columns):
            _accumulate(y[:, part], x, group.weights[sibling].T, begun)


def _products(group: Group, x: Tensor, s: Tensor, wider: Tensor | None) -> None:
    """Write s = x A^T of all adapters, and wider = [x | s]."""
    columns, ranks = x.shape[1], s.shape[1]
    copy, spare = (None, None) if wider is None else (wider[:, :columns], wider[:, columns:])
    if len(group.inputs) > 1:
        for source, (a, _, _, _, part) in zip(map(rows, group.inputs), group.adapters, strict=True):
            terms = terms_of([(a, 0, 0, 1.0)], a.shape[0], a.shape[1], source.dtype, group.rounded)
            project(source, terms.transpose(1, 2), s[:, part])
    elif group.lora_a:
        source = rows(group.read[0])
        terms = terms_of(factors_a(group), ranks, columns, source.dtype, group.rounded).transpose(1, 2)
        together = not group.inputs
        project(source, terms, s, copy if together else None, spare if together else None)
    if group.inputs and copy is not None:
        copy.copy_(x)
        write_spare(spare, s)


def _adapters(y: Tensor, s: Tensor, group: Group) -> None:
    """Write what the weights' products are added to, y = bias + s B^T; write nothing if there is neither."""
    bias = bias_of(group)
    if bias is not None:
        y.copy_(bias.expand_as(y))
    elif group.lora_a and len(set(group.adapted)) < len(group.features):
        y.zero_()
    begun = set(range(len(group.features))) if bias is not None else set()
    for (_, b, scale, part, ranks), sibling in zip(group.adapters, group.adapted, strict=True):
        safe = s.dtype if overflows(group, b, y.dtype) else y.dtype
        product = operands(
            s[:, ranks], [(b, 0, 0, scale)], b.shape[0], safe, rounded=group.rounded, transposed=True
        )  # fmt: skip
        if safe == y.dtype:
            _accumulate(y[:, part], *product, sibling in begun)
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


def _accumulate(out: Tensor, left: Tensor, right: Tensor, begun: bool) -> None:
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


def backward(targets: Sequence[Tensor], grad_output: Tensor, s: Tensor, group: Group, needed: Sequence[bool]) -> None:
    """Fill the needed gradients."""
    remaining = iter(targets)
    lists = (1, len(group.weights), len(group.biases), len(group.lora_a), len(group.lora_b), len(group.inputs))
    marks = iter(needed)
    dx, dweights, dbiases, das, dbs, dinputs = (
        [next(remaining) if next(marks) else None for _ in range(length)] for length in lists
    )
    if rows(grad_output).shape[0] == 0:
        for target in targets:
            target.zero_()
        return
    grad, x, s = rows(grad_output), rows(group.x), rows(s)
    ds = s.new_empty(s.shape)
    if dx[0] is not None:
        _input_gradient(rows(dx[0]), grad, s, ds, dbs, group)
    elif any(gradient is not None for gradient in (*das, *dinputs)):
        _adapter_gradients(grad, s, ds, dbs, group)
    else:
        _second_factors(dbs, grad, s, group)
    _first_factors(das, ds, group)
    if len(dinputs) == 1 and dinputs[0] is not None:
        rows(dinputs[0]).copy_(_times_a(ds, group))
    elif len(dinputs) > 1:
        for (a, b, _, _, ranks), dinput in zip(group.adapters, dinputs, strict=True):
            if dinput is not None:
                dtype = group.adapter_dtype(a, b)
                rows(dinput).copy_(ds[:, ranks].to(dtype) @ a.to(dtype))
    for sibling, part in enumerate(group.columns):
        if (dweight := dweights[sibling]) is not None:
            torch.mm(grad[:, part].to(x.dtype).T, x, out=dweight)
    for sibling, dbias in zip(group.biased, dbiases, strict=True):
        if dbias is not None:
            dbias.copy_(torch.sum(grad[:, group.columns[sibling]], 0))


def _adapter_gradients(
    grad: Tensor, s: Tensor, ds: Tensor, dbs: Sequence[Tensor | None], group: Group, wider: Tensor | None = None
) -> None:
    """Write ds = s_j dY B and dB = s_j dY^T S of each adapter, and wider = [dY | ds], reading dY once if possible."""
    n, ranks = grad.shape[1], ds.shape[1]
    if ranks == 0:
        return
    copy, spare = (None, None) if wider is None else (wider[:, :n], wider[:, n:])
    own = dict(zip(group.adapted, group.ranks, strict=True))
    if len(own) == len(group.adapted):  # no sibling has two
        factors = [(b, part.start, 0, scale) for _, b, scale, part, _ in group.adapters]
        targets = [(db, row, 0, scale) for db, (_, row, _, scale) in zip(dbs, factors, strict=True) if db is not None]
        of_sibling = [own.get(sibling, slice(0, 0)) for sibling in range(len(group.features))]
        if project_and_outer(grad, s, ds, factors, targets, group.columns, of_sibling, copy, spare, group.rounded):
            return
    _project_gradient(grad, ds, group, copy, spare)
    _second_factors(dbs, grad, s, group)


def _project_gradient(grad: Tensor, ds: Tensor, group: Group, copy: Tensor | None, spare: Tensor | None) -> None:
    """Write ds = s_j dY B of each adapter, copy = dY and spare = [ds | 0]."""
    n, ranks = grad.shape[1], ds.shape[1]
    if ranks <= MAX_RANK:
        project(grad, terms_of(factors_b(group), n, ranks, grad.dtype, group.rounded), ds, copy, spare)
        return
    for _, b, scale, part, own in group.adapters:  # in one matrix most of it would be zeros
        terms = terms_of([(b, 0, 0, scale)], b.shape[0], b.shape[1], grad.dtype, group.rounded)
        project(grad[:, part], terms, ds[:, own])
    if copy is not None:
        copy.copy_(grad)
    write_spare(spare, ds)


def _second_factors(dbs: Sequence[Tensor | None], grad: Tensor, s: Tensor, group: Group) -> None:
    """Write dB = s_j dY^T S, in one pass over dY if the ranks are few."""
    needed = [(db, *adapter) for db, adapter in zip(dbs, group.adapters, strict=True) if db is not None]
    if s.shape[1] <= MAX_RANK:
        pieces = [(db, part.start, ranks.start, scale) for db, _, _, scale, part, ranks in needed]
        outer(grad, s, pieces, rounded=group.rounded)
        return
    for db, _, _, scale, part, ranks in needed:
        outer(grad[:, part], s[:, ranks], [(db, 0, 0, scale)], rounded=group.rounded)


def _first_factors(das: Sequence[Tensor | None], ds: Tensor, group: Group) -> None:
    """Write dA = ds^T x_j; adapters that read the same x share a pass over it."""
    needed = [
        (da, source, ranks) for da, source, ranks in zip(das, group.read, group.ranks, strict=True) if da is not None
    ]
    if len(group.inputs) > 1:
        for da, source, ranks in needed:
            outer(rows(source), ds[:, ranks], [(da, 0, 0, 1.0)], rounded=group.rounded, transposed=True)
    elif needed:
        pieces = [(da, ranks.start, 0, 1.0) for da, _, ranks in needed]
        outer(rows(group.read[0]), ds, pieces, rounded=group.rounded, transposed=True)


def _input_gradient(
    dx: Tensor, grad: Tensor, s: Tensor, ds: Tensor, dbs: Sequence[Tensor | None], group: Group
) -> None:
    """Write dx = dY W + ds A (ds A only where the adapters read x itself), and ds and dB."""
    n, columns = grad.shape[1], dx.shape[1]
    spare = 0 if group.inputs else spare_columns(group, n, columns)
    if spare:
        _input_gradient_by_parts(dx, grad, s, ds, dbs, group, spare)
        return
    _adapter_gradients(grad, s, ds, dbs, group)
    begun = len(group.lora_a) > 0 and not group.inputs
    if begun and not any(overflows(group, a, dx.dtype) for a in group.lora_a):
        torch.mm(*operands(ds, factors_a(group), columns, dx.dtype, rounded=group.rounded), out=dx)
    elif begun:
        dx.copy_(_times_a(ds, group))
    grad = grad.to(dx.dtype)
    if group.quant_type:
        _accumulate(dx, grad, scratch(group), begun)
        return
    for sibling, part in enumerate(group.columns):
        _accumulate(dx, grad[:, part], group.weights[sibling], begun or sibling > 0)


def _input_gradient_by_parts(
    dx: Tensor, grad: Tensor, s: Tensor, ds: Tensor, dbs: Sequence[Tensor | None], group: Group, spare: int
) -> None:
    """Write dx = [dY | ds] [W ; A], ds and dB, some rows at a time: a copy of dY would be as large as dY."""
    M, n = grad.shape
    size = _rows_of_a_part(M, n, spare, grad.element_size())
    count = int(cdiv(M, size))
    size = M if count == 1 else size
    weight, wider = scratch(group, rows_below=spare), grad.new_empty(size, n + spare)
    place(weight[None, n:], factors_a(group))
    totals = dbs if count == 1 else [None if db is None else torch.zeros_like(db, dtype=wide(db.dtype)) for db in dbs]
    for number in range(count):
        part = slice(number * size, M if number == count - 1 else (number + 1) * size)
        own = dbs if totals is dbs else [None if total is None else torch.empty_like(total) for total in totals]
        beside = wider[: part.stop - part.start]
        _adapter_gradients(grad[part], s[part], ds[part], own, group, beside)
        torch.mm(beside, weight, out=dx[part])
        for total, more in zip(totals, own, strict=True) if totals is not dbs else ():
            if total is not None and more is not None:
                total.add_(more)
    for db, total in zip(dbs, totals, strict=True) if totals is not dbs else ():
        if db is not None and total is not None:
            db.copy_(total)


def _rows_of_a_part(M: int, n: int, spare: int, itemsize: int) -> int:
    """Return the rows of a part: parts of one size but for the last, of about PART_BYTES at the most."""
    count = cdiv(M * (n + spare) * itemsize, PART_BYTES)
    return cdiv(cdiv(M, count), ROWS_TOGETHER) * ROWS_TOGETHER


def _times_a(ds: Tensor, group: Group) -> Tensor:
    """Return ds A of all adapters, in ds's dtype."""
    factors = [a.to(group.x.dtype) if group.rounded else a for a in group.lora_a]
    return ds @ torch.cat([a.to(ds.dtype) for a in factors])
