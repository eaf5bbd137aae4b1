"""``fastft.explain``: what the backend would make of a model, without compiling, training or changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fastft.rewriter.backend import first_line
from fastft.rewriter.compat import compile_once, record_breaks, value_of
from fastft.rewriter.graph import Snapshot
from fastft.rewriter.report import GraphReport, Report
from fastft.rewriter.rewrite import rewrite


def explain(model: Callable, /, *args: Any, **batch: Any) -> Report:
    """Report what fastft lifts in ``model(*args, **batch)``, what it nearly lifts and why not, and graph breaks.

    The model runs forward once, without keeping activations, in the mode (train or eval) that it is in; weights,
    buffers, gradients and the random state are afterwards as before.  A model on the meta device is enough, so that
    a model too large for this machine can be explained too.
    """
    report = Report()

    def capture(gm: GraphModule, example_inputs: list[Tensor]) -> Callable:
        original = Snapshot(gm)
        try:
            report.graphs.append(rewrite(gm))
        except Exception as error:
            cause = f"{type(error).__name__}: {first_line(error)}"
            report.graphs.append(GraphReport(failure=cause))
        original.restore()
        return _without_activations(gm)

    with _unchanged(model), record_breaks(report.breaks):
        compile_once(lambda *args, **batch: model(*args, **batch), capture)(*args, **batch)
    return report


def _without_activations(gm: GraphModule) -> Callable:
    """Run the graph without autograd, with outputs that need a gradient where they would have needed one."""
    outputs: Any = gm.graph.output_node().args[0]
    needs_grad = [isinstance(value := value_of(node), Tensor) and value.requires_grad for node in outputs]

    def run(*inputs: Any) -> tuple:
        with torch.no_grad():
            results = gm.forward(*inputs)
        return tuple(
            result.detach().requires_grad_() if needed else result
            for result, needed in zip(results, needs_grad, strict=True)
        )

    return run


@contextmanager
def _unchanged(model: Callable) -> Iterator[None]:
    """Put back buffers and the random state."""
    buffers = dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
    before = {name: (buffer._version, buffer.detach().clone()) for name, buffer in buffers.items()}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for name, (version, value) in before.items():
            if buffers[name]._version != version:
                with torch.no_grad():
                    buffers[name].copy_(value)
