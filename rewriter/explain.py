"""``fastft.explain``: what the backend would make of a model, without compiling, training or changing it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fastft.compat import ddp, fsdp
from fastft.compat.dynamo import RestartAnalysis, compile_once
from fastft.compat.fake_tensors import value_of
from fastft.compat.fsdp_tracing import traced_homes
from fastft.errors import describe
from fastft.rewriter import backend  # noqa: F401  (it has Dynamo trace as it does for the backend)
from fastft.rewriter.capture import layer_calls
from fastft.rewriter.fx.bodies import Snapshot
from fastft.rewriter.lowering import cuda_graph_policy, plan_builder
from fastft.rewriter.lowering.region import RegionCompiler, by_kind
from fastft.rewriter.lowering.sharding import Sharding
from fastft.rewriter.memory import stages
from fastft.rewriter.options import Options
from fastft.rewriter.outline.partition import outline
from fastft.rewriter.passes import rewrite
from fastft.rewriter.report import repro_writer
from fastft.rewriter.report.data import GraphReport
from fastft.rewriter.report.graph_breaks import record_breaks
from fastft.rewriter.report.graph_listing import lines
from fastft.rewriter.report.report import Report
from fastft.rewriter.runtime.sharded import Sharded, units

log = logging.getLogger("fastft")
Planning = Callable[[GraphModule, Any, Sequence[Any]], Any]
PLANNED = Options(lower="eager", memory_budget="max-speed")  # a plan without a compiler


def explain(model: Callable, /, *args: Any, **batch: Any) -> Report:
    """Report what fastft lifts in ``model(*args, **batch)``, what it nearly lifts and why not, and graph breaks.

    The model runs forward once, without keeping activations, in the mode (train or eval) that it is in; buffers,
    gradients and the random state are afterwards as before (not: plain attributes that forward sets, nor inputs that
    it writes to).  A model on the meta device is enough, so that one too large for this machine can be explained too.
    A training step's memory is simulated, with every layer keeping what is fastest.
    If the model fails after some graphs, the report has those and the error; if before, the error is raised.
    """
    return explained(model, args, batch, _planned)


def explained(model: Callable, args: Sequence[Any], batch: Mapping[str, Any], planned: Planning) -> Report:
    """Explain a model as ``explain`` does.  planned: makes each graph's plan, of the graph, its pieces and inputs."""
    report = Report()

    def capture(gm: GraphModule, example_inputs: list[Tensor]) -> Callable:
        ddp.uncut(gm)
        gm, example_inputs, taking_tuples = layer_calls.take_apart(gm, example_inputs)
        original, repro = Snapshot(gm), repro_writer.text(gm)
        try:
            before = lines(gm)
            graph = rewrite(gm, deferred=[])
            graph.before, graph.after, graph.device = before, lines(gm), str(stages.device_of(gm))
            pieces = outline(gm, graph, always=bool(traced_homes(example_inputs)))
            graph.plan = planned(gm, pieces, example_inputs)
        except RestartAnalysis:  # Dynamo's, to trace again with a number it now knows
            raise
        except Exception as error:
            graph = GraphReport(failure=describe(error))
        graph.repro = repro
        report.graphs.append(graph)
        original.restore()
        return taking_tuples(_without_activations(gm, traced_homes(example_inputs)))

    capture.traces_layers_once = True  # type: ignore[attr-defined]
    with unchanged(model), record_breaks(report.breaks):
        try:
            compile_once(lambda *args, **batch: model(*args, **batch), capture)(*args, **batch)
        except Exception as error:
            if not report.graphs:
                raise
            report.stopped_by = describe(error)
    return report


def _planned(gm: GraphModule, pieces: Any, example_inputs: Sequence[Any]) -> Any:
    """Plan a training step's memory and describe the plan; None where nothing can be planned."""
    if not pieces or not torch.is_grad_enabled():
        return None
    given = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    try:
        regions = {key: RegionCompiler(gm, alike[0], given, PLANNED) for key, alike in by_kind(pieces).items()}
        homes = traced_homes(example_inputs)
        graphed = cuda_graph_policy.capturable(gm, pieces, PLANNED.cuda_graphs, sharded=bool(homes))
        sharding = Sharding(pieces, list(given), homes, regions).account if homes else None
        planned = plan_builder.plan_graph(gm, pieces, regions, PLANNED, graphed, lambda text: None, sharding=sharding)
    except Exception as error:
        log.info("no plan to explain: %s", describe(error))
        return None
    return planned.describe() if planned is not None else None


class _Grown(torch.autograd.Function):
    """A tensor as if it had been computed with gradients: no leaf, but nothing is saved for it."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, values: list[Tensor]) -> Tensor:
        return values[0].detach()  # in a list, or the result would count as a view of an input

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return None, None


def _without_activations(gm: GraphModule, homes: Mapping[int, fsdp.Home] | None = None) -> Callable:
    """Run the graph without autograd, with outputs that need a gradient where they would have needed one.

    homes: of inputs that are sharded; all are gathered for it.
    """
    outputs: Any = gm.graph.output_node().args[0]
    needs_grad = [isinstance(value := value_of(node), Tensor) and value.requires_grad for node in outputs]

    whole = gm.forward
    if homes:
        sharded = Sharded(units([list(homes)], [[]], homes))
        sharded.run = sharded.around(0, gm.forward)
        whole = sharded

    def run(*inputs: Any) -> tuple:
        with torch.no_grad():
            results = whole(*inputs)
        root = torch.empty(0, requires_grad=True)
        return tuple(
            _Grown.apply(root, [result]) if needed else result
            for result, needed in zip(results, needs_grad, strict=True)
        )

    return run


@contextmanager
def unchanged(model: Callable) -> Iterator[None]:
    """Put back buffers and the random state."""
    module = getattr(model, "__self__", model)  # model.forward is as good as model
    owners = list(module.modules()) if isinstance(module, nn.Module) else []
    before = [(owner, name, buffer) for owner in owners for name, buffer in owner.named_buffers(recurse=False)]
    values = [buffer.detach().clone() for _, _, buffer in before]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for (owner, name, buffer), value in zip(before, values, strict=True):
            setattr(owner, name, buffer)
            if not buffer.is_meta and not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)
