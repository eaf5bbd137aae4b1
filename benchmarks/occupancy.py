"""Is a step bound by the host or by the GPU?  The host's time to issue it, and the time that the GPU works on it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workers import describe

Row = dict[str, Any]
Interval = tuple[float, float]
HOST_STEPS, PROFILED_STEPS = 5, 3
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")  # of the CUDA runtime


def occupancy(step: Callable[[], object], seconds: float, *, cuda: bool) -> Row:
    """Figures about ``step``, which takes ``seconds`` when nobody looks; all None without CUDA.

    host_s: from an empty queue until the host has issued the step.  It includes the model's own waits for the GPU
        (host_syncs, a step) and, where thousands of kernels fill the launch queue, waits for a place in it.
    gpu_busy_s: time with at least one kernel, copy or fill running.  The profiler may stretch kernels a little, so
        that gpu_busy, its share of ``seconds``, can come out above 1 for a step without a gap.
    occupancy_error: what failed; the figures found before it stay, and so does the row.
    """
    row: Row = dict.fromkeys(("host_s", "host_syncs", "gpu_busy_s", "gpu_busy", "occupancy_error"))
    if not cuda:
        return row
    try:
        row["host_s"] = host_seconds(step)
        events = profiled(step)
        row["host_syncs"] = waits(events)
        row["gpu_busy_s"] = busy_microseconds(events) / PROFILED_STEPS / 1e6
        row["gpu_busy"] = row["gpu_busy_s"] / seconds
    except Exception as error:  # a profiler that fails must not cost the times that are already there
        row["occupancy_error"] = describe(error)
    return row


def host_seconds(step: Callable[[], object]) -> float:
    times = []
    for _ in range(HOST_STEPS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(times)


def profiled(step: Callable[[], object]) -> list[Any]:
    """The profiler's events of a few steps.  The first time it runs it sets itself up: that step is thrown away."""
    for steps in (1, PROFILED_STEPS):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
    return list(profiler.events() or [])


def busy_microseconds(events: Iterable[Any]) -> float:
    spans = [(event.time_range.start, event.time_range.end) for event in events if is_work(event)]
    if not spans:
        raise RuntimeError("the profiler saw nothing on the GPU")
    return union(spans)


def is_work(event: Any) -> bool:
    """Whether an event is a kernel, a copy or a fill on the GPU, not a range that someone named nor a wait."""
    named = getattr(event, "is_user_annotation", False) or event.name.startswith(("ProfilerStep", "## "))
    return event.device_type == DeviceType.CUDA and not named and not event.name.endswith((" Sync", " Wait Event"))


def waits(events: Iterable[Any]) -> int | None:
    """The host's waits in each step; None where the profiler does not show the runtime's calls.

    Rounded down: the measurement's own waits at the end are fewer than the steps.
    """
    calls = [event.name for event in events if event.device_type == DeviceType.CPU and event.name.startswith("cuda")]
    return sum(name in WAITS for name in calls) // PROFILED_STEPS if calls else None


def union(spans: Iterable[Interval]) -> float:
    """The length of what the spans cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
