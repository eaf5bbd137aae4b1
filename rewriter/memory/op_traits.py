"""What Inductor and autograd do with a node: whether it is random or fused, and its FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from fastft.compat.operators import OpOverload
from fastft.compat.symbolic import hint

_SEEDS = ("prims.inductor_seed.default", "prims.inductor_seeds.default")  # of Inductor's random numbers


def is_random(target: Any) -> bool:
    """Whether another call gives other numbers; Inductor's random numbers follow from seeds, which do."""
    if str(target).startswith("prims.inductor_"):
        return str(target) in _SEEDS
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def is_fused(node: Node) -> bool:
    """Whether Inductor makes this part of a kernel with its neighbours."""
    target = node.target
    own = isinstance(target, OpOverload) and target.namespace in ("aten", "prims")
    return own and cast(OpOverload, target).overloadpacket not in flop_registry


def flops(target: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """By the operator's formula, at the sizes of the example; 0 where it has none."""
    formula = flop_registry.get(target.overloadpacket) if isinstance(target, OpOverload) else None
    return 0 if formula is None else hint(formula(*args, **kwargs, out_val=result))
