"""benchmarks/blocks.py on records written by hand, and how benchmarks/peak.py shows them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import blocks
import peak
import report
from blocks import Block

# no two classes of one size, in 16 bits nor in 32
SHAPE = {"vocab_size": 10007, "hidden_size": 600, "intermediate_size": 1700}
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 1}
SIZES = blocks.sizes_of(SHAPE, 3, 32, nf4=True, rank=16)
TOKENS = 96


def alloc(addr: int, size: int) -> dict[str, Any]:
    return {"action": "alloc", "addr": addr, "size": size}


def free(addr: int, action: str = "free_requested") -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": 0}


def test_the_peak_is_in_the_middle() -> None:
    before = {1: Block(100, "model"), 2: Block(50, "gradients")}
    events = [free(2), free(2, "free_completed"), alloc(3, 70), alloc(4, 30), free(3), alloc(5, 60), free(4), free(5)]
    at, live = blocks.replay(before, events)
    assert at == 4
    assert live == [Block(100, "model"), Block(70), Block(30)]


def test_the_peak_may_be_where_the_record_begins() -> None:
    assert blocks.replay({1: Block(100)}, [free(1), alloc(2, 99)]) == (0, [Block(100)])
    assert blocks.replay({1: Block(100)}, []) == (0, [Block(100)])


def test_an_address_used_again_is_another_block() -> None:
    """The late free_completed of the first block of an address must not free the second."""
    before = {1: Block(10, "gradients")}
    events = [free(1), free(1, "free_completed"), alloc(1, 500), alloc(2, 5)]
    assert blocks.replay(before, events) == (4, [Block(500), Block(5)])


def test_a_block_waiting_for_another_stream_is_not_live() -> None:
    events = [alloc(1, 100), free(1), alloc(2, 90), free(1, "free_completed")]
    assert blocks.replay({}, events) == (1, [Block(100)])


def test_other_actions_and_unknown_addresses_count_nothing() -> None:
    events = [{"action": "segment_alloc", "addr": 7, "size": 10**9}, {"action": "oom", "size": 10**9}, free(99)]
    events += [alloc(1, 8), {"action": "segment_free", "addr": 1, "size": 8}, {"action": "snapshot"}]
    assert blocks.replay({}, events) == (4, [Block(8)])


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (TOKENS * 10007 * 4, "logits"),
        (TOKENS * 10007 * 2, "logits"),
        ((TOKENS - 3) * 10007 * 4, "logits"),  # without each row's last position
        (TOKENS * 600 * 2, "hidden states"),
        (TOKENS * 600 * 2 + 511, "hidden states"),  # rounded up by the allocator
        (TOKENS * 600 * 2 + 512, "other"),
        (TOKENS * 600 * 2 - 1, "other"),
        (TOKENS * 100 * 4, "keys or values"),
        (TOKENS * 1700 * 4, "MLP activations"),
        (TOKENS * 16 * 4, "LoRA activations"),
        (600 * 1700 * 2, "weights in 16 bits"),
        (600 * 100 * 2, "weights in 16 bits"),
        (600 * 600 * 2, "weights in 16 bits"),
        (1000, "other"),
    ],
)
def test_classes(size: int, name: str) -> None:
    assert blocks.classify(Block(size), SIZES) == name


def test_what_is_known_is_not_guessed() -> None:
    assert blocks.classify(Block(TOKENS * 10007 * 4, "live before: LoRA"), SIZES) == "live before: LoRA"


def test_weights_are_dequantised_only_where_they_are_in_4_bits() -> None:
    sizes = blocks.sizes_of(SHAPE, 3, 32, nf4=False, rank=16)
    assert blocks.classify(Block(600 * 1700 * 2), sizes) == "other"


def test_a_size_of_two_classes_has_both_names() -> None:
    """As many tokens as a projection has outputs."""
    sizes = blocks.sizes_of(SHAPE, 17, 100, nf4=True, rank=16)
    assert blocks.classify(Block(600 * 1700 * 2), sizes) == "hidden states or weights in 16 bits"


def test_summary() -> None:
    live = [Block(100, "model"), Block(TOKENS * 10007 * 4), *[Block(7)] * 3, Block(20)]
    assert blocks.summarise(live, SIZES) == [
        {"class": "logits", "blocks": 1, "bytes": TOKENS * 10007 * 4},
        {"class": "model", "blocks": 1, "bytes": 100},
        {"class": "other", "blocks": 4, "bytes": 41},
    ]
    assert blocks.largest_other(live, SIZES) == [{"bytes": 7, "blocks": 3}, {"bytes": 20, "blocks": 1}]


def test_whose_an_address_is() -> None:
    class State:  # as bitsandbytes' QuantState: scales, and the state of the scales
        def __init__(self, inner: State | None) -> None:
            self.absmax, self.state2, self.shape = torch.ones(3), inner, (1, 2)

    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in ("embed_tokens", "norm", "quant")})
    model["lora"] = torch.nn.Linear(2, 2, bias=False)
    for name in ("embed_tokens", "norm", "quant"):
        model[name].requires_grad_(False)
    state = State(State(None))
    model["quant"].weight.quant_state = state
    optimizer = torch.optim.AdamW(model["lora"].parameters())
    model["lora"](torch.ones(2)).sum().backward()
    optimizer.step()
    named = peak.kinds(model, optimizer)
    lora = model["lora"].weight
    expected = {
        "embeddings and head": [model["embed_tokens"].weight],
        "16-bit parameters": [model["norm"].weight],
        "4-bit weights": [model["quant"].weight, state.absmax, state.state2.absmax],
        "LoRA": [lora],
        "gradients": [lora.grad],
        "optimizer state": list(optimizer.state[lora].values()),
    }
    assert named == {tensor.data_ptr(): kind for kind, tensors in expected.items() for tensor in tensors}


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gib = 2**30
    row: dict[str, Any] = {"status": "ok", "contender": "fastft", "batch": 1, "length": 32, "model": "tiny"}
    row |= {"layers": None, "nf4": True, "dtype": "bfloat16", "mask": "ones", "device": "cuda", "peak_bytes": 4 * gib}
    row["classes"] = [{"class": "logits", "blocks": 2, "bytes": 3 * gib}, {"class": "other", "blocks": 4, "bytes": gib}]
    row["other"] = [{"bytes": gib // 4, "blocks": 4}]
    row |= {"allocator_peak_bytes": 5 * gib, "before_bytes": gib, "allocator_before_bytes": gib}
    row |= {"peak_event": 7, "events": 9}
    report.present("a title", peak.table([row]), [row])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["logits", "2", "3.000", "75.0%"] in lines
    assert ["of", "268,435,456", "bytes", "4", "1.000"] in lines
    assert peak.checks(row).startswith("sum 4.000 GiB, allocator's peak 5.000; before the step 1.000")
    peak.draw(row, tmp_path / "peak.png")
    assert (tmp_path / "peak.png").stat().st_size > 10_000
