"""How lora_linear runs: which GEMMs, what goes beside what, and the primitives that PyTorch has no fast call for.

A 4-bit weight is written in 16 bits into scratch for one GEMM and freed with the call; torch's caching allocator gives
the next group the same memory.  The adapters' part is either a few spare columns of that GEMM, [x | S] [W | s B]^T
forward and [dY | dS] [W ; A] backward, or what it is added to.  Spare columns cost a copy of the GEMM's left operand,
the other a pass over its result, so the smaller of the two decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastft.kernels import dispatch
from fastft.kernels.lora_linear import Group
from fastft.kernels.registry import load, wide

FEW_ROWS = 64  # up to which bitsandbytes' fused GEMM, which reads 4 bits, is faster than de-quantising first
MAX_RANK = 128  # of one launch


def project(x: Tensor, p: Tensor, scale: float, s: Tensor, copy: Tensor | None = None) -> None:
    """s = scale * x p, and copy = [x | s] in one pass over x.

    x [M, K]; p [K, r] of any strides; s [M, r] float32 or float64; copy [M, K + at least r], or None.
    """
    ranks = p.shape[1]
    if not _on_triton(x, p, s) or ranks == 0:
        torch.mul(x.to(s.dtype) @ p.to(s.dtype), scale, out=s)
        if copy is not None:
            copy[:, : x.shape[1]].copy_(x)
            copy[:, x.shape[1] : x.shape[1] + ranks].copy_(s)
        return
    for first in range(0, ranks, MAX_RANK):
        part = slice(first, min(first + MAX_RANK, ranks))
        whole, spare = None, None
        if copy is not None:
            whole = copy[:, : x.shape[1]] if first == 0 else None
            spare = copy[:, x.shape[1] + part.start : x.shape[1] + part.stop]
        load("lora_linear_triton.project")(x, p[:, part], scale, s[:, part], whole, spare)


def outer(x: Tensor, s: Tensor, scale: float, out: Tensor) -> None:
    """out = scale * x^T s:  x [M, K], s [M, r], out [K, r] of any strides.

    As precise as out's dtype is: s is rounded to x's only where out has no more bits than that.
    """
    if not _on_triton(x, s) or out.numel() == 0:
        out.copy_((x.to(s.dtype).T @ s) * scale)
        return
    for first in range(0, s.shape[1], MAX_RANK):
        part = slice(first, min(first + MAX_RANK, s.shape[1]))
        load("lora_linear_triton.outer")(x, s[:, part], scale, out[:, part])


def _on_triton(*tensors: Tensor) -> bool:
    dtypes = dispatch.triton_dtypes(tensors[0].device)
    return tensors[0].numel() > 0 and all(tensor.dtype in dtypes for tensor in tensors)


def rows(tensor: Tensor) -> Tensor:
    """[..., D] as [M, D]."""
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def spare_columns(group: Group, wider: int, narrower: int) -> int:
    """How many spare columns the GEMM gets: 0 where the adapters are better added, or would overflow its dtype.

    wider: columns of the left operand, which is copied; narrower: of the result, which would be read and written again.
    """
    ranks = sum(a.shape[0] for a in group.lora_a)
    exponents = [torch.finfo(one.dtype).max for one in (*group.lora_a, *group.lora_b)]
    overflows = any(largest > torch.finfo(group.x.dtype).max for largest in exponents)
    if not group.quant_type or ranks == 0 or overflows or wider >= 2 * narrower:
        return 0
    return -(-ranks // 8) * 8  # rows begin at multiples of 16 bytes


def scratch(group: Group, rows_below: int = 0, spare: int = 0) -> Tensor:
    """The 4-bit weights of all siblings, one below the other, in x's dtype; more rows and columns are zero."""
    n, columns = sum(group.features), group.x.shape[-1]
    weight = group.x.new_empty(n + rows_below, columns + spare)
    for at, part in enumerate(group.columns):
        group.weight_into(weight[part, :columns], at)
    if spare:
        weight[:, columns:].zero_()
    if rows_below:
        weight[n:].zero_()
    return weight


