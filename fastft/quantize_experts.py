"""Make frozen experts 4-bit, in place: weights of many matrices in one parameter, as bitsandbytes' parametrization."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_VALUES = 2**31 - 1  # bitsandbytes counts them by a C int


@dataclass(frozen=True)
class FourBit:
    """How weights are made 4-bit; the words are those of ``fastft.quantize_``."""

    quant_type: str
    blocksize: int
    double_quant: bool
    storage: torch.dtype


def candidates(model: nn.Module) -> list[str]:
    """List the names of all 3-D floating-point parameters that modules of no class of torch's have.

    They may be experts, which convolutions' weights and adapters' factors are not.
    """
    return [
        f"{path}.{name}".removeprefix(".")
        for path, module in model.named_modules()
        if not _is_of_torch(module) and not any(part.startswith("lora_") for part in path.split("."))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    ]


def _is_of_torch(module: nn.Module) -> bool:
    """Tell whether a class of this module is torch's, apart from nn.Module and what holds parametrizations."""
    classes = [base for base in type(module).__mro__ if base is not nn.Module]
    of_torch = any(base.__module__.startswith("torch.nn.") for base in classes)
    return of_torch and not isinstance(module, parametrize.ParametrizationList)


def quantize(model: nn.Module, name: str, uses: Counter[int], how: FourBit, meta: bool = False) -> str:
    """Make a parameter of experts 4-bit; return why it is left as it was, or "".

    It is de-quantised whenever its module reads it.  ``state_dict`` has what ``bitsandbytes.nn.parametrize`` saves: the
    bytes under the parameter's own name, and the statistics under names behind it.  meta: parameters without values
    become what has none either.
    """
    path, _, own_name = name.rpartition(".")
    module, wrappers = model.get_submodule(path), _wrappers(model, path, own_name)
    reason = "it holds embeddings, as its name says" if "embed" in own_name else ""
    reason = reason or _reason(module, module.get_parameter(own_name), uses, how.blocksize)
    reason = reason or next(filter(None, map(reason_of_parent, wrappers)), "")
    if not reason and module.get_parameter(own_name).is_meta and not meta:
        reason = "it has no values yet"
    if not reason:
        _four_bit_(module, own_name, how)
        for wrapper in wrappers:
            wrapper.merge = _refuse_to_merge
    return reason


def _wrappers(model: nn.Module, path: str, own_name: str) -> list[Any]:
    """List the adapters' modules around a module that are there for this parameter of it."""
    found = []
    while path.rpartition(".")[2] == "base_layer":
        path = path.rpartition(".")[0]
        wrapper = model.get_submodule(path)
        found += [wrapper] if getattr(wrapper, "parameter_name", own_name) == own_name else []
    return found


def _reason(module: nn.Module, parameter: nn.Parameter, uses: Counter[int], blocksize: int) -> str:
    """Return why this parameter is not quantised; "" if it can be."""
    experts, rows, columns = parameter.shape
    if isinstance(module, parametrize.ParametrizationList):
        return "it has a parametrization already"
    if parameter.requires_grad:
        return "it is trainable"
    if uses[id(parameter)] > 1:
        return "it is shared with another module"
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}"
    if parameter.dtype not in DTYPES:
        return f"it is {parameter.dtype}"
    if experts < 2 or rows < 2:
        return "it is no stack of matrices"
    if columns % blocksize:
        return f"a row of {columns} is no whole number of blocks of {blocksize}"
    return f"bitsandbytes counts no more than {MOST_VALUES} values" if parameter.numel() > MOST_VALUES else ""


def reason_of_parent(parent: nn.Module) -> str:
    """Return why what is inside this module is not quantised: a merged adapter; "" if it can be."""
    merged = getattr(parent, "merged_adapters", ())
    return f"the adapter {merged[0]!r} is merged into its weight: unmerge it first" if merged else ""


def _four_bit_(module: Any, name: str, how: FourBit) -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    from fastft.compat.four_bit_parameters import FourBitParametrization, work_with_adapters

    quant_type: Any = how.quant_type
    with on_default_stream(module.get_parameter(name).device):
        replace_parameter_4bit(module, name, how.double_quant, quant_type, how.blocksize)
    held = module.parametrizations[name]
    held[0] = FourBitParametrization(held[0].quant_state)
    if how.storage != torch.uint8:
        held.original = nn.Parameter(_stored_as(held.original.data, how.storage), requires_grad=False)
    module.parametrizations.train(module.training)
    module.register_load_state_dict_pre_hook(partial(_take_statistics, name=name))
    work_with_adapters(module)


def _stored_as(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """View packed bytes as another dtype, as bitsandbytes lays them out: [n, 1]."""
    return packed.view(-1).view(dtype).unsqueeze(1)


def _take_statistics(module: Any, state_dict: dict[str, Tensor], prefix: str, *rest: Any, name: str) -> None:
    """Put what bitsandbytes saved where torch looks for the bytes, and the statistics into the parametrization."""
    from bitsandbytes.functional import QuantState

    key, held = f"{prefix}{name}", module.parametrizations[name]
    statistics = {
        other.removeprefix(f"{key}."): state_dict.pop(other) for other in [*state_dict] if other.startswith(f"{key}.")
    }
    if key not in state_dict:  # a state of adapters alone
        return
    value = state_dict.pop(key)
    if statistics:
        found, shape = QuantState.from_dict(statistics, device=held.original.device), held[0].quant_state.shape
        if found.shape != shape:
            rest[-1].append(f"size mismatch for {key}: {tuple(found.shape)} in the state, {tuple(shape)} in the model.")
            return
        held[0].quant_state = found
        value = _stored_as(value, held.original.dtype)
    state_dict[f"{prefix}parametrizations.{name}.original"] = value


def _refuse_to_merge(*_: Any, **__: Any) -> None:
    """Raise NotImplementedError: PEFT would add to a de-quantised copy, and what an adapter learnt would be lost."""
    raise NotImplementedError("PEFT merges nothing into 4-bit experts: merge the adapter into the model in 16 bits.")


def refuse_to_save(base: Any) -> None:
    """Let a transformers model's save_pretrained raise ValueError: its loader would not know what the bytes are."""
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.is_serializable = _is_serializable


def _is_serializable(*_: Any, **__: Any) -> bool:
    """Return False, and warn of what to do instead."""
    warnings.warn(
        "transformers loads no 4-bit experts: save model.state_dict(), and load it into a model of which "
        "fastft.quantize_ made the same weights 4-bit.  Adapters are saved as ever.",
        stacklevel=3,
    )
    return False


@contextmanager
def on_default_stream(device: torch.device) -> Iterator[None]:
    """Run on the default stream, where bitsandbytes (0.49 to 0.50) quantises whichever stream is current."""
    if device.type != "cuda":
        yield
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    default.wait_stream(current)
    with torch.cuda.stream(default):
        yield
    current.wait_stream(default)
