"""The only file, beside compat_ddp.py, that touches private torch symbols.  Supported: torch 2.11 to 2.15."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import convert_frame, pgo
from torch._dynamo.exc import BackendCompilerFailed, RestartAnalysis, ShortenTraceback
from torch._dynamo.pgo import FrameStateSizeEntry as SizeEntry
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters, get_metrics_context
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx as _compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.runtime.cache_dir_utils import cache_dir as cache_folder
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols, statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastft.rewriter import compat_ddp

maybe_mark_dynamic = torch._dynamo.maybe_mark_dynamic
DYNAMIC = pgo.auto_dynamic  # the size, as Dynamo remembers it, of what it saw change

__all__ = [  # what is only passed on
    "BackendCompilerFailed",
    "CustomPartitionerFn",
    "OpOverload",
    "RestartAnalysis",
    "ShortenTraceback",
    "SizeEntry",
    "TorchDispatchMode",
    "cache_folder",
    "min_cut_rematerialization_partition",
    "statically_known_true",
    "tree_map_only",
]

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint  # as torch.utils.checkpoint is captured
ENTER_AUTOCAST = torch.amp._enter_autocast  # as autocast inside a graph is captured

break_log = torch._logging.getArtifactLogger("torch._dynamo.symbolic_convert", "graph_breaks")


def value_of(argument: Any) -> Any:
    """What a node computes, as the fake tensor or number that Dynamo saw; anything but a node is its own value."""
    return argument.meta.get("example_value") if isinstance(argument, Node) else argument


def set_value(node: Node, value: Any) -> None:
    """Record what ``node`` computes."""
    node.meta["example_value"] = value


def propagate(node: Node) -> None:
    """Record what a new call computes, from what its arguments are."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value_of)
    with fake_mode_of(tensors_in((args, kwargs))), torch.no_grad():
        function = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        result = cast(Callable, function)(*args, **kwargs)
    # A real op writes its results in place; .data is the same tensor without that history, which a fake one has not.
    real = lambda tensor: tensor if isinstance(tensor, FakeTensor) else tensor.data  # noqa: E731
    set_value(node, tree_map_only(Tensor, real, result))


@contextlib.contextmanager
def fake_mode_of(values: Any) -> Iterator[None]:
    """The mode under which these fake tensors were made, if any; sizes stay symbols in torch 2.11's linear too."""
    with _mode_in(values) or contextlib.nullcontext(), enable_python_dispatcher():
        yield


def _mode_in(values: Iterable[Any]) -> FakeTensorMode | None:
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


_template_mode = FakeTensorMode()


def fake_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor that belongs to no graph."""
    with _template_mode:
        return torch.empty(tuple(shape), dtype=dtype)


as_plain_tensors = torch._C.DisableTorchFunctionSubclass  # within it no __torch_function__ is asked


def without_storage(kind: type, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of this subclass that holds no memory."""
    return Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)


def version(tensor: Tensor) -> int:
    """How often this tensor or a view of it was written to."""
    return tensor._version


def written_to(tensor: torch.Tensor) -> bool:
    """Whether anything wrote to this tensor or a view of it while the graph was captured."""
    return not tensor.is_inference() and tensor._version > 0 and tensor._version > _made_by_writing(tensor)


def _made_by_writing(tensor: torch.Tensor) -> int:
    """How many writes it takes to make a fake of this graph input: some if it lies at an offset in its storage."""
    at_offset = tensor.is_leaf and not tensor._is_view() and not statically_known_true(tensor.storage_offset() == 0)
    return _writes_at_offset() if at_offset else 0


@functools.cache
def _writes_at_offset() -> int:
    return FakeTensorMode().from_tensor(torch.nn.Parameter(torch.zeros(2)[1:]))._version


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on, for which the ops have no formula."""
    return torch.autograd.forward_ad._current_level >= 0


def storage_key(tensor: torch.Tensor) -> int:
    """The same number for a tensor and all its views."""
    return tensor.untyped_storage()._cdata


def empty_like_fake(value: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor of ``mode`` with the metadata of ``value``, in storage of its own; a size is its own value."""
    if not isinstance(value, Tensor):
        return value
    with mode, torch.no_grad():
        offset = value.storage_offset()
        size, stride = tuple(value.shape), tuple(value.stride())
        if statically_known_true(offset == 0):
            result = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
        else:
            extent = offset + 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
            flat = torch.empty(extent, dtype=value.dtype, device=value.device)
            result = flat.as_strided(size, stride, offset)
    return result.requires_grad_(value.requires_grad)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a node's value, which may be a tuple."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def is_plain(value: Any) -> bool:
    """Whether this is a strided tensor of no subclass, or a size."""
    return isinstance(value, torch.SymInt) or (type(value) is FakeTensor and value.layout is torch.strided)


