"""Properties of a node: whether it is random, whether Inductor fuses it, and its FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from fastft.compat.operators import OpOverload
from fastft.compat.symbolic import hint

_SEEDS = ("prims.inductor_seed.default", "prims.inductor_seeds.default")  # seeds of Inductor's random numbers


def is_random(target: Any) -> bool:
    """Tell whether a second call gives other numbers; of Inductor's random ops, only those that draw a seed do."""
    if str(target).startswith("prims.inductor_"):
        return str(target) in _SEEDS
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def is_fused(node: Node) -> bool:
    """Tell whether Inductor fuses this node with its neighbours."""
    target = node.target
    own = isinstance(target, OpOverload) and target.namespace in ("aten", "prims")
    return own and cast(OpOverload, target).overloadpacket not in flop_registry


def flops(target: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Count the FLOPs by the operator's formula, at the example's sizes; 0 for an operator without one."""
    formula = flop_registry.get(target.overloadpacket) if isinstance(target, OpOverload) else None
    return 0 if formula is None else hint(formula(*args, **kwargs, out_val=result))
