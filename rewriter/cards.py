"""Plan a training step for cards that one does not have: what each holds at its peak, and how long a step takes.

The graph is captured on the meta device, its regions are traced, and a step is simulated as it is before one runs
(memory/planner.py).  Sharding is that of ``fully_shard`` for each layer and the model.  Time is the sum of what each op
computes and moves at a card's rates, gathering hidden behind it where it is shorter: docs/performance.md says how far
that was from what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastft.compat import symbolic
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.lowering import plan_builder
from fastft.rewriter.lowering.region import RegionCompiler, by_kind
from fastft.rewriter.lowering.sharding import Sharding
from fastft.rewriter.memory import cost_model, device_budget, planner, stages
from fastft.rewriter.memory.device_rates import TYPICAL, Rates
from fastft.rewriter.memory.planner import BudgetError
from fastft.rewriter.memory.simulate import Facts, Plan, StageSequence
from fastft.rewriter.options import Options
from fastft.rewriter.outline.partition import Piece
from fastft.units import GIB

# Measured steps of an 8B model (NF4, 2x2048 tokens a card, H200) by those computed here: of one card; of two by one's.
CALIBRATION, COPIES, SHARDED = 0.96, 1.06, 1.15
ADAM = 2  # tensors of state for each trained one


@dataclass(frozen=True)
class Card:
    """A kind of card: bytes of memory, rates, and the bytes per second that it sends to and takes from each other.

    flops and bytes are what a matrix product and a copy reach, four fifths of what the maker says where it was not
    measured.
    """

    name: str
    memory: int
    rates: Rates
    link: float


def _by_maker(name: str, gib: int, tera_flops: float, tera_bytes: float, link: float) -> Card:
    share = 0.8
    rates = replace(TYPICAL, flops=share * tera_flops * 1e12, bytes=share * tera_bytes * 1e12)
    return Card(name, gib * GIB, rates, share * link)


CARDS = {
    card.name: card
    for card in (
        Card("H200", 141 * 10**9, replace(TYPICAL, bytes=4.1e12), 3.0e11),
        Card("H100", 80 * GIB, TYPICAL, 3.0e11),
        _by_maker("A100", 80, 312, 2.0, 3.0e11),
        _by_maker("A100-40GB", 40, 312, 1.55, 3.0e11),
        _by_maker("L40S", 48, 362, 0.864, 2.5e10),
        _by_maker("RTX 4090", 24, 165, 1.01, 2.5e10),
        _by_maker("RTX 3090", 24, 71, 0.936, 2.5e10),
        _by_maker("L4", 24, 121, 0.3, 2.5e10),
        _by_maker("RTX 4080", 16, 97, 0.717, 2.5e10),
        _by_maker("T4", 16, 65, 0.32, 1.2e10),
        _by_maker("RTX 3060", 12, 51, 0.36, 1.2e10),
    )
}


@dataclass(eq=False)
class Kept:
    """A parameter as FSDP2 would keep it, with what fastft.compat.fsdp.Home tells of a real one."""

    whole_bytes: int
    own_bytes: int
    trained: bool
    group: int
    is_given: bool

    @property
    def own_gradient_bytes(self) -> int:
        """The bytes of this card's part of its gradient."""
        return self.own_bytes if self.trained else 0


@dataclass
class CardPlan:
    """A step of one of several cards.

    plan: None where not even the leanest fits, of which ``reason`` tells.  compute, gather: seconds of a step at work,
    and of gathering.  seconds: of a step.
    """

    plan: Plan | None = None
    reason: str = ""
    limit_bytes: int = 0
    compute: float = 0.0
    gather: float = 0.0
    seconds: float = 0.0

    @property
    def parts(self) -> Mapping[str, int]:
        """What the bytes at the peak are for."""
        return self.plan.peak.parts if self.plan is not None else {}


def plan_for(
    card: Card, devices: int, *, shard: bool, gm: GraphModule, pieces: Sequence[Piece], example_inputs: Sequence[Any]
) -> CardPlan:  # fmt: skip
    """Plan a graph's step for one of so many cards.

    shard: parameters over all of them, else each has them whole.  As much may be offloaded to the host as a card has.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    given = dict(zip(inputs, example_inputs, strict=True))
    options = Options(lower="eager")
    regions = {key: RegionCompiler(gm, alike[0], given, options) for key, alike in by_kind(pieces).items()}
    sequence = plan_builder.traced(gm, pieces, regions, card.rates, lambda text: None)
    kept = _kept(inputs, pieces, devices if shard else 1)
    before = stages.input_bytes(gm) - sum(one.whole_bytes - one.own_bytes for one in kept.values())
    sharding = Sharding(pieces, inputs, kept, regions, lambda home: True) if shard else None  # type: ignore[arg-type]
    if sharding is not None:
        sharding.count(sequence)
    states = ADAM * sum(one.own_gradient_bytes for one in kept.values())
    workspace = device_budget.CUBLAS_BYTES[9]
    facts = Facts(before, states, workspace, host=card.memory)
    made = CardPlan(limit_bytes=card.memory - int(device_budget.MARGIN * card.memory))
    try:
        made.plan = planner.plan(sequence, facts, made.limit_bytes, graphs=False)
    except BudgetError as error:
        made.reason = str(error)
        return made
    _add_times(made, sequence, card, sharding, devices)
    return made


def _kept(inputs: Sequence[Node], pieces: Sequence[Piece], devices: int) -> dict[int, Kept]:
    """Return how parameters are kept: a layer's together, the others with the model."""
    readers: dict[Node, set[int]] = {}
    for number, piece in enumerate(pieces):
        for node in piece.inputs:
            readers.setdefault(node, set()).add(number)
    kept = {}
    for place, node in enumerate(inputs):
        value = value_of(node)
        if not isinstance(value, torch.nn.Parameter):
            continue
        numbers = readers.get(node, set())
        layer = next(iter(numbers)) if len(numbers) == 1 and pieces[next(iter(numbers))].layer else -1
        whole = _bytes(node)
        rows = value.shape[0] if value.dim() else 1
        own = whole if devices == 1 else -(-int(rows) // devices) * (whole // max(1, int(rows)))
        kept[place] = Kept(whole, own, value.requires_grad, layer, layer < 0)
    return kept


def _bytes(node: Node) -> int:
    value = value_of(node)
    return symbolic.hint(cost_model.tensor_bytes(value)) if isinstance(value, Tensor) else 0


def _add_times(made: CardPlan, sequence: StageSequence, card: Card, sharding: Sharding | None, devices: int) -> None:
    """Add what a step takes: each stage computes while the next one's parameters come."""
    assert made.plan is not None
    for number, (stage, choice) in enumerate(zip(sequence.stages, made.plan.choices, strict=True)):
        ops = stage.kind.joint.ops if stage.kind.joint is not None else []
        forward = CALIBRATION * sum(op.seconds for op in ops if op.forward)
        backward = CALIBRATION * sum(op.seconds for op in ops if not op.forward) + choice.seconds
        moved = sharding.moved(number) if sharding is not None else (0, 0)
        gather = [size * (devices - 1) / devices / card.link for size in moved]
        made.compute += forward + backward
        made.gather += sum(gather)
        made.seconds += max(forward, gather[0]) + max(backward, gather[1])
    made.seconds *= 1.0 if devices == 1 else COPIES if sharding is None else SHARDED
