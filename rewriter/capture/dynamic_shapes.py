"""Limit a graph to two compilations, whatever the batches: one for the sizes of the first, one for any sizes.

Dynamo makes only those sizes of an input dynamic that it saw change, so that sequence lengths that change first and
batch sizes that change later cost three compilations.  Here it learns which sizes change together: once a size of one
of the batch's tensors differs, all are dynamic.  Until then, recompilations for other reasons (eval, no_grad) stay
static.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastft.compat import ddp, dynamo, fake_tensors
from fastft.compat.dynamo import DYNAMIC, SizeEntry
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx.metadata import without_scope

log = logging.getLogger("fastft")
MANY_LAYERS = 4


def watch(gm: GraphModule) -> None:
    """Make Dynamo treat all sizes of the batch as dynamic once one of them changes."""
    try:
        remembered, backend = dynamo.remembered_sizes(), dynamo.current_backend()
        nodes = {dynamo.source_name(node): node for node in gm.graph.find_nodes(op="placeholder") if _moves(node)}
        names = nodes.keys() & remembered.keys()
        for name in names:
            remembered[name] = Batch(remembered[name], _open_ends(value_of(nodes[name])), names, backend)
    except Exception as error:  # called without Dynamo, or by another torch: then it learns as it always does
        log.debug("changing sizes are left to torch: %s", error)


def expect_any_size(tensor: Tensor, name: str) -> None:
    """Make the batch's sizes symbols in the first graph of a model of many layers, which then serves for all sizes."""
    try:
        remembered = dynamo.remembered_sizes()
        if name in remembered or not tensor.dim() or not _has_layers():
            return
        ddp.keep_whole()  # before torch cuts it: known this early, Dynamo need not trace twice
    except Exception as error:  # another torch: then it learns as it always does
        log.debug("sizes are not expected to change: %s", error)
        return
    ends = _open_ends(tensor)
    sizes: Any = tuple(DYNAMIC if dim < ends else size for dim, size in enumerate(tensor.shape))
    longer = [size + (dim < ends) for dim, size in enumerate(tensor.shape)]
    strides = torch.empty(longer, device="meta").stride() if tensor.is_contiguous() else None
    remembered[name] = SizeEntry.make_tensor(sizes, strides if strides is not None else tuple(tensor.stride()))


def _has_layers() -> bool:
    """Tell whether what is compiled has so many layers that a second graph would be a long wait."""
    return any(
        isinstance(part, nn.ModuleList) and len(part) >= MANY_LAYERS
        for module in dynamo.compiled_modules()
        for part in module.modules()
    )


class Batch(SizeEntry):
    """Dynamo's record of the sizes of one of the batch's tensors.

    ends: the sizes before this position change together.  names: of all the batch's tensors.  backend: the one that
    this applies to; others that compile the same code keep Dynamo's own behaviour.
    """

    def __init__(self, known: SizeEntry, ends: int, names: Collection[str], backend: Any) -> None:
        super().__init__(*_values(known))
        self.ends, self.names, self.backend = ends, names, backend

    def __ior__(self, other: Any) -> Batch:
        """Merge in this compilation's sizes as Dynamo does; make all dynamic if one of the batch's changed."""
        before = self.size
        super().__ior__(other)
        if self.backend != dynamo.current_backend():
            return self
        ddp.keep_whole()  # before torch cuts it: known this early, Dynamo need not trace twice
        changes = _differ(before, other.size) or self._another_differs()
        if changes and isinstance(self.size, tuple):
            self.size = tuple(DYNAMIC if dim < self.ends else size for dim, size in enumerate(self.size))
        return self

    def _another_differs(self) -> bool:
        """Tell whether Dynamo recompiles because of the size of another tensor of the batch."""
        mismatch = re.search(r"tensor '(.+)' size mismatch at index", dynamo.recompile_reason())
        return mismatch is not None and mismatch.group(1) in map(without_scope, self.names)

    def __reduce__(self) -> tuple:
        """Copy and pickle as Dynamo's own class, which is what goes into a profile on disk."""
        return SizeEntry, _values(self)


def _values(entry: SizeEntry) -> tuple:
    return tuple(getattr(entry, field.name) for field in fields(SizeEntry))


def _moves(node: Node) -> bool:
    """Tell whether an input is a tensor of the batch: neither a parameter nor a buffer."""
    value = value_of(node)
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not fake_tensors.stays_in_place(node)


def _open_ends(tensor: Tensor) -> int:
    """Return how many leading sizes may change.

    Ids and masks have only batch sizes and lengths; other tensors have features after the first two.
    """
    return 2 if tensor.is_floating_point() else tensor.dim()


def _differ(before: Any, now: Any) -> bool:
    """Tell whether a static size changed; a dimension that the user marked as dynamic does not count."""
    pairs = zip(before, now, strict=False) if isinstance(before, tuple) and isinstance(now, tuple) else ()
    return any(type(old) is int and type(new) is int and old != new for old, new in pairs)
