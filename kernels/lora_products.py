"""Multiply by a matrix of few columns, and put pieces together: PyTorch has no fast call for either.

By Triton where it has tensor cores, by PyTorch elsewhere, and where a kernel cannot be compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastft.kernels.core import dispatch
from fastft.kernels.core.registry import load, wide

MAX_RANK = 64  # of one launch
ONE_PASS_RANK = 16  # of a sibling, up to which one pass does both products with a gradient
ONE_PASS_TERMS = 4  # there, of float32 in bfloat16: a power of two; what three have left is zero, or below float32

Piece = tuple[Tensor, int, int, float]  # a matrix, where it begins in a larger one, row and column, and its scale
Matrix = tuple[Tensor, Sequence[Piece]]  # [terms, rows, columns], last axis dense, to be written by place; its pieces
Sum = tuple[Tensor, Sequence[Piece]]  # [splits, rows, columns], to be added up by collect, and where parts of it go


def terms_of(
    pieces: Sequence[Piece], rows: int, columns: int, beside: torch.dtype, matrices: list[Matrix], rounded: bool = False
) -> Tensor:  # fmt: skip
    """Allocate a matrix [rows, columns] of pieces and zeros, to be multiplied by a tensor of another dtype.

    Returns [terms, rows, columns]: one term in the pieces' dtype, or float32 as three in bfloat16.  It is added to
    matrices, which are to be placed before it is read.  rounded: the pieces count as rounded to the other's dtype.
    """
    dtype = beside if rounded else functools.reduce(torch.promote_types, [piece.dtype for piece, *_ in pieces])
    exact = dtype == torch.float32 and beside == torch.bfloat16 and _on_triton(*(piece for piece, *_ in pieces))
    out = pieces[0][0].new_empty(3 if exact else 1, rows, columns, dtype=beside if exact else dtype)
    matrices.append((out, pieces))
    return out


def place(matrices: Sequence[Matrix]) -> None:
    """Write the pieces where they belong in each matrix, and zero elsewhere, in one launch.

    Each term is what those before it have left.
    """
    matrices = [(out, pieces) for out, pieces in matrices if out.numel() > 0]
    tensors = _tensors_in(matrices)
    by_kernel = tensors != [] and all(pieces for _, pieces in matrices) and _on_triton(*tensors)
    if by_kernel and dispatch.launched(_launcher("place"), tensors, matrices):
        return
    for out, pieces in matrices:
        if sum(piece.numel() for piece, *_ in pieces) < out[0].numel():
            out.zero_()
        for piece, row, column, scale in pieces:
            left = piece.to(wide(piece.dtype, out.dtype)) * scale
            for term in out[:, row : row + piece.shape[0], column : column + piece.shape[1]]:
                term.copy_(left)
                left = left - term


def collect(sums: Sequence[Sum]) -> None:
    """Add up sums and write parts of them, scaled, into their pieces, two of them in one launch."""
    for first in range(0, len(sums), 2):
        some = sums[first : first + 2]
        if dispatch.launched(_launcher("collect"), _tensors_in(some), some):
            continue
        for partial, pieces in some:
            _write(partial.sum(0), pieces)


def _tensors_in(several: Sequence[Matrix]) -> list[Tensor]:
    """List matrices, or sums, and their pieces."""
    return [tensor for whole, pieces in several for tensor in (whole, *(piece for piece, *_ in pieces))]


def _write(whole: Tensor, pieces: Sequence[Piece]) -> None:
    """Write parts of a matrix, scaled, into pieces."""
    for target, row, column, scale in pieces:
        target.copy_(whole[row : row + target.shape[0], column : column + target.shape[1]] * scale)


def by_terms(rank: int, pieces: Sequence[Piece], dtype: torch.dtype) -> bool:
    """Return whether operands splits float32 pieces, of so many ranks in all, into terms."""
    return dtype == torch.bfloat16 and rank <= MAX_RANK and any(piece.dtype == torch.float32 for piece, *_ in pieces)


def operand(
    pieces: Sequence[Piece], rank: int, columns: int, dtype: torch.dtype, matrices: list[Matrix], *,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """Allocate a matrix of pieces [rank, columns] for a GEMM in dtype; transposed: they are of its transpose.

    It is added to matrices, which are to be placed before it is read.
    """
    shape = (columns, rank) if transposed else (rank, columns)
    out = pieces[0][0].new_empty(1, *shape, dtype=dtype)
    matrices.append((out, pieces))
    return out[0].T if transposed else out[0]


def operands(
    left: Tensor, pieces: Sequence[Piece], columns: int, dtype: torch.dtype, *, transposed: bool = False
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return left [M, r] and a matrix of pieces [r, columns] ([columns, r] if transposed), for a GEMM in dtype.

    For float32 in bfloat16 both are split into two terms, high and low: high high + low high + high low are one product
    along 3 r.  What is left out is below 2^-16 of it.  More than MAX_RANK ranks are rounded, as three times as many
    would cost time.
    """
    rank = left.shape[1]
    if not by_terms(rank, pieces, dtype):
        matrices: list[Matrix] = []
        right = operand(pieces, rank, columns, dtype, matrices, transposed=transposed)
        place(matrices)
        return left.to(dtype), right
    terms = 3
    right = left.new_empty((columns, terms, rank) if transposed else (terms, rank, columns), dtype=dtype)
    by_term = right.transpose(0, 1) if transposed else right
    beside = left.new_empty(left.shape[0], terms, rank, dtype=dtype)
    place([(by_term[-2:], pieces)])
    place([(beside.transpose(0, 1)[:2], [(left, 0, 0, 1.0)])])  # apart: as many rows as the batch has
    by_term[0].copy_(by_term[1])
    beside[:, 2].copy_(beside[:, 0])
    return beside.flatten(1), right.flatten(1).T if transposed else right.flatten(0, 1)


