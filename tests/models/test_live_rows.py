"""Whole models without the rows of their batches that nobody reads: eager's loss and gradients, fewer operations."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import fastft
from fastft.compat import inductor
from fastft.kernels.core import dispatch, launch_plan
from fastft.rewriter import backend
from fastft.rewriter.rows import live_rows, moves
from fastft.rewriter.runtime import cuda_graphs, row_choice, row_watch
from models.families import FAMILIES, OTHERS, Family, build, step, truth
from models.test_families import by_name

LAYERS = 4  # from which on a graph is for any batch and length from the start
LENGTH = 64
LENGTHS = (64, 40, 9, 23, 2)
SIDES = ("right", "left", "holes")
EXPERTS = "gpt_oss"  # a loop over them breaks the graph
FLOPS_A_TOKEN = 1.10


def batch(side: str, lengths: tuple[int, ...] = LENGTHS, length: int = LENGTH, seed: int = 1) -> dict[str, Tensor]:
    """Rows of these lengths, padded on a side; the first third of the second row is a prompt, without labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 128, (len(lengths), length), generator=generator)
    place, sizes = torch.arange(length), torch.tensor(lengths)[:, None]
    read = place < sizes if side == "right" else place >= length - sizes
    if side == "holes":
        read = torch.rand(ids.shape, generator=generator) < sizes / length
    labels = ids.masked_fill(~read, -100)
    labels[1 % len(lengths), : length // 3] = -100
    return {"input_ids": ids, "attention_mask": read.long(), "labels": labels, "use_cache": False}


def without_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, and nothing has to tell the first token of a row: on the left, that would be padding."""
    first = inputs["attention_mask"].cumsum(1) == 1
    return inputs | {"labels": inputs["labels"].masked_fill(first, -100)}


class Compiled:
    """A model compiled in place, the reports of its graphs, and the operations of a step."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.model, self.reports, self.counter = model, [], None
        chosen = {"lower": "eager", "strict": True, **options}

        def counting(gm: GraphModule, example_inputs: list[Any]) -> Callable:
            with fastft.rewriter.report.history.recorded() as reports:
                run = backend.fastft(gm, example_inputs, options=chosen)
            self.reports += reports

            def call(*inputs: Any) -> Any:
                with self.counter or nullcontext():
                    return run(*inputs)

            return call

        counting.traces_layers_once = True  # type: ignore[attr-defined]
        torch._dynamo.reset()
        model.compile(backend=counting)

    def operations(self, inputs: dict[str, Tensor]) -> int:
        """Count those of a step, forward and backward, once all is compiled."""
        self.model(**inputs).loss.backward()
        self.counter = counter = FlopCounterMode(display=False)
        loss = self.model(**inputs).loss
        self.counter = None
        with counter:
            loss.backward()
        return counter.get_total_flops()

    @property
    def rows(self) -> Any:
        """What the report of the last graph says of rows."""
        return self.reports[-1].rows


def pair(family: Family, **more: Any) -> tuple[nn.Module, nn.Module]:
    """A model and the same again, which is not compiled."""
    model = build(family, nf4=False, checkpoint=False, train_norms=True, layers=LAYERS, **more)
    return model, copy.deepcopy(model)


def assert_same(model: nn.Module, eager: nn.Module, inputs: dict[str, Tensor], **more: Any) -> None:
    """Loss, the gradient of every parameter, and the logits of all tokens that are no padding."""
    results = []
    for one in (model, eager):
        one.zero_grad(set_to_none=True)
        outputs = one(**inputs, **more)
        outputs.loss.backward()
        results.append(outputs)
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-5, atol=1e-5)
    read = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones_like(inputs["labels"]).bool()
    torch.testing.assert_close(results[0].logits[read], results[1].logits[read], rtol=1e-4, atol=2e-5)
    assert results[0].logits.isfinite().all()
    assert_same_gradients(model, eager)


def assert_same_gradients(model: nn.Module, eager: nn.Module) -> None:
    """Each is up to 2.3e-5 of the largest element from what float64 gives (olmo2), so two are up to 5e-5 apart."""
    for (name, mine), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if other.grad is not None:
            scale = other.grad.abs().max().item()
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-4 * max(scale, 1e-2), msg=name)


UNDERSTOOD = [family for family in (*FAMILIES, *OTHERS) if family.head and family.name != EXPERTS]