def bias_of(group: Group) -> Tensor | None:
    """The biases of all siblings, zero for those without."""
    if not group.biases:
        return None
    bias = group.x.new_zeros(sum(group.features))
    for at, value in zip(group.biased, group.biases, strict=True):
        bias[group.columns[at]] = value
    return bias


def low(group: Group) -> Group:
    """The group with x in a dtype that 4-bit weights can be written in: float64 has none of its own."""
    return group


def forward(targets: Sequence[Tensor], group: Group) -> None:
    """Fill y and the products with A."""
    y, s = rows(targets[0]), rows(targets[1])
    x = rows(group.x)
    if y.shape[0] == 0:
        return
    columns, spare = x.shape[1], spare_columns(group, x.shape[1], y.shape[1])
    wider = x.new_empty(x.shape[0], columns + spare) if spare else None
    _products(group, x, s, wider)
    if wider is not None:
        weight = scratch(group, spare=spare)
        for _, b, scale, part, ranks in group.adapters:
            weight[part, columns + ranks.start : columns + ranks.stop] = b * scale
        _multiply(y, wider, weight.T, bias_of(group))
        return
    _adapters(y, s, group)
    begun = len(group.lora_a) > 0 or len(group.biases) > 0
    if _fused(group, x):
        _few_rows(y, x, group, begun)
    elif group.quant_type:
        _accumulate(y, x, scratch(group).T, begun)
    else:
        for at, part in enumerate(group.columns):
            _accumulate(y[:, part], x, group.weights[at].T, begun)


def _products(group: Group, x: Tensor, s: Tensor, wider: Tensor | None) -> None:
    """s = x A^T of all adapters, and wider = [x | s]."""
    if group.inputs:
        for given, (a, _, _, _, ranks) in zip(group.inputs, group.adapters, strict=True):
            project(rows(given), a.T, 1.0, s[:, ranks])
        if wider is not None:
            wider[:, : x.shape[1]].copy_(x)
            wider[:, x.shape[1] : x.shape[1] + s.shape[1]].copy_(s)
    elif group.lora_a:
        a = torch.cat(list(group.lora_a)) if len(group.lora_a) > 1 else group.lora_a[0]
        project(x, a.T, 1.0, s, wider)
    if wider is not None:
        wider[:, x.shape[1] + s.shape[1] :].zero_()


def _adapters(y: Tensor, s: Tensor, group: Group) -> None:
    """What the weights' products are added to: y = bias + s B^T; nothing is written if there is neither."""
    bias = bias_of(group)
    if bias is not None:
        y.copy_(bias.expand_as(y))
    elif group.lora_a and len(set(group.adapted)) < len(group.features):
        y.zero_()
    begun = set(range(len(group.features))) if bias is not None else set()
    for (_, b, scale, part, ranks), at in zip(group.adapters, group.adapted, strict=True):
        safe = y.dtype if torch.finfo(b.dtype).max <= torch.finfo(y.dtype).max else s.dtype
        product = s[:, ranks].to(safe), (b * scale).to(safe).T
        if safe == y.dtype:
            _accumulate(y[:, part], *product, at in begun)
        elif at in begun:
            y[:, part] += torch.mm(*product)
        else:
            y[:, part] = torch.mm(*product)
        begun.add(at)


