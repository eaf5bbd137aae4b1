"""Labels of a head's rows, int64 [...]: the number of a class, or ignore_index for rows that do not count.

Labels outside of [0, V) raise as torch.nn.functional.cross_entropy does: IndexError, on a GPU a device-side assertion.
"""

import torch
from torch import Tensor

from fastft.kernels.core.registry import require
from fastft.kernels.head_call import HeadCall


class LabelledCall(HeadCall):
    """What every call has whose rows have labels."""

    labels: Tensor
    ignore_index: int


def check(call: LabelledCall) -> None:
    """Raise where labels are not int64, one for each row."""
    labels, rows = call.labels, call.rows
    fits = labels.shape == rows and labels.dtype == torch.int64
    require(fits, lambda: f"labels {labels.dtype} {tuple(labels.shape)} for rows {tuple(rows)}")


def flattened(call: LabelledCall) -> tuple[Tensor, Tensor]:
    """Return all labels [M] and which of them are ignored; on a CPU raise IndexError where one is out of bounds."""
    labels = call.labels.reshape(-1)
    if labels.device.type == "cpu" and not (right := _is_class(call)).all():
        raise IndexError(f"Target {labels[~right][0].item()} is out of bounds.")
    return labels, labels == call.ignore_index


def _is_class(call: LabelledCall) -> Tensor:
    labels = call.labels.reshape(-1)
    return ((labels >= 0) & (labels < call.weight.shape[0])) | (labels == call.ignore_index)


def finish(call: LabelledCall) -> None:
    """Raise on a GPU as torch does, without waiting for it: an index out of range is a device-side assertion there."""
    if call.labels.device.type != "cpu" and call.labels.numel():
        wrong = (~_is_class(call)).any().long().view(1)
        torch.zeros(1, device=wrong.device).index_select(0, wrong)
