"""AOTAutograd and Inductor: compile one graph, in a tracing context and a cache of its own."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx as _compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.runtime.cache_dir_utils import cache_dir as cache_folder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from fastft.compat.fake_tensors import mode_of

__all__ = ["CustomPartitionerFn", "cache_folder", "min_cut_rematerialization_partition"]  # what is only passed on


@contextlib.contextmanager
def isolated_tracing_context(inputs: Iterable[Any]) -> Iterator[FakeTensorMode]:
    """Compile part of a graph without its AOTAutograd notes reaching the guards that Dynamo makes for the whole.

    Yields the mode in which to compile: that of Dynamo, or else of the whole graph's inputs.  Guards on sizes still
    reach Dynamo, which owns the symbols.
    """
    around = TracingContext.try_get()
    mode = (around.fake_mode if around is not None else None) or mode_of(inputs)
    if mode is None:
        raise RuntimeError("there is no fake tensor to learn the mode from")
    context = TracingContext(mode)
    if around is not None:
        context.tensor_to_context = around.tensor_to_context  # the symbols of inputs that are not fake yet
    with tracing(context):
        yield mode


def backward_without_autocast() -> AbstractContextManager:
    """Have backwards traced in no autocast, as eager runs them, and not in that which is on now."""
    return torch._functorch.config.patch(backward_pass_autocast="off")


def tracing_in(mode: FakeTensorMode) -> AbstractContextManager:
    """Enter the tracing context that Dynamo has around a backend, with this mode of fake tensors."""
    return tracing(TracingContext(mode))


def compile_fx(
    gm: GraphModule, example_inputs: Sequence[Any], version: str, partitioner: CustomPartitionerFn | None = None,
    *, exact_strides: bool = False,
) -> Callable:  # fmt: skip
    """Compile by Inductor, with caches kept apart for each ``version`` of what the graph alone does not tell.

    partitioner: decides what forward saves for backward, in place of torch's own.  exact_strides: no result may be the
    part of a product that was computed with wider rows, as Inductor's padding of products returns it.
    """
    tag = f"{torch.compiler.config.cache_key_tag}{version}"
    patches: dict[str, Any] = {"custom_partitioner_fn": partitioner} if partitioner is not None else {}
    patches |= {"shape_padding": False} if exact_strides else {}
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return cast(Callable, _compile_fx(gm, example_inputs, config_patches=patches or None))


def partitioned(gm: GraphModule, example_inputs: Sequence[Any], partitioner: CustomPartitionerFn) -> Callable:
    """Split a graph into forward and backward by this partitioner and leave both as is; backward may run twice."""

    def as_it_is(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable:
        cast(Any, TracingContext.get()).fw_metadata.bw_donated_idxs = []  # what else there is, None, forbids it
        return make_boxed_func(gm.forward)

    with torch._functorch.config.patch(donated_buffer=False):
        return aot_module_simplified(gm, example_inputs, as_it_is, partition_fn=partitioner)


def saved_by(forward: GraphModule, outputs: int) -> list[str]:
    """List the tensors that a forward returns for backward after its outputs, in the order that autograd saves them."""
    saved = cast(Any, forward.graph.output_node().args[0])[outputs:]
    return [node.name for node in saved if isinstance(node.meta.get("val"), Tensor)]


def cache_counts() -> Counter[str]:
    """Count how often AOTAutograd's cache has hit, missed or been bypassed so far."""
    prefix = "autograd_cache_"
    counts = counters["aot_autograd"]
    return Counter({name: counts[prefix + name] for name in ("hit", "miss", "bypass")})


def draws_as_eager() -> bool:
    """Return whether compiled code is to draw the random numbers that eager code draws."""
    return bool(torch._inductor.config.fallback_random)
