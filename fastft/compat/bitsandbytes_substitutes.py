"""What is traced in the place of functions of bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastft.compat.substitutions import Substitution


def linear_8bit(original: Callable, module: Any, x: Any) -> Any:
    """Multiply by a weight in 8 bits, and leave out that the parameter is set to the memory that it has already."""
    from bitsandbytes import matmul

    module.state.is_training = module.training
    if module.weight.CB is not None:
        module.init_8bit_state()
    if module.state.has_fp16_weights or (module.bias is not None and module.bias.dtype != x.dtype):
        return original(module, x)  # it changes its parameters
    return matmul(x, module.weight, bias=module.bias, state=module.state)


SUBSTITUTIONS = (
    Substitution(
        "bitsandbytes.nn.modules:Linear8bitLt.forward", "bitsandbytes", "0.49", "0.51",
        "it sets its parameter to the memory that it has, which is a write to an input of the graph",
        linear_8bit,
    ),
)  # fmt: skip
