"""Whole models with every mask: what it is recognised as, and eager's loss and gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastft.rewriter.report.data import GraphReport
from models.families import FAMILIES, OTHERS, Family, batch, build
from models.test_families import by_name, check, rewriting

LENGTH = 16
PADDING, DOCUMENTS, CAUSAL = {"causal", "padding"}, {"causal", "documents"}, {"causal"}
WINDOWED = tuple(  # a window in every layer, or in every second one
    family for family in (*FAMILIES, *OTHERS) if family.name in ("mistral", "gemma2", "gemma3")
)
# A loop over experts breaks its graph before each layer, so that a layer is given its mask.
BROKEN = "gpt_oss"


def padded() -> dict[str, Tensor]:
    """One row padded on the right, and one on the left, where its first token is told by a row that sees nothing."""
    inputs = batch(padded=False, length=LENGTH)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, LENGTH - 5 :], mask[1, :4] = 0, 0
    return inputs | {"attention_mask": mask, "labels": inputs["input_ids"].masked_fill(mask == 0, -100)}


def packed() -> dict[str, Tensor]:
    """Documents of 6 and 10 tokens in one row, and of 3, 12 and 1 in the other, as padding-free collators give them."""
    rows = [torch.cat([torch.arange(length) for length in lengths]) for lengths in ((6, 10), (3, 12, 1))]
    return batch(padded=False, length=LENGTH) | {"position_ids": torch.stack(rows), "use_cache": False}


def kinds(family: Family, inputs: dict[str, Tensor], layers: int) -> Sequence[set[str]]:
    """What the masks of the layers are called, after the model is held to eager."""
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=False, train_norms=False, layers=layers, lora=False)
    reports: list[GraphReport] = []
    check(model, torch.compile(model, backend=rewriting(reports)), inputs)
    return [set(mask.rule.split(", ")) for report in reports for mask in report.masks]


CASES = [(family, make) for family in FAMILIES for make in (padded, packed)]
CASES += [(family, (padded, packed)[at % 2]) for at, family in enumerate(OTHERS)]  # in turn, for the time it takes


@pytest.mark.parametrize(("family", "make"), CASES, ids=lambda one: getattr(one, "name", None) or one.__name__)
def test_a_mask_is_recognised(family: Family, make: Callable) -> None:
    (found,) = kinds(family, make(), 1)
    if family.name == BROKEN:
        assert found == {"dense: it is data"}
    else:
        assert found == (PADDING if make is padded else DOCUMENTS)


@pytest.mark.parametrize("window", [6, LENGTH, LENGTH + 1])
@by_name(WINDOWED)
def test_a_sliding_window(family: Family, window: int) -> None:
    """One that is as long as the sequence, or longer, is none."""
    sliding = Family(**{**vars(family), "sizes": {**family.sizes, "sliding_window": window}})
    found = kinds(sliding, batch(padded=False, length=LENGTH), 2)
    short = {"causal", f"window {window}"}
    assert len(found) == 2
    assert all(one in ([short, CAUSAL] if window < LENGTH else [CAUSAL]) for one in found)
    assert (short in found) == (window < LENGTH)


@pytest.mark.parametrize("make", [padded, packed], ids=["padded", "packed"])
@by_name(FAMILIES[:1])
def test_in_checkpointed_layers(family: Family, make: Callable) -> None:
    """The mask is read in the graph around the layers, and once for all of them."""
    torch._dynamo.reset()
    model = build(family, nf4=False, checkpoint=True, train_norms=False, layers=3)
    reports: list[GraphReport] = []
    inputs = make()
    check(model, torch.compile(model, backend=rewriting(reports)), inputs)
    assert [set(mask.rule.split(", ")) for report in reports for mask in report.masks] == 3 * [
        PADDING if make is padded else DOCUMENTS
    ]
