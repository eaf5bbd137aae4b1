"""Let FSDP2 shard the statistics of 4-bit weights too, which bitsandbytes keeps beside its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "weight_absmax"


def statistics_as_parameters_(model: nn.Module) -> list[str]:
    """Make the absmax of every 4-bit weight of ``model`` a frozen parameter, so that ``fully_shard`` shards them.

    Call it before ``fully_shard``.  They are a thirty-second of the packed bytes (an eighth without double
    quantisation), and whole on every device otherwise.  Forward is as before, compiled or not, and so are checkpoints
    of adapters; a state dict of the whole model has the parameters in addition.  Returns the names of the layers.
    """
    names = []
    for name, module in model.named_modules():
        statistics = getattr(module, "quant_state", None)
        if statistics is None or NAME in module._parameters or not hasattr(module, "weight"):
            continue
        absmax, storage = statistics.absmax, module.weight.dtype
        if absmax.numel() * absmax.element_size() % storage.itemsize:
            continue  # a part of an element: it stays whole
        kept = absmax.contiguous().view(-1).view(storage)  # as the weight is stored, which nobody casts
        module.register_parameter(NAME, nn.Parameter(kept, requires_grad=False))
        _of_module(statistics, module, absmax.dtype, storage)
        names.append(name)
    return names


def _of_module(statistics: Any, module: nn.Module, dtype: torch.dtype, storage: torch.dtype) -> None:
    """Have statistics look their absmax up in a module: whole in its forward, else as FSDP2 keeps it."""
    del statistics.absmax
    statistics.__class__ = _shared(type(statistics))
    statistics.__dict__ |= {"holder": [module], "absmax_dtype": dtype, "stored_as": storage}


def _shared(kind: type) -> type:
    if kind not in _kinds:

        class Shared(kind):
            """Statistics whose absmax is a parameter of their module."""

            @property
            def absmax(self) -> Tensor:
                """The parameter, as it is now.  Raises RuntimeError where it was cast."""
                kept = self.holder[0]._parameters[NAME]
                if kept.dtype != self.stored_as:
                    raise RuntimeError("statistics of a 4-bit weight were cast: quantise the model behind the cast.")
                return kept if kept.dtype == self.absmax_dtype else kept.view(self.absmax_dtype)

            @absmax.setter
            def absmax(self, value: Tensor) -> None:
                kept = self.holder[0]._parameters[NAME]
                if value.device == kept.device:  # else the whole model moves, and its parameters with it
                    kept.data = value.contiguous().view(-1).view(kept.dtype)

        _kinds[kind] = Shared
    return _kinds[kind]


_kinds: dict[type, type] = {}
