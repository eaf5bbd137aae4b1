"""The throughput of a device, measured once for each kind of card and cached beside torch's caches."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastft.compat import aot


@dataclass(frozen=True)
class Rates:
    """The throughput of a device per second.

    flops: of a 16-bit matrix product.  bytes: read or written.  to_host, from_host: bytes copied to and from pinned
    host memory while it computes.
    """

    flops: float
    bytes: float
    to_host: float
    from_host: float


# For devices that are not measured, CPUs among them: ratios like those of an H100, so that plans are similar.
TYPICAL = Rates(flops=6.5e14, bytes=2.9e12, to_host=4.5e10, from_host=4.5e10)
_STEPS = 8  # for each doubling: a measured rate is rounded to one of them, which hides most of its noise


def rates(device: torch.device) -> Rates:
    """Return a device's rates; a kind of card without stored rates is measured in a tenth of a second."""
    return _rates(device.index or 0) if device.type == "cuda" else TYPICAL


@functools.cache
def _rates(index: int) -> Rates:
    name = torch.cuda.get_device_name(index).replace(" ", "-")
    path = Path(aot.cache_folder()) / "fastft" / f"rates-{name}.json"
    try:
        return Rates(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        measured = _measure(index)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(measured)))
    except OSError:
        pass  # the folder is read-only: every process measures for itself
    return measured


def _measure(index: int) -> Rates:
    with torch.cuda.device(index), torch.no_grad():
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        square = torch.randn(4096, 4096, dtype=dtype, device="cuda")
        large = torch.empty(2**27, dtype=torch.uint8, device="cuda")
        other, host = torch.empty_like(large), torch.empty(2**27, dtype=torch.uint8, pin_memory=True)
        product = torch.empty_like(square)
        return Rates(
            flops=_rounded(2 * 4096**3 / _seconds(lambda: torch.mm(square, square, out=product))),
            bytes=_rounded(2 * large.numel() / _seconds(lambda: other.copy_(large))),
            to_host=_rounded(large.numel() / _seconds(lambda: host.copy_(large, non_blocking=True))),
            from_host=_rounded(large.numel() / _seconds(lambda: large.copy_(host, non_blocking=True))),
        )


def _seconds(work: Callable[[], Any]) -> float:
    """Return the time in seconds of the fastest of 6 repetitions."""
    work()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def _rounded(rate: float) -> float:
    """Round a rate to the nearest of _STEPS steps per doubling."""
    exponent = round(_STEPS * torch.tensor(rate, dtype=torch.float64).log2().item())
    return 2.0 ** (exponent / _STEPS)
