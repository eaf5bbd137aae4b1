"""What forward keeps for backward, where torch's partitioner is to be told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from fastft.compat import aot, dynamo
from fastft.rewriter.fx.metadata import is_result_of_many
from fastft.rewriter.memory import op_traits
from fastft.source_digest import sources

_CHEAP = ("fastft.glu.default", "fastft.glu_packed.default")  # one pass over inputs that backward keeps anyway


class Partitioner(aot.CustomPartitionerFn):
    """Torch's partitioner, told what it should keep.

    Torch takes an op that it does not know for one that is dear: it would keep the product of a gated activation, the
    largest tensor of a layer, beside gate and up, which are enough to make it again.

    kept: names of the forward ops whose results stay as far as they are read again, all others run again (joint.py);
    None leaves it to torch, but for gated activations.
    """

    def __init__(self, kept: Sequence[str] | None = None) -> None:
        self.kept = None if kept is None else tuple(kept)

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[Any], **settings: Any
    ) -> tuple[GraphModule, GraphModule]:
        tag_forward(gm.graph, self.kept)
        return aot.min_cut_rematerialization_partition(gm, joint_inputs, **settings)

    def uuid(self) -> str:
        """For torch's caches: what is kept follows from the tags, and these from more than this file."""
        return f"{sources()}-{self.kept}"


class JointGraphCapture(aot.CustomPartitionerFn):
    """Takes the joint graph, with the settings it was to be divided by, and ends the compilation there."""

    def __init__(self) -> None:
        self.joint: GraphModule | None = None
        self.settings: dict[str, Any] = {}

    def __call__(self, gm: GraphModule, joint_inputs: Sequence[Any], **settings: Any) -> Any:
        gm.graph.eliminate_dead_code()
        self.joint, self.settings = gm, settings
        raise ProbedError

    def uuid(self) -> None:
        """None: what is never completed is not to be looked for in torch's caches."""

    @property
    def forward_outputs(self) -> int:
        """How many of the joint graph's outputs are those of forward."""
        return self.settings["num_fwd_outputs"]

    def saved(self, kept: Sequence[str]) -> list[str]:
        """The names of the tensors that autograd will save, in their order."""
        assert self.joint is not None
        copy = GraphModule(self.joint, dynamo.copy_graph(self.joint.graph))
        forward, _ = Partitioner(kept)(copy, [], **self.settings)
        return aot.saved_by(forward, self.forward_outputs)


class ProbedError(Exception):
    """The joint graph was all that was wanted."""


def tag_forward(joint: Graph, kept: Sequence[str] | None) -> None:
    """Tag untagged nodes that depend on no gradient: to be kept or to be run again, or only the cheap ones for None.

    Nobody is told to repeat what is random: Inductor keeps its seeds, others keep their numbers.
    """
    groups = [node.meta["ac_graph_id"] for node in joint.nodes if "ac_graph_id" in node.meta]
    group = max(groups, default=0)
    backward: set[Node] = set()
    for node in joint.nodes:
        tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if tangent or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
        elif node.op == "call_function" and "recompute" not in node.meta and not op_traits.is_random(node.target):
            policy = _policy(node, kept)
            if policy is not None:
                node.meta |= {"recompute": policy, "ac_graph_id": group}


def _policy(node: Node, kept: Sequence[str] | None) -> CheckpointPolicy | None:
    if kept is None:
        return CheckpointPolicy.PREFER_RECOMPUTE if str(node.target) in _CHEAP else None
    if is_result_of_many(node):  # follows the op
        return None
    return CheckpointPolicy.MUST_SAVE if node.name in kept else CheckpointPolicy.PREFER_RECOMPUTE
