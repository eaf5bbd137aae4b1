"""What forward keeps for backward, where torch's partitioner is to be told."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from fastft.rewriter import compat

_SEEDS = ("prims.inductor_seed.default", "prims.inductor_seeds.default")  # of Inductor's random numbers
_CHEAP = ("fastft.glu.default", "fastft.glu_packed.default")  # one pass over inputs that backward keeps anyway


class Partitioner(compat.CustomPartitionerFn):
    """Torch's partitioner, told what it should not keep.

    Torch takes an op that it does not know for one that is dear: it would keep the product of a gated activation, the
    largest tensor of a layer, beside gate and up, which are enough to make it again.

    all_of_it: recompute="full", the whole forward is computed again and nothing but its inputs is kept.  An activation
    checkpoint around the layer would tag its nodes for this, but torch 2.11 leaves out those inside an
    autograd.Function, such as bitsandbytes' 4-bit projections.
    """

    def __init__(self, *, all_of_it: bool) -> None:
        self.all_of_it = all_of_it

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[Any], **settings: Any
    ) -> tuple[GraphModule, GraphModule]:
        tag_forward(gm.graph, all_of_it=self.all_of_it)
        return compat.min_cut_rematerialization_partition(gm, joint_inputs, **settings)

    def uuid(self) -> str:
        """For torch's caches."""
        return f"{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}-{self.all_of_it}"


def tag_forward(joint: Graph, *, all_of_it: bool) -> None:
    """Tag untagged nodes that depend on no gradient: all but the seeds of random numbers, or the cheap ones."""
    groups = [node.meta["ac_graph_id"] for node in joint.nodes if "ac_graph_id" in node.meta]
    group = max(groups, default=0)
    backward: set[Node] = set()
    for node in joint.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
        elif node.op == "call_function" and "recompute" not in node.meta:
            name = str(node.target)
            if name in _CHEAP or (all_of_it and name not in _SEEDS):
                node.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": group}
