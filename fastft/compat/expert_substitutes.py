"""What is traced in place of the experts of transformers, and of PEFT's adapters on experts: calls of fastft's ops.

Transformers' experts keep to an interface (transformers.integrations.moe): a module of that interface has weights
gate_up_proj, or up_proj without a gate, and down_proj, of all experts in one tensor, and says by has_gate, has_bias,
is_transposed and has_post_expert_norm what is computed with them.  Each implementation computes just that, so that one
substitute stands for all: it sorts the tokens by expert once, and multiplies by each weight as it is, in 16 or 4 bits.

PEFT's ParamWrapper adds its adapter to a parameter by a parametrization, in each forward.  Here it passes itself to the
layer that it is around, as the argument ``adapters``; the experts give the factors to the op, and whatever else is
there computes with W + delta, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastft.compat.substitutions import Substitution

RULE = "experts"
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_OWN = "transformers.models."  # whose experts' own forwards were read: they compute what their implementations do
_IN_FLOAT32 = f"{_OWN}openai_privacy_filter."  # but these, which widen all weights


class Weight(NamedTuple):
    """A weight of all experts as an op takes it, with its adapters.

    tensor: [E, ...] in dtype, or packed, with a quant_type.  statistics: absmax, or, nested, absmax, absmax_8bit,
    absmax_code and absmax_offset.  factors: A [E, r, K] and B [E, N, r] with their scale, or two Nones.
    """

    tensor: Tensor
    dtype: torch.dtype
    statistics: Sequence[Tensor] = ()
    blocksize: int = 0
    quant_type: str = ""
    factors: tuple[Tensor | None, Tensor | None, float] = (None, None, 1.0)


class _StandIn:
    """A module with other tensors in the place of some of its parameters."""

    def __init__(self, module: Any, tensors: dict[str, Tensor]) -> None:
        self._module = module
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def experts(
    original: Callable, self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor,
    adapters: Sequence[Any] = (),
) -> Tensor:  # fmt: skip
    """Compute a mixture of experts for tokens [T, K] by fastft's ops.

    top_k_index, top_k_weights: [T, k].  adapters: the ParamWrappers around the module.
    """
    if not _is_taken(self, hidden_states, top_k_index, top_k_weights):
        return experts_as_they_are(original, self, hidden_states, top_k_index, top_k_weights, adapters=adapters)
    kind, top_k = hidden_states.device.type, top_k_index.shape[-1]
    rounded = self.config._experts_implementation != "grouped_mm" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if rounded else None  # torch's grouped product knows nothing of autocast
    up, down = _names(self)
    normed = getattr(self, "has_post_expert_norm", False)
    order = torch.ops.fastft.expert_order(top_k_index, self.num_experts)
    rows = _product(self, up, hidden_states, None, order, top_k, adapters, dtype)
    rows = self._apply_gate(rows) if self.has_gate else self.act_fn(rows)
    result = _product(self, down, rows, None if normed else top_k_weights, order, top_k, adapters, dtype)
    if normed:
        rows = self.post_expert_norm(result)[order[1]].unflatten(0, top_k_weights.shape)
        result = (rows * top_k_weights.unsqueeze(-1)).sum(1)
    return result.to(hidden_states.dtype)


def experts_as_they_are(original: Callable, self: Any, *args: Any, adapters: Sequence[Any] = (), **kwargs: Any) -> Any:
    """Compute experts by their own implementation, with W + delta where there are adapters."""
    if not adapters:
        return original(self, *args, **kwargs)
    return original(_StandIn(self, _effective(self, adapters)), *args, **kwargs)


def get_interface(original: Callable, self: Any, implementation: str, default: Callable) -> Callable:
    """Return what computes experts; their own forward, if transformers', loops over the experts that tokens chose."""
    if implementation != "eager":
        return original(self, implementation, default)

    def forward(module: Any, *args: Any, adapters: Sequence[Any] = (), **kwargs: Any) -> Any:
        kind = type(module)
        if hasattr(module, "parametrizations"):  # torch makes a class of such a module
            kind = kind.__mro__[1]
        written_in = kind.__module__
        is_read = written_in.startswith(_OWN) and not written_in.startswith(_IN_FLOAT32)
        if kwargs or len(args) != 3 or not is_read:
            return experts_as_they_are(default, module, *args, adapters=adapters, **kwargs)
        return experts(default, module, *args, adapters=adapters)

    return forward