@pytest.mark.slow
@by_name(UNDERSTOOD)
def test_rows_that_nobody_reads_cost_nothing(family: Family) -> None:
    """All families, padded on either side: eager's results, and at most a tenth more operations a token."""
    model, eager = pair(family)
    compiled = Compiled(model)
    for side in SIDES:
        assert_same(model, eager, batch(side))
    full = batch("right", (LENGTH,) * len(LENGTHS))
    assert_same(model, eager, full)
    assert len(compiled.reports) == 1
    if compiled.rows.reason:
        pytest.fail(compiled.rows.reason)
    assert 0 < compiled.rows.live < compiled.rows.rows
    of_full = compiled.operations(full) / int(full["attention_mask"].sum())
    for side in SIDES[:2]:
        padded = without_first(batch(side))
        assert compiled.operations(padded) / int(padded["attention_mask"].sum()) <= FLOPS_A_TOKEN * of_full


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "a row of padding alone": lambda: batch("right", (64, 0, 13, 30)),
    "one row": lambda: batch("right", (40,)),
    "one row, padded on the left": lambda: batch("left", (50,)),
    "positions": lambda: (one := batch("left")) | {"position_ids": (one["attention_mask"].cumsum(1) - 1).clamp(min=0)},
    "prompts": lambda: (
        (one := batch("right")) | {"labels": one["labels"].masked_fill(torch.arange(LENGTH) < LENGTH // 2, -100)}
    ),
    "labels of padding": lambda: (one := batch("right")) | {"labels": one["input_ids"]},
    "no padding": lambda: batch("right", (LENGTH,) * 3),
    "a token of each row": lambda: batch("right", (1, 1, 2)),
    "documents that end in padding": lambda: documents(),
    "the number of labels": lambda: (one := batch("right")) | {"num_items_in_batch": (one["labels"] != -100).sum() * 2},
}


def documents() -> dict[str, Any]:
    """Rows of documents told by positions that begin again, the last of which is padding."""
    one = batch("right", (50, 64, 31))
    positions = torch.arange(LENGTH) % 20
    return one | {"position_ids": positions.expand(3, -1).contiguous()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@by_name(UNDERSTOOD[:1])
def test_batches_of_all_kinds(family: Family, name: str) -> None:
    """After another batch, so that nothing is for one size; twice, as gradients are accumulated."""
    model, eager = pair(family)
    compiled = Compiled(model)
    inputs = CASES[name]()
    if len(inputs["input_ids"]) > 1:
        assert_same(model, eager, batch("right"))
    assert_same(model, eager, inputs)
    for one in (model, eager):
        for seed in (2, 3):
            one(**batch("left", seed=seed)).loss.backward()
    assert_same_gradients(model, eager)
    assert not compiled.rows.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "checkpoint", "budget", "inductor", "whole"])
@by_name(UNDERSTOOD[:1])
def test_models_of_all_kinds(family: Family, kind: str) -> None:
    more = {"nf4": kind in ("nf4", "budget"), "checkpoint": kind == "checkpoint"}
    model = build(family, train_norms=True, layers=LAYERS, lora=kind != "whole", **more)
    eager = copy.deepcopy(model)
    options: dict[str, Any] = {"budget": {"memory_budget": "1GiB"}, "inductor": {"lower": "inductor"}}.get(kind, {})
    compiled = Compiled(model, **options)
    for side in SIDES[:2]:
        assert_same(model, eager, batch(side))
    assert not compiled.rows.reason
    assert compiled.rows.live < compiled.rows.rows


@pytest.mark.slow
@by_name(UNDERSTOOD[:1])
def test_dropout_of_adapters(family: Family) -> None:
    """Its draws are others than eager's, and the mean of what they give is the same."""
    model, _ = pair(family)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout = nn.ModuleDict(dict.fromkeys(module.lora_dropout, nn.Dropout(0.3)))
    eager, inputs = copy.deepcopy(model), batch("right")
    compiled = Compiled(model)

    def gradient(one: nn.Module, seed: int) -> Tensor:
        """The mean of many draws."""
        torch.manual_seed(seed)
        total, times = torch.zeros(()), 100
        for _ in range(times):
            one.zero_grad(set_to_none=True)
            one(**inputs).loss.backward()
            total = total + torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]) / times
        return total

    expected = gradient(eager, 0)
    by_chance = (gradient(eager, 1) - expected).norm()
    assert by_chance > 0.01 * expected.norm()  # it does draw
    assert (gradient(model, 0) - expected).norm() < 1.2 * by_chance
    assert not compiled.rows.reason
    assert compiled.rows.live < compiled.rows.rows


