"""How logits that are not computed yet are computed, and whether they still may be."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastft.compat import eager
from fastft.rewriter.loss.head import Logits

STALE = (
    "these logits are computed when they are read, but what they are made of has changed since the model's forward: "
    "read them before the optimizer's step, or compile with options={'lazy_logits': False}."
)
_USED = (
    "backward is repeated for logits that are no more: keep the model's output until the last one, or compile with "
    "options={'lazy_logits': False}."
)


@dataclass(eq=False)
class Computation:
    """How some logits are computed, and the small graph of autograd that this leaves until a backward has used it.

    It is all that their node in the graph of autograd holds: a tensor with a history that leads back to that node would
    keep both alive for ever, since Python cannot see a cycle that runs through autograd's nodes.

    bare: the logits, with numbers in the places of tensors.  parameters: the head's, and how often they had been
    written to.  stale: whether an optimizer has changed one of them since.
    """

    bare: Logits
    parameters: list[tuple[Tensor, int]]
    stale: bool = False
    leaves: list[Tensor] = field(default_factory=list)  # stand for all tensors
    computed: Tensor | None = None  # of the leaves
    tensors: Sequence[Tensor] | None = None  # while a backward is on its way from what was read to the logits

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """Compute the logits of these tensors, apart from the graph of autograd; keep what a backward needs."""
        self.check()
        self.leaves = [one.detach().requires_grad_(one.requires_grad) for one in tensors]
        with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            self.computed = self.bare.with_values(self.leaves).compute()
        return self.computed.detach()

    def check(self) -> None:
        """Raise where a parameter is not what it was in the model's forward."""
        if self.stale or changed(self.parameters):
            raise RuntimeError(STALE)

    def gradients(self, grad: Tensor, tensors: Sequence[Tensor] | None) -> list[Tensor | None]:
        """Of all tensors, given that of the logits.  A second backward computes the logits again."""
        tensors, self.tensors = self.tensors or tensors, None
        if self.computed is None:
            if tensors is None:
                raise RuntimeError(_USED)
            self.run(tensors)
        assert self.computed is not None
        computed, leaves = self.computed, self.leaves
        self.computed, self.leaves = None, []
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(computed, wanted, grad, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]


def is_parameter(tensor: Tensor) -> bool:
    """Whether an optimizer may be given this tensor."""
    return isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)


def versions_of(tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    return [(one, eager.version(one)) for one in tensors if not one.is_inference()]


def changed(versions: Sequence[tuple[Tensor, int]]) -> bool:
    return any(eager.version(one) != version for one, version in versions)


unread: weakref.WeakSet[Computation] = weakref.WeakSet()  # all that may be computed yet


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Mark what was made of the weights that an optimizer changed: not every one counts its writes as torch does."""
    if waiting := [one for one in unread if one.computed is None]:
        changed = {one.data_ptr() for group in optimizer.param_groups for one in group["params"]}
        for computation in waiting:
            computation.stale |= any(one.data_ptr() in changed for one, _ in computation.parameters)


register_optimizer_step_post_hook(_after_step)
