"""Two compilations of a graph, whatever the batches: one for the sizes of the first, one for any.

Dynamo makes dynamic those sizes of an input that it saw change, so that lengths that change first and batch sizes that
change later cost three compilations.  Here it is told what changes together: once a size of one of the batch's tensors
is another, all are dynamic.  Until then what is compiled again for other reasons (eval, no_grad) stays static.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastft.compat import ddp, dynamo, fake_tensors
from fastft.compat.dynamo import DYNAMIC, SizeEntry
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx.metadata import without_scope

log = logging.getLogger("fastft")


def watch(gm: GraphModule) -> None:
    """Let Dynamo conclude from one size of the batch that changes that all may."""
    try:
        remembered, backend = dynamo.remembered_sizes(), dynamo.current_backend()
        nodes = {dynamo.source_name(node): node for node in gm.graph.find_nodes(op="placeholder") if _moves(node)}
        names = nodes.keys() & remembered.keys()
        for name in names:
            remembered[name] = Batch(remembered[name], _open_ends(value_of(nodes[name])), names, backend)
    except Exception as error:  # called without Dynamo, or by another torch: then it learns as it always does
        log.debug("changing sizes are left to torch: %s", error)


class Batch(SizeEntry):
    """What Dynamo remembers of the sizes of one of the batch's tensors.

    ends: the sizes before this position change together.  names: of all the batch's tensors.  backend: the one that
    these apply to; others that compile the same code learn as they always do.
    """

    def __init__(self, known: SizeEntry, ends: int, names: Collection[str], backend: Any) -> None:
        super().__init__(*_values(known))
        self.ends, self.names, self.backend = ends, names, backend

    def __ior__(self, other: Any) -> Batch:
        """Dynamo's own update with the sizes that it compiles for now, and then ours."""
        before = self.size
        super().__ior__(other)
        if self.backend != dynamo.current_backend():
            return self
        ddp.keep_whole()  # before torch cuts it: known this early, Dynamo need not trace twice
        changes = _differ(before, other.size) or self._another_differs()
        if changes and isinstance(self.size, tuple):
            self.size = tuple(DYNAMIC if at < self.ends else size for at, size in enumerate(self.size))
        return self

    def _another_differs(self) -> bool:
        """Whether Dynamo compiles again because of the size of another tensor of the batch."""
        found = re.search(r"tensor '(.+)' size mismatch at index", dynamo.recompile_reason())
        return found is not None and found.group(1) in map(without_scope, self.names)

    def __reduce__(self) -> tuple:
        """A copy, or what goes into a profile on disk, is Dynamo's own class."""
        return SizeEntry, _values(self)


def _values(entry: SizeEntry) -> tuple:
    return tuple(getattr(entry, field.name) for field in fields(SizeEntry))


def _moves(node: Node) -> bool:
    """Whether an input is a tensor of the batch: neither a parameter nor a buffer."""
    value = value_of(node)
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not fake_tensors.stays_in_place(node)


def _open_ends(tensor: Tensor) -> int:
    """Ids and masks have no other sizes than the batch's and lengths; the features of others come after these two."""
    return 2 if tensor.is_floating_point() else tensor.dim()


def _differ(before: Any, now: Any) -> bool:
    """Whether a size that was known is another now; marks for sizes that the user calls dynamic are neither."""
    pairs = zip(before, now, strict=False) if isinstance(before, tuple) and isinstance(now, tuple) else ()
    return any(type(one) is int and type(other) is int and one != other for one, other in pairs)
