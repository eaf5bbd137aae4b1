"""The parameters that FSDP2 (``fully_shard``) has sharded: found, gathered, freed, reduced; by private torch symbols.

FSDP2 swaps the parameters of a module for whole ones in a hook before its forward, and back behind it.  fastft leaves
the modules as they are and gathers what a piece of a graph reads: see rewriter/runtime/sharded.py.  What FSDP2 makes of
gradients is its own code: reduction, accumulation, replicated meshes, offloading.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import make_contiguous_strides_for
from torch.autograd import Variable
from torch.utils.weak import WeakIdKeyDictionary

try:
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import foreach_all_gather, foreach_all_gather_copy_out
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState, _get_module_fsdp_state
    from torch.distributed.tensor import DTensor, Partial
except ImportError:  # a torch without it
    FSDPState = DTensor = None  # type: ignore[assignment,misc]

MARK = "_fastft_sharded"  # an attribute of the parameters that are known here, which Dynamo guards


@dataclass(frozen=True, eq=False)
class Home:
    """Where FSDP2 keeps a parameter: its own object for it, the group that is reduced with it, and the model's root."""

    parameter: Any
    group: Any
    root: Any

    @property
    def whole_bytes(self) -> int:
        """The bytes of the whole parameter."""
        return self.parameter._orig_size.numel() * _dtype(self.parameter).itemsize

    @property
    def own_bytes(self) -> int:
        """The bytes of this process's part of the parameter, as it is kept."""
        return self.parameter._sharded_param_data.untyped_storage().nbytes()

    @property
    def trained(self) -> bool:
        """Whether it needs a gradient."""
        return self.parameter.sharded_param.requires_grad

    @property
    def own_gradient_bytes(self) -> int:
        """The bytes of this process's part of its gradient; 0 for a frozen parameter."""
        return self.own_bytes if self.trained else 0

    @property
    def is_given(self) -> bool:
        """Whether FSDP2 itself has gathered it: the root's parameters, whose hook has run around a graph."""
        whole = self.group.is_unsharded and self.parameter.sharded_state.name == "UNSHARDED"
        return whole and self.parameter.all_gather_outputs[0].untyped_storage().size() > 0

    @property
    def processes(self) -> int:
        """Over how many processes it is sharded."""
        return self.group._all_gather_process_group.size()

    def whole(self) -> nn.Parameter:
        """Return the whole parameter; it has no memory until it is gathered."""
        parameter = self.parameter
        if not hasattr(parameter, "_unsharded_param"):
            elements = [parameter.padded_sharded_param_size.numel()]
            parameter.init_all_gather_outputs(elements, [_dtype(parameter)], self.processes, parameter.device)
            parameter.init_unsharded_param()
            parameter.free_unsharded_param()
        whole = parameter._unsharded_param
        if whole.requires_grad != parameter.sharded_param.requires_grad:
            whole.requires_grad_(parameter.sharded_param.requires_grad)
        return whole

    def like(self) -> dict[str, Any]:
        """Return size, stride, dtype and device of the whole parameter."""
        size = self.parameter._orig_size
        return {
            "size": size, "stride": make_contiguous_strides_for(size), "dtype": _dtype(self.parameter),
            "device": self.parameter.device,
        }  # fmt: skip


def _dtype(parameter: Any) -> torch.dtype:
    return parameter.param_dtype or parameter.orig_dtype


_homes: Any = WeakIdKeyDictionary()  # by the parameter, sharded or whole: weak references


def home_of(tensor: Any) -> Home | None:
    """Return where a parameter is kept that ``adopt`` has seen."""
    reference = _homes.get(tensor) if isinstance(tensor, Tensor) else None
    return reference() if reference is not None else None


def state_of(module: Any) -> Any:
    """Return what FSDP2 keeps of a module, or None."""
    return _get_module_fsdp_state(module) if FSDPState is not None else None


