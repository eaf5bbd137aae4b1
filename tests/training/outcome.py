"""A scenario with and without fastft: how far apart, how far they may be, and what was lifted."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastft
from fastft.rewriter.report.data import GraphReport
from training.setting import Scenario, Setting

SMALL = 1e-3  # what is smaller is compared as if it were this
ROUNDINGS = 3  # weights that are a rounding away move what is seen by so much less than fastft may


@dataclass(frozen=True)
class Outcome:
    """What became of a scenario.

    difference: between what was seen with and without fastft, relative to its size, where it is nearest to what is
    allowed, by what runs differ whose weights are a rounding apart.  graphs: of the run with fastft.
    """

    name: str
    title: str
    difference: float
    allowed: float
    graphs: Sequence[GraphReport]

    @property
    def right(self) -> bool:
        return self.difference <= self.allowed

    @property
    def lifted(self) -> Counter[str]:
        """How often something became an op, by the first word of its rule."""
        return lifted_in(self.graphs)

    @property
    def fused(self) -> int:
        return sum(len(graph.fused) for graph in self.graphs)


def seen(scenario: Scenario, **settings: Any) -> torch.Tensor:
    """Run it, from nothing."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), **settings)
        setting.seed()
        values = torch.tensor(list(scenario(setting)), dtype=torch.float64)
    assert torch.isfinite(values).all(), "what is seen is not finite: choose another learning rate"
    return values


def seen_with_fastft(scenario: Scenario, **settings: Any) -> tuple[torch.Tensor, list[GraphReport]]:
    """What is seen with fastft, and the graphs that were compiled for it."""
    before = {id(graph) for graph in fastft.compilations().graphs}
    values = seen(scenario, compiled=True, **settings)
    return values, [graph for graph in fastft.compilations().graphs if id(graph) not in before]


def lifted_in(graphs: Sequence[GraphReport]) -> Counter[str]:
    """How often something became an op, by the first word of its rule."""
    return Counter(one.rule.split(".")[0] for graph in graphs for one in graph.lifted)


def compare(found: torch.Tensor, scenario: Scenario, **settings: Any) -> tuple[float, float]:
    """With the scenario without fastft: as it is, and twice with weights that are a rounding away.

    Where it is nearest to what is allowed, or furthest beyond: the difference relative to the size, and that allowed.
    What two right runs may differ by grows from step to step: it is by what nudged runs differ at this number, at those
    before, and at the next (a loss and its gradients go together).
    """
    plain, *nudged = (seen(scenario, nudge=nudge, **settings) for nudge in range(3))
    assert found.shape == plain.shape, f"{len(found)} numbers were seen, {len(plain)} without fastft"
    size = plain.abs().clamp(min=SMALL)
    sensitivity = torch.stack([(one - plain).abs() / size for one in nudged]).amax(0).cummax(0).values
    sensitivity = torch.maximum(sensitivity, torch.cat([sensitivity[1:], sensitivity[-1:]]))
    allowed = ROUNDINGS * sensitivity + 8 * torch.finfo(torch.float32).eps
    difference = (found - plain).abs() / size
    worst = (difference / allowed).argmax()
    return difference[worst].item(), allowed[worst].item()


def outcome(scenario: Any, **settings: Any) -> Outcome:
    """Run it with fastft, and compare."""
    found, graphs = seen_with_fastft(scenario, **settings)
    title = (scenario.__doc__ or "").strip()
    return Outcome(scenario.__name__, title, *compare(found, scenario, **settings), graphs)
