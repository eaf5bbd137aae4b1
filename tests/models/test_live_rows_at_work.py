"""Models without the rows of their batches that nobody reads: what is compiled, run as CUDA graphs, let go of."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastft.compat import inductor
from fastft.kernels import attention_engines
from fastft.kernels.core import dispatch, launch_plan
from fastft.rewriter.rows import live_rows, moves
from fastft.rewriter.rows.selection import Selection
from fastft.rewriter.runtime import cuda_graphs, row_choice, row_watch
from models.families import Family, build, step, truth
from models.padded_models import (
    LAYERS,
    LENGTH,
    SIDES,
    UNDERSTOOD,
    Compiled,
    assert_same,
    batch,
    pair,
    without_first,
)
from models.test_families import by_name


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Selection | None, int]]:
    """What is chosen for each batch."""
    of, found = row_choice.RowChoice.of, []
    monkeypatch.setattr(row_choice.RowChoice, "of", lambda self, values: (found.append(of(self, values)), found[-1])[1])
    return found


@by_name(UNDERSTOOD[:2])
@pytest.mark.parametrize(
    "inputs", [batch("right"), batch("left"), batch("right", (LENGTH,) * 5)], ids=["pads", "left", "full"]
)
def test_the_first_batch_is_expected(
    family: Family, inputs: dict[str, Tensor], chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled ahead is for the sizes that the layers then meet."""
    expecting, expected = inductor.expecting, []
    monkeypatch.setattr(inductor, "expecting", lambda sizes: (expected.append(sizes), expecting(sizes))[1])
    model, _ = pair(family)
    compiled = Compiled(model)
    state = torch.get_rng_state()
    model(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
    (sizes,), ((selected, max_seqlen),) = expected, chosen
    assert [*sizes.values()] == [*([1, selected.size] if selected is not None else []), max_seqlen]
    assert (selected is None) == bool(inputs["attention_mask"].all())
    assert not compiled.rows.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding", "documents", "eager's attention"])
@by_name(UNDERSTOOD[:1])
def test_batches_that_are_not_looked_at(family: Family, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As small ones are run: attention reads the ranges that the model has, and none that were made for live rows."""
    monkeypatch.setattr(row_watch.Watch, "waits", lambda self, hidden: False)
    told, unlooked = [], row_choice.RowChoice.unlooked
    monkeypatch.setattr(
        row_choice.RowChoice, "unlooked", lambda self, length: (told.append(unlooked(self, length)), told[-1])[1]
    )
    model, eager = pair(family)
    for one in (model, eager):
        one.get_base_model().set_attn_implementation("eager" if kind == "eager's attention" else "sdpa")
    compiled = Compiled(model)
    inputs = batch("right")
    if kind == "documents":
        del inputs["attention_mask"]
        inputs["position_ids"] = (torch.arange(LENGTH) % 20).expand(len(inputs["labels"]), -1).contiguous()
    assert_same(model, eager, inputs)
    assert {*told} == {attention_engines.NO_RANGES if kind == "padding" else attention_engines.AS_GIVEN}
    assert not compiled.rows.reason
    assert not compiled.rows.forwards


@pytest.mark.slow
def test_kernels_are_compiled_for_the_first_batch_alone(planned_here: dict[str, launch_plan.Plan]) -> None:
    """By the whole way: each op is recorded once, for the rows of a padded batch."""
    model, eager = pair(UNDERSTOOD[0])
    Compiled(model, lower="inductor")
    assert_same(model, eager, batch("right"))
    plans = planned_here.values()
    assert {plan.name for plan in plans} > {"fastft::attention", "fastft::lora_linear", "fastft::rms_norm"}
    assert all(len(plan.variants) == 1 for plan in plans)


@by_name(UNDERSTOOD[:1])
def test_few_sizes_where_layers_run_as_cuda_graphs(
    family: Family, chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_watch.Watch, "in_graphs", True)
    model, eager = pair(family)
    compiled = Compiled(model)
    for lengths in ((64, 40, 9, 23, 2), (64, 30, 20, 23, 9), (20, 10, 9, 23, 2)):
        assert_same(model, eager, batch("right", lengths))
    assert [selected.size for selected, _ in chosen] == [160, 160, 80]  # parts of 5 * 64
    assert not compiled.rows.reason


def distances(found: Any, exact: Any, names: list[str]) -> Tensor:
    """How far off the loss is, and the gradients of these names, each to the size of what is exact."""
    pairs = [(found.loss, exact.loss), *((found.gradients[name], exact.gradients[name]) for name in names)]
    return torch.stack([((mine - true).norm() / true.norm()).double() for mine, true in pairs])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [None, True], ids=["", "graphs"])
@pytest.mark.parametrize("nf4", [False, True], ids=["plain", "nf4"])
@by_name([family for family in UNDERSTOOD if family.name in ("llama", "gemma2", "qwen3")])
def test_on_a_card(family: Family, nf4: bool, graphs: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, by the whole way: as near to float32 as the unmodified model, with and without padding."""
    device, dtype = "cuda", torch.bfloat16
    model = build(family, nf4=nf4, checkpoint=False, train_norms=True, layers=LAYERS, dtype=dtype, device=device)
    eager = copy.deepcopy(model)
    compiled = Compiled(model, lower="inductor", cuda_graphs=graphs)
    capture, captures = cuda_graphs.Capture.of, []
    monkeypatch.setattr(cuda_graphs.Capture, "of", lambda *given: (captures.append(given), capture(*given))[1])
    monkeypatch.setattr(row_watch, "WORTH", 0)  # as this model is small
    full = batch("right", (LENGTH,) * 5)
    padded = [without_first(batch(side)) for side in SIDES]
    errors = []
    for inputs in (*padded, full, *(batch("right", seed=7) for _ in range(3)), *(padded if graphs else ())):
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        exact = truth(eager, inputs)
        names = [name for name in exact.gradients if exact.gradients[name].norm() > 0]
        errors.append([distances(step(one, inputs, one), exact, names) for one in (model, eager)])
    # Eager attention on a card has NaN for gradients where a row has no keys: other batches tell how far off it is.
    usual = torch.stack([others for _, others in errors]).nan_to_num(0.0).amax(0)
    errors = [(mine, others.where(others.isfinite(), usual)) for mine, others in errors]
    for mine, others in errors:
        assert mine.max() <= 3 * others.max() + 1e-2, (mine.max(), others.max())
    mine, others = map(torch.cat, zip(*errors, strict=True))  # of one batch either may be twice the other's, by chance
    assert mine.median() <= 1.5 * others.median() + 1e-3, (mine.median(), others.median())
    assert not compiled.rows.reason
    assert compiled.rows.live < compiled.rows.rows
    assert 0 < len(captures) <= row_watch.PARTS  # unasked too, as batches have one shape


@by_name(UNDERSTOOD[:1])
def test_rows_that_are_left_out_are_let_go_of(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole batch's hidden states are freed before the layers."""
    taken: list[StorageWeakRef] = []
    freed: list[bool] = []
    forward, fill = moves.Taken.forward, dispatch.fill

    def noted(ctx: Any, whole: Tensor, *arguments: Any) -> Tensor:
        taken.append(StorageWeakRef(whole.untyped_storage()))
        return forward(ctx, whole, *arguments)

    def asked(*arguments: Any) -> None:
        freed.append(all(one.expired() for one in taken))
        fill(*arguments)

    model, _ = pair(family)
    compiled = Compiled(model, memory_budget="max-speed")
    inputs = batch("right")
    model(**inputs)
    monkeypatch.setattr(moves.Taken, "forward", noted)
    monkeypatch.setattr(dispatch, "fill", asked)
    model(**inputs)
    assert len(freed) >= LAYERS
    assert all(freed)
    assert taken
    assert not compiled.rows.reason


@by_name(UNDERSTOOD[:1])
def test_a_failure_costs_the_rule_alone(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of changing a graph and the bodies of its layers, the worst moment."""
    restrict, calls = live_rows._restrict, []

    def failing(*arguments: Any) -> None:
        restrict(*arguments)
        calls.append(arguments)
        raise RuntimeError("forced")

    monkeypatch.setattr(live_rows, "_restrict", failing)
    model, eager = pair(family)
    compiled = Compiled(model, strict=False)
    with pytest.warns(RuntimeWarning, match="runs every row of a padded batch, because of RuntimeError: forced"):
        assert_same(model, eager, batch("right"))
    assert calls
    assert compiled.rows.reason == "it could not be prepared: RuntimeError: forced"
    assert compiled.reports[-1].regions
    torch._dynamo.reset()
    compiled = Compiled(pair(family)[0])
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="forced"):
        compiled.model(**batch("right"))
