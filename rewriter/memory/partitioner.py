"""Tell torch's partitioner which forward results to save for backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from fastft.compat import aot, dynamo
from fastft.rewriter.fx import residual_gradients
from fastft.rewriter.fx.metadata import is_result_of_many
from fastft.rewriter.memory import op_traits
from fastft.source_digest import sources

_CHEAP = ("fastft.glu.default", "fastft.glu_packed.default")  # one pass over inputs that backward keeps anyway


class Partitioner(aot.CustomPartitionerFn):
    """Torch's partitioner with instructions about what to save.

    Torch assumes that an op it does not know is expensive: it would save the product of a gated activation, the largest
    tensor of a layer, besides gate and up, from which it can be recomputed.

    kept: names of the forward ops whose results are saved where backward or a recomputed op reads them; all others are
    recomputed (joint_graph.py).  None leaves the choice to torch, except for gated activations.
    """

    def __init__(self, kept: Sequence[str] | None = None) -> None:
        self.kept = None if kept is None else tuple(kept)

    def __call__(
        self, gm: GraphModule, joint_inputs: Sequence[Any], **settings: Any
    ) -> tuple[GraphModule, GraphModule]:
        residual_gradients.fold(gm.graph)
        tag_forward(gm.graph, self.kept)
        return aot.min_cut_rematerialization_partition(gm, joint_inputs, **settings)

    def uuid(self) -> str:
        """Return a key for torch's caches: what is saved follows from fastft's sources and ``kept``."""
        return f"{sources()}-{self.kept}"


class JointGraphCapture(aot.CustomPartitionerFn):
    """Captures the joint graph and the settings for partitioning it, and stops the compilation there."""

    def __init__(self) -> None:
        self.joint: GraphModule | None = None
        self.settings: dict[str, Any] = {}

    def __call__(self, gm: GraphModule, joint_inputs: Sequence[Any], **settings: Any) -> Any:
        gm.graph.eliminate_dead_code()
        residual_gradients.fold(gm.graph)
        self.joint, self.settings = gm, settings
        raise ProbedError

    def uuid(self) -> None:
        """Return None, so that torch's caches are not searched: this compilation is never completed."""

    @property
    def forward_outputs(self) -> int:
        """The number of the joint graph's outputs that are those of forward."""
        return self.settings["num_fwd_outputs"]

    def saved(self, kept: Sequence[str]) -> list[str]:
        """List the names of the tensors that autograd will save, in its order."""
        assert self.joint is not None
        copy = GraphModule(self.joint, dynamo.copy_graph(self.joint.graph))
        forward, _ = Partitioner(kept)(copy, [], **self.settings)
        return aot.saved_by(forward, self.forward_outputs)


class ProbedError(Exception):
    """Raised to end a compilation of which only the joint graph was wanted."""


def tag_forward(joint: Graph, kept: Sequence[str] | None) -> None:
    """Tag untagged forward nodes as saved or recomputed; for ``kept`` None only the cheap ones, as recomputed.

    Random nodes are not tagged for recomputation: Inductor saves its seeds, others save their results.
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
    if is_result_of_many(node):  # it follows its op
        return None
    return CheckpointPolicy.MUST_SAVE if node.name in kept else CheckpointPolicy.PREFER_RECOMPUTE
