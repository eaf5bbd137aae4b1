"""Rows are addressed in the memory order of the dense tensor, and copied only where they must be."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Spec, layouts, shapes, specs

from fastft.kernels.core import layout


def gather(rows: layout.Rows, index: int, n_rows: int, row_length: int) -> torch.Tensor:
    """The rows of one tensor, [n_rows, row_length], read as a kernel reads them."""
    view, (s0, s1, s2) = rows.tensors[index], rows.strides[index]
    starts = [r // rows.n2 // rows.n1 * s0 + r // rows.n2 % rows.n1 * s1 + r % rows.n2 * s2 for r in range(n_rows)]
    return torch.stack([view.as_strided((row_length,), (1,), view.storage_offset() + start) for start in starts])


@given(specs(), layouts(), st.data())
def test_rows_are_numbered_as_in_dense(spec: Spec, other_layout: str, data: st.DataObject) -> None:
    x = spec.build()
    dense = torch.empty_like(x)
    other = Spec(spec.shape, spec.dtype, other_layout, spec.seed + 1).build()
    per_row = torch.arange(x[..., 0].numel(), dtype=torch.float32).reshape(x.shape[:-1])
    found = layout.rows(dense, x, other, per_row)
    order = sorted(range(x.dim() - 1), key=lambda axis: -dense.stride(axis))
    n_rows, row_length = per_row.numel(), x.shape[-1]
    for index, tensor in enumerate((x, other)):
        expected = tensor.permute([*order, x.dim() - 1]).reshape(n_rows, row_length)
        assert torch.equal(gather(found, index, n_rows, row_length), expected)
    assert torch.equal(gather(found, 2, n_rows, 1).flatten(), per_row.permute(order).reshape(-1))


@given(shapes(), st.sampled_from(("contiguous", "transposed", "sliced", "chunked", "expanded")))
def test_rows_of_unit_stride_are_not_copied(shape: tuple[int, ...], kind: str) -> None:
    x = Spec(shape, torch.float32, kind).build()
    gradient = Spec(shape, torch.float32, "transposed").build()
    found = layout.rows(torch.empty_like(x), x, gradient)
    assert found.tensors[0].data_ptr() == x.data_ptr()
    assert found.tensors[1].data_ptr() == gradient.data_ptr()


def test_contiguous_rows_are_one_axis() -> None:
    x = torch.empty(2, 3, 4, 5)
    found = layout.rows(x, x, x[..., 0])
    assert (found.n1, found.n2, found.strides) == (1, 1, [(5, 0, 0), (5, 0, 0)])


def test_five_axes_that_do_not_merge_are_copied() -> None:
    dense = torch.empty(2, 3, 2, 3, 7)
    x = torch.randn(3, 2, 3, 2, 7).permute(3, 2, 1, 0, 4)
    found = layout.rows(dense, dense, x)
    assert found.tensors[0].data_ptr() == dense.data_ptr()
    assert torch.equal(gather(found, 1, 36, 7), x.reshape(36, 7))


def test_no_rows_and_one_row() -> None:
    assert layout.rows(torch.empty(7), torch.empty(7)).strides == [(0, 0, 0)]
    assert layout.rows(torch.empty(0, 7), torch.empty(0, 7)).n1 == 1
