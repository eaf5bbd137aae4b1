"""benchmarks/occupancy.py: intervals, which events count, and what a failure leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import occupancy


def event(name: str, start: float, end: float, device: Any = DeviceType.CUDA, **more: Any) -> Any:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end), **more)


@pytest.mark.parametrize(
    ("spans", "covered"),
    [
        ([], 0.0),
        ([(0, 2), (5, 6)], 3.0),
        ([(5, 6), (0, 2), (1, 4)], 5.0),  # out of order, overlapping
        ([(0, 10), (2, 3), (4, 12)], 12.0),  # one inside another must not pull the end back
        ([(0, 1), (1, 2)], 2.0),
    ],
)
def test_union(spans: list[tuple[float, float]], covered: float) -> None:
    assert occupancy.union(spans) == covered


def test_only_work_on_the_gpu_counts() -> None:
    events = [
        event("triton_poi_fused_0", 0, 10),
        event("Memcpy HtoD (Pageable -> Device)", 5, 20, is_user_annotation=False),
        event("Memset (Device)", 30, 31),
        event("Optimizer.step#AdamW.step", 0, 100, is_user_annotation=True),
        event("## Call CompiledFxGraph ##", 0, 100),
        event("Context Sync", 0, 100),
        event("Stream Wait Event", 0, 100),
        event("cudaLaunchKernel", 0, 100, DeviceType.CPU),
    ]
    assert occupancy.busy_microseconds(events) == 21
    with pytest.raises(RuntimeError, match="saw nothing"):
        occupancy.busy_microseconds(events[3:])


def test_waits_of_the_host() -> None:
    launch = event("cudaLaunchKernel", 0, 1, DeviceType.CPU)
    wait = event("cudaStreamSynchronize", 0, 1, DeviceType.CPU)
    end = event("cudaDeviceSynchronize", 0, 1, DeviceType.CPU)
    assert occupancy.waits([launch, end]) == 0
    assert occupancy.waits([launch, *[wait] * 2 * occupancy.PROFILED_STEPS, end]) == 2
    assert occupancy.waits([event("kernel", 0, 1)]) is None


def test_events_of_this_torch_have_what_is_read() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(8).sum()
    events = list(profiler.events() or [])
    assert any(event.name == "aten::sum" and event.time_range.end > event.time_range.start for event in events)
    assert not any(map(occupancy.is_work, events))  # reads device_type of all


def test_what_was_found_before_a_failure_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: Any) -> Any:
        raise RuntimeError("no profiler\nhere")

    monkeypatch.setattr(occupancy, "host_seconds", lambda step: 0.25)
    monkeypatch.setattr(occupancy, "profiled", broken)
    row = occupancy.occupancy(lambda: None, 1.0, cuda=True)
    assert (row["host_s"], row["gpu_busy_s"], row["gpu_busy"]) == (0.25, None, None)
    assert row["occupancy_error"] == "RuntimeError: no profiler"


def test_the_share_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "host_seconds", lambda step: 0.25)
    monkeypatch.setattr(occupancy, "profiled", lambda step: [event("kernel", 0, 3 * occupancy.PROFILED_STEPS * 1e5)])
    row = occupancy.occupancy(lambda: None, 0.4, cuda=True)
    assert row["gpu_busy_s"] == pytest.approx(0.3)
    assert row["gpu_busy"] == pytest.approx(0.75)
    assert row["occupancy_error"] is None
