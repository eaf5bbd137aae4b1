"""TRL's trainers of preferences, rewards and teachers: with fastft as without, and no tensor of all logits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastft.rewriter.report import history
from training import preference
from training.outcome import outcome, seen

LIFTED = {"rms_norm": 5, "rotary": 4, "glu": 2, "attention": 2}  # in a graph of the model's two layers
OWN_HEAD = {"sft", "dpo", "kto", "grpo", "rloo"}  # trainers whose head is TRL's own


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(history, "_graphs", deque(maxlen=history.LIMIT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # generation is thousands of tiny calls: beside other processes, threads wait for threads
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("scenario", preference.PREFERENCE, ids=lambda one: one.__name__)
def test_trainers(scenario: Any) -> None:
    scenario.memory.clear()
    found = outcome(scenario)
    assert found.right, f"{found.difference:.1e} apart, {found.allowed:.1e} allowed"
    graphs = [graph for graph in found.graphs if any(one.rule.startswith("attention") for one in graph.lifted)]
    assert graphs
    for graph in found.graphs:
        assert not graph.failure
        assert not graph.reads
    for graph in graphs:
        counts = {rule: sum(one.rule.split(".")[0] == rule for one in graph.lifted) for rule in LIFTED}
        assert counts == LIFTED
    assert found.lifted["linear_token_statistics"] == (len(graphs) if scenario.__name__ in OWN_HEAD else 0)
    assert scenario.memory[0].largest < preference.MUCH


def test_the_watch_would_see_all_logits() -> None:
    """One that could not would let every trainer pass: ORPO's own code makes them."""
    (scenario,) = (one for one in preference.PREFERENCE if one.__name__ == "orpo")
    scenario.memory.clear()
    seen(scenario)
    assert scenario.memory[0].largest >= preference.LOGITS


def test_memory_of_what_was_profiled() -> None:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        first = torch.empty(1000)
        second = torch.empty(3000)
        del first, second
        torch.empty(2000)
    assert preference.memory_of(profiled) == preference.Memory(largest=12000, peak=16000)
