"""A whole model under budgets: the same bits whatever is kept, repeated or offloaded, and plans keep to their word."""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastft
from fastft.rewriter.memory import device_rates, pareto, planner
from fastft.rewriter.runtime import controller
from fastft.rewriter.runtime.planned_graph import Planned
from models.families import FAMILIES, batch, build

LAYERS = 3
LLAMA = FAMILIES[0]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]


@pytest.fixture(autouse=True)
def alone_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward of another test waits for a backward, and small tensors may go to the host."""
    monkeypatch.setattr(controller, "alive", weakref.WeakSet())
    monkeypatch.setattr(pareto, "LEAST_OFFLOAD", 1)


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def model_of(device: str, *, dropout: float = 0.25, checkpoint: bool = False, nf4: bool = False) -> nn.Module:
    """On a GPU always of 4 bits, which double the time that torch traces for."""
    torch._dynamo.reset()
    gc.collect()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings: dict[str, Any] = {"nf4": nf4 or device == "cuda", "checkpoint": checkpoint, "train_norms": True}
    model = build(LLAMA, **settings, layers=LAYERS, dtype=dtype, device=device)
    for module in model.modules():
        for name in getattr(module, "lora_dropout", {}):
            module.lora_dropout[name] = nn.Dropout(dropout)
    return model


def compiled(model: nn.Module, budget: Any, device: str = "cpu", **options: Any) -> tuple[Callable, list[Planned]]:
    """The model, and where its plans will be."""
    options |= {"lower": "inductor" if device == "cuda" else "eager", "strict": True, "memory_budget": budget}
    before = set(controller.alive)
    call = torch.compile(model, backend="fastft", options=options)

    class Made(list):
        def __iter__(self) -> Iterator[Planned]:
            return iter([one for one in controller.alive if one not in before])

    return call, Made()


def gradients(call: Callable, model: nn.Module, device: str) -> list[Tensor]:
    """Of a batch and the same again, accumulated."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    for _ in range(2):
        call(**batch(padded=False, length=64, device=device)).loss.backward()
    return grads_of(model)


def grads_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def large_batch(rows: int) -> dict[str, Tensor]:
    """On a GPU: so many times the rows of the others, each 16 times as long."""
    small = batch(padded=False, length=64, device="cuda")
    return {name: value.repeat(rows, 16) for name, value in small.items()}


def peak_of(planned: Planned) -> int:
    assert planned.controller.plan is not None
    return planned.controller.plan.peak_bytes


