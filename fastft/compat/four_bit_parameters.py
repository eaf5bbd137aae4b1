"""A 4-bit parameter of bitsandbytes' as it has to be among modules that move and PEFT's adapters in eager mode.

bitsandbytes' parametrization keeps its statistics where they were when a model moves.  PEFT's wrappers read the weight
before their factors are in place, under torch's cache of parametrized values, so that forward would then be given the
cached weight, without what the adapter adds; and PEFT 0.21 does not find its own proxy to take it away again, so that
the next forward would add it twice.  All three are put right from the module that holds the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import Tensor, nn
from torch.nn.utils import parametrize


class FourBitParametrization(Bnb4bitParametrization):
    """De-quantises a parameter, by statistics that move with it; raises RuntimeError if its bytes were cast."""

    def forward(self, packed: Tensor) -> Tensor:
        """Return the weight that ``packed`` stands for, of the shape and dtype that it had; it needs no gradient."""
        if 2 * packed.nbytes != prod(self.quant_state.shape):
            raise RuntimeError(
                f"A 4-bit weight of shape {tuple(self.quant_state.shape)} has {packed.nbytes} bytes of "
                f"{packed.dtype}: was its storage cast? Quantize with storage=torch.uint8, or leave its dtype."
            )
        return super().forward(packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourBitParametrization:
        """Follow the module to another device; torch casts what ``fn`` is for, and statistics are never cast."""
        absmax = self.quant_state.absmax
        device = fn(torch.empty(0, dtype=torch.uint8, device=absmax.device)).device
        if device != absmax.device:
            self.quant_state.to(device)
        return super()._apply(fn, recurse)


_NAME = "fastft"  # of the hooks


def work_with_adapters(module: nn.Module) -> None:
    """Let PEFT's wrappers around this module, which has a 4-bit parameter, add what they add exactly once.

    torch numbers the hooks of a process, so that no layer would be like another; these have one name in each module.
    """
    hooks: Any = module
    hooks._forward_pre_hooks[_NAME] = _read_afresh
    hooks._forward_hooks[_NAME] = _let_proxies_be_found
    hooks._forward_hooks_always_called[_NAME] = True


def _read_afresh(module: Any, inputs: Any) -> None:
    if _has_proxies(module):
        _forget()


def _let_proxies_be_found(module: Any, inputs: Any, output: Any) -> None:
    if _has_proxies(module):
        _put_proxies(module)


def _has_proxies(module: Any) -> bool:
    """Tell whether an adapter is among a module's parametrizations; what is compiled without any has no trace of it."""
    return any(len(parametrizations) > 1 for parametrizations in module.parametrizations.values())


@torch.compiler.disable
def _forget() -> None:
    """Forget values that were read before all adapters were in place."""
    parametrize._cache.clear()


@torch.compiler.disable
def _put_proxies(module: Any) -> None:
    """Put a proxy that PEFT's wrapper looks for where it left one that it would not find."""
    for parametrizations in module.parametrizations.values():
        for index, one in enumerate(parametrizations):
            if type(one).__name__ == "_LoraFactorsProxy":
                from peft.tuners.lora.layer import _LoraParameterProxy

                parametrizations[index] = _LoraParameterProxy(None)
