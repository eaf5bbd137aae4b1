"""The backend: rewrite the graph, lower it, and fall back to the graph as it was if anything of ours fails."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fastft.compat import (
    bitsandbytes_substitutes,
    ddp,
    dynamo,
    expert_substitutes,
    fsdp,
    fsdp_tracing,
    hook_tracing,
    late_strings,
    layer_reuse,
    peft_substitutes,
    substitutions,
    transformers_substitutes,
    trl_substitutes,
)
from fastft.compat.fake_tensors import value_of
from fastft.errors import describe
from fastft.reasons import Declined
from fastft.rewriter.capture import ambient_autocast, dynamic_shapes, layer_calls
from fastft.rewriter.context import Context
from fastft.rewriter.fx.bodies import Snapshot
from fastft.rewriter.fx.metadata import path_in
from fastft.rewriter.loss.losses import Deferred
from fastft.rewriter.lowering import cache_dirs
from fastft.rewriter.lowering.inductor import compile_graph
from fastft.rewriter.lowering.lower import UnshardedError, WholeError, lower
from fastft.rewriter.lowering.plan_builder import should_plan
from fastft.rewriter.memory.planner import BudgetError
from fastft.rewriter.options import Options, OptionsError
from fastft.rewriter.passes import check_disabled, rewrite
from fastft.rewriter.projections import experts
from fastft.rewriter.report import repro_writer
from fastft.rewriter.report.advice import with_advice
from fastft.rewriter.report.data import GraphReport, RowsReport
from fastft.rewriter.report.history import Recording
from fastft.rewriter.report.pass_log import dump_folder
from fastft.rewriter.rows import live_rows
from fastft.rewriter.runtime import lazy_logits

log = logging.getLogger("fastft")
_warned: set[str] = set()


def fastft(
    gm: GraphModule,
    example_inputs: list[torch.Tensor],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Callable:
    """Compile one graph that torch.compile captured; found by the name "fastft".

    The first graph is for the sizes of the first batch; once a size changes, the second is for any batch and length.
    Only 0 and 1 are sizes that Dynamo compiles for apart, before it asks a backend.

    options: see Options.  Raises OptionsError for one that does not exist, and for any ``mode``.
    """
    if mode not in (None, "default"):
        raise OptionsError(f"fastft takes no mode; leave out mode={mode!r} and use options={{...}} instead.")
    parsed = Options.parse(options)
    check_disabled(parsed)
    ddp.leave_buffers_to_ddp()
    ddp.uncut(gm)
    if ddp.is_cut(gm) and layer_reuse.refuse():
        raise ddp.TraceAgain(restart_reason="fastft traces every layer, as torch cuts the graph between them")
    dynamic_shapes.watch(gm)
    gm, example_inputs, taking_tuples = layer_calls.take_apart(gm, example_inputs)
    cache_dirs.ensure_writable()
    recording = Recording(gm)
    if (folder := dump_folder(recording.place)) is not None:
        repro_writer.dump(gm, parsed, folder)
    modes = ambient_autocast.take_out(gm)
    with ambient_autocast.entered(modes):
        compiled, report = _compile(gm, example_inputs, parsed, folder)
    recording.end(report)
    log_report(report)
    return taking_tuples(ambient_autocast.called_within(modes, compiled))


class CutError(Exception):
    """A piece of a graph that torch cut and did not hand over whole: it is compiled as a piece, as torch expects it."""


def _compile(
    gm: GraphModule, example_inputs: list[Any], options: Options, folder: Path | None
) -> tuple[Callable, GraphReport]:
    """Compile a graph as fastft does, or, where anything of that fails, as the user wrote it."""
    original, roots = Snapshot(gm), fsdp_tracing.traced_roots()
    try:
        if ddp.is_cut(gm):
            raise CutError("torch cut it at the buckets of DistributedDataParallel (optimize_ddp)")
        try:
            plan = should_plan(gm, options)
            return _rewritten(gm, example_inputs, options, folder, plan=plan, inline=plan)
        except WholeError:  # the user's checkpoints are all that saves memory
            original.restore()
            return _rewritten(gm, example_inputs, options, folder, plan=plan, inline=False)
    except (BudgetError, dynamo.RestartAnalysis):  # the user's, and Dynamo's to trace again with a number it now knows
        raise
    except Exception as error:
        if roots and (isinstance(error, UnshardedError) or not options.strict):
            _leave_to_hooks(error)
        if options.strict:
            raise
        return _as_it_was(original, gm, example_inputs, options, error)


def _leave_to_hooks(error: Exception) -> None:
    """Have Dynamo trace again a model that FSDP2 has sharded, with FSDP2's hooks, which cut it into single layers."""
    reason = str(error) if isinstance(error, UnshardedError) else describe(error)
    message = f"fastft leaves a sharded model to FSDP2's hooks, layer by layer, because of {reason}"
    if isinstance(error, UnshardedError):
        log.info(message)
    else:
        warn_once(message)
    fsdp_tracing.trace_again(message)


def _as_it_was(
    original: Snapshot, gm: GraphModule, example_inputs: list[Any], options: Options, error: Exception
) -> tuple[Callable, GraphReport]:
    """Compile the user's own graph by Inductor, or run it as it is where Inductor fails too.

    The warning names a file that shows what failed, but of a graph that was cut, as what cut it is not in the graph.
    """
    original.restore()
    report = GraphReport(failure=describe(error))
    # Inductor may change the graph, so it is written down before.
    repro = repro_writer.text(gm, options, report.failure) if not isinstance(error, CutError) else ""
    try:
        compiled: Callable = compile_graph(gm, example_inputs, options)
        message = f"fastft left a graph as it was, because of {report.failure}"
    except dynamo.RestartAnalysis:
        raise
    except Exception as other:
        original.restore()
        compiled = gm.forward
        message = f"fastft runs a graph as it was and without Inductor, which failed with {describe(other)}"
    if message not in _warned:
        report.repro = repro
        warn_once(message, repro_writer.saved_as(repro))
    return compiled, report


