"""What is traced in the place of functions of bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastft.compat.hook_tracing import keep
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


def has_parameter_in_4_bits(module: Any) -> bool:
    """Tell whether bitsandbytes holds a parameter of a module in 4 bits, and has hooks on it for that."""
    return any(map(_is_hook, module._forward_hooks.values()))


def hooks_of_others(tx: Any, module: Any, name: str, found: Any) -> Any:
    """Return a module's hooks without bitsandbytes', which count in a global who keeps computed parameters.

    In a graph a parameter that is read twice is computed once anyway, and each layer would have hooks of its own.
    """
    own = {key for hooks in (module._forward_pre_hooks, module._forward_hooks) for key in hooks if _is_hook(hooks[key])}
    return keep(found, {key: hook for key, hook in found.items.items() if key.vt.as_python_constant() not in own})


def _is_hook(hook: Any) -> bool:
    return getattr(hook, "__module__", "") == "bitsandbytes.nn.parametrize"


SUBSTITUTIONS = (
    Substitution(
        "bitsandbytes.nn.modules:Linear8bitLt.forward", "bitsandbytes", "0.49", "0.51",
        "it sets its parameter to the memory that it has, which is a write to an input of the graph",
        linear_8bit,
    ),
)  # fmt: skip
