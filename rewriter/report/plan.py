"""A memory plan as text and numbers alone, which outlive the graph; memory/describe.py fills them in."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

from fastft.rewriter.report import memory_plot
from fastft.units import MIB, format_bytes

ERROR = "beyond the simulation"
ACTIVATIONS = ("kept activations", "between layers", "at work")


@dataclass(frozen=True)
class Item:
    """A tensor of some layers: fate is kept, offloaded, recomputed, or de-quantised for one product.

    microseconds: what its op takes to run again, the copies there and back, or the de-quantising, for each layer.
    """

    layers: str
    fate: str
    tensor: str
    shape: str
    bytes: int
    microseconds: float


@dataclass
class PlanReport:
    """budget: the user's word.  limit_bytes: what it came to, None for no limit and 0 for the least.

    moments: of a simulated step, what holds how many bytes.  measured_bytes: the peak of the first steps, where it was
    measured; corrections: how often the plan was made anew for it or for a lack of memory.
    """

    budget: str = ""
    limit_bytes: int | None = None
    peak_bytes: int = 0
    peak_at: str = ""
    host_bytes: int = 0
    seconds: float = 0.0
    graphed: bool = False
    measured_bytes: int | None = None
    corrections: int = 0
    items: list[Item] = field(default_factory=list)
    moments: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    def __str__(self) -> str:
        limit = {None: "no limit", 0: "as little as possible"}.get(self.limit_bytes)
        wanted = limit or format_bytes(self.limit_bytes or 0)
        measured = f", {format_bytes(self.measured_bytes)} measured" if self.measured_bytes is not None else ""
        host = f"; {format_bytes(self.host_bytes)} in host memory" if self.host_bytes else ""
        again = f"; corrected {self.corrections}×" if self.corrections else ""
        return (
            f"budget {self.budget}: {wanted}; planned peak {format_bytes(self.peak_bytes)} in {self.peak_at}{measured}"
            f"{host}; backward takes {self.seconds * 1e3:.1f} ms longer than if all were kept{again}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Return layers, tensor, shape, fate, MiB and microseconds of each item, for a table."""
        return [
            (one.layers, one.tensor, one.shape, one.fate, f"{one.bytes / MIB:,.2f}", f"{one.microseconds:,.0f}")
            for one in self.items
        ]

    def draw(self, target: str | Path | io.BytesIO, form: str = "png") -> None:
        """Draw the bytes of a step over its moments, stacked by what holds them.  Needs matplotlib."""
        moments = [(label, _drawn(parts)) for label, parts in self.moments]
        limits = {"budget": self.limit_bytes, "measured peak": self.measured_bytes}
        memory_plot.draw(moments, limits, f"a step's memory as planned, budget {self.budget}", target, form)

    def html(self) -> str:
        """Return the picture as an <img> that needs no file, "" where it cannot be drawn."""
        buffer = io.BytesIO()
        try:
            self.draw(buffer)
        except ImportError:
            return ""
        return (
            f'<img alt="memory of a step" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        )


def _drawn(parts: dict[str, int]) -> dict[str, int]:
    """Return bytes by holder; what was measured below the simulation is taken off the largest activations."""
    less = -min(0, parts.get(ERROR, 0))
    if less:
        largest = max(ACTIVATIONS, key=lambda name: parts.get(name, 0))
        parts = parts | {ERROR: 0, largest: max(0, parts.get(largest, 0) - less)}
    return parts