def _rewritten(
    gm: GraphModule, example_inputs: list[Any], options: Options, folder: Path | None, *, plan: bool, inline: bool
) -> tuple[Callable, GraphReport]:
    """Rewrite and lower.

    folder: where the graph is written to after each pass.  inline: whether the plan is to decide about what the user
    checkpointed.
    """
    count = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    deferred: list[Deferred] = []
    report = rewrite(
        gm,
        options=options,
        deferred=deferred if options.lazy_logits else None,
        inline_checkpoints=inline,
        folder=folder,
    )
    gm, live = _live_rows(gm, options, report, [output.position for output in deferred])
    if live is not None:
        added = (live.max_seqlen, live.copies)
        example_inputs = [*example_inputs, *(value_of(node) for node in added if node is not None)]
    homes = fsdp_tracing.traced_homes(example_inputs)
    if homes and any(fsdp.is_sharded(value) and place not in homes for place, value in enumerate(example_inputs)):
        raise UnshardedError("a tensor is sharded otherwise than by FSDP2")
    taken = fsdp.complete(homes.values()) if fsdp_tracing.is_all_of_forward() else ()
    compiled = lower(
        gm, example_inputs, options, report, plan=plan, planned_only=bool(report.inlined), live=live, homes=homes,
        taken=taken,
    )  # fmt: skip
    return lazy_logits.restore(compiled, deferred, count, options.logits_bytes, report.reads), report


def _live_rows(
    gm: GraphModule, options: Options, report: GraphReport, deferred: Sequence[int]
) -> tuple[GraphModule, live_rows.LiveRows | None]:
    """Prepare a copy of a graph to leave out rows that nobody reads; or return it, and the report says why.

    A copy, as it gets an input of which Dynamo, whose graph it may be, knows nothing.
    """
    if options.skip_padding is False or live_rows.RULE in options.disable or not options.outline:
        return gm, None
    trains = torch.is_grad_enabled() and not dynamo.in_eval_mode()
    if not trains and deferred:  # an evaluation may read logits of padding too
        return gm, None
    report.rows = RowsReport()
    copy = dynamo.inherit_capture_metadata(GraphModule(gm, dynamo.copy_graph(gm.graph)), gm)
    original = Snapshot(copy)
    try:
        asked, share = options.skip_padding is True and trains, options.share_prefixes
        return copy, live_rows.prepare(copy, report, deferred, asked=asked, share=share)
    except Declined as declined:
        report.rows.reason = declined.reason
        if not trains:  # as of what only generates
            report.rows = None
    except dynamo.RestartAnalysis:
        raise
    except Exception as error:  # costs this alone
        if options.strict:
            raise
        original.restore()  # bodies, which both graphs call
        report.rows.reason = f"it could not be prepared: {describe(error)}"
        warn_once(f"fastft runs every row of a padded batch, because of {describe(error)}")
    return gm, None


def warn_once(message: str, more: str = "") -> None:
    """Warn, once a process for each message, whatever ``more`` there is to say about it."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message.rstrip(".") + more if more else message, RuntimeWarning, stacklevel=2)


def log_report(report: GraphReport) -> None:
    """Log what happened to a graph."""
    regions = f"{len(report.regions)} regions" if report.regions else "one piece"
    lifted, missed = len(report.lifted), len(report.near_misses)
    log.info("compiled in %s, %.1f s; %d lifted, %d near misses", regions, report.seconds, lifted, missed)
    if report.reason:
        log.info("compiled again: %s", report.reason)
    for miss in report.near_misses:
        log.info("%s not applied in %s (%s): %s", miss.rule, miss.module, miss.source, with_advice(miss.reason))


def _is_ours() -> bool:
    """Return whether the compilation that is under way is one of fastft's."""
    return getattr(dynamo.given_backend()[0], "traces_layers_once", False)


def _traces_layers_once() -> bool:
    """Return whether layers are traced once in this compilation: not if something is switched off in one of them."""
    options = Options.parse(dynamo.given_backend()[1].get("options"))
    return _is_ours() and not any("@" in name for name in options.disable)


def _is_on(rule: str, tx: Any) -> bool:
    """Return whether a rule that is applied while Dynamo traces may be applied in the module that it traces now."""
    try:
        options = Options.parse(dynamo.given_backend()[1].get("options"))
    except OptionsError:  # the backend complains about them
        return True
    made = experts.OPS if rule == experts.RULE else (rule,)
    return Context(options).refusal(rule, path_in(tx.nn_module_stack), *made) is None


fastft.traces_layers_once = True  # type: ignore[attr-defined]
layer_reuse.install(_traces_layers_once)
fsdp_tracing.install(_is_ours)
hook_tracing.install(
    _is_ours,
    {
        fsdp_tracing.is_sharded: fsdp_tracing.hooks_of_others,
        bitsandbytes_substitutes.has_parameter_in_4_bits: bitsandbytes_substitutes.hooks_of_others,
    },
)
late_strings.install(_is_ours)
substitutions.install(
    _is_ours,
    (
        *peft_substitutes.SUBSTITUTIONS,
        *transformers_substitutes.SUBSTITUTIONS,
        *bitsandbytes_substitutes.SUBSTITUTIONS,
        *expert_substitutes.SUBSTITUTIONS,
        *trl_substitutes.SUBSTITUTIONS,
    ),
    _is_on,
)
dynamo.break_early(_is_ours)
dynamo.before_sizes(lambda tensor, name: dynamic_shapes.expect_any_size(tensor, name) if _is_ours() else None)
