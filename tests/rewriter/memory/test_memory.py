"""Budgets as users write them, and what optimizers will allocate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastft.rewriter.memory import device_budget, optimizer_state
from fastft.rewriter.options import Options, OptionsError, budget_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("14GiB", 14 * 2**30), ("12 GB", 12 * 10**9), (2**33, 2**33), (0.5, 0.5), ("50%", 0.5), ("12.5 %", 0.125),
        ("min", "min"), ("max-speed", "max-speed"), (None, None), ("1.5MiB", 3 * 2**19),
    ],
)  # fmt: skip
def test_budgets_are_read(written: Any, meant: Any) -> None:
    assert budget_of(written) == meant
    assert Options(memory_budget=written).budget == meant


@pytest.mark.parametrize("written", ["14", "fast", 0.0, 1.5, "0%", "200%", -1, 8, True, "GiB", [1]])
def test_what_is_no_budget_is_an_error_that_says_what_is(written: Any) -> None:
    with pytest.raises(OptionsError, match="'memory_budget' is bytes such as '14GiB'"):
        Options(memory_budget=written)


def test_budgets_in_bytes() -> None:
    assert device_budget.budget_bytes("max-speed", CPU) is None
    assert device_budget.budget_bytes("min", CPU) == 0
    assert device_budget.budget_bytes(2**30, CPU) == 2**30
    assert device_budget.budget_bytes(0.5, CPU) is None  # a CPU has no memory of its own to share


OPTIMIZERS: dict[str, Callable] = {
    "AdamW": torch.optim.AdamW,
    "AdamW amsgrad": lambda ones: torch.optim.AdamW(ones, amsgrad=True),
    "SGD": lambda ones: torch.optim.SGD(ones, lr=0.1),
    "SGD momentum": lambda ones: torch.optim.SGD(ones, lr=0.1, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
    "NAdam": torch.optim.NAdam,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_to_come_is_what_an_optimizer_allocates(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(300))]
    optimizer = OPTIMIZERS[name](parameters)
    expected = optimizer_state.state_bytes(optimizer, CPU)
    for one in parameters:
        one.grad = torch.randn_like(one)
    optimizer.step()
    tensors = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor)]
    assert expected == sum(one.numel() * one.element_size() for one in tensors if one.numel() > 1)
    assert optimizer_state.state_bytes(optimizer, CPU) == 0 or name == "SGD"  # nothing more is to come


def test_without_an_optimizer_adam_is_to_come() -> None:
    facts = device_budget.facts(torch.device("meta"), 100, 40)
    assert (facts.before, facts.optimizer) == (100, 80)


def test_eight_bits_and_pages_are_known() -> None:
    bnb = pytest.importorskip("bitsandbytes.optim")
    parameters = [torch.nn.Parameter(torch.randn(64, 64)), torch.nn.Parameter(torch.randn(300))]
    assert optimizer_state.state_bytes(bnb.AdamW8bit(parameters), CPU) == 2 * (4096 + 4 * 16) + 2 * 4 * 300
    assert optimizer_state.state_bytes(bnb.PagedAdamW8bit(parameters), CPU) == 0