def get_interface_as_it_is(original: Callable, self: Any, implementation: str, default: Callable) -> Callable:
    """Return the same where experts are left as they are."""
    if implementation != "eager":
        return original(self, implementation, default)

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        return experts_as_they_are(default, module, *args, **kwargs)

    return forward


def _is_taken(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> bool:
    """Tell whether the ops compute what this module does."""
    if getattr(self, "_is_expert_parallel", False) or hidden_states.dim() != 2 or top_k_index.dim() != 2:
        return False
    return top_k_weights.shape == top_k_index.shape and all(_is_known(self, name) for name in _names(self))


def _names(self: Any) -> tuple[str, str]:
    return ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")


def _is_known(self: Any, name: str) -> bool:
    """Tell whether a parameter is a weight of all experts, in a dtype that the ops take or in bitsandbytes' 4 bits."""
    state = _quant_state(self, name)
    if state is not None:
        known = state.dtype in _DTYPES and state.quant_type in ("nf4", "fp4")
        return known and len(state.shape) == 3 and state.shape[0] == self.num_experts
    weight = getattr(self, name)
    if type(weight) not in (Tensor, nn.Parameter) or weight.dim() != 3:
        return False
    return weight.shape[0] == self.num_experts and weight.dtype in _DTYPES


def _quant_state(self: Any, name: str) -> Any:
    """Return what bitsandbytes knows of a parameter in 4 bits; None for others."""
    parametrizations = getattr(self, "parametrizations", None)
    if parametrizations is None or name not in parametrizations or len(parametrizations[name]) != 1:
        return None
    return getattr(parametrizations[name][0], "quant_state", None)


def _product(
    self: Any, name: str, x: Tensor, top_k_weights: Tensor | None, order: tuple[Tensor, Tensor, Tensor], top_k: int,
    adapters: Sequence[Any], dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """Multiply tokens, or rows for down_proj, by a weight of the experts; dtype: of the product if not the weight's."""
    weight = _weight(self, name, adapters)
    dtype = weight.dtype if dtype is None or weight.dtype == torch.float64 else dtype  # autocast leaves float64 alone
    tensor = weight.tensor if weight.quant_type else weight.tensor.to(dtype)
    bias = _with_deltas(self, f"{name}_bias", adapters).to(dtype) if self.has_bias else None
    a, b, scale = weight.factors
    transposed = self.is_transposed
    features = _shape(self, name)[2 if transposed else 1]
    y, _ = torch.ops.fastft.expert_linear(
        x.to(dtype), tensor, weight.statistics, bias, a, b, top_k_weights, *order, features, scale, top_k, transposed,
        name != "down_proj", weight.blocksize, weight.quant_type,
    )  # fmt: skip
    return y


def _shape(self: Any, name: str) -> Sequence[int]:
    state = _quant_state(self, name)
    return getattr(self, name).shape if state is None else state.shape


def _weight(self: Any, name: str, adapters: Sequence[Any]) -> Weight:
    """Return a weight of the experts with its adapters; those that are no product of two factors are added to it."""
    own = [one for one in adapters if one.parameter_name == name]
    if any(one.num_experts == 1 for one in own):
        tensor = _with_deltas(self, name, own)
        return Weight(tensor, tensor.dtype)
    factors = _stacked([_factors(one, adapter, self.is_transposed) for one in own for adapter in _active(one)])
    state = _quant_state(self, name)
    if state is None:
        tensor = getattr(self, name)
        return Weight(tensor, tensor.dtype, factors=factors)
    statistics = [state.absmax]
    if state.nested:
        statistics = [state.state2.absmax, state.absmax, state.state2.code, state.offset]
    packed = self.parametrizations[name].original
    return Weight(packed, state.dtype, statistics, state.blocksize, state.quant_type, factors)


def _active(wrapper: Any) -> list[str]:
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _factors(wrapper: Any, adapter: str, transposed: bool) -> tuple[Tensor, Tensor, float]:
    """Return A [E, r, K] and B [E, N, r] of one adapter, which PEFT has by the axes of the parameter, and its scale."""
    a, b, experts = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight, wrapper.num_experts
    a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    if wrapper._did_swap_in_out_features == transposed:  # delta is a^T b^T where it should be b a, or the other way
        a, b = b.transpose(1, 2), a.transpose(1, 2)
    return a, b, wrapper.scaling[adapter]


def _stacked(factors: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor | None, Tensor | None, float]:
    """Return the factors of one adapter that is the sum of several."""
    if len(factors) < 2:
        return factors[0] if factors else (None, None, 1.0)
    return torch.cat([a for a, _, _ in factors], 1), torch.cat([b * scale for _, b, scale in factors], 2), 1.0


def _with_deltas(self: Any, name: str, adapters: Sequence[Any]) -> Tensor:
    """Return a parameter with what its adapters add to it, as PEFT computes it."""
    tensor = getattr(self, name)
    for wrapper in adapters:
        active = _active(wrapper) if wrapper.parameter_name == name else []
        if len(active) == 1 and wrapper.num_experts > 1 and tensor.dtype in _DTYPES:
            lhs, rhs, scaling = wrapper.get_delta_factors(active[0])
            with torch.autocast(device_type=tensor.device.type, enabled=False):
                tensor = torch.baddbmm(tensor, lhs, rhs, alpha=scaling)
        elif active:
            delta = wrapper.get_delta_weight(active[0])
            for adapter in active[1:]:
                delta = delta + wrapper.get_delta_weight(adapter)
            tensor = tensor + delta
    return tensor


def _effective(self: Any, adapters: Sequence[Any]) -> dict[str, Tensor]:
    return {one.parameter_name: _with_deltas(self, one.parameter_name, adapters) for one in adapters}


def adapted(original: Callable, self: Any, x: Tensor, *args: Any, adapters: Sequence[Any] = (), **kwargs: Any) -> Any:
    """Compute what a ParamWrapper does without a parametrization of the layer that it is around."""
    if kwargs.get("adapter_names") is not None or not _can_pass(self):
        return original(self, x, *args, **kwargs)
    kwargs.pop("adapter_names", None)
    if not self.disable_adapters and not self.merged and _active(self):
        adapters = (*adapters, self)
    layer = self.base_layer
    if not adapters:
        return layer(x, *args, **kwargs)
    if hasattr(layer, "parameter_name") or _keeps_to_the_interface(layer):
        return layer(x, *args, adapters=adapters, **kwargs)
    return torch.func.functional_call(layer, _effective(layer, adapters), (x, *args), kwargs, tie_weights=False)


def _can_pass(wrapper: Any) -> bool:
    """Tell whether all wrappers, from this one to the innermost, can be traced so."""
    while hasattr(wrapper, "parameter_name"):
        if wrapper.disable_adapters and wrapper.merged:  # it is about to be unmerged
            return False
        name, base = wrapper.parameter_name, wrapper.get_base_layer()
        if _keeps_to_the_interface(base):
            taken = name.removesuffix("_bias") in _names(base)  # not what a gate of its own may read
        else:
            taken = name in base._parameters and base._parameters[name].dtype in _DTYPES
        if not taken:
            return False
        wrapper = wrapper.base_layer
    return True


def _keeps_to_the_interface(layer: Any) -> bool:
    """Tell whether this is a module of transformers' experts that one of the implementations here computes."""
    if not hasattr(type(layer).forward, "__wrapped__") or not hasattr(layer, "has_gate"):
        return False
    known = all(_is_known(layer, name) for name in _names(layer))
    return known and layer.config._experts_implementation in _IMPLEMENTATIONS


def _of_transformers(original: str, substitute: Callable, reason: str, rule: str = "") -> Substitution:
    original = f"transformers.integrations.moe:{original}"
    return Substitution(original, "transformers", "5.17", "5.25", reason, substitute, rule=rule)


_ADAPTERS = "adapters come as an argument"
_READS = "it reads how many tokens chose each expert"

SUBSTITUTIONS = (
    _of_transformers("grouped_mm_experts_forward", experts, "it takes no adapters, nor weights in 4 bits", RULE),
    _of_transformers("batched_mm_experts_forward", experts, "it gathers a weight for each token and expert", RULE),
    _of_transformers("ExpertsInterface.get_interface", get_interface, _READS, RULE),
    _of_transformers("grouped_mm_experts_forward", experts_as_they_are, _ADAPTERS),
    _of_transformers("batched_mm_experts_forward", experts_as_they_are, _ADAPTERS),
    _of_transformers("ExpertsInterface.get_interface", get_interface_as_it_is, _ADAPTERS),
    Substitution(
        "peft.tuners.lora.layer:ParamWrapper.forward", "peft", "0.21", "0.22",
        "it makes a class of its own for the layer in each call", adapted,
    ),
)  # fmt: skip
