"""Describe a plan for the report: the simulated step, and what happens to each tensor of each kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastft.compat.symbolic import evaluate
from fastft.rewriter.memory import device_rates
from fastft.rewriter.memory.device_rates import Rates
from fastft.rewriter.memory.pareto import Choice
from fastft.rewriter.memory.simulate import Plan, Stage, StageSequence
from fastft.rewriter.report.plan import Item, PlanReport

LEAST_SHOWN = 2**10  # bytes of a tensor


def describe(
    report: PlanReport, sequence: StageSequence, plan: Plan, budget: Any, limit_bytes: int | None, device: torch.device
) -> None:
    """Fill in a report with this plan.

    budget: as the user wrote it.  limit_bytes: the same in bytes.  device: whose rates the microseconds follow from.
    """
    report.budget, report.limit_bytes = str(budget or "whatever is free"), limit_bytes
    rate = device_rates.rates(device)
    report.peak_bytes, report.peak_at, report.host_bytes = plan.peak_bytes, plan.peak.label, plan.host_bytes
    report.seconds, report.graphed = plan.seconds, plan.graphed
    report.moments = [(moment.label, dict(moment.parts)) for moment in plan.moments]
    if not plan.described:
        alike = _alike(sequence, plan)
        plan.described.extend(item for layers, stage, choice in alike for item in _items(layers, stage, choice, rate))
    report.items = list(plan.described)


def _alike(sequence: StageSequence, plan: Plan) -> list[tuple[str, Stage, Choice]]:
    """Group stages of the same structure and choice, each group with its name."""
    groups: dict[tuple[int, Choice], list[Stage]] = {}
    for stage, choice in zip(sequence.stages, plan.choices, strict=True):
        if stage.kind.joint is not None:
            groups.setdefault((id(stage.kind.joint), choice), []).append(stage)
    return [(_names(stages), stages[0], choice) for (_, choice), stages in groups.items()]


def _names(stages: Sequence[Stage]) -> str:
    first, last = stages[0].name, stages[-1].name
    return first if len(stages) == 1 else f"{first} … {last.rpartition('.')[2]} ({len(stages)} layers)"


def _within(stage: Stage, module: str) -> str:
    """Return a module's path inside its layer, such as mlp.down_proj."""
    stack = stage.name.rpartition(".")[0]
    return module.removeprefix(f"{stack}.").partition(".")[2] if stack and module.startswith(stack) else module


def _items(layers: str, stage: Stage, choice: Choice, rate: Rates) -> list[Item]:
    joint = stage.kind.joint
    assert joint is not None
    saved, recomputed = joint.closure(choice.ops)
    there_and_back = 1e6 / rate.to_host + 1e6 / rate.from_host
    items = []
    for index, op in enumerate(joint.ops):
        scratch = evaluate(op.scratch, joint.hints)
        if op.forward and "lora_linear" in op.label and scratch >= LEAST_SHOWN:
            taken = 1.25 * scratch / rate.bytes * 1e6  # 16 bits written of 4 read
            items.append(Item(layers, "de-quantised", f"weights of {_within(stage, op.module)}", "", scratch, taken))
        for made in op.makes if op.forward else ():
            storage = joint.storages[made]
            size = evaluate(storage.bytes, joint.hints)
            fate = "recomputed" if index in recomputed else "offloaded" if storage.name in choice.offloaded else "kept"
            if size >= LEAST_SHOWN and (index in recomputed or made in saved) and op.materialized:
                name = f"{_within(stage, op.module)} {op.label.removeprefix('fastft.')}".strip()
                taken = size * there_and_back if fate == "offloaded" else op.seconds * 1e6
                items.append(Item(layers, fate, name, f"{storage.dtype} {storage.shape}", size, taken))
    for number in saved:
        storage = joint.storages[number]
        if storage.input is not None and storage.name in choice.offloaded:
            size = evaluate(storage.bytes, joint.hints)
            shape, taken = f"{storage.dtype} {storage.shape}", size * there_and_back
            items.append(Item(layers, "offloaded", "hidden_states, its input", shape, size, taken))
    return items
