"""How fast and how lean is a language model's head with its loss, forward and backward?  Milliseconds and MiB.

    python benchmarks/head.py --ignored 0,0.5 --json head.json
    python benchmarks/head.py --vocabularies 128256 --trainable --contenders fastft --chunk 64MiB,256MiB

Gradients are those of the mean loss, of the hidden states and with --trainable of the weight.  Contenders take turns,
launched from Python, for some wait for the device.  TFLOP/s count 2MHV for each of the two or three products, whatever
is done again or left out for ignored labels.  "GEMMs alone" are these by torch.mm, 1024 rows at a time, of those rows
that are not ignored.  "peak" is allocated beyond what was before; "transient" is that less the gradients themselves.

The numbers are like a language model's, for cut_cross_entropy leaves out what is small: token k has a share of about
k ** -1.3 of any prediction, labels are drawn by 1 / k, and the loss is about 1.5.  Errors are relative, by the norm,
beside float32.  A gradient's above three times eager's or 2% is marked ~; a contender off by 10% is not timed.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import arguments
import checkout
import report
import torch
import torch.nn.functional as F
from measure import machine
from rich.table import Table
from torch import Tensor

import fastft.kernels.linear_cross_entropy  # noqa: F401  (the op)
import kernels

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden, weight and labels
GEMMS = "GEMMs alone"
ERRORS = ("loss_error", "dhidden_error", "dweight_error")
IGNORED = -100
ROWS = 1024  # of logits at once, where this file multiplies
SLACK, ROUGH, WRONG = 3.0, 2e-2, 1e-1  # errors: times eager's; what is marked; what is not timed
POWER, STEADY = 1.3, 64.0  # how fast shares fall; the first of hidden's features, always the same, which gives them
MIB = 2**20


@dataclass(frozen=True)
class Head:
    """hidden [M, H] and weight [V, H]; labels int64 [M]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    @property
    def wanted(self) -> list[Tensor]:
        return [one for one in (self.hidden, self.weight) if one.requires_grad]

    def step(self, loss: Loss) -> list[Tensor]:
        """The loss and its gradients."""
        value = loss(self.hidden, self.weight, self.labels)
        return [value.detach(), *torch.autograd.grad(value, self.wanted)]


def build(vocabulary: int, ignored: float, options: argparse.Namespace) -> Head:
    """Random but for shares, and for what makes a label likely."""
    torch.manual_seed(0)
    M, H, dtype = options.tokens, options.hidden, getattr(torch, options.dtype)
    new = partial(torch.randn, device=options.device)
    fall = POWER * torch.arange(1.0, vocabulary + 1, device=options.device).log()
    weight = new(vocabulary, H, dtype=dtype).mul_(H**-0.5)  # logits vary by 1 beside their shares
    weight[:, 0] = 0.0
    labels = (vocabulary ** torch.rand(M, device=options.device)).long().clamp(1, vocabulary) - 1
    its = weight[labels].float()
    lift = torch.logsumexp(-fall, 0) + 0.5 + fall[labels] + 3.0 * new(M)  # to a probability of one half, or near it
    hidden = new(M, H).addcmul_((lift / its.square().sum(1)).unsqueeze(1), its)
    weight[:, 0], hidden[:, 0] = -fall / STEADY, STEADY
    labels[torch.randperm(M, device=options.device)[: round(ignored * M)]] = IGNORED
    return Head(hidden.to(dtype).requires_grad_(), weight.requires_grad_(options.trainable), labels)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=IGNORED)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int) -> Tensor:
    plain = (None, None, None, IGNORED, 0.0, 0.0, 1.0, 0.0)  # no bias and no adapter, a loss without options
    ahead = [True, weight.requires_grad, False, False, False]
    found = torch.ops.fastft.linear_cross_entropy(hidden, weight, labels, *plain, chunk_bytes, True, ahead)
    return found[0] / (labels != IGNORED).sum()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]


def cut(hidden: Tensor, weight: Tensor, labels: Tensor, exact: bool) -> Tensor:
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    named = hasattr(LinearCrossEntropyImpl, "CCE_EXACT")  # not in older versions
    how: Any = {} if not exact else {"impl": "cce_exact"} if named else {"filter_eps": None}
    return linear_cross_entropy(hidden, weight, labels, shift=False, **how)


def torchs_own(hidden: Tensor, weight: Tensor, labels: Tensor, chunked: bool) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise LookupError("not in this torch")
    how: Any = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    return F.linear_cross_entropy(hidden, weight, labels, **how)


