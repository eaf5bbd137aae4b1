"""Rows that sequences of a batch have in common are run once: eager's losses and gradients, with fewer rows."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from models.families import Family, build, step, truth
from models.padded_models import (
    LAYERS,
    LENGTH,
    UNDERSTOOD,
    Compiled,
    OnlyLoss,
    assert_same,
    assert_same_gradients,
    pair,
)
from models.test_families import by_name
from models.test_live_rows_at_work import distances

PROMPT = 40
NAMES = ("llama", "gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3")
TESTED = [family for family in UNDERSTOOD if family.name in NAMES]


def groups(
    sizes: tuple[int, ...] = (3, 2), prompt: int = PROMPT, side: str = "", seed: int = 1, labels: str = "completions"
) -> dict[str, Any]:
    """Groups of sequences, each with a prompt of its own and completions of several lengths.

    side: on which prompts are padded ("left", with completions behind them padded on the right), or all ("right").
    """
    generator = torch.Generator().manual_seed(seed)
    ids, read, counts = [], [], []
    for number, size in enumerate(sizes):
        start = torch.randint(1, 128, (prompt,), generator=generator)
        missing = 3 * number + 1 if side else 0
        for _ in range(size):
            behind = torch.randint(1, 128, (LENGTH - prompt,), generator=generator)
            kept = int(torch.randint(2, LENGTH - prompt + 1, (), generator=generator))
            row = torch.cat((start, behind))
            place = torch.arange(LENGTH)
            mask = (place < prompt + kept) if side else place >= 0
            if side == "left":
                mask &= place >= missing
            elif side == "right":  # prompts of different lengths, nothing before them
                row, mask = torch.cat((row[missing:], row[:missing])), place < prompt - missing + kept
            ids.append(row)
            read.append(mask)
            begin = prompt - (missing if side == "right" else 0)
            counts.append(mask & (place >= begin))
    rows, mask, counted = map(torch.stack, (ids, read, counts))
    labels_of = {"completions": counted, "all": mask}[labels]
    return {
        "input_ids": rows, "attention_mask": mask.long(), "labels": rows.masked_fill(~labels_of, -100),
        "use_cache": False,
    }  # fmt: skip


@by_name(TESTED)
def test_prompts_are_run_once(family: Family) -> None:
    model, eager = pair(family)
    compiled = Compiled(model, share_prefixes=True)
    for side in ("", "left", "right"):
        inputs = groups(side=side)
        assert_same(model, eager, inputs)
        rows, live = compiled.rows.last
        assert live < rows
        assert live <= int(inputs["attention_mask"].sum()) - 3 * (PROMPT - 8), (live, rows)
    assert not compiled.rows.reason
    assert not compiled.rows.unshared
    assert len(compiled.reports) == 1


def nested() -> dict[str, Any]:
    """All begin alike; two pairs go on alike for longer, and the last is the same as the first."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 128, (5, LENGTH), generator=generator)
    ids[:, :16] = ids[0, :16]
    ids[1, :30], ids[3, :30], ids[4] = ids[0, :30], ids[2, :30], ids[0]
    place = torch.arange(LENGTH)
    labels = ids.masked_fill(place < torch.tensor([20, 40, 30, 32, 50])[:, None], -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "use_cache": False}


