"""AOTAutograd without Inductor: what a graph becomes before kernels are generated, in seconds."""

from collections.abc import Callable
from functools import partial
from typing import Any

from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule


def through_aot(
    gm: GraphModule, example_inputs: list[Any], version: str, partitioner: Callable | None = None, **settings: Any
) -> Callable:
    """In place of fastft.compat.aot.compile_fx: the decompositions and the partitioner that Inductor would use."""
    partition = partial(partitioner or min_cut_rematerialization_partition, compiler="inductor")
    run = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
    compiler = aot_autograd(
        fw_compiler=run, bw_compiler=run, decompositions=select_decomp_table, partition_fn=partition
    )
    return compiler(gm, example_inputs)
