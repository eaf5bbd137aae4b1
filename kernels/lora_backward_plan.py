"""Run lora_linear's backward: its GEMMs, and what the adapters need of the gradient of y in one pass over it.

See lora_plan.py for spare columns.  What is summed in parts is added up at the end, by one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastft.kernels.core.arith import cdiv
from fastft.kernels.core.registry import wide
from fastft.kernels.lora_group import Group
from fastft.kernels.lora_plan import accumulate, factors_a, factors_b, overflows, rows, scratch, spare_columns
from fastft.kernels.lora_products import (
    MAX_RANK,
    ONE_PASS_RANK,
    Matrix,
    Sum,
    by_terms,
    collect,
    one_pass_factors,
    operand,
    operands,
    outer,
    place,
    project,
    project_and_outer,
    terms_of,
    write_spare,
)

PASS_COLUMNS = 256  # of which a pass over the gradient keeps a sum each (TILE of lora_linear_backward_triton.py)
PART_BYTES = 2**27  # of a copy of the gradient of y; products of fewer rows than that are slower
ROWS_TOGETHER = 128  # a part has a multiple of them


def backward_scratch(group: Group) -> int:
    """Count the bytes that backward allocates beside its results, small ones left out."""
    M, K, N = prod(group.x.shape[:-1]), group.x.shape[-1], sum(group.features)
    spare = 0 if group.inputs else spare_columns(group, N, K)
    weight = (N + spare) * K if group.quant_type else 0
    rows = torch.sym_min(M, PART_BYTES // ((N + spare) * group.x.element_size()) + ROWS_TOGETHER) if spare else M
    sums = rows * ONE_PASS_RANK * 4 * (N // PASS_COLUMNS) if group.lora_a else 0
    dtype = wide(group.x.dtype)  # of ds A, which is rounded to the dtype of what the adapters read
    product = M * K * dtype.itemsize if any(source.dtype != dtype for source in group.inputs) else 0
    return (weight + (rows * (N + spare) if spare else 0)) * group.x.element_size() + max(sums, product)


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
    sums: list[Sum] = []
    if dx[0] is not None:
        _input_gradient(rows(dx[0]), grad, s, ds, dbs, group, sums)
    elif any(gradient is not None for gradient in (*das, *dinputs)):
        matrices: list[Matrix] = []
        p = _one_pass_factors(grad, s, dbs, group, matrices)
        place(matrices)
        _adapter_gradients(grad, s, ds, dbs, group, p, sums)
    else:
        _second_factors(dbs, grad, s, group, sums)
    _first_factors(das, ds, group, sums)
    collect(sums)
    if len(dinputs) == 1 and dinputs[0] is not None:
        _multiply(rows(dinputs[0]), ds, _all_a(ds, group))
    elif len(dinputs) > 1:
        for (a, b, _, _, ranks), dinput in zip(group.adapters, dinputs, strict=True):
            if dinput is not None:
                dtype = group.adapter_dtype(a, b)
                _multiply(rows(dinput), ds[:, ranks].to(dtype), a.to(dtype))
    for sibling, part in enumerate(group.columns):
        if (dweight := dweights[sibling]) is not None:
            torch.mm(grad[:, part].to(x.dtype).T, x, out=dweight)
    for sibling, dbias in zip(group.biased, dbiases, strict=True):
        if dbias is not None:
            dbias.copy_(torch.sum(grad[:, group.columns[sibling]], 0))


def _one_pass_factors(
    grad: Tensor, s: Tensor, dbs: Sequence[Tensor | None], group: Group, matrices: list[Matrix]
) -> Tensor | None:  # fmt: skip
    """Allocate all s_j B_j for a pass over dY that computes ds and dB; None if there is none, or two are better."""
    one_each = len(set(group.adapted)) == len(group.adapted)  # no sibling has two
    if not one_each or all(db is None for db in dbs):
        return None
    factors = [(b, part.start, 0, scale) for _, b, scale, part, _ in group.adapters]
    return one_pass_factors(grad, s, factors, group.ranks_of_siblings, matrices, group.rounded)


def _adapter_gradients(
    grad: Tensor, s: Tensor, ds: Tensor, dbs: Sequence[Tensor | None], group: Group, p: Tensor | None, sums: list[Sum],
    copy: Tensor | None = None, spare: Tensor | None = None,
) -> None:  # fmt: skip
    """Write ds = s_j dY B of each adapter, copy = dY and spare = [ds | 0], and add dB = s_j dY^T S to sums.

    p: as _one_pass_factors gives it; dY is read once if there is one.
    """
    if ds.shape[1] == 0:
        return
    if p is not None:
        needed = zip(dbs, group.adapters, strict=True)
        targets = [(db, part.start, 0, scale) for db, (_, _, scale, part, _) in needed if db is not None]
        if project_and_outer(grad, s, p, ds, targets, group.columns, group.ranks_of_siblings, copy, spare, sums):
            return
    _project_gradient(grad, ds, group, copy, spare)
    _second_factors(dbs, grad, s, group, sums)


def _project_gradient(grad: Tensor, ds: Tensor, group: Group, copy: Tensor | None, spare: Tensor | None) -> None:
    """Write ds = s_j dY B of each adapter, copy = dY and spare = [ds | 0]."""
    n, ranks = grad.shape[1], ds.shape[1]
    matrices: list[Matrix] = []
    if ranks <= MAX_RANK:
        terms = terms_of(factors_b(group), n, ranks, grad.dtype, matrices, group.rounded)
        place(matrices)
        project(grad, terms, ds, copy, spare)
        return
    every = [  # in one matrix most of it would be zeros
        terms_of([(b, 0, 0, scale)], b.shape[0], b.shape[1], grad.dtype, matrices, group.rounded)
        for _, b, scale, _, _ in group.adapters
    ]
    place(matrices)
    for terms, (_, _, _, part, own) in zip(every, group.adapters, strict=True):
        project(grad[:, part], terms, ds[:, own])
    if copy is not None:
        copy.copy_(grad)
    write_spare(spare, ds)


def _second_factors(
    dbs: Sequence[Tensor | None], grad: Tensor, s: Tensor, group: Group, sums: list[Sum]
) -> None:  # fmt: skip
    """Compute dB = s_j dY^T S, in one pass over dY if the ranks are few."""
    needed = [(db, *adapter) for db, adapter in zip(dbs, group.adapters, strict=True) if db is not None]
    if s.shape[1] <= MAX_RANK:
        pieces = [(db, part.start, ranks.start, scale) for db, _, _, scale, part, ranks in needed]
        outer(grad, s, pieces, sums, rounded=group.rounded)
        return
    for db, _, _, scale, part, ranks in needed:
        outer(grad[:, part], s[:, ranks], [(db, 0, 0, scale)], sums, rounded=group.rounded)


def _first_factors(das: Sequence[Tensor | None], ds: Tensor, group: Group, sums: list[Sum]) -> None:
    """Compute dA = ds^T x_j; adapters that read the same x share a pass over it."""
    needed = [
        (da, source, ranks) for da, source, ranks in zip(das, group.read, group.ranks, strict=True) if da is not None
    ]
    if len(group.inputs) > 1:
        for da, source, ranks in needed:
            one = [(da, 0, 0, 1.0)]
            outer(rows(source), ds[:, ranks], one, sums, rounded=group.rounded_beside(source), transposed=True)
    elif needed:
        source, pieces = group.read[0], [(da, ranks.start, 0, 1.0) for da, _, ranks in needed]
        outer(rows(source), ds, pieces, sums, rounded=group.rounded_beside(source), transposed=True)


def _input_gradient(
    dx: Tensor, grad: Tensor, s: Tensor, ds: Tensor, dbs: Sequence[Tensor | None], group: Group, sums: list[Sum]
) -> None:  # fmt: skip
    """Write dx = dY W + ds A (ds A only where the adapters read x itself), and compute ds and dB."""
    n, columns = grad.shape[1], dx.shape[1]
    spare = 0 if group.inputs else spare_columns(group, n, columns)
    if spare:
        _input_gradient_by_parts(dx, grad, s, ds, dbs, group, spare, sums)
        return
    begun = len(group.lora_a) > 0 and not group.inputs
    safe = begun and not any(overflows(group, a, dx.dtype) for a in group.lora_a)
    pieces, ranks, matrices = factors_a(group), ds.shape[1], list[Matrix]()
    p = _one_pass_factors(grad, s, dbs, group, matrices)
    whole = safe and (group.rounded or not by_terms(ranks, pieces, dx.dtype))
    right = operand(pieces, ranks, columns, dx.dtype, matrices) if whole else None
    low = dx.new_empty(ds.shape) if whole and dx.dtype != ds.dtype else None
    place(matrices)
    _adapter_gradients(grad, s, ds, dbs, group, p, sums, spare=low)
    if right is not None:
        torch.mm(ds if low is None else low, right, out=dx)
    elif safe:
        torch.mm(*operands(ds, pieces, columns, dx.dtype), out=dx)
    elif begun:
        _multiply(dx, ds, _all_a(ds, group))
    grad = grad.to(dx.dtype)
    if group.quant_type:
        accumulate(dx, grad, scratch(group), begun)
        return
    for sibling, part in enumerate(group.columns):
        accumulate(dx, grad[:, part], group.weights[sibling], begun or sibling > 0)


def _input_gradient_by_parts(
    dx: Tensor, grad: Tensor, s: Tensor, ds: Tensor, dbs: Sequence[Tensor | None], group: Group, spare: int,
    sums: list[Sum],
) -> None:  # fmt: skip
    """Write dx = [dY | ds] [W ; A], ds and dB, some rows at a time: a copy of dY would be as large as dY."""
    M, n = grad.shape
    size = _rows_of_a_part(M, n, spare, grad.element_size())
    count = int(cdiv(M, size))
    size = M if count == 1 else size
    weight, wider = scratch(group, rows_below=spare), grad.new_empty(size, n + spare)
    matrices: list[Matrix] = [(weight[None, n:], factors_a(group))]
    p = _one_pass_factors(grad, s, dbs, group, matrices)
    place(matrices)
    if count == 1:
        _adapter_gradients(grad, s, ds, dbs, group, p, sums, wider[:, :n], wider[:, n:])
        torch.mm(wider, weight, out=dx)
        return
    totals = [None if db is None else torch.zeros_like(db, dtype=wide(db.dtype)) for db in dbs]
    for number in range(count):
        part = slice(number * size, M if number == count - 1 else (number + 1) * size)
        own, own_sums = [None if total is None else torch.empty_like(total) for total in totals], list[Sum]()
        beside = wider[: part.stop - part.start]
        _adapter_gradients(
            grad[part], s[part], ds[part], own, group, p, own_sums, beside[:, :n], beside[:, n:]
        )  # fmt: skip
        torch.mm(beside, weight, out=dx[part])
        collect(own_sums)
        for total, more in zip(totals, own, strict=True):
            if total is not None and more is not None:
                total.add_(more)
    for db, total in zip(dbs, totals, strict=True):
        if db is not None and total is not None:
            db.copy_(total)


def _rows_of_a_part(M: int, n: int, spare: int, itemsize: int) -> int:
    """Return the rows of a part: parts of one size but for the last, of about PART_BYTES at the most."""
    count = cdiv(M * (n + spare) * itemsize, PART_BYTES)
    return cdiv(cdiv(M, count), ROWS_TOGETHER) * ROWS_TOGETHER


def _all_a(ds: Tensor, group: Group) -> Tensor:
    """Return all A, one below the other, in ds's dtype."""
    factors = [a.to(group.x.dtype) if group.rounded else a for a in group.lora_a]
    return torch.cat([a.to(ds.dtype) for a in factors])


def _multiply(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left right into out, rounded to its dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