def is_hook(function: Any) -> bool:
    """Return whether a module's hook is FSDP2's."""
    while function is not None and FSDPState is not None:
        if isinstance(getattr(function, "__self__", None), FSDPState):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def adopt(state: Any) -> tuple[Any, str]:
    """Note the parameters of the model that a state belongs to; return its root, and why it is left to FSDP2's hooks.

    The root's own hook may have run: around the code that is traced, as torch.compile arranges it.
    """
    root = state._state_ctx.iter_forward_root or state
    if root in _refused:
        return root, _refused[root]
    if root._is_root is False:
        return root, "it is a part of a model that is called by itself"
    root._lazy_init()
    found = [
        (parameter, group)
        for one in root._state_ctx.all_states for group in groups_of(one) for parameter in group.fsdp_params
    ]  # fmt: skip
    for parameter, group in found:
        if reason := _reason(parameter, group):
            return root, reason
    for parameter, group in found:
        sharded = parameter.sharded_param
        setattr(sharded, MARK, True)
        home = getattr(parameter, "_fastft_home", None)
        if home is None or home.root is not root or home.group is not group:
            home = parameter._fastft_home = Home(parameter, group, root)  # for as long as FSDP2 keeps the parameter
        _homes[sharded] = _homes[home.whole()] = weakref.ref(home)
        statistics = getattr(parameter._module_info.module, "quant_state", None)
        if statistics is not None and parameter._module_info.param_name == "weight":
            weights: tuple[Any, Any] = sharded, home.whole()
            for weight in weights:  # where bitsandbytes looks for them, or it makes a parameter anew
                weight.quant_state = statistics
            if not hasattr(parameter, "_fastft_hook"):
                hook = parameter._module_info.module.register_state_dict_post_hook(_without_statistics)
                parameter._fastft_hook = hook
    return root, ""


def _without_statistics(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Leave a state dict as it is without ``adopt``: bitsandbytes would save the statistics that it finds, beside names
    that torch looks for in vain."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}weight.")]:
        del state_dict[key]


def _reason(parameter: Any, group: Any) -> str:
    """Return why a parameter is left to FSDP2's hooks."""
    if not isinstance(group.mesh_info, FSDPMeshInfo):
        return "a parameter is replicated, not sharded"
    if getattr(parameter, "is_dtensor", False):
        return "a parameter is also sharded by tensor parallelism"
    if hasattr(parameter.sharded_param._local_tensor, "fsdp_pre_all_gather"):
        return "a parameter is gathered in a way of its own"
    return ""


_refused: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def refuse(state: Any, reason: str) -> None:
    """Leave a model to FSDP2's hooks from now on."""
    _refused[state] = reason


def groups_of(state: Any) -> list[Any]:
    """Return the groups of parameters that a state reduces."""
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    return groups


def casts(state: Any, module: Any) -> tuple[torch.dtype | None, torch.dtype | None, torch.device | None]:
    """Return the dtypes to which FSDP2 casts what a module takes and returns, and where a root's inputs go."""
    policy = state._mp_policy
    taken = policy.param_dtype if policy.cast_forward_inputs else None
    return taken, policy.output_dtype, state._device if state._is_root and state._device.type != "cpu" else None


@dataclass(eq=False)
class Gathering:
    """Parameters of one group on their way.

    Several are sent as one, and are twice in memory while they are put in place; one comes into its place.
    """

    homes: Sequence[Home]
    result: Any = field(init=False)

    def __post_init__(self) -> None:
        group, context = self.homes[0].group, self.homes[0].root._comm_ctx
        if self._goes_straight():
            self._gather_straight()
            return
        self.result = foreach_all_gather(
            [home.parameter for home in self.homes], group._all_gather_process_group, False,
            context.all_gather_copy_in_stream, context.all_gather_stream, group.device, group._all_gather_comm,
        )  # fmt: skip

    def _goes_straight(self) -> bool:
        """Return whether there is one parameter, whose parts lie one after another in the whole as they are sent."""
        parameter = self.homes[0].parameter
        plain = parameter.param_dtype is None and not parameter.offload_to_cpu and parameter.fsdp_placement.dim == 0
        return len(self.homes) == 1 and plain

    def _gather_straight(self) -> None:
        """Gather one parameter into its place, so that it is never twice in memory."""
        home = self.homes[0]
        parameter, stream = home.parameter, home.root._comm_ctx.all_gather_stream
        whole = home.whole()
        parameter.alloc_all_gather_outputs()
        handle = home.group.device_handle
        stream.wait_stream(handle.current_stream())  # the memory may have been another's
        with handle.stream(stream), torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(whole):
            home.group._all_gather_comm(
                output_tensor=parameter.all_gather_outputs[0], input_tensor=parameter._sharded_param_data,
                group=home.group._all_gather_process_group, async_op=False,
            )  # fmt: skip
            self.result = handle.Event()
            self.result.record(stream)

    def finish(self) -> None:
        """Wait for them, and put them into place."""
        if self._goes_straight():
            self.homes[0].group.device_handle.current_stream().wait_event(self.result)
            return
        group, context = self.homes[0].group, self.homes[0].root._comm_ctx
        parameters = [home.parameter for home in self.homes]
        foreach_all_gather_copy_out(self.result, parameters, group._all_gather_process_group)
        for parameter in parameters:
            parameter.init_unsharded_param()
        copied = group.device_handle.Event()
        copied.record()
        for stream in (context.all_gather_copy_in_stream, context.all_gather_stream):
            stream.wait_event(copied)  # before the memory of the result is used again
        self.result = None