def shared_rows(inputs: dict[str, Any]) -> int:
    """How many rows are the same as in a sequence before, by comparing tokens; as many may be left out at the most."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    counts = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    found = 0
    for b in range(1, len(ids)):
        alike = [(ids[b] == ids[a]).cumprod(0).bool() & ~counts[a] & ~counts[b] for a in range(b)]
        found += int(torch.stack(alike).any(0).sum())
    return found


CASES = {
    "nested": nested,
    "nothing alike": lambda: groups((1, 1, 1)),
    "one sequence": lambda: groups((1,)),
    "labels of prompts": lambda: groups(labels="all"),
    "left": lambda: groups((2, 3, 1), side="left", seed=3),
    "right": lambda: groups((4,), side="right", seed=4),
    "no mask": lambda: {name: value for name, value in groups().items() if name != "attention_mask"},
    "positions": lambda: (
        (one := groups(side="left")) | {"position_ids": (one["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    ),
    "positions that differ": lambda: groups() | {"position_ids": torch.arange(LENGTH) + torch.arange(5)[:, None]},
    "documents": lambda: (
        {name: value for name, value in groups().items() if name != "attention_mask"}
        | {"position_ids": (torch.arange(LENGTH) % 50).expand(5, -1).contiguous()}
    ),
}


@by_name(TESTED[:1])
def test_batches_of_all_kinds(family: Family) -> None:
    """One after the other, so that nothing is for one size."""
    model, eager = pair(family)
    compiled = Compiled(model, share_prefixes=True)
    for name, made in CASES.items():
        inputs = made()
        assert_same(model, eager, inputs)
        rows, live = compiled.rows.last
        if name in ("nested", "left", "right"):
            unread = rows - int(inputs["attention_mask"].sum())
            assert rows - live > 0.8 * (shared_rows(inputs) + unread), name
        if name in ("nothing alike", "one sequence", "labels of prompts", "positions that differ"):
            assert live >= rows - 32, name  # what is before the first label of the last sequences is not left out


@by_name(TESTED[:1])
def test_gradients_are_accumulated(family: Family) -> None:
    model, eager = pair(family)
    Compiled(model, share_prefixes=True)
    for one in (model, eager):
        for seed in (8, 9):
            one(**groups(side="right", seed=seed)).loss.backward()
    assert_same_gradients(model, eager)


@pytest.mark.parametrize("kind", ["nf4", "checkpoint", "budget", "whole"])
@by_name(TESTED[:1])
def test_models_of_all_kinds(family: Family, kind: str) -> None:
    more = {"nf4": kind in ("nf4", "budget"), "checkpoint": kind == "checkpoint"}
    model = build(family, train_norms=True, layers=LAYERS, lora=kind != "whole", **more)
    eager = copy.deepcopy(model)
    compiled = Compiled(model, share_prefixes=True, **({"memory_budget": "1GiB"} if kind == "budget" else {}))
    for side in ("", "left"):
        assert_same(model, eager, groups(side=side))
    rows, live = compiled.rows.last
    assert live < rows
    assert not compiled.rows.unshared


@by_name(TESTED[:1])
def test_without_gradients(family: Family) -> None:
    """As a reference is computed; also in eval mode."""
    model, eager = (OnlyLoss(one) for one in pair(family))
    compiled = Compiled(model, share_prefixes=True)
    with torch.no_grad():
        for train in (True, False):
            inputs = groups(side="left")
            losses = [one.train(train)(**inputs) for one in (model, eager)]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
            rows, live = compiled.rows.last
            assert live < rows


@by_name(TESTED[:1])
def test_what_is_drawn_for_each_row_is_not_shared(family: Family) -> None:
    model, _ = pair(family)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout = nn.ModuleDict(dict.fromkeys(module.lora_dropout, nn.Dropout(0.3)))
    compiled = Compiled(model, share_prefixes=True)
    model(**groups()).loss.backward()
    assert "dropout" in compiled.rows.unshared
    assert compiled.rows.unshared.code == "rows.unshared"
    rows, live = compiled.rows.last
    assert live == rows


@by_name(TESTED[:1])
def test_embeddings_that_have_a_gradient_of_their_own(family: Family) -> None:
    """A gradient for each sequence is what its caller reads."""
    model, eager = pair(family)
    compiled = Compiled(model, share_prefixes=True)
    inputs = groups()
    ids = inputs.pop("input_ids")
    found = []
    for one in (model, eager):
        embeds = one.get_input_embeddings()(ids).detach().requires_grad_()
        one(inputs_embeds=embeds, **inputs).loss.backward()
        found.append(embeds.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)
    assert compiled.rows.unshared


class Embedded(nn.Module):
    """A model whose embeddings are changed by an operand before its layers."""

    def __init__(self, model: nn.Module, change: Any) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, input_ids: torch.Tensor, operand: torch.Tensor | None = None, **more: Any) -> Any:
        embedded = self.model.get_input_embeddings()(input_ids)
        return self.model(inputs_embeds=self.change(embedded, operand), **more)


@pytest.mark.parametrize("kind", ["table", "factor of rows", "trained for each sequence"])
@by_name(TESTED[:1])
def test_gradients_of_what_only_looks_the_same(family: Family, kind: str) -> None:
    """Two tokens with one embedding; a row that a factor of 0 makes like another; an operand that is trained."""
    whole = build(family, nf4=False, checkpoint=False, train_norms=True, layers=LAYERS, lora=False)
    table = whole.get_input_embeddings().weight
    change = {"table": lambda e, _: e, "factor of rows": lambda e, one: e * one[..., None]}
    model = Embedded(whole, change.get(kind, lambda e, one: e + one[:, None]))
    with torch.no_grad():
        table[5] = table[7] if kind == "table" else table[5].abs()
        table[7] *= 1.0 if kind == "table" else 0.0
    eager = copy.deepcopy(model)
    compiled = Compiled(model, share_prefixes=True)
    inputs = groups((2, 2))
    inputs["input_ids"][0, 3], inputs["input_ids"][1, 3] = 5, 7
    found = []
    for one in (model, eager):
        if kind == "trained for each sequence":
            operand = torch.zeros(4, table.shape[1], requires_grad=True)
        else:
            operand = torch.ones(4, LENGTH)
            operand[0, 3] = 0.0 if kind == "factor of rows" else 1.0
        one(operand=operand, **inputs).loss.backward()
        found.append([one.model.get_input_embeddings().weight.grad, *([operand.grad] if operand.requires_grad else [])])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    if kind == "table":
        rows, live = compiled.rows.last
        assert live < rows - PROMPT // 2  # the second group's prompt is shared, the first's up to the token
    else:
        assert compiled.rows.unshared


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@by_name(TESTED[:3])
def test_on_a_card(family: Family) -> None:
    """In bfloat16, by the whole way: about as near to float32 as the unmodified model."""
    model = build(
        family, nf4=False, checkpoint=False, train_norms=True, layers=LAYERS, dtype=torch.bfloat16, device="cuda"
    )
    eager = copy.deepcopy(model)
    compiled = Compiled(model, share_prefixes=True, lower="inductor")
    errors = []
    for seed in range(4):
        inputs = {
            name: value.cuda() if isinstance(value, torch.Tensor) else value
            for name, value in groups(side=("", "left", "right")[seed % 3], seed=seed).items()
        }
        exact = truth(eager, inputs)
        names = [name for name in exact.gradients if exact.gradients[name].norm() > 0]
        errors.append([distances(step(one, inputs, one), exact, names) for one in (model, eager)])
    rows, live = compiled.rows.last
    assert live < rows
    mine, others = (torch.cat(one).nan_to_num(0.0) for one in zip(*errors, strict=True))
    assert mine.max() <= 3 * others.max() + 1e-2, (mine.max(), others.max())
    assert mine.median() <= 1.5 * others.median() + 1e-3, (mine.median(), others.median())


@pytest.mark.gpu  # one thread of a CPU adds in one order anyway
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@by_name(TESTED[:1])
def test_two_runs_give_the_same_bits(family: Family) -> None:
    model, _ = pair(family)
    model.cuda()
    Compiled(model, share_prefixes=True)
    inputs = {name: one.cuda() if isinstance(one, torch.Tensor) else one for name, one in groups().items()}
    found = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.slow
@by_name(TESTED[:1])
def test_by_the_whole_way(family: Family) -> None:
    model, eager = pair(family)
    compiled = Compiled(model, share_prefixes=True, lower="inductor")
    for inputs in (groups(), groups((1, 1, 1)), groups(side="left", seed=9)):
        assert_same(model, eager, inputs)
    assert not compiled.rows.unshared
    assert compiled.rows.live < compiled.rows.rows
