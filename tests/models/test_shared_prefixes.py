"""Rows that sequences of a batch have in common are run once: eager's losses and gradients, with fewer rows."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from models.families import Family, build
from models.padded_models import LAYERS, LENGTH, UNDERSTOOD, Compiled, assert_same, assert_same_gradients, pair
from models.test_families import by_name

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
    model, eager = pair(family)
    compiled = Compiled(model, share_prefixes=True)
    with torch.no_grad():
        for train in (True, False):
            inputs = groups(side="left")
            losses = [one.train(train)(**inputs).loss for one in (model, eager)]
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


@by_name(TESTED[:1])
def test_two_runs_give_the_same_bits(family: Family) -> None:
    model, _ = pair(family)
    Compiled(model, share_prefixes=True)
    found = []
    for _ in range(2):
        model.zero_grad()
        model(**groups()).loss.backward()
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
