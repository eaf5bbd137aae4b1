"""Compute lazy logits and their gradients, and check that nothing they are computed from has changed."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastft.compat import eager, fsdp
from fastft.rewriter.loss.head import Logits

if TYPE_CHECKING:
    from fastft.rewriter.runtime.row_programs import Program

STALE = (
    "these logits are computed when they are read, but what they are made of has changed since the model's forward: "
    "read them before the optimizer's step, or compile with options={'lazy_logits': False}."
)
_USED = (
    "backward is repeated for logits that are no more: keep the model's output until the last one, or compile with "
    "options={'lazy_logits': False}."
)


@dataclass(eq=False)
class Watched:
    """Parameters that something will be computed from again, with their version counters at that time.

    stale: whether an optimizer has changed one of them since; those in ``unread`` are told.
    """

    parameters: list[tuple[Tensor, int]]
    stale: bool = field(default=False, kw_only=True)

    @property
    def waits(self) -> bool:
        """Whether it is still to be computed."""
        return True

    def check(self) -> None:
        """Raise RuntimeError where a parameter has changed since the model's forward."""
        if self.stale or changed(self.parameters):
            raise RuntimeError(STALE)


@dataclass(eq=False)
class Computation(Watched):
    """How some logits are computed, and the small autograd graph of that computation until a backward has used it.

    Their node in the user's autograd graph holds nothing else: a tensor whose history leads back to that node would
    keep both alive for ever, since Python's garbage collector does not see cycles through autograd nodes.

    bare: the logits, with numbers in the places of tensors.
    """

    bare: Logits | Program
    leaves: list[Tensor] = field(default_factory=list)  # detached, one for each tensor
    computed: Tensor | None = None  # from the leaves
    tensors: Sequence[Tensor] | None = None  # set between the backward of the tensor that was read and the logits'

    @property
    def waits(self) -> bool:
        """Whether the logits are not there."""
        return self.computed is None

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """Compute the logits from these tensors; return them detached, and keep what a backward needs.

        Raises RuntimeError where a parameter has changed.
        """
        self.check()
        self.leaves = [fsdp.detach(tensor).requires_grad_(tensor.requires_grad) for tensor in tensors]
        with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            computed = self.bare.with_values(list(map(fsdp.whole, self.leaves))).compute()
        # there is no graph below autograd, as in a vmap: a backward computes them again
        self.computed = computed if computed.requires_grad else None
        return computed.detach()

    def gradients(self, grad: Tensor, tensors: Sequence[Tensor] | None) -> list[Tensor | None]:
        """Return the gradients of all tensors from that of the logits; None for tensors that need none.

        A second backward computes the logits again.  Raises RuntimeError where their tensors are gone by then.
        """
        tensors, self.tensors = self.tensors or tensors, None
        if self.computed is None:
            if tensors is None:
                raise RuntimeError(_USED)
            self.run(tensors)
        assert self.computed is not None
        computed, leaves = self.computed, self.leaves
        self.computed, self.leaves = None, []
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(computed, wanted, grad, allow_unused=True))
        return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


def is_parameter(tensor: Tensor) -> bool:
    """Return whether a tensor may be a parameter of an optimizer."""
    return isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad)


def versions_of(tensors: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Pair the tensors with their version counters; leave out inference tensors, which have none."""
    return [(tensor, eager.version(tensor)) for tensor in tensors if not tensor.is_inference()]


def changed(versions: Sequence[tuple[Tensor, int]]) -> bool:
    """Return whether one of the tensors has been written to since its version was noted."""
    return any(eager.version(tensor) != version for tensor, version in versions)


unread: weakref.WeakSet[Watched] = weakref.WeakSet()  # all that may still be computed


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Mark computations stale whose weights an optimizer changed: not every optimizer increments version counters."""
    if waiting := [one for one in unread if one.waits]:
        changed = {
            fsdp.local(parameter).data_ptr() for group in optimizer.param_groups for parameter in group["params"]
        }
        for one in waiting:
            one.stale |= any(fsdp.local(parameter).data_ptr() in changed for parameter, _ in one.parameters)


register_optimizer_step_post_hook(_after_step)
