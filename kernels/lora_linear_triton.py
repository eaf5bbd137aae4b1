"""Triton kernels of lora_linear: the products with a matrix of few columns, which are as fast as memory.

Adapters may be in float32 beside 16-bit activations.  A bfloat16 operand is exact in a bfloat16 tensor core, so the
float32 one is cut into three bfloat16 terms, which hold its 24 bits; other pairs are multiplied as float32 in three
terms of TF32.
"""
# mypy: allow-untyped-defs

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastft.kernels.tiles import multiprocessors

AS_IT_IS, THREE_TERMS, FLOAT32 = 0, 1, 2  # how a product is taken


@triton.jit
def add_product(left, right, total, HOW: tl.constexpr):
    """total + left right, of which left is exact in its own dtype and right may be float32."""
    if HOW == 0:
        return tl.dot(left, tl.cast(right, left.dtype), total)
    elif HOW == 1:
        high = tl.cast(right, left.dtype)
        rest = right - tl.cast(high, tl.float32)
        middle = tl.cast(rest, left.dtype)
        lowest = tl.cast(rest - tl.cast(middle, tl.float32), left.dtype)
        total = tl.dot(left, lowest, total)
        total = tl.dot(left, middle, total)
        return tl.dot(left, high, total)
    else:
        return tl.dot(tl.cast(left, tl.float32), tl.cast(right, tl.float32), total, input_precision="tf32x3")


@triton.jit
def project_kernel(
    x_ptr, p_ptr, s_ptr, copy_ptr, spare_ptr, M, K, R, scale, x_stride, p_stride_k, p_stride_r, s_stride, copy_stride,
    spare_stride, COPY: tl.constexpr, SPARE: tl.constexpr, HOW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    long_row = tl.cast(row, tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (row < M)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + (long_row * x_stride)[:, None] + k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        if COPY:
            tl.store(copy_ptr + (long_row * copy_stride)[:, None] + k[None, :], x, mask=mask)
        p = tl.load(
            p_ptr + (tl.cast(k, tl.int64) * p_stride_k)[:, None] + (tl.cast(r, tl.int64) * p_stride_r)[None, :],
            mask=(k < K)[:, None] & (r < R)[None, :], other=0.0,
        )  # fmt: skip
        total = add_product(x, p, total, HOW)
    total *= tl.cast(scale, tl.float32)
    mask = (row < M)[:, None] & (r < R)[None, :]
    tl.store(s_ptr + (long_row * s_stride)[:, None] + r[None, :], total, mask=mask)
    if SPARE:
        spare = tl.cast(total, spare_ptr.dtype.element_ty)
        tl.store(spare_ptr + (long_row * spare_stride)[:, None] + r[None, :], spare, mask=mask)


@triton.jit
def outer_kernel(
    x_ptr, s_ptr, partial_ptr, M, K, R, rows, x_stride, s_stride, partial_stride, partial_stride_k, partial_stride_r,
    HOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * rows
    total = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for start in range(first, min(first + rows, M), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        long_row = tl.cast(row, tl.int64)
        inside = (row < min(first + rows, M))[:, None]
        x = tl.load(
            x_ptr + (long_row * x_stride)[:, None] + k[None, :], mask=inside & (k < K)[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        s = tl.load(s_ptr + (long_row * s_stride)[:, None] + r[None, :], mask=inside & (r < R)[None, :], other=0.0)
        total = add_product(tl.trans(x), s, total, HOW)
    address = partial_ptr + tl.cast(tl.program_id(1), tl.int64) * partial_stride
    address = address + (k * partial_stride_k)[:, None] + (r * partial_stride_r)[None, :]
    tl.store(address, total, mask=(k < K)[:, None] & (r < R)[None, :])


def block_of(rank: int) -> int:
    """A tile's columns for these ranks."""
    return max(16, triton.next_power_of_2(rank))


def how(left: torch.dtype, right: torch.dtype) -> int:
    """The cheapest product that loses nothing of either."""
    if left == right and left != torch.float32:
        return AS_IT_IS
    return THREE_TERMS if (left, right) == (torch.bfloat16, torch.float32) else FLOAT32


def project_meta(n_rows: int, rank: int, way: int) -> dict[str, int]:
    """Tiles of 16 rows where there are few, so that every multiprocessor has some."""
    block_m = 16 if n_rows <= 2048 else 32
    return {"HOW": way, "BLOCK_M": block_m, "BLOCK_K": 128 if way != FLOAT32 else 32, "BLOCK_R": block_of(rank), "num_warps": 4}


def outer_meta(rank: int, way: int) -> dict[str, int]:
    return {"HOW": way, "BLOCK_M": 64 if way != FLOAT32 else 32, "BLOCK_K": 64, "BLOCK_R": block_of(rank), "num_warps": 4}


_POINTERS = {"s_ptr": "*fp32", "partial_ptr": "*fp32", "scale": "fp32"}


def variants() -> Iterator[tuple[Any, dict[str, Any]]]:
    """The kernels for ranks of a model, for the tests that compile them ahead of time."""
    for way, p in ((AS_IT_IS, "*row"), (THREE_TERMS, "*fp32"), (FLOAT32, "*fp32")):
        for rank in (16, 64, 128):
            for n_rows in (512, 4096):
                yield project_kernel, {"COPY": True, "SPARE": True, "p_ptr": p, **_POINTERS, **project_meta(n_rows, rank, way)}
            yield outer_kernel, {**_POINTERS, **outer_meta(rank, way)}


def project(x: Tensor, p: Tensor, scale: float, s: Tensor, copy: Tensor | None, spare: Tensor | None) -> None:
    if x.stride(-1) != 1:
        x = x.contiguous()
    (M, K), R = x.shape, p.shape[1]
    meta = project_meta(M, R, how(x.dtype, p.dtype))
    whole, beside = (x if copy is None else copy), (x if spare is None else spare)
    with torch.cuda.device_of(x):
        project_kernel[(triton.cdiv(M, meta["BLOCK_M"]),)](
            x, p, s, whole, beside, M, K, R, scale, x.stride(0), p.stride(0), p.stride(1), s.stride(0), whole.stride(0),
            beside.stride(0), COPY=copy is not None, SPARE=spare is not None, **meta,
        )  # fmt: skip


def outer(x: Tensor, s: Tensor, scale: float, out: Tensor) -> None:
    """Sums over rows are split among programs and added up in one order."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    (M, K), R = x.shape, s.shape[1]
    low = out.dtype == x.dtype and out.dtype != torch.float32
    meta = outer_meta(R, AS_IT_IS if low else how(x.dtype, s.dtype))
    blocks = triton.cdiv(K, meta["BLOCK_K"])
    splits = max(1, min(triton.cdiv(2 * multiprocessors(x.device), blocks), triton.cdiv(M, 4 * meta["BLOCK_M"])))
    n_rows = triton.cdiv(triton.cdiv(M, splits), meta["BLOCK_M"]) * meta["BLOCK_M"]
    partial = s.new_empty(triton.cdiv(M, n_rows), *out.T.shape) if out.stride(0) == 1 else s.new_empty(triton.cdiv(M, n_rows), *out.shape)
    by_k, by_r = (1, K) if out.stride(0) == 1 else (R, 1)
    with torch.cuda.device_of(x):
        outer_kernel[(blocks, partial.shape[0])](
            x, s, partial, M, K, R, n_rows, x.stride(0), s.stride(0), partial.stride(0), by_k, by_r, **meta
        )
    total = partial.sum(0) if scale == 1.0 else partial.sum(0) * scale
    out.copy_(total.T if out.stride(0) == 1 else total)
