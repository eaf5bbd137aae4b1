"""A head and its logits, described by what they are computed from: hidden states, a weight, elementwise steps.

In a graph (losses.py) the values are nodes, and calls are added to the graph; at run time
(runtime/lazy_logits.py) they are tensors, and calls are executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from fastft.compat import fsdp
from fastft.compat.fake_tensors import value_of

Step = tuple[str, Any]  # ("mul", 2.0), ("div", 30.0), ("tanh", None), ("to", torch.float32), ("log_softmax", None)


class Call(Protocol):
    """Executes a call, or adds it to a graph: a function, or a method by its name."""

    def __call__(self, function: Callable | str, *args: Any, **kwargs: Any) -> Any: ...


def run(function: Callable | str, *args: Any, **kwargs: Any) -> Any:
    """Execute a call; this is the Call for tensors."""
    if isinstance(function, str):
        return getattr(args[0], function)(*args[1:], **kwargs)
    return function(*args, **kwargs)


@dataclass(frozen=True)
class Head:
    """The product that logits begin with: hidden W^T + bias, or a lora_linear of one 4-bit or adapted layer.

    weight: [V, H], or packed in 4 bits with statistics (absmax, and three more if they are nested).  bias: [V], or with
    axes of size 1 before it, as one that is added to the product may have.  lora_a, lora_b,
    scales: of adapters.  dtype: of the operands; result: of the product, which adapters in float32 may widen.  plain:
    whether the user's call was F.linear.  rounded: the adapters count as rounded to that dtype.
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
    rounded: bool = False

    @property
    def values(self) -> list[Any]:
        """All tensors that it is computed from."""
        optional = [] if self.bias is None else [self.bias]
        return [self.weight, *optional, *self.statistics, *self.lora_a, *self.lora_b]

    def with_values(self, values: Sequence[Any]) -> Head:
        """Return the same head with other values, in the order of ``values``."""
        remaining = iter(values)
        return replace(
            self,
            weight=next(remaining),
            bias=None if self.bias is None else next(remaining),
            statistics=tuple(next(remaining) for _ in self.statistics),
            lora_a=tuple(next(remaining) for _ in self.lora_a),
            lora_b=tuple(next(remaining) for _ in self.lora_b),
        )

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the logits as the user's own call does."""
        dtype = self.dtype
        if self.plain:
            return F.linear(*(cast(operand, dtype, run) for operand in (hidden, self.weight, self.vector(run))))
        statistics = [[tensor] for tensor in self.statistics] + [[]] * (4 - len(self.statistics))
        biases = [] if self.bias is None else [self.bias]
        return torch.ops.fastft.lora_linear(
            cast(hidden, dtype, run), [self.weight], *statistics, biases,
            list(self.lora_a), list(self.lora_b), [], [self.classes], [0] * len(biases), [0] * len(self.lora_a),
            list(self.scales), self.blocksize, self.quant_type, self.result != dtype,
            self.rounded,
        )[0]  # fmt: skip

    def vector(self, call: Call) -> Any:
        """Return the bias [V], None if there is none."""
        many = self.bias is not None and value_of(self.bias).dim() > 1
        return call(torch.reshape, self.bias, (self.classes,)) if many else self.bias

    def dense_weight(self, call: Call) -> Any:
        """Return the weight [V, H] in the product's dtype."""
        if not self.quant_type:
            return cast(self.weight, self.dtype, call)
        statistics = [*self.statistics, *[None] * (4 - len(self.statistics))]
        sizes = (self.classes, self.features, self.blocksize, self.quant_type, self.dtype)
        return call(torch.ops.fastft.dequantize_4bit, self.weight, *statistics, *sizes)

    def adapter(self, hidden: Any, call: Call) -> tuple[Any, Any]:
        """Return lora_s and lora_b as linear_cross_entropy takes them, None without adapters."""
        products = []
        own = self.dtype if self.rounded else None
        lora_a, lora_b = (
            [cast(f, own or value_of(f).dtype, call) for f in many] for many in (self.lora_a, self.lora_b)
        )
        for a, scale in zip(lora_a, self.scales, strict=True):
            product = call(F.linear, cast(hidden, value_of(a).dtype, call), a)
            products.append(product if scale == 1.0 else call(torch.mul, product, scale))
        if len(products) < 2:
            return (products or [None])[0], (lora_b or [None])[0]
        return call(torch.cat, products, -1), call(torch.cat, lora_b, 1)


@dataclass(frozen=True)
class Logits:
    """Logits [..., V] of hidden states [..., H]; steps: the elementwise operations on them, in order.

    trained: whether hidden, weight, bias and the adapters' two factors require grad.  classes_second: the last two axes
    are transposed, as F.cross_entropy wants them of sequences.
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
        """The shape that torch gives them."""
        *others, last = self.rows if self.classes_second else (*self.rows, self.head.classes)
        return (*others, self.head.classes, last) if self.classes_second else (*others, last)

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.rows) + 1

    @property
    def is_log_probs(self) -> bool:
        """Whether the last step made log-probabilities of them."""
        return self.steps[-1:] == (("log_softmax", None),)

    @property
    def is_kl_terms(self) -> bool:
        """Whether they are the summands of a KL divergence."""
        return self.steps[-1:] != () and self.steps[-1][0] == "kl_div"

    @property
    def device(self) -> torch.device:
        """The device of the hidden states, and of the logits."""
        return value_of(self.hidden).device

    @property
    def requires_grad(self) -> bool:
        """Whether one of the tensors that they are computed from does."""
        return any(value.requires_grad for value in self.values)

    def detached(self) -> Logits:
        """Return the same logits of tensors that lead to no gradient, those that lead to none as they are."""
        detached = [fsdp.detach(value) if value.requires_grad else value for value in self.values]
        return replace(self.with_values(detached), trained=(False,) * len(self.trained))

    def with_step(self, name: str, operand: Any = None, dtype: torch.dtype | None = None) -> Logits:
        """Return these logits with one more step."""
        return replace(self, steps=(*self.steps, (name, operand)), dtype=dtype or self.dtype)

    @property
    def values(self) -> list[Any]:
        """All tensors that they are computed from."""
        return [self.hidden, *self.head.values]

    def with_values(self, values: Sequence[Any]) -> Logits:
        """Return the same logits with other values, in the order of ``values``."""
        hidden, *others = values
        return replace(self, hidden=hidden, head=self.head.with_values(others))

    def compute(self) -> torch.Tensor:
        """Compute the logits with the user's own steps."""
        y = self.head.product(self.hidden)
        for name, operand in self.steps:
            y = run(STEPS[name], y, *(() if operand is None else (operand,)))
        return y.transpose(-1, -2) if self.classes_second else y

    def softmax_form(self) -> tuple[float, float] | None:
        """Return the steps as scale and softcap of linear_cross_entropy, or None if they are something else."""
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


STEPS: dict[str, Callable | str] = {
    "mul": torch.mul,
    "div": torch.div,
    "tanh": torch.tanh,
    "to": "to",
    "log_softmax": lambda y: torch.log_softmax(y, -1),
    "kl_div": lambda y, target: F.kl_div(y, target, reduction="none", log_target=True),
}


def cast(value: Any, dtype: torch.dtype, call: Call) -> Any:
    """Cast a value to this dtype if it has another; None stays None."""
    return value if value is None or value_of(value).dtype == dtype else call("to", value, dtype)
