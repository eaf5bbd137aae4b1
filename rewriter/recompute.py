"""recompute="full": of a layer, nothing but its inputs is kept for backward."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from fastft.rewriter import compat

_SEEDS = ("prims.inductor_seed.default", "prims.inductor_seeds.default")  # of Inductor's random numbers


class KeepInputs(compat.CustomPartitionerFn):
    """Torch's partitioner, told to recompute the whole forward.

    An activation checkpoint around the layer would tag its nodes for this, but torch 2.11 leaves out those inside an
    autograd.Function, such as bitsandbytes' 4-bit projections.
    """

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[Any], **settings: Any
    ) -> tuple[GraphModule, GraphModule]:
        tag_forward(gm.graph)
        return compat.min_cut_rematerialization_partition(gm, joint_inputs, **settings)

    def uuid(self) -> str:
        """For torch's caches."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def tag_forward(joint: Graph) -> None:
    """Tag every untagged node that depends on no gradient; the seeds of random numbers are kept."""
    groups = [node.meta["ac_graph_id"] for node in joint.nodes if "ac_graph_id" in node.meta]
    group = max(groups, default=0)
    backward: set[Node] = set()
    for node in joint.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
        elif node.op == "call_function" and "recompute" not in node.meta and str(node.target) not in _SEEDS:
            node.meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": group}
