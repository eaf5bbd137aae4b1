"""A model beside itself in eager: the loss and all gradients of one batch, and how far others are from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastft.compat import dynamo
from fastft.compat.fake_tensors import tensors_in
from fastft.rewriter.backend import fastft
from fastft.rewriter.explain import unchanged
from fastft.rewriter.options import Options

# Of a result's own norm: what sums in another order may change it by, in training of a few layers.
TOLERANCES = {torch.float16: 0.02, torch.bfloat16: 0.05, torch.float32: 1e-3, torch.float64: 1e-6}
LOSS, WHOLE = "the loss", "whole_model"
# What is made of rounding may differ by so many times what it moves by if weights are a rounding apart, but by no more
# than a gradient may that is this part of the largest.
MOVES, LEAST = 16, 0.01


@dataclass(frozen=True)
class Difference:
    """How far a result is from eager's, relative to its norm, and how far it may be."""

    result: str
    error: float
    allowed: float

    @property
    def within(self) -> bool:
        """Whether it is as near as it may be; NaN never is."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.result} differs by {self.error:.2g} of its norm, where {self.allowed:.2g} is allowed"


@contextmanager
def compiled(model: Callable, options: Options) -> Iterator[Callable]:
    """Compile the model with these options for a while, after which no compiled code of it is left."""

    def whole_model(*args: Any, **batch: Any) -> Any:  # model as a local, or the paths of modules would begin with self
        return model(*args, **batch)

    with dynamo.compiled_meanwhile(whole_model, functools.partial(fastft, options=options)) as run:
        yield run


class Trial:
    """Runs a model forward and backward on one batch, and compares with eager's first run.

    loss: makes a number of the model's result; without it its ``.loss`` is taken, or a weighted sum of all its tensors.
    tolerance: how far a result may be from eager's, as a share of its norm; as ``tolerances`` say of the model's dtype
    if it is None.
    """

    def __init__(
        self,
        model: Callable,
        args: Sequence[Any],
        batch: Mapping[str, Any],
        loss: Callable[[Any], Tensor] | None = None,
        tolerance: float | None = None,
        tolerances: Mapping[torch.dtype, float] = TOLERANCES,
    ) -> None:
        self.model, self.args, self.batch, self.loss = model, args, batch, loss or _number
        module = getattr(model, "__self__", model)  # model.forward is as good as model
        self.parameters = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
        self.truth = self.run(model)
        self.dtype = self._narrowest()
        self.allowed = tolerance or tolerances[self.dtype]
        self.scales = self._scales([self._nudged(seed) for seed in (1, 2)])

    def run(self, call: Callable) -> dict[str, Tensor]:
        """Return the loss and all gradients by name of the model, or of what stands for it."""
        leaves = self._leaves()
        with unchanged(self.model), torch.enable_grad():
            torch.manual_seed(0)
            loss = self.loss(call(*self.args, **self.batch))
            if not loss.requires_grad:
                raise ValueError("nothing that the loss depends on is trained, so there are no gradients to compare.")
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        found = {LOSS: loss.detach()}
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                found[f"the gradient of {name}"] = gradient.detach()
        return found

    def differences(self, results: Mapping[str, Tensor]) -> list[Difference]:
        """Return how far each result is from eager's, the loss first; infinitely far where one is missing."""
        found = []
        for name, value in self.truth.items():
            mine = results.get(name)
            apart = float("inf") if mine is None else _norm(mine.double() - value.double())
            found.append(Difference(name, apart / (self.scales[name] or 1.0), self.allowed))
        return found

    def compare(self, results: Mapping[str, Tensor]) -> Difference | None:
        """Return the result that is farthest from eager's, None if all are within what is allowed."""
        return farthest([one for one in self.differences(results) if not one.within])

    def _nudged(self, seed: int) -> dict[str, float]:
        """Return how far each result moves if the weights are a rounding apart."""
        with nudged(self.parameters.values(), seed):
            beside = self.run(self.model)
        both = self.truth.keys() & beside.keys()
        return {name: _norm(beside[name].double() - self.truth[name].double()) for name in both}

    def _scales(self, moves: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return what each result's difference is divided by: its norm, or more if it is made of rounding alone.

        moves: how far results move with weights that are a rounding apart.  A gradient that is zero in exact
        arithmetic, as that of a bias of keys, is made of rounding, and so is what it differs by: MOVES times as much as
        such weights move it by is no difference.  LEAST has it that nothing hides behind a result that jumps.
        """
        norms = {name: _norm(value) for name, value in self.truth.items()}
        largest = max((norm for name, norm in norms.items() if name != LOSS), default=0.0)
        scales = {LOSS: norms.pop(LOSS)}
        for name, norm in norms.items():
            moved = max(move.get(name, 0.0) for move in moves)
            scales[name] = max(norm, min(MOVES * moved / self.allowed, LEAST * largest)) or largest
        return scales

    def _leaves(self) -> dict[str, Tensor]:
        """List the parameters and inputs that need a gradient, by name."""
        inputs = {f"input {number}": tensor for number, tensor in enumerate(tensors_in((self.args, self.batch)))}
        return {name: tensor for name, tensor in {**self.parameters, **inputs}.items() if tensor.requires_grad}

    def _narrowest(self) -> torch.dtype:
        """Find the dtype with the fewest bits among the model's floating-point parameters and results."""
        tensors = (*self.parameters.values(), *self.truth.values())
        dtypes = {tensor.dtype for tensor in tensors if tensor.dtype in TOLERANCES}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def farthest(differences: Sequence[Difference]) -> Difference | None:
    """Return the largest of some differences, the first NaN before all others; None of none."""
    return max(differences, key=lambda one: one.error if one.error == one.error else float("inf"), default=None)


@contextmanager
def nudged(parameters: Any, seed: int) -> Iterator[None]:
    """Move each plain floating-point parameter's elements by a rounding, up or down, and put them back."""
    plain = [one for one in parameters if type(one) in (nn.Parameter, Tensor) and one.is_floating_point()]
    before = [one.detach().clone() for one in plain]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for one in plain:
            if one.dtype in TOLERANCES:
                one.mul_(1 + torch.finfo(one.dtype).eps * (2.0 * (torch.rand_like(one) < 0.5) - 1))
    try:
        yield
    finally:
        with torch.no_grad():
            for one, value in zip(plain, before, strict=True):
                one.copy_(value)


def _norm(value: Tensor) -> float:
    return value.double().norm().item()


def _number(result: Any) -> Tensor:
    """Make a number of a model's result: its loss, or a sum of all its floating-point tensors, each weighted anew."""
    if isinstance(loss := getattr(result, "loss", None), Tensor):
        return loss
    values = [value for value in tensors_in(result) if value.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(value.shape, generator=generator).to(value.device) for value in values]
    return torch.stack([(value.float() * weight).sum() for value, weight in zip(values, weights, strict=True)]).sum()