def free(homes: Sequence[Home]) -> None:
    """Free the whole parameters."""
    for home in homes:
        home.parameter.free_unsharded_param()


def begin(root: Any) -> None:
    """Prepare for a forward: what is gathered from now on is as the optimizer left it.

    What the root's own hook has gathered is in place, but would be held a second time until the next hook.
    """
    context, streams = root._state_ctx, root._comm_ctx
    if (held := streams.all_gather_state) is not None:
        for stream in (streams.all_gather_copy_in_stream, streams.all_gather_stream):
            if held.event is not None:
                stream.wait_event(held.event)
        streams.all_gather_state = None
    event, context.post_optim_event = context.post_optim_event, None
    current = root._device_handle.current_stream()
    for stream in (streams.all_gather_copy_in_stream, streams.all_gather_stream):
        if event is not None:
            stream.wait_event(event)
        else:
            stream.wait_stream(current)


def reduce(group: Any) -> None:
    """Reduce the gradients of a group over all processes, or keep them for later where the user asked for that.

    Where there are none yet FSDP2 is not told: it would take the group for done.
    """
    if any(one._unsharded_param.grad is not None for one in group.fsdp_params if hasattr(one, "_unsharded_param")):
        group.post_backward()


def complete(homes: Iterable[Home]) -> set[Any]:
    """Return the groups of which all parameters are among these, and which FSDP2 would leave whole until backward."""
    members: dict[Any, set[Any]] = {}
    for home in homes:
        members.setdefault(home.group, set()).add(home.parameter)
    return {
        group
        for group, found in members.items()
        if not group._reshard_after_forward and found.issuperset(group.fsdp_params)
    }


def give_up(group: Any) -> None:
    """Shard a group again that FSDP2 itself has gathered, and have it not gather the group for backward."""
    if group.is_unsharded:
        group._to_sharded()
        group.unshard_in_backward = False


def at_end_of_backward(root: Any, function: Callable[[], None]) -> None:
    """Call a function at the end of the backward that is running, where FSDP2 reduces what is left."""
    Variable._execution_engine.queue_callback(function)
    root._register_root_post_backward_final_callback()


def sharded(tensor: Tensor) -> Tensor:
    """Return the parameter that stays, for one that is whole for a while; any other tensor as it is."""
    home = home_of(tensor)
    return tensor if home is None else home.parameter.sharded_param


def detach(tensor: Tensor) -> Tensor:
    """Detach a tensor; one that is sharded is still known here."""
    detached = tensor.detach()
    if is_sharded(tensor) and tensor in _homes:
        _homes[detached] = _homes[tensor]
    return detached


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is sharded as a whole, of the dtype that FSDP2 gives it; any other as it is.

    All processes have to ask.  Backward gives each the mean of all processes' gradients for its part.
    """
    home = home_of(tensor) if is_sharded(tensor) else None
    if home is None:
        return tensor
    cast: Any = tensor.to(_dtype(home.parameter))
    return cast.full_tensor(grad_placements=[Partial("avg")] * cast.device_mesh.ndim)


def is_sharded(tensor: Any) -> bool:
    """Return whether a tensor's elements are spread over processes."""
    return DTensor is not None and isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that is sharded, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