def _multiply(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(bias, left, right, out=out)


def _accumulate(out: Tensor, left: Tensor, right: Tensor, begun: bool) -> None:
    """out += left right, or out = left right if nothing is there yet."""
    if begun:
        out.addmm_(left, right)
    else:
        torch.mm(left, right, out=out)


def _fused(group: Group, x: Tensor) -> bool:
    """Whether bitsandbytes' own GEMM takes this call: for few rows on a GPU."""
    few = group.quant_type != "" and x.is_cuda and x.shape[0] < FEW_ROWS
    return few and x.shape[1] % group.blocksize == 0 and hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def _few_rows(y: Tensor, x: Tensor, group: Group, begun: bool) -> None:
    for at, part in enumerate(group.columns):
        absmax, *nested = group.statistics_of(at)
        names = ("absmax_8bit", "absmax_code", "absmax_offset")
        product = torch.ops.bitsandbytes.gemm_4bit(
            x, group.weights[at].view(-1, 1), [group.features[at], x.shape[1]], absmax, group.blocksize,
            group.quant_type, None, **dict(zip(names, nested, strict=False)),
        )  # fmt: skip
        y[:, part] = y[:, part] + product if begun else product


def backward(
    targets: Sequence[Tensor], grad_output: Tensor, s: Tensor, group: Group, needed: Sequence[bool]
) -> None:
    """Fill the gradients that are needed."""
    found = iter(targets)
    lists = (1, len(group.weights), len(group.biases), len(group.lora_a), len(group.lora_b), len(group.inputs))
    marks = iter(needed)
    dx, dweights, dbiases, das, dbs, dinputs = (
        [next(found) if next(marks) else None for _ in range(length)] for length in lists
    )
    if rows(grad_output).shape[0] == 0:
        for target in targets:
            target.zero_()
        return
    grad, x, s = rows(grad_output), rows(group.x), rows(s)
    ds = s.new_empty(s.shape)
    if dx[0] is not None:
        _input_gradient(rows(dx[0]), grad, ds, group)
    elif any(one is not None for one in (*das, *dinputs)):
        _adapter_gradients(grad, ds, group, None)
    for at, (a, _, scale, part, ranks) in enumerate(group.adapters):
        given = rows(group.inputs[at]) if group.inputs else x
        if (da := das[at]) is not None:
            outer(given, ds[:, ranks], 1.0, da.T)
        if (db := dbs[at]) is not None:
            outer(grad[:, part], s[:, ranks], scale, db)
        if group.inputs and (dinput := dinputs[at]) is not None:
            rows(dinput).copy_(ds[:, ranks].to(a.dtype) @ a)
    for at, part in enumerate(group.columns):
        if (dweight := dweights[at]) is not None:
            torch.mm(grad[:, part].T, x, out=dweight)
    for at, dbias in zip(group.biased, dbiases, strict=True):
        if dbias is not None:
            torch.sum(grad[:, group.columns[at]], 0, out=dbias)


def _adapter_gradients(grad: Tensor, ds: Tensor, group: Group, wider: Tensor | None) -> None:
    """ds = s_j dY B of each adapter, and wider = [dY | ds]."""
    n = grad.shape[1]
    if wider is not None:
        wider[:, :n].copy_(grad)
    for _, b, scale, part, ranks in group.adapters:
        project(grad[:, part], b, scale, ds[:, ranks])
    if wider is not None:
        wider[:, n : n + ds.shape[1]].copy_(ds)
        wider[:, n + ds.shape[1] :].zero_()


def _input_gradient(dx: Tensor, grad: Tensor, ds: Tensor, group: Group) -> None:
    """dx = dY W + ds A, where the adapters read x itself."""
    n, columns = grad.shape[1], dx.shape[1]
    spare = 0 if group.inputs else spare_columns(group, n, columns)
    wider = grad.new_empty(grad.shape[0], n + spare) if spare else None
    _adapter_gradients(grad, ds, group, wider)
    if wider is not None:
        weight = scratch(group, rows_below=spare)
        for a, _, _, _, ranks in group.adapters:
            weight[n + ranks.start : n + ranks.stop] = a
        torch.mm(wider, weight, out=dx)
        return
    begun = False
    for a, _, _, _, ranks in () if group.inputs else group.adapters:
        safe = dx.dtype if torch.finfo(a.dtype).max <= torch.finfo(dx.dtype).max else ds.dtype
        if safe == dx.dtype:
            _accumulate(dx, ds[:, ranks].to(safe), a.to(safe), begun)
        else:
            product = ds[:, ranks] @ a.to(safe)
            dx.copy_(dx + product if begun else product)
        begun = True
    if group.quant_type:
        _accumulate(dx, grad, scratch(group), begun)
        return
    for at, part in enumerate(group.columns):
        _accumulate(dx, grad[:, part], group.weights[at], begun or at > 0)