compiled = cache(lambda: torch.compile(eager, dynamic=False))
CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "fastft": ours,
    "eager": eager,
    "inductor": lambda *given: compiled()(*given),
    "torch": partial(torchs_own, chunked=False),
    "torch chunked": partial(torchs_own, chunked=True),
    "liger": liger,
    "cce": partial(cut, exact=False),
    "cce exact": partial(cut, exact=True),
}


def chosen(options: argparse.Namespace) -> Iterator[tuple[Row, Loss]]:
    """The beginning of a row, and its loss; fastft once for each size of chunk."""
    for name in (one for one in options.contenders if one != GEMMS):
        for noted in [{"chunk_bytes": size} for size in options.chunk] if name == "fastft" else [{}]:
            yield {"contender": name, "status": "ok", **noted}, partial(CONTENDERS[name], **noted)


@torch.no_grad()
def reference(head: Head) -> list[Tensor]:
    """The loss and its gradients in float32, some rows at a time."""
    weight, count = head.weight.float(), (head.labels != IGNORED).sum()
    loss, dhidden, dweight = weight.new_zeros(()), [], torch.zeros_like(weight) if head.weight.requires_grad else None
    for hidden, labels in zip(head.hidden.float().split(ROWS), head.labels.split(ROWS), strict=True):
        used = (labels != IGNORED).float()
        grad, at = hidden @ weight.T, labels.clamp(min=0).unsqueeze(1)
        lse, target = grad.logsumexp(1, keepdim=True), grad.gather(1, at)
        loss += ((lse - target).squeeze(1) * used).sum() / count
        grad.sub_(lse).exp_().scatter_add_(1, at, grad.new_full(at.shape, -1.0)).mul_((used / count).unsqueeze(1))
        dhidden.append(grad @ weight)
        if dweight is not None:
            dweight.addmm_(grad.T, hidden)
    return [loss, torch.cat(dhidden), *([] if dweight is None else [dweight])]


def errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Of each result, by the norm."""
    off = [((mine.float() - other).norm() / other.norm()).item() for mine, other in zip(found, expected, strict=True)]
    return dict(zip(ERRORS, off, strict=False))


def judge(row: Row, found: Sequence[Tensor], expected: Sequence[Tensor], eagers: dict[str, float]) -> None:
    """Note errors and mark the row; raise if it is not to be timed."""
    off, rounding = errors(found, expected), torch.finfo(found[1].dtype).eps
    row |= {"loss": found[0].item(), "loss_difference": (found[0].float() - expected[0]).item(), **off}
    for name, value in off.items():
        if not value <= WRONG:
            raise AssertionError(f"{name} {value:.1e}")
        if name != ERRORS[0] and value > min(ROUGH, max(SLACK * eagers.get(name, ROUGH), rounding)):
            row["status"] = "rough"


def gemms(head: Head) -> Callable[[], None]:
    """The products, of the rows that are not ignored."""
    rows, weight = head.hidden.detach()[head.labels != IGNORED], head.weight.detach()
    logits, dhidden = rows.new_empty(min(ROWS, len(rows)), len(weight)), torch.empty_like(rows[:ROWS])
    dweight = torch.empty_like(weight) if head.weight.requires_grad else None

    def run() -> None:
        for hidden in rows.split(ROWS):
            chunk = logits[: len(hidden)]
            torch.mm(hidden, weight.T, out=chunk)
            torch.mm(chunk, weight, out=dhidden[: len(hidden)])
            if dweight is not None:
                torch.mm(chunk.T, hidden, out=dweight)

    return run


def ready(row: Row, head: Head, loss: Loss, expected: Sequence[Tensor], eagers: dict[str, float]) -> None:
    """Compile, judge, and see what a step allocates at most, where that can be seen."""
    judge(row, head.step(loss), expected, eagers)
    if head.hidden.device.type == "cuda":
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        head.step(loss)
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - before_bytes
        row["transient_bytes"] = row["peak_bytes"] - sum(one.numel() * one.element_size() for one in head.wanted)


def prepared(head: Head, options: argparse.Namespace) -> Iterator[tuple[Row, Callable[[], Any] | None]]:
    """A row for each contender, and what is timed if it is right."""
    if GEMMS in options.contenders:
        yield {"contender": GEMMS, "status": "ok"}, gemms(head)
    expected, eagers = reference(head), {}
    kernels.attempt(lambda: eagers.update(errors(head.step(eager), expected)))  # it may need more than there is
    for row, loss in chosen(options):
        why = kernels.attempt(ready, row, head, loss, expected, eagers)
        print(f"{len(head.weight)} {label(row)}: {why or 'ready'}", flush=True)
        if why:  # one contender must not cost the others their rows
            torch.cuda.empty_cache()
            row |= {"status": "failed", "error": why}
        yield row, None if why else partial(head.step, loss)


def measured(vocabulary: int, ignored: float, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each contender."""
    head = build(vocabulary, ignored, options)
    entries: list[tuple[Row, Any, list[float]]] = [(row, run, []) for row, run in prepared(head, options)]
    for _, run, seconds in [entry for entry in entries if entry[1]] * options.rounds:
        seconds.append(kernels.timed(run, options.device))
    counted = 2 * (1 + len(head.wanted)) * head.hidden.numel() * vocabulary
    for row, _, seconds in entries:
        if seconds:
            p20, p50, p80 = kernels.quantiles(seconds)
            row |= {"ms_p20": 1e3 * p20, "ms": 1e3 * p50, "ms_p80": 1e3 * p80, "tflops": counted / p50 / 1e12}
        yield {"vocabulary": vocabulary, "ignored": ignored, **row}