@by_name(UNDERSTOOD[:2])
@pytest.mark.parametrize(
    "inputs", [batch("right"), batch("left"), batch("right", (LENGTH,) * 5)], ids=["pads", "left", "full"]
)
def test_the_first_batch_is_expected(
    family: Family, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled ahead is for the sizes that the layers then meet."""
    expected, chosen = [], []
    expecting, of = inductor.expecting, row_choice.RowChoice.of

    def noted(self: row_choice.RowChoice, values: Any) -> Any:
        chosen.append(of(self, values))
        return chosen[-1]

    monkeypatch.setattr(inductor, "expecting", lambda sizes: (expected.append(sizes), expecting(sizes))[1])
    monkeypatch.setattr(row_choice.RowChoice, "of", noted)
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
def test_kernels_are_compiled_for_the_first_batch_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the whole way: each op is recorded once, for the rows of a padded batch."""
    monkeypatch.setattr(launch_plan, "PLANNED_ON", {"cpu"})
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plans: dict[str, launch_plan.Plan] = {}
    monkeypatch.setattr(launch_plan, "_plans", plans)
    model, eager = pair(UNDERSTOOD[0])
    Compiled(model, lower="inductor")
    assert_same(model, eager, batch("right"))
    assert {plan.name for plan in plans.values()} > {"fastft::attention", "fastft::lora_linear", "fastft::rms_norm"}
    assert all(len(plan.variants) == 1 for plan in plans.values())


@by_name(UNDERSTOOD[:1])
def test_few_sizes_where_layers_run_as_cuda_graphs(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_watch.Watch, "in_graphs", True)
    of, sizes = row_choice.RowChoice.of, []

    def noted(self: row_choice.RowChoice, values: Any) -> Any:
        selected, max_seqlen = of(self, values)
        sizes.append(selected.size)
        return selected, max_seqlen

    monkeypatch.setattr(row_choice.RowChoice, "of", noted)
    model, eager = pair(family)
    compiled = Compiled(model)
    for lengths in ((64, 40, 9, 23, 2), (64, 30, 20, 23, 9), (20, 10, 9, 23, 2)):
        assert_same(model, eager, batch("right", lengths))
    assert sizes == [160, 160, 80]  # parts of 5 * 64
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
    assert bool(captures) == bool(graphs)
    assert len(captures) <= row_watch.PARTS


class Outside(nn.Module):
    """A model whose hidden states alone leave the graph, cut as TRL's trainers cut them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        base = self.model.get_base_model()
        hidden = base.model(**inputs).last_hidden_state[:, :-1]
        return hidden, labels[:, 1:]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [None, True], ids=["unasked", "asked"])
@by_name(UNDERSTOOD[:1])
def test_a_loss_outside_the_graph(family: Family, asked: bool | None) -> None:
    """Nobody knows what it counts, but for the user."""
    model, eager = (Outside(one) for one in pair(family))
    compiled = Compiled(model, skip_padding=asked)
    for side in SIDES[:2]:
        inputs, results = without_first(batch(side)), []
        for one in (model, eager):
            one.zero_grad(set_to_none=True)
            hidden, labels = one(**inputs)
            head = one.model.get_base_model().lm_head
            results.append(F.cross_entropy(head(hidden[labels != -100]), labels[labels != -100]))
            results[-1].backward()
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
        assert_same_gradients(model, eager)
    if asked:
        assert not compiled.rows.reason
        assert compiled.rows.live < compiled.rows.rows
    else:
        assert compiled.rows.reason == "its loss is not taken from labels in it"


@pytest.mark.slow
@by_name(UNDERSTOOD[:1])
def test_what_leaves_the_graph(family: Family) -> None:
    """Hidden states for which nobody asked are not touched; keys and values of a cache are zeros in padding."""
    model, eager = pair(family)
    compiled = Compiled(model)
    inputs = batch("right") | {"use_cache": True}
    assert_same(model, eager, inputs)
    assert compiled.rows.live < compiled.rows.rows
    read = inputs["attention_mask"].bool()
    caches = [one(**inputs).past_key_values for one in (model, eager)]
    for mine, others in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            found, expected = (getattr(layer, name).transpose(1, 2) for layer in (mine, others))
            torch.testing.assert_close(found[read], expected[read], rtol=1e-4, atol=1e-4)
            assert not found[~read].any()
    model, eager = pair(family)
    compiled = Compiled(model)
    inputs = batch("right") | {"output_hidden_states": True}
    assert_same(model, eager, inputs)
    assert compiled.rows.reason


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


@pytest.mark.slow
@by_name(UNDERSTOOD[:1])
def test_what_is_never_left_out(family: Family) -> None:
    """Without gradients, in eval mode, and where it is switched off."""
    model, _ = pair(family)
    compiled, inputs = Compiled(model), batch("right")
    with torch.no_grad():
        loss = model(**inputs).loss
    assert compiled.rows is None
    torch.testing.assert_close(loss, model(**inputs).loss.detach())
    model, _ = pair(family)
    compiled = Compiled(model.eval())
    model(**inputs)
    assert compiled.rows is None
    model, _ = pair(family)
    compiled = Compiled(model, skip_padding=False)
    model(**inputs)
    assert compiled.rows is None
    model, _ = pair(family)
    compiled = Compiled(model, disable=["live_rows"])
    model(**inputs)
    assert compiled.rows is None
