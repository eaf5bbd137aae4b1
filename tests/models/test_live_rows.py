"""Whole models without the rows of their batches that nobody reads: eager's loss and gradients, fewer operations."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.families import Family, build
from models.padded_models import (
    FLOPS_A_TOKEN,
    LAYERS,
    LENGTH,
    LENGTHS,
    ROUTED,
    SIDES,
    UNDERSTOOD,
    Compiled,
    OnlyLoss,
    assert_same,
    assert_same_gradients,
    batch,
    pair,
    without_first,
)
from models.test_families import by_name


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


@pytest.mark.slow
@by_name(ROUTED[:1])
def test_a_loss_of_the_routing(family: Family) -> None:
    """The experts' load is that of all rows."""
    model, eager = pair(family)
    for one in (model, eager):
        one.config.output_router_logits = True
        one.get_base_model().config.output_router_logits = True
    compiled, inputs = Compiled(model), batch("right")
    assert_same(model, eager, inputs)
    assert eager(**inputs).aux_loss > 0
    assert compiled.rows.reason


@pytest.mark.slow
@by_name(UNDERSTOOD[:1])
def test_what_is_never_left_out(family: Family) -> None:
    """Without labels or gradients, as where a model generates, and where it is switched off."""
    model, _ = pair(family)
    compiled, inputs = Compiled(model), batch("right")
    without = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        model(**without)
        assert compiled.rows is None
        model.eval()(**without)
        assert compiled.rows is None
    model, _ = pair(family)
    compiled = Compiled(model, skip_padding=False)
    model(**inputs)
    assert compiled.rows is None
    model, _ = pair(family)
    compiled = Compiled(model, disable=["live_rows"])
    model(**inputs)
    assert compiled.rows is None


class Scored(nn.Module):
    """A model that returns its loss and the keys and values of its layers, and no logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        return output.loss, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


@by_name(UNDERSTOOD[:1])
def test_a_cache_has_the_tokens_behind_the_last_label(family: Family) -> None:
    """As of a prompt that is scored, and then gone on from."""
    model, eager = (Scored(one) for one in pair(family))
    compiled = Compiled(model)
    inputs = batch("right") | {"use_cache": True}
    inputs["labels"] = inputs["labels"].masked_fill(torch.arange(LENGTH) > 5, -100)
    read = inputs["attention_mask"].bool()
    for train in (False, True):
        with torch.no_grad():
            mine, other = (one.train(train)(**inputs) for one in (model, eager))
        torch.testing.assert_close(mine[0], other[0], rtol=1e-5, atol=1e-5)
        for pairs in zip(mine[1], other[1], strict=True):
            for one, another in zip(*pairs, strict=True):
                torch.testing.assert_close(
                    one.transpose(1, 2)[read], another.transpose(1, 2)[read], rtol=1e-4, atol=1e-4
                )
    assert not compiled.rows.reason


@by_name(UNDERSTOOD[:1])
def test_losses_without_gradients(family: Family) -> None:
    """As of a reference: padding is left out, in train and in eval mode; not where a metric may read logits."""
    model, eager = (OnlyLoss(one) for one in pair(family))
    compiled, inputs = Compiled(model), batch("right")
    for train in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(*(one.train(train)(**inputs) for one in (model, eager)), rtol=1e-5, atol=1e-5)
        rows, live = compiled.rows.last
        assert live < rows
    compiled = Compiled(model.model)
    with torch.no_grad():
        mine, other = (one.model(**inputs).logits for one in (model, eager))
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)
    assert compiled.rows is None