def size_inputs(graph: Graph) -> dict[Any, Node]:
    """For each symbol in the graph's shapes, the input that is its value."""
    inputs = [(node, value_of(node)) for node in graph.find_nodes(op="placeholder")]
    return {value.node.expr: node for node, value in inputs if isinstance(value, torch.SymInt)}


def symbols_of(value: Any) -> list[Any]:
    """The symbols in a tensor's shape and strides, by name."""
    return sorted(free_symbols(value), key=str) if type(value) is FakeTensor else []


def kind_of_input(node: Node) -> tuple:
    """What compiled code relies on in an input: equal kinds may be passed to the same code."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return type(value), repr(value)
    geometry = repr((tuple(value.shape), tuple(value.stride()), value.storage_offset()))
    properties = (value.dtype, value.device, value.layout, value.requires_grad, value.is_conj(), value.is_neg())
    subclass = () if is_plain(value) or isinstance(value, torch.nn.Parameter) else (id(value),)
    return type(value), geometry, *properties, stays_in_place(node), *subclass


def stays_in_place(node: Node) -> str | None:
    """Dynamo's word for inputs that stay where they are: parameters and buffers."""
    return (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")


def describe_input(placeholder: Node, source: Node) -> None:
    """Give a region's input what AOTAutograd reads of Dynamo's inputs."""
    placeholder.meta = {key: source.meta[key] for key in ("example_value", "tensor_dict") if key in source.meta}
    placeholder._dynamo_source = None  # a region serves many layers: no guard on one of them


def as_captured(part: GraphModule, whole: GraphModule) -> GraphModule:
    """Mark a part of a captured graph as captured itself, or AOTAutograd will not know its static inputs."""
    if "dynamo_compile_id" in whole.meta:
        part.meta["dynamo_compile_id"] = whole.meta["dynamo_compile_id"]
    part._param_name_to_source = {}  # type: ignore[assignment]
    return part


@contextlib.contextmanager
def apart(given: Iterable[Any]) -> Iterator[FakeTensorMode]:
    """Compile a part of a graph: what AOTAutograd notes about it stays out of what Dynamo guards for the whole.

    Gives the mode in which to compile: that of Dynamo, or else of the inputs given for the whole.  Guards on sizes
    still reach Dynamo, which owns the symbols.
    """
    around = TracingContext.try_get()
    mode = (around.fake_mode if around is not None else None) or _mode_in(given)
    if mode is None:
        raise RuntimeError("there is no fake tensor to learn the mode from")
    context = TracingContext(mode)
    if around is not None:
        context.tensor_to_context = around.tensor_to_context  # the symbols of inputs that are not fake yet
    with tracing(context):
        yield mode


def same_addresses(values: Sequence[Any], pointers: list[int | None], places: list[int]) -> bool:
    """Whether the tensors at these places lie at these addresses; one call for thousands of tensors."""
    return torch._C._tensors_data_ptrs_at_indices_equal(list(values), pointers, places)


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of each tensor, in few launches."""
    grouped = [tensor for tensor in tensors if tensor.is_floating_point()]
    copied = iter(torch._foreach_mul(grouped, 1.0) if grouped else [])
    return [next(copied) if tensor.is_floating_point() else tensor.clone() for tensor in tensors]


def compile_fx(
    gm: GraphModule, example_inputs: Sequence[Any], version: str, partitioner: CustomPartitionerFn | None = None
) -> Callable:
    """Inductor, with its caches kept apart for each ``version`` of what the graph alone does not tell.

    partitioner: decides what forward keeps for backward, in place of torch's own.
    """
    tag = f"{torch.compiler.config.cache_key_tag}{version}"
    patches = {"custom_partitioner_fn": partitioner} if partitioner is not None else None
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return cast(Callable, _compile_fx(gm, example_inputs, config_patches=patches))


def partitioned(gm: GraphModule, example_inputs: Sequence[Any], partitioner: CustomPartitionerFn) -> Callable:
    """A graph's forward and backward as they are, divided by this partitioner; backward may run twice."""

    def as_it_is(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        cast(Any, TracingContext.get()).fw_metadata.bw_donated_idxs = []  # what else there is, None, forbids it
        return make_boxed_func(gm.forward)

    with torch._functorch.config.patch(donated_buffer=False):
        return aot_module_simplified(gm, example_inputs, as_it_is, partition_fn=partitioner)


def saved_by(forward: GraphModule, outputs: int) -> list[str]:
    """The tensors that a forward returns for backward behind its outputs, in the order in which autograd saves them."""
    saved = cast(Any, forward.graph.output_node().args[0])[outputs:]
    return [node.name for node in saved if isinstance(node.meta.get("val"), Tensor)]


def compile_once(function: Callable, backend: Callable) -> Callable:
    """torch.compile for a call or two that leaves no compiled code behind, nor counts as a recompilation.

    Code that was compiled before keeps one entry more: to take it out would take the others out too.
    """
    compiled = torch.compile(function, backend=backend)
    known = _compiled_code()

    def call(*args: Any, **kwargs: Any) -> Any:
        unlimited = {"recompile_limit": 2**31, "accumulated_recompile_limit": 2**31}
        try:
            with torch._dynamo.config.patch(unlimited):
                return compiled(*args, **kwargs)
        finally:
            for code in _compiled_code() - known:
                torch._dynamo.reset_code(code)
                _forget(code)

    return call


def _compiled_code() -> set[CodeType]:
    """Every code object that Dynamo has compiled, those among them that it made to resume after a break."""
    return {code for reference in convert_frame.input_codes.seen if (code := reference()) is not None}


def _forget(code: CodeType) -> None:
    """Let Dynamo meet this code as if for the first time."""
    tracker = convert_frame.input_codes
    tracker.seen[:] = [reference for reference in tracker.seen if reference() is not code]
    tracker.seen_ids.discard(id(code))


def copy_graph(graph: Graph) -> Graph:
    """A copy of the graph whose inputs still know where Dynamo got them from, which AOTAutograd asks."""
    result = copy.deepcopy(graph)
    for node, original in zip(result.nodes, graph.nodes, strict=True):
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    return result


def recompile_reason() -> str:
    """Why Dynamo compiles again what it compiles now; "" for a first time."""
    metrics = get_metrics_context()
    return (metrics._metrics.get("recompile_reason", "unknown") or "") if metrics.in_progress() else ""


def current_code() -> tuple[CodeType, Any]:
    """The code that Dynamo compiles now, and the module that it is a method of, or None."""
    tx = InstructionTranslator.current_tx()
    return tx.f_code, tx.f_locals.get("self")


def current_backend() -> Any:
    """The backend that torch.compile was given, with its options."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    if (between := compat_ddp.optimizer()) is not None:
        backend = between.backend_compile_fn
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def remembered_sizes() -> dict[str, SizeEntry]:
    """What Dynamo remembers of the inputs of the code that it compiles now; empty where it is to learn nothing."""
    if not torch._dynamo.config.automatic_dynamic_shapes:
        return {}
    tx = InstructionTranslator.current_tx()
    make: Callable = pgo.CodeId.make
    told_apart_by = (tx.f_code, tx.closure)[: make.__code__.co_argcount]  # torch 2.11: by the code alone
    return pgo.get_code_state()[make(*told_apart_by)].automatic_dynamic


def source_name(placeholder: Node) -> str:
    """Where an input comes from, as Dynamo spells it: ``L['batch']['input_ids']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    return source.name if source is not None else ""


def cache_counts() -> Counter[str]:
    """How often AOTAutograd's cache had a graph, had it not, or could not be asked, so far."""
    prefix = "autograd_cache_"
    found = counters["aot_autograd"]
    return Counter({name: found[prefix + name] for name in ("hit", "miss", "bypass")})


def is_higher_order(target: Any) -> bool:
    """Whether the node's target takes graph bodies as arguments (checkpoint, autograd.Function, ...)."""
    return isinstance(target, HigherOrderOperator)


def is_operator(target: Any) -> bool:
    """Whether the node's target is a registered operator (``torch.ops.library.name``)."""
    return isinstance(target, (OpOverload, OpOverloadPacket))


def is_mutable(target: Any) -> bool:
    """Whether a registered operator may write to an argument."""
    if isinstance(target, OpOverloadPacket):
        return any(is_mutable(getattr(target, overload)) for overload in target.overloads())
    return isinstance(target, OpOverload) and target._schema.is_mutable


def module_path(node: Node) -> str:
    """The dotted path of the module that made this node, as ``named_modules`` spells it; "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    raw = list(stack.values())[-1][0] if stack else ""
    # A forward behind a decorator's ``wrapper(*args, **kwargs)`` has the model at args[0].
    root = r"^L\['args'\]\[0\]|^L\['\w+'\]"
    path = re.sub(r"\.__dict__\['_modules'\]|\._modules", "", re.sub(root, "", raw))
    path = re.sub(r"\['?([^\]']+)'?\]", r".\1", path)
    return re.sub(r"^\.?(_orig_mod\b\.?)?", "", path)


def source_line(node: Node) -> str:
    """``file:line`` of the user's or the model's line that made this node; "" where Dynamo kept none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""


def has_saved_tensors_hooks() -> bool:
    """Whether torch.autograd.graph.saved_tensors_hooks is in force, of which only the innermost are asked."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def after_backward(call: Callable[[], None]) -> None:
    """Call this once the backward that is running has made all gradients."""
    torch.autograd.Variable._execution_engine.queue_callback(call)