def label(row: Row) -> str:
    return row["contender"] + (f" {row['chunk_bytes'] // MIB} MiB" if "chunk_bytes" in row else "")


def table(rows: list[Row]) -> Table:
    off = [name for name in ERRORS[1:] if any(name in row for row in rows)]
    right = ("ms", "p20", "p80", "TFLOP/s", "GEMMs", "loss off", *(name.replace("_error", "") for name in off))
    shown = report.columns(("vocabulary", "ignored", "contender"), (*right, "transient", "peak MiB"))
    limits = {(row["vocabulary"], row["ignored"]): row["ms"] for row in rows if row["contender"] == GEMMS}
    for row in rows:
        limit = limits.get((row["vocabulary"], row["ignored"]))
        part = limit / row["ms"] if limit and "ms" in row else None
        figures = [report.figure(row.get(key), form=".2f") for key in ("ms", "ms_p20", "ms_p80")]
        figures += [report.figure(row.get("tflops"), form=".3g"), report.figure(part, form=".0%")]
        figures.append(report.figure(row.get("loss_difference"), form=".0e"))
        figures += [report.figure(row.get(name), form=".1e") for name in off]
        figures += [report.figure(row.get(f"{name}_bytes"), 1 / MIB, ",.0f") for name in ("transient", "peak")]
        mark = {"ok": "", "rough": " ~", "failed": " !"}[row["status"]]
        shown.add_row(str(row["vocabulary"]), f"{row['ignored']:g}", label(row) + mark, *figures)
    return shown


def size(text: str) -> int:
    return arguments.positive(text.removesuffix("MiB")) * MIB


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--hidden", type=arguments.positive, default=4096)
    add("--vocabularies", type=arguments.listed(arguments.positive), default=[128256, 256000])
    add("--tokens", type=arguments.positive, default=8192)
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--trainable", action="store_true", help="the head's weight gets a gradient too")
    add("--ignored", type=arguments.listed(float), default=[0.0], help="shares of ignored labels (default 0)")
    add("--chunk", type=arguments.listed(size), default=[256 * MIB], help="of fastft's logits (default 256MiB)")
    contenders = [GEMMS, *CONTENDERS]
    add("--contenders", type=arguments.listed(arguments.named("contender", contenders)), default=contenders)
    add("--device", default="cuda", help="cpu only tries this script out")
    add("--rounds", type=arguments.positive, default=15)
    add("--commit", default=checkout.commit(), help="recorded in the rows (default: from git)")
    add("--json", type=Path, help="write the rows here, after each vocabulary and share")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    options = parse(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("head.py needs a CUDA device; --device cpu only tries it out.")
    common = {**machine(options.device), "commit": options.commit, "date": datetime.date.today().isoformat()}
    common["versions"] |= {one.name: one.version for one in metadata.distributions(name="cut-cross-entropy")}
    common |= {name: getattr(options, name) for name in ("hidden", "tokens", "dtype", "trainable")}
    rows: list[Row] = []
    for vocabulary in options.vocabularies:
        for ignored in options.ignored:
            rows += [{**common, **row} for row in measured(vocabulary, ignored, options)]
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    kind = f"{options.dtype}, {'trained' if options.trainable else 'frozen'} head"
    report.present(f"{common['gpu'] or 'CPU'}, {options.tokens} x {options.hidden}, {kind}", table(rows), [])
    for line in dict.fromkeys(f"{label(row)}: {row['error']}" for row in rows if "error" in row):
        print(line[: report.WIDTH])


if __name__ == "__main__":
    main()
