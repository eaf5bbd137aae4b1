"""What nodes of a joint graph are: sizes as numbers or expressions, views, what is random, what Inductor fuses."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from fastft.rewriter.compat import OpOverload


def expression(size: Any) -> Any:
    """A size as what outlives its graph: a number, or an expression of symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def evaluate(expression: Any, sizes: dict[Any, int]) -> int:
    """An expression's value where its symbols have these values."""
    return expression if isinstance(expression, int) else int(expression.xreplace(sizes))


def hints_of(value: Tensor) -> dict[Any, int]:
    """The symbols in a tensor's shape and strides, with their values in the example."""
    found: dict[Any, int] = {}
    for size in (*value.shape, *value.stride()):
        if isinstance(size, torch.SymInt):
            env = size.node.shape_env
            known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # torch 2.11
            found |= {symbol: int(known[symbol]) for symbol in size.node.expr.free_symbols if symbol in known}
    return found


def is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0


def is_view(target: Any) -> bool:
    """Whether an operator's result shares the memory of its first argument."""
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


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


def hint(size: Any) -> int:
    """A size in the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def is_result_of_many(node: Node) -> bool:
    """Whether a node takes one of the results of another."""
    return node.target is operator.getitem
