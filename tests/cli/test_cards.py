"""``fastft explain --card``: peaks and times on cards that need not be here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from training.setting import LAYERS, Setting, batch

from fastft import explain
from fastft.cards import card_of
from fastft.cli import main
from fastft.errors import UserError
from fastft.models import on_meta
from fastft.rewriter.cards import CARDS, CardPlan, plan_for
from fastft.rewriter.explain import explained
from fastft.rewriter.memory.simulate import GATHERED
from fastft.units import GIB, MIB

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
    "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without weights: planning needs none."""
    place = tmp_path_factory.mktemp("model")
    (place / "config.json").write_text(json.dumps(SHAPE))
    return str(place)


class Planner:
    """Plans a captured graph for any number of cards."""

    def __init__(self, model: Any, inputs: dict[str, Any], wanted: dict[str, tuple[str, int, bool]]) -> None:
        torch._dynamo.reset()
        self.made: dict[str, CardPlan] = {}

        def plan(gm: Any, pieces: Any, example_inputs: Any) -> None:
            for name, (card, devices, shard) in wanted.items():
                self.made[name] = plan_for(
                    card_of(card), devices, shard=shard, gm=gm, pieces=pieces, example_inputs=example_inputs
                )

        explained(model, (), inputs, plan)


WANTED = {
    "one": ("24GiB", 1, False), "copies": ("24GiB", 8, False), "half": ("24GiB", 2, True), "eighth": ("24GiB", 8, True),
    "tiny": ("8MiB", 2, True),
}  # fmt: skip


@pytest.fixture(scope="module")
def plans(folder: str) -> dict[str, CardPlan]:
    model, inputs = on_meta(folder, rank=8, batch_size=2, seq_len=512, nf4=True)
    return Planner(model, inputs, WANTED).made


def test_a_plan_is_printed(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"explain {folder} --nf4 --devices 8 --shard --card 24GiB --batch 1x256"
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    assert "8 cards, sharded (FSDP2), 1 x 256 tokens on each" in printed
    peak = re.search(r"planned peak\s+([\d.]+) MiB of 22.56 GiB", printed)
    assert peak is not None
    assert float(peak[1]) > 0
    assert re.search(r"tokens/s\s+[\d,]+ of all cards", printed)


def test_sharding_spreads_what_is_held(plans: dict[str, CardPlan]) -> None:
    """Frozen weights, trained ones and the optimizer's state; statistics of 4-bit weights stay whole."""
    copy, half, eighth = (plans[name] for name in ("one", "half", "eighth"))
    held = [one.parts["held before"] for one in (copy, half, eighth)]
    assert held[0] - held[2] == pytest.approx((held[0] - held[1]) * (7 / 8) / (1 / 2), rel=0.01)
    assert half.parts["optimizer"] == pytest.approx(copy.parts["optimizer"] / 2, rel=0.01)
    assert copy.parts[GATHERED] == 0
    assert half.parts[GATHERED] == eighth.parts[GATHERED] > 0
    assert plans["copies"].parts == copy.parts
    assert (copy.gather, half.gather > 0) == (0, True)


def test_four_bits_are_a_quarter(folder: str, plans: dict[str, CardPlan]) -> None:
    model, inputs = on_meta(folder, rank=8, batch_size=2, seq_len=512)
    whole = Planner(model, inputs, {"one": WANTED["one"]}).made["one"]
    weights = SHAPE["num_hidden_layers"] * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)
    saved = weights * (next(iter(model.parameters())).element_size() - 0.5 - 1 / 64)
    assert whole.parts["held before"] - plans["one"].parts["held before"] >= saved * 0.95


def test_less_memory_takes_longer_until_nothing_fits(folder: str, plans: dict[str, CardPlan]) -> None:
    most = plans["half"]
    assert most.plan is not None
    model, inputs = on_meta(folder, rank=8, batch_size=2, seq_len=512, nf4=True)
    less = f"{int(most.plan.peak_bytes * 0.85 / MIB)}MiB"
    small = Planner(model, inputs, {"small": (less, 2, True)}).made["small"]
    assert small.plan is not None
    assert small.plan.peak_bytes <= small.limit_bytes
    assert small.seconds > most.seconds
    assert plans["tiny"].plan is None
    assert "takes at the least" in plans["tiny"].reason


def test_a_real_sharded_model_is_planned_alike(tmp_path: Path) -> None:
    """What is gathered while a layer goes backward, of a group of one process."""
    setting, inputs = Setting(tmp_path), batch(0)
    plan = Planner(setting.model(nf4=True), inputs, {"one": ("H100", 1, True)}).made["one"].plan
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = setting.model(nf4=True)
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        (graph,) = explain(model, **inputs).graphs
    finally:
        dist.destroy_process_group()
    assert plan is not None
    assert graph.plan is not None
    mine = {moment.label: moment.parts[GATHERED] for moment in plan.moments if "backward" in moment.label}
    theirs = {label: parts[GATHERED] for label, parts in graph.plan.moments if "backward" in label}
    layers = [label for label in mine if ".layers." in label]
    assert len(layers) == LAYERS
    assert [theirs[label] for label in layers] == [mine[label] for label in layers]
    assert min(mine[label] for label in layers) > 0


def test_cards_are_found_by_name_and_by_memory() -> None:
    assert card_of("h100") is CARDS["H100"]
    assert card_of("24GiB").memory == 24 * GIB
    with pytest.raises(UserError, match="did you mean H100"):
        card_of("H10")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--devices 2", "add --card 24GiB or --card H100"),
        ("--card H100 --batch 4096", "rows and tokens, such as 1x4096"),
        ("--card H100 --devices 0", "whole number above zero"),
        ("--card nothing", "No card 'nothing' is known"),
    ],
)
def test_mistakes_are_told(folder: str, words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"explain {folder} {words}".split()) == 2
    assert told in capsys.readouterr().err