def project(x: Tensor, terms: Tensor, s: Tensor, copy: Tensor | None = None, spare: Tensor | None = None) -> None:
    """Write s = x p, copy = x and spare = [s | 0] in one pass over x.

    x and copy [M, K]; terms [terms, K, r] of p, of any strides; s [M, r] float32 or float64; spare [M, r or more] as x.
    """
    parts = _parts(s.shape[1])
    beside = spare if len(parts) == 1 else None

    def launch(part: slice) -> bool:
        arguments = (x, terms[:, :, part], s[:, part], copy if part.start == 0 else None, beside)
        return dispatch.launched(_launcher("project"), (x, terms), *arguments)

    if _on_triton(x, s, terms) and all(launch(part) for part in parts):
        if beside is None:
            write_spare(spare, s)
        return
    # A sum of one term would be laid out anew, for a less exact product.
    p = terms[0].to(s.dtype) if terms.shape[0] == 1 else terms.to(s.dtype).sum(0)
    s.copy_(x.to(s.dtype) @ p)
    if copy is not None:
        copy.copy_(x)
    write_spare(spare, s)


def write_spare(spare: Tensor | None, s: Tensor) -> None:
    """Write spare = [s | 0], if there is any."""
    if spare is not None:
        spare[:, : s.shape[1]].copy_(s)
        spare[:, s.shape[1] :].zero_()


def outer(
    x: Tensor, s: Tensor, pieces: Sequence[Piece], sums: list[Sum], *, rounded: bool = False, transposed: bool = False
) -> None:  # fmt: skip
    """Compute parts of x^T s [K, r], or of s^T x [r, K]:  x [M, K], s [M, r].

    Writes them into pieces, or adds to sums what collect is to write.  s counts as rounded to x's dtype if rounded, or
    where all pieces have that dtype.
    """
    rounded = rounded or all(target.dtype == x.dtype for target, *_ in pieces)

    def launch(part: slice) -> bool:
        cut = [_within(piece, part, transposed) for piece in pieces]
        inside = [piece for piece in cut if piece is not None]
        tensors, arguments = (x, s, *(target for target, *_ in inside)), (inside, sums, rounded, transposed)
        return not inside or dispatch.launched(_launcher("outer"), tensors, x, s[:, part], *arguments)

    if not pieces or (_on_triton(x, s) and all(launch(part) for part in _parts(s.shape[1]))):
        return
    _write(s.T @ x.to(s.dtype) if transposed else x.to(s.dtype).T @ s, pieces)


def one_pass_factors(
    x: Tensor, s: Tensor, factors: Sequence[Piece], ranks: Sequence[slice], matrices: list[Matrix],
    rounded: bool = False,
) -> Tensor | None:  # fmt: skip
    """Allocate p of project_and_outer, whose rows of a share's columns have its ranks from column 0 on.

    It is added to matrices, which are to be placed before it is read.  Returns None if other ways are better.
    rounded: the factors and s count as rounded to x's dtype.
    """
    rank = max(own.stop - own.start for own in ranks)
    dtypes = {x.dtype} if rounded else {factor.dtype for factor, *_ in factors}
    exact = {torch.bfloat16: {torch.bfloat16, torch.float32}, torch.float16: {torch.float16}}.get(x.dtype, set())
    if rank > ONE_PASS_RANK or not dtypes <= exact or not _on_triton(x, s):
        return None
    p = x.new_empty(x.shape[1], 1 if dtypes == {x.dtype} else ONE_PASS_TERMS, ONE_PASS_RANK)
    matrices.append((p.transpose(0, 1), factors))
    return p


def project_and_outer(
    x: Tensor, s: Tensor, p: Tensor, product: Tensor, targets: Sequence[Piece], columns: Sequence[slice],
    ranks: Sequence[slice], copy: Tensor | None, spare: Tensor | None, sums: list[Sum],
) -> bool:  # fmt: skip
    """Write product = x p, copy = x and spare = [product | 0] and add x^T s to sums, in one pass; False if it fails.

    The columns[i] of x go with the ranks[i] of s and product alone, and targets have those from column 0 on.
    """
    both = load("lora_linear_backward_triton.both")
    return dispatch.launched(both, (x, p), x, s, p, product, targets, columns, ranks, copy, spare, sums)


def _launcher(name: str) -> Callable[..., None]:
    return load(f"lora_linear_triton.{name}")


def _within(piece: Piece, part: slice, transposed: bool) -> Piece | None:
    """Cut a piece to these ranks, which are its rows if transposed, else its columns; None if nothing is left."""
    matrix, row, column, scale = piece
    first, size = (row, matrix.shape[0]) if transposed else (column, matrix.shape[1])
    low, high = max(first, part.start), min(first + size, part.stop)
    if low >= high:
        return None
    inside = slice(low - first, high - first)
    return (
        (matrix[inside], low - part.start, 0, scale)
        if transposed
        else (matrix[:, inside], row, low - part.start, scale)
    )


def _parts(ranks: int) -> list[slice]:
    return [slice(first, min(first + MAX_RANK, ranks)) for first in range(0, ranks, MAX_RANK)]


def _on_triton(*tensors: Tensor) -> bool:
    """Return whether Triton should multiply these tensors: without tensor cores cuBLAS is the better choice."""
    device = tensors[0].device
    dtypes = dispatch.triton_dtypes(device) if dispatch.has_tensor_cores(device) else ()
    return all(tensor.dtype in dtypes and tensor.numel() > 0 for tensor in tensors)
