"""A scenario with and without fastft: how far apart, how far they may be, and what was lifted."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastft
from fastft.rewriter.report import GraphReport
from training.setting import Scenario, Setting

SMALL = 1e-3  # what is smaller is compared as if it were this
ROUNDINGS = 3  # weights that are a rounding away move what is seen by so much less than fastft may


@dataclass(frozen=True)
class Outcome:
    """What became of a scenario.

    difference: between what was seen with and without fastft, the largest, relative to its size.  allowed: so much,
    by what runs differ whose weights are a rounding apart.  graphs: of the run with fastft.
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
        return Counter(one.rule.split(".")[0] for graph in self.graphs for one in graph.lifted)

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


def outcome(scenario: Any, **settings: Any) -> Outcome:
    """Run it four times: as it is, twice with weights that are a rounding away, and with fastft."""
    plain = seen(scenario, **settings)
    size = plain.abs().clamp(min=SMALL)

    def difference(other: torch.Tensor) -> float:
        assert other.shape == plain.shape, f"{len(other)} numbers were seen, {len(plain)} without fastft"
        return ((other - plain).abs() / size).max().item()

    sensitivity = max(difference(seen(scenario, nudge=nudge, **settings)) for nudge in (1, 2))
    before = {id(graph) for graph in fastft.compilations().graphs}
    with_fastft = seen(scenario, compiled=True, **settings)
    graphs = [graph for graph in fastft.compilations().graphs if id(graph) not in before]
    atol = 8 * torch.finfo(torch.float32).eps
    title = (scenario.__doc__ or "").strip()
    return Outcome(scenario.__name__, title, difference(with_fastft), ROUNDINGS * sensitivity + atol, graphs)