@pytest.mark.parametrize("device", DEVICES)
def test_bits_are_the_same_whatever_is_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = replace(device_rates.TYPICAL, to_host=1e12, from_host=1e12)  # whatever this card's are, the host is worth it
    monkeypatch.setattr(device_rates, "rates", lambda device: fast)
    model = model_of(device, nf4=True)
    # Without CUDA graphs, or the budget halfway is met by leaving them out and keeping as much as before.
    call, made = compiled(model, "max-speed", device, cuda_graphs=False)
    fastest = gradients(call, model, device)
    (planned,) = made
    low, high = planner.plan(planned.sequence, planned.controller.facts, 0).peak_bytes, peak_of(planned)
    plans, offloaded = {planned.choices}, 0
    graphs = len(fastft.compilations().graphs)
    for budget in ("min", (low + high) // 2):
        fastft.set_memory_budget(budget)
        for one, other in zip(gradients(call, model, device), fastest, strict=True):
            assert torch.equal(one, other), budget
        plans.add(planned.choices)
        offloaded += sum(choice.offloaded_bytes for choice in planned.choices)
        assert peak_of(planned) < high
    assert len(plans) == 3
    assert offloaded > 0
    assert len(fastft.compilations().graphs) == graphs  # a budget changes without compiling the model anew
    with pytest.raises(fastft.OptionsError):
        fastft.set_memory_budget("plenty")


def test_backward_may_run_twice() -> None:
    """Inductor's may not, which uses the memory of what was saved."""
    model = model_of("cpu")
    call, _ = compiled(model, "min")
    loss = call(**batch(padded=False)).loss
    loss.backward(retain_graph=True)
    once = grads_of(model)
    loss.backward()
    assert once
    assert all(torch.equal(2 * one, other) for one, other in zip(once, grads_of(model), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_is_interrupted_continues_with_the_same_bits(device: str, tmp_path: Path) -> None:
    """Compiled and planned anew: the same plan gives the same bits."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        call, _ = compiled(model, "min", device)
        losses = []
        for number in steps:
            optimizer.zero_grad()
            inputs = batch(padded=False, length=32, device=device)
            loss = call(**{name: value.roll(number, -1) for name, value in inputs.items()}).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = model_of(device)
        return model, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)

    torch.manual_seed(3)
    model, optimizer = fresh()
    torch.manual_seed(3)
    first = train(model, optimizer, range(2))
    rng = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    saved = tmp_path / "state.pt"
    trained = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    torch.save({"model": trained, "optimizer": optimizer.state_dict(), "rng": rng}, saved)
    expected = train(model, optimizer, range(2, 4))
    again, other = fresh()
    state = torch.load(saved)
    again.load_state_dict(state["model"], strict=False)
    other.load_state_dict(state["optimizer"])
    (torch.cuda.set_rng_state if device == "cuda" else torch.set_rng_state)(state["rng"].cpu())
    assert train(again, other, range(2, 4)) == expected
    assert first != expected


def test_a_larger_budget_is_never_slower_and_never_exceeded() -> None:
    model = model_of("cpu")
    call, made = compiled(model, "max-speed")
    call(**batch(padded=False, length=64))
    (planned,) = made
    controller = planned.controller
    low = planner.plan(planned.sequence, controller.facts, 0)
    high = planner.plan(planned.sequence, controller.facts, None)
    budgets = [low.peak_bytes + (high.peak_bytes - low.peak_bytes) * share // 16 for share in range(17)]
    plans = [planner.plan(planned.sequence, controller.facts, budget) for budget in budgets]
    assert all(plan.peak_bytes <= budget for plan, budget in zip(plans, budgets, strict=True))
    assert all(one.seconds >= other.seconds for one, other in pairwise(plans))
    assert len({plan.choices for plan in plans}) > 6  # the trade is smooth
    assert plans == [planner.plan(planned.sequence, controller.facts, budget) for budget in budgets]
    with pytest.raises(fastft.BudgetError, match=r"at the least, in backward of .*held before .*use a smaller batch"):
        planner.plan(planned.sequence, controller.facts, low.peak_bytes - 1)


def test_what_is_saved_is_what_was_planned() -> None:
    """The user's own hooks see every tensor; with them nothing is offloaded."""
    for budget in ("max-speed", "min"):
        model = model_of("cpu", dropout=0.0, nf4=True)
        call, made = compiled(model, budget)
        call(**batch(padded=False, length=64)).loss.backward()
        (planned,) = made
        own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.dtype.is_floating_point and tensor.numel() > 256:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = call(**batch(padded=False, length=64))
        assert out.loss.requires_grad
        del out  # what waits for its backward would be planned for too
        plan = planned.controller.plan
        assert plan is not None
        parts = next(moment.parts for moment in plan.moments if moment.label.startswith("backward"))
        offloaded = sum(choice.offloaded_bytes for choice in plan.choices)
        expected = parts["kept activations"] + parts["between layers"] + offloaded
        assert sum(kept.values()) == pytest.approx(expected, rel=0.06), budget


def test_too_small_a_budget_says_what_the_least_is() -> None:
    model = model_of("cpu")
    call, _ = compiled(model, "1.2MiB")
    with pytest.raises(fastft.BudgetError, match=r"^memory_budget of 1\.20 MiB is below the .* at the least"):
        call(**batch(padded=False, length=64))


@pytest.mark.parametrize("device", DEVICES)
def test_checkpoints_of_the_user_give_way_to_the_plan(device: str) -> None:
    plain = model_of(device, dropout=0.0)
    expected = gradients(plain, plain, device)
    model = model_of(device, dropout=0.0, checkpoint=True)
    call, made = compiled(model, "max-speed", device)
    found = gradients(call, model, device)
    kept = [len(choice.kept) for planned in made for choice in planned.choices]
    assert max(kept) > 5
    inlined = [name for graph in fastft.compilations().graphs[-3:] for name in graph.inlined]
    assert sum("layers" in name for name in inlined) == LAYERS
    tolerance = 1e-5 if device == "cpu" else 0.1  # in bfloat16 eager itself is as far from the truth
    for one, other in zip(found, expected, strict=True):
        assert (one - other).float().norm() <= tolerance * other.float().norm()


def test_forwards_before_backwards_share_a_plan() -> None:
    """Two models of one structure are one graph, which runs twice: both together keep to the budget of one."""
    models = [model_of("cpu", dropout=0.0), model_of("cpu", dropout=0.0)]
    expected = [gradients(model, model, "cpu") for model in models]
    alone, made = compiled(models[0], "max-speed")
    alone(**batch(padded=False, length=64)).loss.backward()
    (planned,) = made
    twice = planner.plan(planner.concatenate([planned.sequence] * 2), planned.controller.facts, None)
    once = planned.controller.plan.moments
    waiting = next(one.parts for one in once if one.label.startswith("backward"))  # what is there until then
    for name in ("kept activations", "between layers"):
        most = max(moment.parts[name] for moment in once)
        assert max(moment.parts[name] for moment in twice.moments) == most + waiting[name]
    budget = int(1.3 * peak_of(planned))
    calls, all_made = zip(*(compiled(model, budget) for model in models), strict=True)
    for model in models:
        model.zero_grad(set_to_none=True)
    for _ in range(2):
        losses = [call(**batch(padded=False, length=64)).loss for call in calls]
        sum(losses).backward()
    (planned,) = all_made[0]
    controller = planned.controller
    assert controller.forwards == [planned, planned]
    assert controller.plan is not None
    assert controller.plan.peak_bytes <= budget
    assert len({*controller.choices}) == 2  # the first keeps less, as it keeps it for longer
    for model, grads in zip(models, expected, strict=True):
        for one, other in zip((p.grad for p in model.parameters() if p.grad is not None), grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_of_two_budgets_at_once_the_strictest_rules() -> None:
    fast, lean = model_of("cpu"), model_of("cpu")
    first, made_first = compiled(fast, "max-speed")
    waiting = first(**batch(padded=False, length=64)).loss
    second, _ = compiled(lean, "min")
    second(**batch(padded=False, length=64)).loss.backward()
    waiting.backward()
    (controller,) = {id(one.controller): one.controller for one in made_first}.values()
    assert len(controller.members) == 2
    assert controller.limit_bytes == 0


def test_the_report_says_what_becomes_of_each_tensor(tmp_path: Path) -> None:
    model = model_of("cpu", nf4=True)
    call, _ = compiled(model, "min")
    call(**batch(padded=False, length=64)).loss.backward()
    report = fastft.compilations()
    plan = report.graphs[-1].plan
    assert plan is not None
    assert {item.fate for item in plan.items} >= {"offloaded", "recomputed", "de-quantised"}
    assert all(item.bytes > 0 and item.microseconds > 0 for item in plan.items)
    assert any(item.tensor.startswith("mlp.") for item in plan.items)
    text = str(report)
    assert "as little as possible; planned peak" in text
    assert "de-quantised" in text
    plan.draw(tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    report.save(tmp_path / "report.html")
    assert "data:image/png;base64" in (tmp_path / "report.html").read_text()


def test_lengths_that_change_are_planned_for() -> None:
    model = model_of("cpu", dropout=0.0)
    call, made = compiled(model, "min")
    for length in (32, 48, 64, 96):
        inputs = batch(padded=False, length=length)
        model.zero_grad(set_to_none=True)
        call(**inputs).loss.backward()
        found = grads_of(model)
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        for one, other in zip(found, (one.grad for one in model.parameters() if one.grad is not None), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    dynamic = [planned for planned in made if planned.sizes]
    assert len(dynamic) == 1
    (planned,) = dynamic
    symbol = max(planned.sizes, key=lambda one: planned.sizes[one])

    def least(length: int) -> int:
        return planner.plan(planned.sequence, planned.controller.facts, 0, planned.sizes | {symbol: length}).peak_bytes

    peaks = [least(length) for length in (64, 128, 4096)]
    assert peaks == sorted(set(peaks))
    assert planner.rounded(99) > 103  # for which others are planned too, where that fits
    fastft.set_memory_budget(least(99))
    call(**batch(padded=False, length=99)).loss.backward()
    with pytest.raises(fastft.BudgetError, match="at the least"):
        call(**batch(padded=False, length=103))


def test_after_memory_ran_out_a_plan_fits_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where test_memory_that_runs_out_leads_to_a_leaner_plan lets it run out."""
    model = model_of("cpu")
    call, made = compiled(model, "max-speed")
    expected = gradients(call, model, "cpu")
    (planned,) = made
    least, most = planner.plan(planned.sequence, planned.controller.facts, 0).peak_bytes, peak_of(planned)
    monkeypatch.setattr(controller, "_count_of_ooms", lambda device: 1)
    monkeypatch.setattr(controller.device_budget, "available_bytes", lambda device: (least + most) // 2)
    with pytest.warns(RuntimeWarning, match="ran out of memory .* the batch may be repeated"):
        assert planned.controller.replan_after_oom("the batch may be repeated")
    assert peak_of(planned) <= 0.9 * (least + most) / 2
    assert all(torch.equal(one, other) for one, other in zip(gradients(call, model, "cpu"), expected, strict=True))
    fastft.set_memory_budget("min")
    assert not planned.controller.replan_after_oom("it cannot be run again")


@pytest.mark.gpu
@on_gpu
def test_memory_that_runs_out_leads_to_a_leaner_plan() -> None:
    model = model_of("cuda")
    call, made = compiled(model, "max-speed", "cuda", cuda_graphs=False)
    long = large_batch(rows=64)
    expected = call(**long).loss
    expected.backward()
    (planned,) = made
    model.zero_grad(set_to_none=True)
    del expected
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_allocated()
    kept = next(m.parts["kept activations"] for m in planned.controller.plan.moments if m.label.startswith("backward"))
    torch.cuda.set_per_process_memory_fraction((held + 0.75 * kept) / total)
    try:
        with pytest.warns(RuntimeWarning, match="ran out of memory .* the step is run again"):
            loss = call(**long).loss
        loss.backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert loss.isfinite()


@pytest.mark.gpu
@on_gpu
def test_a_loop_that_counts_its_own_peaks_does_not_mislead_the_plan() -> None:
    model = model_of("cuda")
    call, made = compiled(model, "min", "cuda", cuda_graphs=False)
    long = large_batch(rows=16)
    peaks = []
    for _ in range(8):
        torch.cuda.reset_peak_memory_stats()
        call(**long).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
    (planned,) = made
    assert planned.report.measured_bytes in peaks
    assert peak_of(planned) == pytest.approx(planned.report.measured_bytes, rel=0.05)
