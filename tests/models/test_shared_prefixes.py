"""Rows that sequences of a batch have in common are run once: eager's losses and gradients, with fewer rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.families import Family
from models.padded_models import LENGTH, UNDERSTOOD, Compiled, assert_same, assert_same_gradients, pair
from models.test_families import by_name

PROMPT = 40
NAMES = ("llama", "gemma2", "qwen3", "mistral", "gpt_oss", "qwen3_moe", "deepseek_v3")
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
