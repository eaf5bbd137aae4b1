"""The passes, in order, over a captured graph and the graphs nested in it."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fastft import patterns
from fastft.compat import operators
from fastft.compat.fake_tensors import value_of
from fastft.kernels import REGISTRY
from fastft.rewriter.attention import simplify
from fastft.rewriter.capture import (
    broadcast_vmap,
    constant_scalars,
    early_writes,
    functional_writes,
    hoist_indexed,
    inline_checkpoints,
)
from fastft.rewriter.context import Context
from fastft.rewriter.fx import autocast
from fastft.rewriter.fx.bodies import bodies, body_of, calls_of
from fastft.rewriter.fx.effects import transformed
from fastft.rewriter.fx.metadata import module_path, name_of, traced_in
from fastft.rewriter.loss import losses, token_statistics
from fastft.rewriter.loss.losses import Deferred
from fastft.rewriter.matching import apply
from fastft.rewriter.matching.rule import Rule
from fastft.rewriter.options import Options, OptionsError, nearest
from fastft.rewriter.projections import bnb4bit, experts, merge, siblings, weight_norm
from fastft.rewriter.report.data import GraphReport
from fastft.rewriter.report.pass_log import PassLog
from fastft.rewriter.rows import live_rows


@dataclass(frozen=True)
class Pass:
    """A step from graph to graph.

    run: rewrites a graph in place.  nested: whether it is run for the graph and each nested in it by itself, under the
    autocast that it runs under, but for those that are run under a torch.func transform.  required: what cannot be
    switched off, as others rely on it or as it tells what was done before.
    """

    name: str
    run: Callable[[GraphModule, Context], None]
    nested: bool = False
    required: bool = False


PASSES = (
    Pass("constant_scalars", lambda gm, context: constant_scalars.inline_constant_scalars(gm)),
    Pass("broadcast_vmap", lambda gm, context: broadcast_vmap.broadcast(gm)),
    Pass("inline_checkpoints", inline_checkpoints.inline, required=True),
    Pass("early_writes", lambda gm, context: early_writes.move(gm)),
    Pass("functional_writes", lambda gm, context: functional_writes.functionalize(gm), nested=True),
    Pass("hoist_indexed", lambda gm, context: hoist_indexed.hoist(gm)),
    Pass("weight_norm", weight_norm.lift, nested=True),
    Pass("bnb4bit", bnb4bit.lift, nested=True),
    Pass("experts", experts.note, nested=True, required=True),
    Pass("lift", apply.lift, nested=True),
    Pass("merge", merge.group, nested=True),
    Pass("fuse", apply.fuse, nested=True),
    Pass("attention", simplify.simplify),
    Pass("loss", losses.lift),
    Pass("token_statistics", token_statistics.lift),
)


def rewrite(
    gm: GraphModule,
    rules: Sequence[Rule] = patterns.LIFT,
    merging: Sequence[Rule] = patterns.FUSE,
    *,
    options: Options | None = None,
    deferred: list[Deferred] | None = None,
    inline_checkpoints: bool = False,
    folder: Path | None = None,
) -> GraphReport:
    """Rewrite ``gm`` and its bodies in place, pass by pass.  Raises what a pass raises.

    rules: what is lifted; merging: what is made of it.  deferred: outputs that the graph does not compute any more are
    added here; without it they all stay.  inline_checkpoints: see Context.  folder: where the graph is written to
    after each pass.
    """
    context = Context(options or Options(), GraphReport(), rules, merging, inline_checkpoints, deferred)
    report, log = context.report, PassLog(gm, folder)
    report.passes = log.records
    report.nodes_before = log.calls.total()
    for each in PASSES:
        if each.required or f"pass:{each.name}" not in context.options.disable:
            with log.observe(each.name):
                _run(each, gm, context)
    for body in bodies(gm):
        body.graph.lint()
        body.recompile()
        report.left.update(_computed(body))
    report.nodes_after = log.calls.total()
    _count_calls(gm, report)
    return report


def _count_calls(gm: GraphModule, report: GraphReport) -> None:
    """Report of each layer what was done to the one whose body it calls."""
    layers: dict[GraphModule, list[str]] = {}  # the modules of a body's calls
    for node in gm.graph.find_nodes(op="call_function", target=operators.LAYER_CALL):
        if (body := body_of(gm, node)) is not None:
            layers.setdefault(body, []).append(module_path(node))
    for body, modules in layers.items():
        found_in = traced_in(body.graph.nodes, modules)
        home = modules[0] if found_in is None else found_in
        inside = re.compile(rf"{re.escape(home)}(?=\.|$)")
        for _ in modules[1:]:
            report.left.update(_computed(body))
        lists: list[list[Any]] = [report.lifted, report.fused, report.masks, report.near_misses]
        for found in lists:
            found[:] = [
                replace(one, module=inside.sub(module, one.module))
                for one in found for module in (modules if inside.match(one.module) else (home,))
            ]  # fmt: skip
        report.inlined = [
            inside.sub(module, path)
            for path in report.inlined for module in (modules if inside.match(path) else (home,))
        ]  # fmt: skip


def _run(each: Pass, gm: GraphModule, context: Context) -> None:
    if not each.nested:
        each.run(gm, context)
        return
    done: set[int] = set()
    under_transforms = functools.cache(transformed)  # a model may have hundreds of bodies
    while body := next((body for body in bodies(gm) if id(body) not in done), None):  # what is lifted has no body left
        done.add(id(body))
        if not any(call in under_transforms(call.graph) for call in calls_of(gm, body)):
            with autocast.around(gm, body):
                each.run(body, context)


def rule_names() -> list[str]:
    """List the names of all that may be applied: the rules, and what passes of their own do."""
    own = (weight_norm.RULE, bnb4bit.RULE, experts.RULE, siblings.RULE, simplify.RULE, live_rows.RULE)
    return list(dict.fromkeys((*(rule.name for rule in patterns.RULES), *own, *losses.RULES, token_statistics.RULE)))


def check_disabled(options: Options) -> None:
    """Raise OptionsError for a name in ``options.disable`` that nothing has, which would be ignored in silence."""
    ops = {name.removeprefix("fastft::").removesuffix("_backward") for name in REGISTRY}
    valid = rule_names()
    valid += [f"pass:{each.name}" for each in PASSES if not each.required] + [f"op:{op}" for op in sorted(ops)]
    for name in options.disable:
        if name.partition("@")[0] not in valid:
            raise OptionsError(f"nothing to disable is called {name!r}; did you mean {nearest(name, valid)!r}?")


def _computed(gm: GraphModule) -> Counter[str]:
    """Count how often each function that computes a tensor occurs."""
    return Counter(
        name_of(node.target)
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method") and isinstance(value_of(node), Tensor)
    )
