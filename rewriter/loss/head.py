"""A head and its logits by what they are made of: hidden states, a weight, and what was done to each number since.

In a graph (losses.py) the values are nodes, and a call is written down; at run time (outputs.py) they are tensors, and
it is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from fastft.compat.fake_tensors import value_of

Step = tuple[str, Any]  # ("mul", 2.0), ("div", 30.0), ("tanh", None), ("to", torch.float32), ("log_softmax", None)


class Call(Protocol):
    """Makes a call, or writes it down: a function, or a method by its name."""

    def __call__(self, function: Callable | str, *args: Any, **kwargs: Any) -> Any: ...


def run(function: Callable | str, *args: Any, **kwargs: Any) -> Any:
    """The Call that makes it."""
    if isinstance(function, str):
        return getattr(args[0], function)(*args[1:], **kwargs)
    return function(*args, **kwargs)


@dataclass(frozen=True)
class Head:
    """The product that logits begin with: hidden W^T + bias, or a lora_linear of one 4-bit or adapted layer.

    weight: [V, H], or packed in 4 bits with statistics (absmax, and three more if they are nested).  lora_a, lora_b,
    scales: of adapters.  dtype: of the operands; result: of the product, which adapters in float32 may widen.  plain:
    whether the user's call was F.linear.
    """

    weight: Any
    bias: Any
    classes: int
    features: int
    dtype: torch.dtype
    result: torch.dtype
    statistics: tuple[Any, ...] = ()
    lora_a: tuple[Any, ...] = ()
    lora_b: tuple[Any, ...] = ()
    scales: tuple[float, ...] = ()
    blocksize: int = 0
    quant_type: str = ""
    plain: bool = True

    @property
    def values(self) -> list[Any]:
        """All tensors that it is made of."""
        optional = [] if self.bias is None else [self.bias]
        return [self.weight, *optional, *self.statistics, *self.lora_a, *self.lora_b]

    def with_values(self, values: Sequence[Any]) -> Head:
        """The same of other values, in the order of ``values``."""
        given = iter(values)
        return replace(
            self,
            weight=next(given),
            bias=None if self.bias is None else next(given),
            statistics=tuple(next(given) for _ in self.statistics),
            lora_a=tuple(next(given) for _ in self.lora_a),
            lora_b=tuple(next(given) for _ in self.lora_b),
        )

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits, as the user's own call gives them."""
        dtype = self.dtype
        if self.plain:
            return F.linear(*(cast(one, dtype, run) for one in (hidden, self.weight, self.bias)))
        statistics = [[one] for one in self.statistics] + [[]] * (4 - len(self.statistics))
        biases = [] if self.bias is None else [self.bias]
        return torch.ops.fastft.lora_linear(
            cast(hidden, dtype, run), [self.weight], *statistics, biases,
            list(self.lora_a), list(self.lora_b), [], [self.classes], [0] * len(biases), [0] * len(self.lora_a),
            list(self.scales), self.blocksize, self.quant_type, self.result != dtype,
        )[0]  # fmt: skip

    def dense_weight(self, call: Call) -> Any:
        """[V, H] in the product's dtype."""
        if not self.quant_type:
            return cast(self.weight, self.dtype, call)
        statistics = [*self.statistics, *[None] * (4 - len(self.statistics))]
        sizes = (self.classes, self.features, self.blocksize, self.quant_type, self.dtype)
        return call(torch.ops.fastft.dequantize_4bit, self.weight, *statistics, *sizes)

    def adapter(self, hidden: Any, call: Call) -> tuple[Any, Any]:
        """lora_s and lora_b as linear_cross_entropy takes them, None without adapters."""
        products = []
        for a, scale in zip(self.lora_a, self.scales, strict=True):
            product = call(F.linear, cast(hidden, value_of(a).dtype, call), a)
            products.append(product if scale == 1.0 else call(torch.mul, product, scale))
        if len(products) < 2:
            return (products or [None])[0], (self.lora_b or [None])[0]
        return call(torch.cat, products, -1), call(torch.cat, list(self.lora_b), 1)


@dataclass(frozen=True)
class Logits:
    """[..., V] of hidden states [..., H]; steps: what was done to each number, in order.

    trained: whether hidden, weight, bias and the adapters' two factors need a gradient.  classes_second: the last two
    axes are exchanged, as F.cross_entropy wants them of sequences.
    """

    hidden: Any
    head: Head
    dtype: torch.dtype
    trained: tuple[bool, ...]
    steps: tuple[Step, ...] = ()
    classes_second: bool = False

    @property
    def rows(self) -> tuple[Any, ...]:
        """The shape without the vocabulary."""
        return tuple(value_of(self.hidden).shape[:-1])

    @property
    def shape(self) -> tuple[Any, ...]:
        """As torch counts axes."""
        *others, last = self.rows if self.classes_second else (*self.rows, self.head.classes)
        return (*others, self.head.classes, last) if self.classes_second else (*others, last)

    @property
    def rank(self) -> int:
        """How many axes there are."""
        return len(self.rows) + 1

    @property
    def is_log_probs(self) -> bool:
        """Whether these are log-probabilities by now."""
        return self.steps[-1:] == (("log_softmax", None),)

    @property
    def is_kl_terms(self) -> bool:
        """Whether these are the summands of a divergence from others."""
        return self.steps[-1:] != () and self.steps[-1][0] == "kl_div"

    def with_step(self, name: str, operand: Any = None, dtype: torch.dtype | None = None) -> Logits:
        """One step more."""
        return replace(self, steps=(*self.steps, (name, operand)), dtype=dtype or self.dtype)

    @property
    def values(self) -> list[Any]:
        """All tensors that they are made of."""
        return [self.hidden, *self.head.values]

    def with_values(self, values: Sequence[Any]) -> Logits:
        """The same of other values, in the order of ``values``."""
        hidden, *others = values
        return replace(self, hidden=hidden, head=self.head.with_values(others))

    def compute(self) -> torch.Tensor:
        """The numbers themselves, by the user's own steps."""
        y = self.head.product(self.hidden)
        for name, operand in self.steps:
            y = run(_STEPS[name], y, *(() if operand is None else (operand,)))
        return y.transpose(-1, -2) if self.classes_second else y

    def softmax_form(self) -> tuple[float, float] | None:
        """The steps as scale and softcap of linear_cross_entropy; None if they are something else."""
        inner, outer, capped = 1.0, 1.0, False
        for name, operand in self.steps:
            if name == "tanh":
                if capped:
                    return None
                capped = True
            elif name in ("mul", "div"):
                factor = operand if name == "mul" else 1.0 / operand
                inner, outer = (inner, outer * factor) if capped else (inner * factor, outer)
        if not math.isfinite(inner * outer) or (capped and outer == 0.0):
            return None
        return (inner * outer, outer) if capped else (inner, 0.0)


_STEPS: dict[str, Callable | str] = {
    "mul": torch.mul,
    "div": torch.div,
    "tanh": torch.tanh,
    "to": "to",
    "log_softmax": lambda y: torch.log_softmax(y, -1),
    "kl_div": lambda y, target: F.kl_div(y, target, reduction="none", log_target=True),
}


def cast(value: Any, dtype: torch.dtype, call: Call) -> Any:
    """The value in this dtype; None stays None."""
    return value if value is None or value_of(value).dtype == dtype else call("to", value, dtype)
