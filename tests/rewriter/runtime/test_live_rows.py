"""Rows that are taken and put back, and batches that are waited for."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from fastft.kernels.attention_engines import AS_GIVEN, NO_RANGES
from fastft.rewriter.memory.device_rates import TYPICAL
from fastft.rewriter.report.data import RowsReport
from fastft.rewriter.rows import moves
from fastft.rewriter.rows.live_rows import Mask
from fastft.rewriter.runtime import cuda_graphs, row_watch
from fastft.rewriter.runtime.row_choice import RowChoice
from fastft.rewriter.runtime.row_watch import Watch

ROWS = torch.tensor([5, 0, 3, 5, 5])  # of 7; the last two were added
LIVE, M = 3, 7


@pytest.mark.quick
def test_rows_are_put_back_where_they_were_taken() -> None:
    whole = torch.randn(M, 2, 3, dtype=torch.float64, requires_grad=True)
    part = torch.randn(len(ROWS), 2, 3, dtype=torch.float64, requires_grad=True)
    taken, restored = moves.Taken.apply(whole, ROWS, LIVE), moves.Restored.apply(part, ROWS, LIVE, M)
    assert torch.equal(taken, whole[ROWS])
    assert torch.equal(restored[ROWS[:LIVE]], part[:LIVE])
    others = [row for row in range(M) if row not in ROWS]
    assert not restored[others].any()
    upstream = torch.randn_like(taken)
    (gradient,) = torch.autograd.grad(taken, whole, upstream)
    assert torch.equal(gradient[ROWS[:LIVE]], upstream[:LIVE])  # what was added adds nothing
    assert not gradient[others].any()
    upstream = torch.randn_like(restored)
    (gradient,) = torch.autograd.grad(restored, part, upstream)
    assert torch.equal(gradient[:LIVE], upstream[ROWS[:LIVE]])
    assert not gradient[LIVE:].any()


class OnCard:
    """What a watch asks of hidden states."""

    device = torch.device("cpu")  # whose rates are an H100's

    def __init__(self, *shape: int, is_cuda: bool = True) -> None:
        self.shape, self.is_cuda = shape, is_cuda

    def numel(self) -> int:
        return torch.Size(self.shape).numel()


TINY, SMALL, LARGE = OnCard(1, 512, 2048), OnCard(8, 512, 2048), OnCard(8, 2048, 4096)


@pytest.mark.quick
def test_small_batches_are_not_waited_for_once_nothing_was_left_out() -> None:
    watch = Watch()
    for _ in range(row_watch.QUIET):
        assert watch.waits(SMALL)
        watch.quiet += 1
    assert not watch.waits(SMALL)
    assert watch.waits(LARGE)
    assert watch.waits(OnCard(2, 512, 2048, is_cuda=False))  # where nothing runs ahead
    due = [watch.is_due() for _ in range(2 * row_watch.EVERY)]
    assert sum(due) == 2
    watch.note(facts(3500))
    assert not watch.waits(SMALL)  # of 4096 rows: too little to wait for
    watch.note(facts(2000))
    assert watch.waits(SMALL)
    assert watch.quiet == 0
    watch.quiet = row_watch.QUIET
    watch.note(torch.tensor([4096, 512, 8, 0, 0, 0, 0, 0, 2000]))
    assert watch.waits(SMALL)  # as many are the same as others


@pytest.mark.quick
def test_what_is_small_depends_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    assert watch.size(TINY, 1) == 512
    assert watch.size(SMALL, 3100) == watch.size(SMALL, 3500) == 4096
    assert watch.size(SMALL, 2900) < 4096
    assert watch.size(LARGE, 16_000) < 8 * 2048
    slower = replace(TYPICAL, flops=TYPICAL.flops / 16)
    monkeypatch.setattr(row_watch, "rates", lambda device: slower)
    assert not watch.is_small(SMALL)
    assert watch.is_small(OnCard(1, 256, 2048))
    assert watch.size(TINY, 1) < 512


@pytest.mark.quick
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, 512),
        ({"query_ids": Node, "key_ids": Node}, NO_RANGES),
        ({"own_end": Node}, AS_GIVEN),
        ({"own_start": Node, "query_ids": Node, "key_ids": Node}, AS_GIVEN),
    ],
)
def test_attention_of_a_batch_that_is_not_looked_at(own: dict[str, Any], expected: int) -> None:
    """It reads what the model has, and not the ranges that live rows would be told by."""
    names = ("own_start", "end", "own_end", "query_ids", "key_ids")
    mask = Mask(start=Node, **dict.fromkeys(names) | own, causal=True, window=0)  # type: ignore[arg-type]
    choice = RowChoice(SimpleNamespace(masks=[mask]), RowsReport())  # type: ignore[arg-type]
    assert choice.unlooked(512) == expected


class Graphs:
    """What a watch asks of CUDA graphs."""

    enabled, patience, settled = True, 3, False


@pytest.mark.quick
def test_where_layers_run_as_graphs_sizes_are_few() -> None:
    graphs = Graphs()
    watch, plain = Watch(graphs), Watch()
    rows = 8 * 512
    for _ in range(graphs.patience - 1):
        watch.meet(SMALL)
        assert watch.size(SMALL, rows // 2 + 1) == plain.size(SMALL, rows // 2 + 1) < rows * 5 // 8
        assert not graphs.settled
    watch.meet(SMALL)
    assert graphs.settled  # each of these sizes will come again
    sizes = {watch.size(SMALL, live) for live in range(1, rows + 1)}
    assert sizes == {*range(rows // 8, rows * 6 // 8 + 1, rows // 8), rows}  # what saves less is not worth it
    assert all(watch.size(SMALL, live) >= live for live in range(1, rows + 1))
    assert {watch.longest(SMALL, longest) for longest in range(1, 513)} == {512}
    assert {watch.size(LARGE, live) for live in (1, 9000, 16_000)} == {2048, 10_240, 8 * 2048}
    graphs.enabled = False
    assert watch.longest(SMALL, 100) < 512
    graphs.enabled = True
    watch.meet(LARGE)  # of another shape
    assert not watch.in_graphs
    assert not graphs.settled


@pytest.mark.quick
@pytest.mark.parametrize("settled", [False, True])
def test_sizes_that_come_again_are_captured_the_second_time(settled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = cuda_graphs.Graphed(lambda *_: (), [], [0], patience=4)
    graphed.settled, tried = settled, []
    monkeypatch.setattr(cuda_graphs, "_on_current_device", lambda inputs: tried.append(inputs[0]))  # false: no capture
    for size in (5, 6, 5, 6, 7):  # never twice in a row
        graphed(size)
    assert tried == ([5, 6] if settled else [])


@pytest.mark.quick
def test_a_plan_that_changes_with_each_size_does_not_capture_for_ever() -> None:
    graphed = cuda_graphs.Graphed(lambda: (), [], [])
    made = 0
    for _ in range(100):  # batches of two sizes in turn, each with choices of its own
        if graphed.attempts < cuda_graphs.MOST_CAPTURES:
            graphed.attempts += 1
            made += 1
        graphed.reset(enabled=True)
    assert cuda_graphs.MOST_CAPTURES <= made < 2 * cuda_graphs.MOST_CAPTURES


def facts(live: int) -> Tensor:
    return torch.tensor([live, *[0] * 7])
