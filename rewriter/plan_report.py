"""What a plan of memory looks like: text and numbers alone, for the report, and a picture of a step."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastft.rewriter.costs import Rates
from fastft.rewriter.frontier import Choice
from fastft.rewriter.nodes import evaluate
from fastft.rewriter.planner import ACTIVATIONS, ERROR, GIB, MIB, Plan, Row, Stage, text_of

LEAST_SHOWN = 2**10  # bytes of a tensor
_COLOURS = ("#bbbbbb", "#8c8c8c", "#ddcc77", "#66ccee", "#4477aa", "#228833", "#ee6677", "#aa3377")


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

    def follow(self, row: Row, plan: Plan, budget: str, limit_bytes: int | None, rate: Rates) -> None:
        """Describe this plan."""
        self.budget, self.limit_bytes = budget, limit_bytes
        self.peak_bytes, self.peak_at, self.host_bytes = plan.peak_bytes, plan.peak.label, plan.host_bytes
        self.seconds, self.graphed = plan.seconds, plan.graphed
        self.moments = [(moment.label, dict(moment.parts)) for moment in plan.moments]
        self.items = [
            item for layers, stage, choice in _alike(row, plan) for item in _items(layers, stage, choice, rate)
        ]

    def __str__(self) -> str:
        limit = {None: "no limit", 0: "as little as possible"}.get(self.limit_bytes)
        wanted = limit or text_of(self.limit_bytes or 0)
        measured = f", {text_of(self.measured_bytes)} measured" if self.measured_bytes is not None else ""
        host = f"; {text_of(self.host_bytes)} in host memory" if self.host_bytes else ""
        again = f"; corrected {self.corrections}×" if self.corrections else ""
        return (
            f"budget {self.budget}: {wanted}; planned peak {text_of(self.peak_bytes)} in {self.peak_at}{measured}"
            f"{host}; backward takes {self.seconds * 1e3:.1f} ms longer than if all were kept{again}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """layers, tensor, shape, fate, MiB and microseconds, for a table."""
        return [
            (one.layers, one.tensor, one.shape, one.fate, f"{one.bytes / MIB:,.2f}", f"{one.microseconds:,.0f}")
            for one in self.items
        ]

    def draw(self, target: str | Path | io.BytesIO, form: str = "png") -> None:
        """The bytes of a step over its moments, stacked by what holds them.  Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        axis = figure.subplots()
        moments = [_drawn(moment) for moment in self.moments]
        names = list(dict.fromkeys(name for parts in moments for name in parts))
        shown = [name for name in names if any(parts.get(name, 0) for parts in moments)]
        at = [place + shift for place in range(len(self.moments)) for shift in (-0.5, 0.5)]
        heights = [[parts.get(name, 0) / GIB for parts in moments for _ in range(2)] for name in shown]
        colours = [_COLOURS[names.index(name) % len(_COLOURS)] for name in shown]
        axis.stackplot(at, *heights, labels=shown, colors=colours, linewidth=0)
        for limit, style, label in ((self.limit_bytes, "-", "budget"), (self.measured_bytes, "--", "measured peak")):
            if limit:
                axis.axhline(limit / GIB, color="black", linestyle=style, linewidth=1, label=label)
        axis.set_ylabel("allocated, GiB")
        axis.set_xlim(-0.5, len(self.moments) - 0.5)
        turn = next((place for place, (label, _) in enumerate(self.moments) if label.startswith("backward")), None)
        axis.set_xticks(
            [] if turn is None else [turn / 2, turn + turn / 2], [] if turn is None else ["forward", "backward"]
        )
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
        figure.suptitle(f"a step's memory as planned, budget {self.budget}", fontsize=10)
        figure.savefig(target, format=form, dpi=130)

    def html(self) -> str:
        """The picture as an <img> of its own, "" where it cannot be drawn."""
        buffer = io.BytesIO()
        try:
            self.draw(buffer)
        except ImportError:
            return ""
        return (
            f'<img alt="memory of a step" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
        )


def _drawn(moment: tuple[str, dict[str, int]]) -> dict[str, int]:
    """What holds memory; where less was measured than simulated, the largest part that is no fact is that much less."""
    parts = dict(moment[1])
    less = -min(0, parts.get(ERROR, 0))
    if less:
        largest = max(ACTIVATIONS, key=lambda name: parts.get(name, 0))
        parts |= {ERROR: 0, largest: max(0, parts.get(largest, 0) - less)}
    return parts


def _alike(row: Row, plan: Plan) -> list[tuple[str, Stage, Choice]]:
    """Stages of one structure and choice together, with what to call them."""
    groups: dict[tuple[int, Choice], list[Stage]] = {}
    for stage, choice in zip(row.stages, plan.choices, strict=True):
        if stage.kind.joint is not None:
            groups.setdefault((id(stage.kind.joint), choice), []).append(stage)
    return [(_names(stages), stages[0], choice) for (_, choice), stages in groups.items()]


def _names(stages: Sequence[Stage]) -> str:
    first, last = stages[0].name, stages[-1].name
    return first if len(stages) == 1 else f"{first} … {last.rpartition('.')[2]} ({len(stages)} layers)"


def _within(stage: Stage, module: str) -> str:
    """A module's path inside its layer: mlp.down_proj."""
    stack = stage.name.rpartition(".")[0]
    return module.removeprefix(f"{stack}.").partition(".")[2] if stack and module.startswith(stack) else module


def _items(layers: str, stage: Stage, choice: Choice, rate: Rates) -> list[Item]:
    joint = stage.kind.joint
    assert joint is not None
    saved, again = joint.closure(choice.ops)
    there_and_back = 1e6 / rate.to_host + 1e6 / rate.from_host
    found = []
    for at, op in enumerate(joint.ops):
        scratch = evaluate(op.scratch, joint.hints)
        if op.forward and "lora_linear" in op.label and scratch >= LEAST_SHOWN:
            taken = 1.25 * scratch / rate.bytes * 1e6  # 16 bits written of 4 read
            found.append(Item(layers, "de-quantised", f"weights of {_within(stage, op.module)}", "", scratch, taken))
        for made in op.makes if op.forward else ():
            storage = joint.storages[made]
            size = evaluate(storage.bytes, joint.hints)
            fate = "recomputed" if at in again else "offloaded" if storage.name in choice.offloaded else "kept"
            if size >= LEAST_SHOWN and (at in again or made in saved) and op.lies:
                name = f"{_within(stage, op.module)} {op.label.removeprefix('fastft.')}".strip()
                taken = size * there_and_back if fate == "offloaded" else op.seconds * 1e6
                found.append(Item(layers, fate, name, f"{storage.dtype} {storage.shape}", size, taken))
    for one in saved:
        storage = joint.storages[one]
        if storage.input is not None and storage.name in choice.offloaded:
            size = evaluate(storage.bytes, joint.hints)
            shape, taken = f"{storage.dtype} {storage.shape}", size * there_and_back
            found.append(Item(layers, "offloaded", "hidden_states, its input", shape, size, taken))
    return found
