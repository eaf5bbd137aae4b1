"""Run a reproducer: build its graph, hand it to the backend, and compare with the graph as it is.

What a reproducer does not keep: sizes that are symbols but equally long in the example share one, and those of 0 or 1
are numbers; numbers that ``dynamic=True`` made inputs are what they were; an input that is a view of a tensor outside
the graph is no view, and a tensor subclass is plain; a checkpoint's context_fn is dropped; nothing is guarded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fastft.compat import aot, fake_tensors
from fastft.compat.fake_tensors import value_of
from fastft.rewriter.fx.bodies import Snapshot, bodies
from fastft.rewriter.fx.metadata import name_of
from fastft.rewriter.report import repro_inputs
from fastft.rewriter.report.repro_builder import Build, Builder
from fastft.rewriter.report.repro_inputs import Input

SHOWN = 8  # errors, the largest first


@dataclass
class Repro:
    """A graph as it was captured, what it is given as fake tensors and numbers, and what these are made of."""

    gm: GraphModule
    mode: Any
    example_inputs: list[Any]
    inputs: list[Input | int | None]


def load(build: Build, state: Mapping[str, Any] | None = None, device: str = "") -> Repro:
    """Build a reproducer's graph.  state: what was around it; device: where to put everything, if not where it was."""
    builder = Builder(fake_tensors.new_mode(), device)
    with around(state or {}, device):
        gm = builder.built(build)
    return Repro(gm, builder.mode, [value_of(node) for node in gm.graph.find_nodes(op="placeholder")], builder.inputs)


@contextmanager
def around(state: Mapping[str, Any], device: str = "") -> Iterator[None]:
    """Have gradients and autocast as they were where the graph was captured."""
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(state.get("grad", True)))
        for kind, dtype in state.get("autocast", {}).items():
            stack.enter_context(torch.autocast(device.split(":")[0] or kind, getattr(torch, dtype)))
        yield


def main(build: Build, backend: Callable, options: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Run a reproducer as a program; what fails in the backend is raised."""
    parser = argparse.ArgumentParser(description="Compile a graph by fastft and compare it with the graph as it is.")
    parser.add_argument("--eager", action="store_true", help="compile without Inductor")
    parser.add_argument("--device", default="", help="where to run it, such as cpu; by default where it was")
    given = parser.parse_args()
    if given.eager:
        options = {**options, "lower": "eager"}
    print("\n".join(run(build, backend, options, state, given.device)))


def run(
    build: Build, backend: Callable, options: Mapping[str, Any], state: Mapping[str, Any], device: str = ""
) -> list[str]:
    """Compile the graph, step with it and with the graph as it is, and return lines that compare the results."""
    repro = load(build, state, device)
    if not device and any(isinstance(tensor, Input) and tensor.device == "meta" for tensor in repro.inputs):
        return run(build, backend, options, state, "cpu")  # the model that was explained had no values, but these have
    below, changing = smallest_table(repro.gm), sum(not isinstance(value, Input) for value in repro.inputs)
    original = Snapshot(repro.gm)
    with around(state, device), aot.tracing_in(repro.mode):
        compiled = backend(repro.gm, repro.example_inputs, options={**options, "strict": True})
    with around(state, device):
        actual = _step(compiled, repro.inputs, below)
        original.restore()
        expected = _step(repro.gm.forward, repro.inputs, below)
    errors = sorted(((_error(actual[name], expected[name]), name) for name in expected), reverse=True)
    return [
        f"fastft compiled {len(repro.inputs)} inputs, {changing} of them numbers, and nothing failed.",
        f"Floats were drawn around 0, integers below {below}, bytes from all there are.",
        f"Largest errors of {len(errors)} outputs and gradients, relative to the largest value of the graph as it is:",
        *(f"  {error:.1e}  {name}" for error, name in errors[:SHOWN]),
    ]


def smallest_table(gm: GraphModule) -> int:
    """Return the rows of the smallest embedding in a graph: integers below index every table; 2 without any."""
    nodes = [node for body in bodies(gm) for node in body.graph.nodes if name_of(node.target) == "embedding"]
    tables = [value_of(node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")) for node in nodes]
    return min((int(table.shape[0]) for table in tables if isinstance(table, Tensor)), default=2)


def _step(function: Callable, inputs: Sequence[Input | int | None], below: int) -> dict[str, Tensor]:
    """Forward and, from the loss or from everything, backward: outputs and gradients by name."""
    passed = repro_inputs.drawn(inputs, below)
    torch.manual_seed(0)
    outputs = function(*passed)
    roots = [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]
    roots = [root for root in roots if root.dim() == 0] or roots
    if roots:
        torch.manual_seed(1)
        torch.autograd.backward(
            roots, [torch.randn_like(root) if root.dim() else torch.ones_like(root) for root in roots]
        )
    results = {
        f"output {number}": output.detach().clone()
        for number, output in enumerate(outputs)
        if isinstance(output, Tensor)
    }
    for leaf in inputs:
        if isinstance(leaf, Input) and leaf.tensor.grad is not None:
            results[f"gradient of {leaf.name}"] = leaf.tensor.grad
    return results


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value; NaN in both counts as equal."""
    one, other = actual.double(), expected.double()
    different = ~((one == other) | (one.isnan() & other.isnan()))
    if not different.any():
        return 0.0
    largest = other.nan_to_num(0, 0, 0).abs().max().item() or 1.0
    return ((one - other).abs()[different].nan_to_num(float("inf")).max() / largest).item()
